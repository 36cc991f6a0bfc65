"""TuneLoss in a study of Optuna, which any number of machines may share: two penalties of a logistic regression.

pip install "lossmeta[integrations]", then python examples/optuna_shared_study.py [journal.log on a shared disk]
"""

import sys

import optuna
import torch
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from sklearn.datasets import load_digits
from torch import nn

from lossmeta.integrations.optuna import TuneLossSampler, report
from lossmeta.tuneloss import SquaredL2, TunedLoss, UniformLabelLoss, measure

x, y = (torch.tensor(part) for part in load_digits(return_X_y=True))
x = x.float() / 4
order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
train, valid = [(x[rows], y[rows]) for rows in order[:400].split(200)]

loss = TunedLoss(nn.functional.cross_entropy, {"l2": SquaredL2(), "uniform": UniformLabelLoss()})
sampler = TuneLossSampler({"l2": (1e-4, 1.0), "uniform": (0.0, 0.1)})


def objective(trial: optuna.Trial) -> float:
    values = sampler.suggest(trial)
    loss.set(values)
    torch.manual_seed(0)
    model = nn.Linear(64, 10)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=300, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        value = loss(model, *train)
        value.backward()
        return value

    optimizer.step(closure)
    return report(trial, measure(model, loss, values, train, valid))


storage = JournalStorage(JournalFileBackend(sys.argv[1])) if len(sys.argv) > 1 else None
study = optuna.create_study(study_name="digits", storage=storage, sampler=sampler, load_if_exists=True)
study.optimize(objective, n_trials=4)
print(f"first {study.trials[0].value:.3f}, best of {len(study.trials)}: {study.best_value:.3f} nats")
