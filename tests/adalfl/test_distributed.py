"""Learners of several processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from small_problems import equal, learner, mlp, values
from torch import Tensor, nn

from lossmeta.adalfl import choose_backend
from lossmeta.losses import LossNetwork

PROCESS = """
import os, sys, time, torch, torch.distributed as dist, torch.nn.functional as F
from torch import nn
from lossmeta.adalfl import OnlineLearner
from lossmeta.losses import LossNetwork

folder, rank = sys.argv[1], int(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
data = torch.load(f"{folder}/data.pt", weights_only=True)
model = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.Tanh(), nn.Linear(12, 3)).double()
loss = LossNetwork(8, dtype=torch.float64)
model.load_state_dict(data["model"])
loss.load_state_dict(data["loss"])
parallel = nn.parallel.DistributedDataParallel(model)
optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
learner = OnlineLearner(parallel, optimizer, loss, F.cross_entropy, backend="jvp", min_slope=data["min_slope"])
skipped, ratios = [], []
for i, pair in enumerate(data["pairs"]):
    if i and data["next_min_slope"]:
        learner.min_slope = data["next_min_slope"]
    report = learner.step(*((x[rank::2], y[rank::2]) for x, y in pair))
    skipped.append(report.skipped)
    ratios.append(report.slope_ratio)
torch.save([skipped, ratios, *model.state_dict().values(), *loss.state_dict().values()], f"{folder}/{rank}.pt")
# Gloo's threads sometimes abort a process that ends in the usual way: leave at once, when both have their results.
open(f"{folder}/{rank}.done", "w").close()
while not os.path.exists(f"{folder}/{1 - rank}.done"):
    time.sleep(0.01)
os._exit(0)
"""


def in_two_processes(
    folder: Path,
    model: nn.Module,
    loss: nn.Module,
    pairs: Any,
    min_slope: float | None = None,
    next_min_slope: float | None = None,
) -> list[Any]:
    """What each process has skipped, its slope ratios, and the weights of its model and loss."""
    data = {"model": model.state_dict(), "loss": loss.state_dict(), "pairs": pairs}
    folder.mkdir(exist_ok=True)
    torch.save({**data, "min_slope": min_slope, "next_min_slope": next_min_slope}, folder / "data.pt")
    command = [sys.executable, "-c", PROCESS, str(folder)]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo"}
    processes = [
        subprocess.Popen([*command, str(rank)], env=environment, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    try:
        errors = [p.communicate(timeout=200)[1] for p in processes]
    finally:
        for p in processes:
            p.kill()
    assert [p.returncode for p in processes] == [0, 0], "\n".join(errors)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def test_a_distributed_model_needs_a_backend_that_averages(monkeypatch: pytest.MonkeyPatch) -> None:
    class Parallel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = mlp()
            self.process_group = None

    monkeypatch.setattr(sys.modules["lossmeta.adalfl.trained_model"], "DistributedDataParallel", Parallel)
    with pytest.raises(ValueError, match="backend must be 'jvp' or 'finite_difference' for a Distributed"):
        learner(model=Parallel(), backend="double_backward")
    assert choose_backend(Parallel()) == (
        "finite_difference",
        "the model is wrapped in DistributedDataParallel",
    )


def pairs_of_eight(count: int) -> list[list[tuple[Tensor, Tensor]]]:
    return [
        [(torch.randn(8, 1, 8, 8, dtype=torch.float64), torch.randint(3, (8,))) for _ in range(2)]
        for _ in range(count)
    ]


def test_distributed_processes_do_what_one_does(tmp_path: Path) -> None:
    pairs = pairs_of_eight(3)
    model, loss = mlp(), LossNetwork(8, dtype=torch.float64)
    results = in_two_processes(tmp_path, model, loss, pairs)
    one = learner(loss, model, backend="jvp")
    for pair in pairs:
        one.step(*pair)
    for _, _, *result in results:
        for a, b in zip(result, (*values(model), *values(loss)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_distributed_processes_undo_together(tmp_path: Path) -> None:
    pairs = pairs_of_eight(3)
    model, loss = mlp(), LossNetwork(8, dtype=torch.float64)
    # The ratios differ between the processes; a bound between them and above their mean is one that one alone passes.
    (_, a, *_), (_, b, *_) = in_two_processes(tmp_path / "a", model, loss, pairs, min_slope=1e-9)
    assert a[1] != b[1]
    bound = float(0.3 * min(a[1], b[1]) + 0.7 * max(a[1], b[1]))
    (skipped, _, *first), (other, _, *second) = in_two_processes(
        tmp_path / "b", model, loss, pairs, 1e-9, bound
    )
    assert skipped == other
    assert skipped[0] is None
    assert "the last update is undone" in skipped[1]
    assert equal(first, second)
