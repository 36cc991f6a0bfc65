"""A net of skorch whose criterion is learned while it trains: digits, of which four in ten have a wrong label.

pip install "lossmeta[integrations]", then python examples/skorch_online_loss.py
"""

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.metrics import accuracy_score
from torch import nn

from lossmeta.integrations.skorch import OnlineClassifier

torch.manual_seed(0)
random = np.random.default_rng(0)
x, y = load_digits(return_X_y=True)
x = (x / 16).astype("float32")
order = random.permutation(len(x))
train, valid = order[:1200], order[1200:]
noisy = np.where(random.random(1200) < 0.4, random.integers(10, size=1200), y[train])

net = OnlineClassifier(
    nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)),
    criterion__residual="cross_entropy",
    criterion__normalize_slope=True,
    meta_lr=1e-3,
    optimizer=torch.optim.SGD,
    optimizer__momentum=0.9,
    lr=0.1,
    batch_size=64,
    max_epochs=10,
    train_split=None,
    iterator_train__shuffle=True,
)
net.fit(x[train], noisy)
print(f"accuracy after {net.learner_.steps} steps: {accuracy_score(y[valid], net.predict(x[valid])):.3f}")
