"""Losses and learned losses in the Trainer of transformers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW
from torch.optim.lr_scheduler import LambdaLR

transformers = pytest.importorskip("transformers", reason="needs transformers")

from transformers import Trainer, TrainingArguments  # noqa: E402
from transformers.loss.loss_utils import ForCausalLMLoss, fixed_cross_entropy  # noqa: E402
from transformers.modeling_outputs import SequenceClassifierOutput  # noqa: E402

from lossmeta.adalfl import OnlineLearner  # noqa: E402
from lossmeta.integrations.transformers import Aligned, ComputeLoss, OnlineTrainer  # noqa: E402
from lossmeta.losses import LossNetwork, ParametricCrossEntropy  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:AdaLFL. the first step", "ignore:.*pin_memory")


# ---- compute_loss_func


def plain(classes: int = 5, **options: Any) -> ParametricCrossEntropy:
    return ParametricCrossEntropy(classes, activation="identity", **options)


def tokens() -> tuple[Tensor, Tensor]:
    logits, labels = torch.randn(3, 7, 5, requires_grad=True), torch.randint(5, (3, 7))
    labels[0, 2:] = -100
    labels[2, 5:] = -100
    return logits, labels


@pytest.mark.parametrize("number", [None, 17, torch.tensor(17)])
def test_is_the_loss_of_transformers(number: Any) -> None:
    logits, labels = tokens()
    expected = fixed_cross_entropy(logits.flatten(0, 1), labels.flatten(), number)
    for outputs in ({"logits": logits}, (logits,), SequenceClassifierOutput(logits=logits)):
        found = ComputeLoss(plain())(outputs, labels, num_items_in_batch=number)
        torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(v, logits)[0] for v in (found, expected)))
    shifted = ComputeLoss(plain(), shift=True)({"logits": logits}, labels, num_items_in_batch=number)
    torch.testing.assert_close(shifted, ForCausalLMLoss(logits, labels, 5, number))


@pytest.mark.parametrize("loss", [plain(), nn.CrossEntropyLoss(), LossNetwork(8, residual="cross_entropy")])
def test_accumulated_batches_weigh_as_one(loss: nn.Module) -> None:
    logits, labels = tokens()
    compute, count = ComputeLoss(loss), int((labels != -100).sum())
    together = compute({"logits": logits}, labels, num_items_in_batch=count)
    apart = [
        compute({"logits": logits[i : i + 1]}, labels[i : i + 1], num_items_in_batch=count) for i in range(3)
    ]
    torch.testing.assert_close(sum(apart), together)
    torch.testing.assert_close(together, compute({"logits": logits}, labels))


def test_several_labels_and_regression() -> None:
    logits, labels = torch.randn(4, 3), torch.randint(2, (4, 3)).float()
    several = ComputeLoss(ParametricCrossEntropy(3, link="sigmoid", activation="identity"))
    expected = F.binary_cross_entropy_with_logits(logits, labels)
    for number in (None, 12):
        torch.testing.assert_close(several({"logits": logits}, labels, num_items_in_batch=number), expected)
    error = ComputeLoss(LossNetwork(8, link="identity", residual="squared_error"))
    x, y = torch.randn(4, 1), torch.randn(4)
    for number in (None, 4):
        torch.testing.assert_close(
            error({"logits": x}, y, num_items_in_batch=number), F.mse_loss(x.squeeze(1), y)
        )


def test_shares_the_parameters() -> None:
    loss = plain(learnable=True)
    compute, (logits, labels) = ComputeLoss(loss), tokens()
    before = compute({"logits": logits}, labels, num_items_in_batch=3)
    with torch.no_grad():
        loss.phi.mul_(2)
    torch.testing.assert_close(compute({"logits": logits}, labels, num_items_in_batch=3), 2 * before)
    assert loss.reduction == "mean"


def test_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="ignore_index must be -100, as the Trainer counts labels, got -1"):
        ComputeLoss(plain(ignore_index=-1))
    with pytest.raises(TypeError, match=r"must be a module with a reduction.*got function"):
        ComputeLoss(F.cross_entropy)  # type: ignore[arg-type]
    logits, labels = tokens()
    compute = ComputeLoss(plain())
    with pytest.raises(ValueError, match="must have labels, got NoneType"):
        compute({"logits": logits}, None)
    with pytest.raises(
        ValueError, match=r"labels must have the shape of the logits.*got \[3, 6\] for \[3, 7, 5\]"
    ):
        compute({"logits": logits}, labels[:, 1:])
    with pytest.raises(TypeError, match="output must say what of a dict"):
        compute({"a": logits, "b": logits}, labels)


# ---- The Trainer.


class Small(nn.Module):
    """As models of transformers are: keywords in, an output with logits out."""

    def __init__(self, length: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.body(x)
        loss = None if labels is None else F.cross_entropy(logits.reshape(-1, 3), labels.reshape(-1))
        return SequenceClassifierOutput(loss=loss, logits=logits)


def dataset(count: int = 24, length: int | None = None) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    shape = () if length is None else (length,)
    return [
        {
            "x": torch.randn(*shape, 6, generator=generator),
            "labels": torch.randint(3, shape, generator=generator),
        }
        for _ in range(count)
    ]


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    defaults: Any = {
        "num_train_epochs": 2,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "train_sampling_strategy": "sequential",
        "max_grad_norm": 0.0,
    }
    return TrainingArguments(str(folder), **{**defaults, **options})


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


def network() -> LossNetwork:
    torch.manual_seed(2)
    return LossNetwork(8, residual="cross_entropy")


def learner(model: Any, optimizer: Any, loss: Any, task_loss: Any, **options: Any) -> OnlineLearner:
    meta = Adam(loss.parameters(), 1e-3)
    return OnlineLearner(model, optimizer, loss, task_loss, meta_optimizer=meta, **options)


def trainer(folder: Path, kind: str = "sgd", length: int | None = None, **options: Any) -> OnlineTrainer:
    own = {k: options.pop(k) for k in ("meta_dataset", "task_loss", "shift", "make_learner") if k in options}
    model = options.pop("model", None) or Small()
    optimizer = OPTIMIZERS[kind](model.parameters())
    return OnlineTrainer(
        learned_loss=network(),
        make_learner=own.pop("make_learner", learner),
        **own,
        model=model,
        args=arguments(folder, **options),
        train_dataset=dataset(length=length),
        eval_dataset=dataset(8, length),
        optimizers=(optimizer, LambdaLR(optimizer, lambda step: 1 / (1 + step))),
    )


def batches(data: Any, size: int = 4) -> list[Any]:
    groups = [data[i : i + size] for i in range(0, len(data), size)]
    return [({"x": torch.stack([d["x"] for d in g])}, torch.stack([d["labels"] for d in g])) for g in groups]


def by_hand(
    kind: str, group: int = 1, length: int | None = None, meta: bool = False, **options: Any
) -> Small:
    model = Small()
    optimizer = OPTIMIZERS[kind](model.parameters())
    schedule = LambdaLR(optimizer, lambda step: 1 / (1 + step))
    one = learner(model, optimizer, Aligned(network(), False), Aligned(F.cross_entropy, False), **options)
    valid = batches(dataset(12)) if meta else []
    for _ in range(2):
        given = batches(dataset(length=length))
        for i in range(0, len(given), group):
            one.step(given[i : i + group], valid[one.steps % 3] if meta else None)
            schedule.step()
    return model


def equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_trains_as_a_loop_does(kind: str, tmp_path: Path) -> None:
    run = trainer(tmp_path, kind)
    result = run.train()
    assert (run.state.global_step, run.learner.steps) == (12, 12)
    assert equal(run.model, by_hand(kind))
    assert not equal(run.model, Small())
    assert 0 < result.training_loss < 3
    assert run.evaluate()["eval_loss"] > 0


@pytest.mark.parametrize("group", [2, 4])
def test_accumulated_batches_make_one_step(group: int, tmp_path: Path) -> None:
    run = trainer(tmp_path, gradient_accumulation_steps=group)
    run.train()
    assert run.state.global_step == run.learner.steps == 2 * -(-6 // group)
    assert equal(run.model, by_hand("sgd", group))


def test_tokens_max_steps_and_clipping(tmp_path: Path) -> None:
    run = trainer(tmp_path, length=3, max_grad_norm=0.1)
    run.train()
    assert equal(run.model, by_hand("sgd", length=3, clip_norm=0.1))
    assert not equal(run.model, by_hand("sgd", length=3))
    run = trainer(tmp_path, max_steps=5)
    run.train()
    assert (run.state.global_step, run.learner.steps) == (5, 5)


def test_validation_batches(tmp_path: Path) -> None:
    run = trainer(tmp_path, meta_dataset=dataset(12))
    run.train()
    assert equal(run.model, by_hand("sgd", meta=True))
    assert not equal(run.model, by_hand("sgd"))


def test_a_causal_model_is_judged_by_the_next_token(tmp_path: Path) -> None:
    run = trainer(tmp_path, length=4, shift=True, max_steps=1)
    run.train()
    model = Small()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    (x, y), *_ = batches(dataset(length=4))
    loss, task = network(), lambda f, y: F.cross_entropy(f[:, :-1].reshape(-1, 3), y[:, 1:].reshape(-1))
    task(model(**x).logits, y).backward()  # the residual alone, at first
    optimizer.step()
    for a, b in zip(run.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    assert loss.output_weight.any() == 0


def test_bfloat16(tmp_path: Path) -> None:
    run = trainer(tmp_path, bf16=True)
    run.train()
    close = by_hand("sgd")
    for a, b in zip(run.model.parameters(), close.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0.1, atol=0.02)
    assert not equal(run.model, close)
    assert run.learner.skipped == 0


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("meta", [False, True])
def test_a_resumed_run_ends_in_the_same_bits(kind: str, meta: bool, tmp_path: Path) -> None:
    options: Any = {"save_strategy": "steps", "save_steps": 4}
    if meta:
        options["meta_dataset"] = dataset(12)
    whole = trainer(tmp_path / "whole", kind, **options)
    whole.train()
    second = trainer(tmp_path / "second", kind, **options)
    second.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert second.state.global_step == second.learner.steps == 12
    assert equal(second.model, whole.model)
    assert equal(second.learned_loss, whole.learned_loss)
    states = [run.learner.meta_optimizer.state_dict()["state"] for run in (second, whole)]
    torch.testing.assert_close(*states, rtol=0, atol=0)


def test_a_checkpoint_of_another_trainer_is_refused(tmp_path: Path) -> None:
    model = Small()
    args = arguments(tmp_path, save_strategy="steps", save_steps=4)
    Trainer(model=model, args=args, train_dataset=dataset()).train()
    with pytest.raises(ValueError, match=r"learner\.pt must hold the learner's state"):
        trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_refuses_several_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = arguments(tmp_path)
    monkeypatch.setattr(type(args), "world_size", 2)
    with pytest.raises(ValueError, match="one process, got 2; in several use an OnlineLearner"):
        OnlineTrainer(learned_loss=network(), model=Small(), args=args, train_dataset=dataset())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"fp16": True}, "fp16 must be False"),
        ({"_n_gpu": 2}, "one GPU, got 2; choose one with CUDA_VISIBLE_DEVICES"),
        ({"is_deepspeed_enabled": True}, "DeepSpeed"),
        ({"is_fsdp_enabled": True}, "FSDP"),
        ({"compute_loss_func": ComputeLoss(plain(3))}, "pass it as task_loss"),
        ({"label_smoothing_factor": 0.1}, "give the losses label_smoothing"),
        ({"label_names": ["start", "end"]}, r"one of label_names, got \['start', 'end'\]"),
    ],
)
def test_refuses_arguments(changed: dict[str, Any], message: str, tmp_path: Path) -> None:
    class Changed(OnlineTrainer):  # this machine may not have what some of them ask for
        def _check(self) -> None:
            for name, value in changed.items():
                setattr(self if hasattr(self, name) else self.args, name, value)
            super()._check()

    with pytest.raises(ValueError, match=message):
        Changed(learned_loss=network(), model=Small(), args=arguments(tmp_path), train_dataset=dataset())


def test_refuses_losses_and_batches_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="meta_dataset must have a length, got generator"):
        trainer(tmp_path, meta_dataset=(d for d in dataset()))
    with pytest.raises(ValueError, match="keep_gradients and capture must be False"):
        trainer(tmp_path, make_learner=partial(learner, keep_gradients=True)).train()
    run = trainer(tmp_path)
    run.train_dataset = [{"x": d["x"]} for d in dataset()]
    with pytest.raises(ValueError, match="a batch must have 'labels', got x"):
        run.train()
    assert equal(run.model, Small())


def test_example_runs(run_example: Callable[[str], str]) -> None:
    printed = run_example("transformers_online_loss.py")
    assert float(printed.split("380 steps: ")[1].split()[0]) > 0.6
