"""Children that several processes share are those of one process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lossmeta.ala._ranks import Ranks

STORY = """
import os, sys, time, warnings, torch, torch.distributed as dist
from torch import nn
from torch.optim import SGD, Adam
from lossmeta.ala import LogitAdjustment, Population, Robust

warnings.filterwarnings("ignore", "Population: all children")
folder, rank, size, kind = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
group = None
if size > 1:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store{size}", rank=rank, world_size=size)
    group = dist.group.WORLD


def batch(seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(16, 4, generator=generator, dtype=torch.float64)
    return x, (x[:, 0] > 0).long() + (x[:, 1] > 0.5).long()


def metric(prediction, target):
    return torch.log_softmax(prediction, 1).gather(1, target[:, None]).mean()


torch.manual_seed(rank)  # the first process' weights hold
model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)).double()
if kind == "in turn":
    model[2].forward = lambda x: x.clamp_min(0) if float(x.detach().sum()) > -1e9 else x
optimizer = Adam(model.parameters(), 0.01) if kind == "Adam" else SGD(model.parameters(), 0.1, momentum=0.9)
space = LogitAdjustment(torch.tensor([5, 3, 1])) * Robust()
options = {"process_group": group} if group else {}
population = Population(model, optimizer, space, metric, batch(99), window=4, children=4, **options)
fitness = []
if kind == "other seeds":
    try:
        Population(model, optimizer, space, metric, batch(99), children=4, seed=rank, **options)
    except ValueError as error:
        assert "must be the same in all processes, got [[4, 20, 0, 1], [4, 20, 1, 1]]" in str(error), error
    else:
        assert size == 1
if kind == "other batches":
    before = [p.detach().clone() for p in model.parameters()]
    try:
        for i in range(4):
            population.step(batch(50 + i + rank))
    except ValueError as error:
        assert "must step with the same batches" in str(error), error
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
    else:
        assert size == 1
    os._exit(0) if size > 1 else None
for i in range(14):
    if i == 6 and kind == "killed":
        state = population.state_dict()
        population.step(batch(1234))
        population.load_state_dict(state)
    report = population.step(batch(i))
    if report.fitness is not None:
        fitness.append(report.fitness)
population.settle()
for i in range(2):
    population.step(batch(100 + i))
state = [torch.stack(fitness), population.mean, *model.state_dict().values()]
state += [v for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
torch.save(state, f"{folder}/{size}-{rank}.pt")
# Gloo's threads sometimes abort a process that ends in the usual way: leave at once, when all have their results.
open(f"{folder}/{size}-{rank}.done", "w").close()
while not all(os.path.exists(f"{folder}/{size}-{r}.done") for r in range(size)):
    time.sleep(0.01)
os._exit(0)
"""


def start(folder: Path, rank: int, size: int, kind: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", STORY, str(folder), str(rank), str(size), kind]
    return subprocess.Popen(command, stderr=subprocess.PIPE)


def run(folder: Path, size: int, kind: str) -> list[list[Tensor]]:
    processes = [start(folder, rank, size, kind) for rank in range(size)]
    for p in processes:
        _, error = p.communicate(timeout=300)
        assert p.returncode == 0, error.decode()
    return [torch.load(folder / f"{size}-{rank}.pt", weights_only=True) for rank in range(size)]


@pytest.mark.skipif(not dist.is_available(), reason="torch was built without distributed")
def test_other_batches_are_refused(tmp_path: Path) -> None:
    """In both processes, which look at what they refuse."""
    started = [start(tmp_path, rank, 2, "other batches") for rank in range(2)]
    for p in started:
        _, error = p.communicate(timeout=300)
        assert p.returncode == 0, error.decode()


@pytest.mark.skipif(not dist.is_available(), reason="torch was built without distributed")
@pytest.mark.parametrize("kind", ["SGD", "Adam", "in turn", "killed", "other seeds"])
def test_two_processes_are_one(kind: str, tmp_path: Path) -> None:
    (alone,) = run(tmp_path, 1, kind)
    first, second = run(tmp_path, 2, kind)
    for a, b, c in zip(alone, first, second, strict=True):
        assert torch.equal(b, c)
        torch.testing.assert_close(a, b)
    assert alone[0].shape == (3, 4)


def test_shares() -> None:
    with pytest.raises(ValueError, match="multiple of the 3 processes, got 8"):
        of(3, 0, 8)
    ranks = of(4, 2, 8)
    assert ranks.own(torch.arange(8)).tolist() == [4, 5]
    alone = Ranks(None, 8)
    t: Any = torch.arange(8.0)
    assert alone.own(t) is not None and torch.equal(alone.own(t), t)
    assert torch.equal(alone.gathered(t), t) and torch.equal(alone.total(t), t)
    assert alone.of_child(t, 3) == 3


def of(size: int, rank: int, children: int) -> Ranks:
    """As in a group of that size."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "get_world_size", lambda group: size)
        patch.setattr(dist, "get_rank", lambda group: rank)
        return Ranks(object(), children)  # type: ignore[arg-type]
