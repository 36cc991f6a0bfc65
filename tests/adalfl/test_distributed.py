"""Learners of several processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import two_processes
from small_problems import equal, learner, mlp, values
from torch import Tensor, nn

from lossmeta.losses import LossNetwork

PROCESS = """
import torch.nn.functional as F
from torch import nn
from lossmeta.adalfl import OnlineLearner
from lossmeta.losses import LossNetwork

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
"""


LOSSES = """
import warnings, torch.nn.functional as F
from torch import nn
from lossmeta.adalfl import BackendError, OnlineLearner
from lossmeta.losses import LossNetwork

story = arguments[0]
torch.manual_seed(rank)  # the losses differ, and so do the batches
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.act, self.last = nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 3)
    def forward(self, x):
        h = self.act(self.first(x.flatten(1)))
        if story == "wrong on one" and rank == 1:
            h = h + (h.round() - h).detach() * 3
        return self.last(h)
model = Model()
parallel = nn.parallel.DistributedDataParallel(model)
loss = LossNetwork(8)
loss.register_buffer("mark", torch.tensor(float(rank)))
meta = torch.optim.Adam(loss.parameters(), 1e-2)
if story == "state" and rank == 0:
    for p in loss.parameters():
        p.grad = torch.ones_like(p)
    meta.step()
learner = OnlineLearner(parallel, torch.optim.SGD(model.parameters(), 0.1), loss, F.cross_entropy, meta_optimizer=meta)
raised = ""
try:
    for step in range(3):
        if story == "alone" and step == 2 and rank == 1:
            with torch.no_grad():
                next(loss.parameters())[0, 0] += 1e-6
            learner._check_replicas_at = 2
        if story == "alone" and step == 2:
            learner._check_replicas_at = 2
        if story == "lost" and step == 1 and rank == 1:
            open(f"{folder}/1.done", "w").close()
            os._exit(0)
        before = [t.clone() for t in (*model.state_dict().values(), *loss.state_dict().values())]
        batches = [(torch.randn(8, 1, 8, 8), torch.randint(3, (8,))) for _ in range(3)]
        learner.step(batches[:2] if story == "several" else batches[0], batches[2])
except Exception as error:
    raised = f"{type(error).__name__}: {error}"
    after = (*model.state_dict().values(), *loss.state_dict().values())
    assert all(map(torch.equal, before, after)), "the step was not undone"
    assert learner.steps == step
state = [v for s in meta.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
torch.save([raised, *model.state_dict().values(), *loss.state_dict().values(), *state], f"{folder}/{rank}.pt")
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
    two_processes.run(PROCESS, folder)
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


@pytest.mark.parametrize("story", ["seeds", "state", "several"])
def test_losses_of_different_seeds_start_as_the_first_ones(tmp_path: Path, story: str) -> None:
    two_processes.run(LOSSES, tmp_path, story)
    (one, *first), (other, *second) = (
        torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)
    )
    assert one == other == ""
    assert len(first) == len(second) > 10
    assert equal(first, second)


def test_a_loss_that_one_process_changed_alone_is_an_error_in_all(tmp_path: Path) -> None:
    two_processes.run(LOSSES, tmp_path, "alone")
    for rank in range(2):
        raised, *_ = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert "must be the same in all processes, got different ones" in raised


def test_a_meta_gradient_that_is_wrong_in_one_process_is_an_error_in_all(tmp_path: Path) -> None:
    two_processes.run(LOSSES, tmp_path, "wrong on one")
    raised = [torch.load(tmp_path / f"{rank}.pt", weights_only=True)[0] for rank in range(2)]
    assert raised[0].startswith(
        "BackendError: AdaLFL: no back-end is right for this model: on another process"
    )
    assert raised[1].startswith(
        "BackendError: AdaLFL: no back-end is right for this model: the derivative of"
    )


def test_a_process_that_is_lost_leaves_the_other_as_before(tmp_path: Path) -> None:
    two_processes.run(LOSSES, tmp_path, "lost")
    raised, *_ = torch.load(tmp_path / "0.pt", weights_only=True)
    assert raised.startswith(("RuntimeError", "DistBackendError"))


def test_sharded_models_are_refused() -> None:
    class FullyShardedDataParallel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp()

    with pytest.raises(ValueError, match=r"must have whole parameters, .* DistributedDataParallel instead"):
        learner(model=FullyShardedDataParallel())


SHARDED = """
import os, sys, torch, torch.distributed as dist, torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import fully_shard
from lossmeta.adalfl import OnlineLearner
from lossmeta.losses import LossNetwork

dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}/store", rank=0, world_size=1)
model = nn.Linear(4, 3)
fully_shard(model, mesh=dist.device_mesh.init_device_mesh("cpu", (1,)))
try:
    OnlineLearner(model, torch.optim.SGD(model.parameters(), 0.1), LossNetwork(), F.cross_entropy)
except ValueError as error:
    assert "must have whole parameters, got one whose parameters are sharded" in str(error), error
    os._exit(0)
os._exit(1)
"""


def test_fully_shard_is_refused(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SHARDED, str(tmp_path)]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr


CLEAN = """
from torch import nn
from lossmeta.adalfl import CleanLearner

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3))
parallel = nn.parallel.DistributedDataParallel(model)
clean = torch.randn(30, 6), torch.arange(30) % 3
learner = CleanLearner(parallel, torch.optim.SGD(model.parameters(), 0.05, momentum=0.9), clean, batch_size=8)
torch.manual_seed(rank)
for _ in range(6):
    learner.step((torch.randn(16, 6), torch.randint(3, (16,))))
learner.finish()
mine = learner.relabelling.transition, learner.relabelling._generator.get_state()
torch.save([*mine, *model.state_dict().values(), *learner.loss.state_dict().values()], f"{folder}/{rank}.pt")
"""


def test_clean_learners_stay_alike_and_draw_on_their_own(tmp_path: Path) -> None:
    two_processes.run(CLEAN, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert equal(first[2:], second[2:])
    assert all(value.isfinite().all() for value in first[2:])
    assert not torch.equal(first[0], second[0]) and not torch.equal(first[1], second[1])
