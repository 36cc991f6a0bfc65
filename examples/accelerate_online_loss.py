"""A loop with accelerate whose loss is learned: digits, of which four in ten have a wrong label.

pip install "lossmeta[integrations]", then accelerate launch examples/accelerate_online_loss.py, or with python
"""

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lossmeta.integrations.accelerate import prepare_learner
from lossmeta.losses import LossNetwork

set_seed(0)
accelerator = Accelerator(cpu=True)
images, labels = load_digits(return_X_y=True)
x, y = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
train, valid = torch.randperm(len(x)).split([1200, len(x) - 1200])
wrong = torch.rand(1200) < 0.4
noisy = torch.where(wrong, torch.randint(10, (1200,)), y[train])

model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 190)
batches = DataLoader(TensorDataset(x[train], noisy), batch_size=64, shuffle=True)
model, optimizer, batches, schedule = accelerator.prepare(model, optimizer, batches, schedule)

loss = LossNetwork(residual="cross_entropy", normalize_slope=True)
learner = prepare_learner(
    accelerator,
    model,
    optimizer,
    loss,
    F.cross_entropy,
    meta_optimizer=torch.optim.Adam(loss.parameters(), lr=1e-3),
)
for _ in range(10):
    for batch in batches:
        learner.step(tuple(batch))
        schedule.step()

with torch.no_grad():
    right = (model(x[valid].to(accelerator.device)).argmax(1).cpu() == y[valid]).float().mean().item()
accelerator.print(f"accuracy after {learner.steps} steps: {right:.3f}")
