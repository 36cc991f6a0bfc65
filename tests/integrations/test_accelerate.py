"""Learned losses beside accelerate."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD, Adam, AdamW
from torch.optim.lr_scheduler import LambdaLR

accelerate = pytest.importorskip("accelerate", reason="needs accelerate")

from accelerate.state import AcceleratorState, PartialState  # noqa: E402
from accelerate.utils import DistributedType  # noqa: E402

from lossmeta.adalfl import OnlineLearner  # noqa: E402
from lossmeta.integrations.accelerate import prepare_learner  # noqa: E402
from lossmeta.losses import LossNetwork  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:AdaLFL. the first step")


class Counting(SGD):
    """Counts its calls in its group, as some of timm do."""

    def step(self, closure: Any = None) -> None:
        if closure is not None:
            closure()
        for group in self.param_groups:
            group["calls"] = group.get("calls", 0) + 1
            for p in group["params"]:
                if p.grad is not None:
                    p.data.sub_(p.grad, alpha=group["lr"] / group["calls"])


OPTIMIZERS = {
    "counting": lambda p: Counting(p, 0.1),
    "sgd": lambda p: SGD(p, 0.1, momentum=0.9, weight_decay=1e-2),
    "adamw": lambda p: AdamW(p, 1e-2, weight_decay=1e-2),
}


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    """The state of an accelerator is the process's."""
    yield
    _fresh_state()


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3))


def network() -> LossNetwork:
    torch.manual_seed(1)
    return LossNetwork(8, residual="cross_entropy")


def batches() -> list[Any]:
    generator = torch.Generator().manual_seed(2)
    return [
        (torch.randn(8, 8, generator=generator), torch.randint(3, (8,), generator=generator))
        for _ in range(8)
    ]


def prepared(kind: str = "sgd", **options: Any) -> Any:
    accelerator = accelerate.Accelerator(cpu=True, **options)
    made = model()
    optimizer = OPTIMIZERS[kind](made.parameters())
    schedule = LambdaLR(optimizer, lambda step: 1 / (1 + step))
    return accelerator, *accelerator.prepare(made, optimizer, schedule)


def learner(accelerator: Any, made: Any, optimizer: Any, **options: Any) -> OnlineLearner:
    loss = network()
    meta = Adam(loss.parameters(), 1e-3)
    return prepare_learner(
        accelerator, made, optimizer, loss, F.cross_entropy, meta_optimizer=meta, **options
    )


def by_hand(kind: str = "sgd") -> tuple[nn.Module, OnlineLearner]:
    made, loss = model(), network()
    optimizer = OPTIMIZERS[kind](made.parameters())
    schedule = LambdaLR(optimizer, lambda step: 1 / (1 + step))
    meta = Adam(loss.parameters(), 1e-3)
    one = OnlineLearner(made, optimizer, loss, F.cross_entropy, meta_optimizer=meta)
    for batch in batches():
        one.step(batch)
        schedule.step()
    return made, one


def equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_trains_as_a_loop_does(kind: str) -> None:
    accelerator, made, optimizer, schedule = prepared(kind)
    one = learner(accelerator, made, optimizer)
    for batch in batches():
        one.step(batch)
        schedule.step()
    expected, theirs = by_hand(kind)
    assert equal(made, expected)
    assert equal(one.loss, theirs.loss)
    assert not equal(made, model())


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_saved_state_goes_on_in_the_same_bits(kind: str, tmp_path: Path) -> None:
    accelerator, made, optimizer, schedule = prepared(kind)
    one = learner(accelerator, made, optimizer)
    for batch in batches()[:4]:
        one.step(batch)
        schedule.step()
    accelerator.save_state(str(tmp_path))
    _fresh_state()
    accelerator, made, optimizer, schedule = prepared(kind)
    with torch.no_grad():
        for p in made.parameters():
            p.zero_()
    one = learner(accelerator, made, optimizer)
    accelerator.load_state(str(tmp_path))
    assert one.steps == 4
    for batch in batches()[4:]:
        one.step(batch)
        schedule.step()
    expected, theirs = by_hand(kind)
    assert equal(made, expected)
    assert equal(one.loss, theirs.loss)


def _fresh_state() -> None:
    for state in (AcceleratorState, PartialState):
        state._reset_state()


def test_bfloat16() -> None:
    accelerator, made, optimizer, _ = prepared(mixed_precision="bf16")
    one = learner(accelerator, made, optimizer, backend="jvp")
    reports = [one.step(batch) for batch in batches()]
    assert all(r.skipped is None and r.loss.isfinite() for r in reports)


def test_refuses_what_cannot_be_right() -> None:
    accelerator, made, optimizer, _ = prepared()
    with pytest.raises(
        TypeError, match=r"what accelerator\.prepare\(model, optimizer\) returned, got the optimizer SGD"
    ):
        learner(accelerator, made, optimizer.optimizer)
    with pytest.raises(ValueError, match="loss must have parameters to learn"):
        prepare_learner(accelerator, made, optimizer, nn.CrossEntropyLoss(), F.cross_entropy)
    for changed, message in (
        ({"mixed_precision": "fp16"}, "mixed_precision must be 'no' or 'bf16'.*got 'fp16'"),
        ({"mixed_precision": "fp8"}, "got 'fp8'"),
        ({"distributed_type": DistributedType.FSDP}, "DistributedDataParallel, got FSDP"),
        ({"distributed_type": DistributedType.DEEPSPEED}, "got DEEPSPEED"),
        ({"distributed_type": DistributedType.MEGATRON_LM}, "got MEGATRON_LM"),
        ({"gradient_accumulation_steps": 2}, r"must be 1, got 2; call learner\.step with a list"),
    ):
        like = SimpleNamespace(
            mixed_precision="no",
            distributed_type=DistributedType.NO,
            gradient_accumulation_steps=1,
            device=torch.device("cpu"),
        )
        vars(like).update(changed)
        with pytest.raises(ValueError, match=message):
            learner(like, made, optimizer)


def _in_two_processes(folder: str) -> None:
    accelerator = accelerate.Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    made, rank = model(), accelerator.process_index
    optimizer = SGD(made.parameters(), 0.1)
    made, optimizer = accelerator.prepare(made, optimizer)
    torch.manual_seed(rank)  # losses that differ at first
    loss = LossNetwork(8, residual="cross_entropy")
    meta = Adam(loss.parameters(), 1e-3)
    one = prepare_learner(accelerator, made, optimizer, loss, F.cross_entropy, meta_optimizer=meta)
    for x, y in batches():
        half = slice(4 * rank, 4 * rank + 4)
        one.step((x[half], y[half]))
    states = [p.detach() for p in (*made.parameters(), *loss.parameters())]
    torch.save(states, f"{folder}/{rank}.pt")


def test_two_processes_stay_equal(tmp_path: Path) -> None:
    code = (
        f"import sys; sys.path[:0] = {[str(Path(__file__).parent), *sys.path]!r}\n"
        "from test_accelerate import _in_two_processes\n"
        "from accelerate import debug_launcher\n"
        f"debug_launcher(_in_two_processes, args=({str(tmp_path)!r},), num_processes=2)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    # As one process with the whole batches: without batch statistics there is only rounding between them.
    made = model()
    torch.manual_seed(0)
    loss = LossNetwork(8, residual="cross_entropy")
    one = OnlineLearner(
        made, SGD(made.parameters(), 0.1), loss, F.cross_entropy, meta_optimizer=Adam(loss.parameters(), 1e-3)
    )
    for batch in batches():
        one.step(batch)
    torch.testing.assert_close(first[:4], [p.detach() for p in made.parameters()], rtol=1e-3, atol=1e-4)


def test_example_runs(run_example: Callable[[str], str]) -> None:
    printed = run_example("accelerate_online_loss.py")
    assert float(printed.split("190 steps: ")[1].split()[0]) > 0.85
