"""Metrics of lossmeta beside those of torchmetrics in one collection, and a metric of torchmetrics as one of lossmeta.

pip install "lossmeta[integrations]", then python examples/torchmetrics_metrics.py
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from lossmeta.integrations.torchmetrics import as_torchmetrics, from_torchmetrics
from lossmeta.metrics import AveragePrecision, ErrorRate

torch.manual_seed(0)
images, labels = load_digits(return_X_y=True)
x, y = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
train, valid = torch.randperm(len(x)).split([1200, len(x) - 1200])

model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
for _ in range(5):
    for batch in train[torch.randperm(len(train))].split(64):
        optimizer.zero_grad()
        F.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()

metrics = MetricCollection(
    {
        "error": as_torchmetrics(ErrorRate()),
        "average precision": as_torchmetrics(AveragePrecision()),
        "accuracy": MulticlassAccuracy(10, average="micro"),
    }
)
f1 = from_torchmetrics(MulticlassF1Score(10, average="macro"))  # as a controller of lossmeta takes it
with torch.no_grad():
    for batch in valid.split(128):
        probabilities = model(x[batch]).softmax(1)
        metrics.update(probabilities, y[batch])
        f1.update(probabilities, y[batch])
for name, value in {**metrics.compute(), "F1": f1.compute()}.items():
    print(f"{name}: {value.item():.4f}")
