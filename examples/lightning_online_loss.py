"""A Lightning module whose loss is learned while it trains: digits, of which four in ten have a wrong label.

pip install "lossmeta[integrations]", then python examples/lightning_online_loss.py
"""

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lossmeta.adalfl import OnlineLearner
from lossmeta.integrations.lightning import OnlineModule
from lossmeta.losses import LossNetwork


class Digits(OnlineModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        self.loss = LossNetwork(residual="cross_entropy", normalize_slope=True)

    def configure_optimizers(self):
        return torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)

    def configure_learner(self, optimizer):
        meta = torch.optim.Adam(self.loss.parameters(), lr=1e-3)
        return OnlineLearner(self.model, optimizer, self.loss, F.cross_entropy, meta_optimizer=meta)

    def validation_step(self, batch, _):
        x, y = batch
        self.log("accuracy", (self.model(x).argmax(1) == y).float().mean())


pl.seed_everything(0)
images, labels = load_digits(return_X_y=True)
x, y = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
train, valid = torch.randperm(len(x)).split([1200, len(x) - 1200])
wrong = torch.rand(1200) < 0.4
noisy = torch.where(wrong, torch.randint(10, (1200,)), y[train])

trainer = pl.Trainer(max_epochs=10, accelerator="cpu", logger=False, enable_checkpointing=False)
batches = DataLoader(TensorDataset(x[train], noisy), batch_size=64, shuffle=True)
trainer.fit(Digits(), batches, DataLoader(TensorDataset(x[valid], y[valid]), batch_size=len(valid)))
print(f"accuracy after {trainer.global_step} steps: {trainer.callback_metrics['accuracy'].item():.3f}")
