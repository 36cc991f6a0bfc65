"""Modules of Lightning that train with a learned loss."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD, Adam, AdamW
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR
from torch.utils.data import DataLoader, TensorDataset

pl = pytest.importorskip("lightning.pytorch", reason="needs lightning")

from lightning.pytorch.callbacks import ModelCheckpoint  # noqa: E402

from lossmeta.adalfl import OnlineLearner  # noqa: E402
from lossmeta.integrations.lightning import OnlineModule  # noqa: E402
from lossmeta.losses import LossNetwork  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*(num_workers|LeafSpec|log_every_n_steps|Checkpoint directory)"),
    pytest.mark.filterwarnings("ignore:AdaLFL. the first step"),
]
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


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
    "adamw": lambda p: AdamW(p, 1e-2),
}


class Module(OnlineModule):
    def __init__(self, optimizer: str = "sgd", scheduler: Any = None, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3))
        self.loss = LossNetwork(8, residual="cross_entropy")
        self.kind, self.scheduler, self.options = optimizer, scheduler, options
        self.rates: list[float] = []

    def configure_optimizers(self) -> Any:
        optimizer = OPTIMIZERS[self.kind](self.model.parameters())
        if self.scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": self.scheduler(optimizer)}

    def configure_learner(self, optimizer: Any) -> OnlineLearner:
        meta = Adam(self.loss.parameters(), 1e-3)
        return OnlineLearner(
            self.model, optimizer, self.loss, F.cross_entropy, meta_optimizer=meta, **self.options
        )

    def on_train_batch_end(self, *args: Any) -> None:
        self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("error", F.cross_entropy(self.model(batch[0]), batch[1]))


def data() -> list[Any]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(8, 8, generator=generator), torch.randint(3, (8,), generator=generator))
        for _ in range(6)
    ]


def loader(batches: list[Any] | None = None) -> DataLoader[Any]:
    x, y = (torch.cat(t) for t in zip(*(batches or data()), strict=True))
    return DataLoader(TensorDataset(x, y), batch_size=8)


def trainer(**options: Any) -> Any:
    defaults: Any = {
        "max_epochs": 2,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return pl.Trainer(**{**defaults, **options})


def by_hand(epochs: int = 2, group: int = 1, optimizer: str = "sgd", **options: Any) -> Module:
    """The same training in a loop."""
    module = Module(optimizer, **options)
    learner = module.configure_learner(module.configure_optimizers())
    for _ in range(epochs):
        batches = data()
        for i in range(0, len(batches), group):
            learner.step(batches[i : i + group])
    return module


def equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_trains_as_a_loop_does(optimizer: str) -> None:
    module, run = Module(optimizer), trainer()
    run.fit(module, loader())
    assert run.global_step == 12
    assert module.learner.steps == 12
    assert equal(module, by_hand(optimizer=optimizer))
    assert not equal(module, Module(optimizer))
    assert run.callback_metrics["train_loss"].isfinite()


def test_max_steps_and_checkpoints(tmp_path: Path) -> None:
    saved = ModelCheckpoint(tmp_path, every_n_train_steps=4, save_top_k=-1)
    run = trainer(max_steps=5, max_epochs=-1, enable_checkpointing=True, callbacks=[saved])
    module = Module()
    run.fit(module, loader())
    assert (run.global_step, module.learner.steps) == (5, 5)
    assert [path.name for path in tmp_path.iterdir()] == ["epoch=0-step=4.ckpt"]


@pytest.mark.parametrize("group", [2, 4])
def test_accumulated_batches_make_one_step(group: int) -> None:
    module, run = Module(), trainer(accumulate_grad_batches=group)
    run.fit(module, loader())
    assert run.global_step == 2 * -(-6 // group)
    assert equal(module, by_hand(group=group))


def test_bfloat16_is_the_learner_s(monkeypatch: pytest.MonkeyPatch) -> None:
    module = Module()
    trainer(precision="bf16-mixed").fit(module, loader())
    assert equal(module, by_hand(autocast=torch.bfloat16))
    assert not equal(module, by_hand())


# ---- Schedulers.


@pytest.mark.parametrize(
    ("interval", "frequency", "expected"),
    [
        ("step", 1, [0.05, 0.025, 0.0125, 0.00625]),
        ("step", 2, [0.1, 0.05, 0.05, 0.025]),
        ("epoch", 1, [0.1, 0.1, 0.1, 0.1]),
    ],
)
def test_schedulers_step(interval: str, frequency: int, expected: list[float]) -> None:
    module = Module(
        scheduler=lambda o: {"scheduler": StepLR(o, 1, 0.5), "interval": interval, "frequency": frequency}
    )
    trainer().fit(module, loader())
    assert module.rates[:4] == pytest.approx(expected)
    if interval == "epoch":
        assert module.rates[6:] == pytest.approx([0.05] * 5 + [0.025])


def test_a_scheduler_that_watches_a_metric() -> None:
    module = Module(
        scheduler=lambda o: {
            "scheduler": ReduceLROnPlateau(o, patience=0, threshold=100.0),
            "monitor": "error",
        }
    )
    run = trainer(max_epochs=3)
    run.fit(module, loader(), loader())
    assert module.rates == pytest.approx([0.1] * 6 + [0.01] * 6 + [0.001] * 6)


# ---- Resumption.


@pytest.mark.parametrize("steps", [4, 6])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_resumed_run_ends_in_the_same_bits(steps: int, optimizer: str, tmp_path: Path) -> None:
    def made() -> Module:
        return Module(
            optimizer, lambda o: {"scheduler": StepLR(o, 5, 0.5), "interval": "step"}, snapshot_every=3
        )

    def batches() -> DataLoader[Any]:
        return loader(data()[:1] * 6)  # a loader starts anew where a run is resumed within an epoch

    whole = made()
    trainer().fit(whole, batches())
    saved = ModelCheckpoint(tmp_path, "half", every_n_train_steps=steps)
    trainer(max_steps=steps + 1, enable_checkpointing=True, callbacks=[saved]).fit(made(), batches())
    second, run = made(), trainer()
    run.fit(second, batches(), ckpt_path=tmp_path / "half.ckpt")
    assert run.global_step == 12
    assert equal(second, whole)
    assert [s.step for s in second.learner.history] == [s.step for s in whole.learner.history]
    moments = [m.learner.meta_optimizer.state_dict()["state"] for m in (second, whole)]  # type: ignore[union-attr]
    torch.testing.assert_close(*moments, rtol=0, atol=0)


def test_a_checkpoint_without_the_learner_is_refused(tmp_path: Path) -> None:
    run = trainer(max_steps=4)
    run.fit(Module(), loader())
    run.save_checkpoint(tmp_path / "weights.ckpt")
    saved = torch.load(tmp_path / "weights.ckpt", weights_only=True)
    saved["callbacks"] = {}
    torch.save(saved, tmp_path / "weights.ckpt")
    with pytest.raises(ValueError, match="must hold the learner's state, got one without"):
        trainer().fit(Module(), loader(), ckpt_path=tmp_path / "weights.ckpt")
    trainer().validate(Module(), loader(), ckpt_path=tmp_path / "weights.ckpt", verbose=False)


def test_a_second_fit_starts_with_a_new_learner() -> None:
    module = Module()
    trainer(max_epochs=1).fit(module, loader())
    first = module.learner
    trainer(max_epochs=1).fit(module, loader())
    assert module.learner is not first


# ---- What raises.


def test_a_step_that_raises_leaves_everything() -> None:
    module = Module()
    batches = data()
    batches[3][0][0, 0] = torch.nan
    with pytest.raises(RuntimeError, match="not finite"):
        trainer().fit(module, loader(batches))
    expected = Module()
    learner = expected.configure_learner(expected.configure_optimizers())
    for batch in data()[:3]:
        learner.step(batch)
    assert equal(module, expected)


def fails(module: Any, message: str, kind: type[Exception] = ValueError, **options: Any) -> None:
    before = copy.deepcopy(module)
    with pytest.raises(kind, match=message):
        trainer(**options).fit(module, loader())
    assert equal(module, before)


def test_refuses_what_cannot_be_right(monkeypatch: pytest.MonkeyPatch) -> None:
    fails(Module(), "pass clip_norm or clip_value", gradient_clip_val=1.0)
    with pytest.raises(ValueError, match='use "bf16-mixed"'):
        trainer(precision="16-true").fit(Module(), loader())
    manual = Module()
    manual.automatic_optimization = False
    fails(manual, "automatic_optimization must stay True")
    fails(Module(keep_gradients=True), "keep_gradients=False")
    fails(Module(), "one process, got 2; pass devices=1", devices=2, strategy=OneOfTwo())
    module = Module()
    with pytest.raises(RuntimeError, match="not attached to a `Trainer`"):
        module.learner  # noqa: B018


class OneOfTwo(pl.strategies.SingleDeviceStrategy):  # type: ignore[misc]
    @property
    def world_size(self) -> int:
        return 2

    def __init__(self) -> None:
        super().__init__("cpu")

    @world_size.setter
    def world_size(self, value: int) -> None:
        pass


def test_refuses_learners_that_do_not_fit() -> None:
    class Other(Module):
        def configure_learner(self, optimizer: Any) -> OnlineLearner:
            return super().configure_learner(SGD(self.model.parameters(), 0.1))

    class Nothing(Module):
        def configure_learner(self, optimizer: Any) -> Any:
            return None

    class All(Module):
        def configure_optimizers(self) -> Any:
            return SGD(self.parameters(), 0.1)

    class Two(Module):
        def configure_optimizers(self) -> Any:
            return [SGD(p.parameters(), 0.1) for p in (self.model[0], self.model[2])]

    class Silent(Module):
        def configure_callbacks(self) -> Any:
            return []

    fails(Other(), "the optimizer that configure_learner was given, got another")
    fails(Nothing(), "must return an OnlineLearner, got NoneType", TypeError)
    fails(All(), "optimizer must have")
    fails(Two(), "multiple optimizers|one optimizer, got 2", Exception)
    fails(Silent(), "add those of super")

    class Bare(Module):
        configure_learner = OnlineModule.configure_learner

    fails(Bare(), r"configure_learner\(optimizer\) must return", NotImplementedError)


def test_a_training_step_must_learn_once() -> None:
    class Never(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return F.cross_entropy(self.model(batch[0]), batch[1])

    class Twice(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.learn((batch[0], batch[1]))
            return super().training_step(batch, batch_idx)

    fails(Never(), r"must call self.learn\(batch\)", RuntimeError)
    with pytest.raises(RuntimeError, match=r"must call self\.learn once"):
        trainer().fit(Twice(), loader())


def test_validation_batches() -> None:
    class WithValidation(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            report = self.learn((batch[0], batch[1]), data()[0])
            assert report is not None
            return report.loss

    module = WithValidation()
    trainer(max_epochs=1).fit(module, loader())
    expected = Module()
    learner = expected.configure_learner(expected.configure_optimizers())
    for batch in data():
        learner.step(batch, data()[0])
    assert equal(module, expected)


def test_example_runs(run_example: Callable[[str], str]) -> None:
    printed = run_example("lightning_online_loss.py")
    assert float(printed.split("190 steps: ")[1].split()[0]) > 0.85
