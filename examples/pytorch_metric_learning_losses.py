"""A loss of lossmeta in the place of a triplet loss: with a miner and a cross-batch memory of pytorch-metric-learning.

pip install "lossmeta[integrations]", then python examples/pytorch_metric_learning_losses.py
"""

import torch
import torch.nn.functional as F
from pytorch_metric_learning.miners import MultiSimilarityMiner
from sklearn.datasets import load_digits
from torch import Tensor, nn

from lossmeta.integrations.pytorch_metric_learning import CrossBatchMemory
from lossmeta.losses import FocalWeightedLoss

torch.manual_seed(0)
images, labels = load_digits(return_X_y=True)
x, y = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
train, test = torch.randperm(len(x)).split([1200, len(x) - 1200])


def precision_at_1() -> float:
    """How often the nearest other sample has the same label."""
    with torch.no_grad():
        embedded = embed(x[test])
    distances = torch.cdist(embedded, embedded).fill_diagonal_(torch.inf)
    return (y[test][distances.argmin(1)] == y[test]).double().mean().item()


def embed(batch: Tensor) -> Tensor:
    return F.normalize(model(batch))  # the loss takes Euclidean distances of embeddings as they come


model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
# Was: losses.CrossBatchMemory(losses.TripletMarginLoss(), ...)
criterion = CrossBatchMemory(
    FocalWeightedLoss(), embedding_size=8, memory_size=256, miner=MultiSimilarityMiner()
)
before = precision_at_1()
for _ in range(10):
    for batch in train[torch.randperm(len(train))].split(64):
        optimizer.zero_grad()
        criterion(embed(x[batch]), y[batch]).backward()
        optimizer.step()
print(f"precision at 1: {before:.3f} before training, {precision_at_1():.3f} after")
