"""Losses in files and in state dicts: with their options, whole or not at all, and never as another loss."""

from __future__ import annotations

import copy
import json
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from lossmeta.losses import (
    DistanceMixtureLoss,
    FocalWeightedLoss,
    LossNetwork,
    LossWeighting,
    ParametricCrossEntropy,
    TaylorLoss,
    TransitionLoss,
)

F64 = torch.float64
LOSSES: dict[str, Callable[[], Any]] = {
    "network": LossNetwork,
    "network of another kind": lambda: LossNetwork(
        5,
        0.2,
        3.0,
        activation="relu",
        output="softplus",
        residual="cross_entropy",
        normalize_slope=True,
        exact=True,
        weight=torch.rand(3),
        ignore_index=-1,
        label_smoothing=0.1,
        reduction="sum",
        dtype=F64,
    ),
    "network of a regression": lambda: LossNetwork(7, link="identity", residual="squared_error"),
    "taylor": lambda: TaylorLoss(2, weight=torch.rand(3), label_smoothing=0.1),
    "taylor of a regression": lambda: TaylorLoss(3, link="identity", reduction="none", dtype=F64),
    "classes": lambda: ParametricCrossEntropy(3, activation="identity", weight=torch.rand(3)),
    "learnable classes": lambda: ParametricCrossEntropy(3, learnable=True, ignore_index=-1, dtype=F64),
    "low-rank classes": lambda: ParametricCrossEntropy(5, rank=2, learnable=True),
    "mixture": lambda: DistanceMixtureLoss(min_distance=0.01, reduction="sum"),
    "learnable mixture": lambda: DistanceMixtureLoss(learnable=True),
    "focal": lambda: FocalWeightedLoss(offset=0.5, reduction="none"),
    "transition": lambda: TransitionLoss(3, 0.6, ignore_index=-1, dtype=F64),
    "transition with a shape": lambda: TransitionLoss(
        3,
        shape=LossNetwork(
            5, 0.2, activation="relu", residual="cross_entropy", exact=True, dtype=torch.bfloat16
        ),
        reduction="sum",
    ),
    "weighting": lambda: LossWeighting(
        7, normalize_weights=False, ignore_index=-1, reduction="sum", dtype=F64
    ),
    "learnable focal": lambda: FocalWeightedLoss(learnable=True, dtype=torch.bfloat16),
}
EACH = pytest.mark.parametrize("kind", LOSSES)


def made(kind: str) -> Any:
    """A loss whose values are not those that it starts with."""
    loss = LOSSES[kind]()
    with torch.no_grad():
        for p in (*loss.parameters(), *loss.buffers()):
            p.copy_(torch.rand_like(p))
    return loss


def tensors(loss: nn.Module) -> dict[str, Tensor]:
    return {name: v for name, v in loss.state_dict().items() if name != "_extra_state"}


def write(path: Path, values: dict[str, Tensor], header: Any) -> None:
    metadata = (
        None if header is None else {"lossmeta": header if isinstance(header, str) else json.dumps(header)}
    )
    safetensors.torch.save_file(values, path, metadata)


def read(path: Path) -> Any:
    with safetensors.safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["lossmeta"])


# ---- Files.


@EACH
def test_what_is_saved_is_loaded(kind: str, tmp_path: Path) -> None:
    loss, path = made(kind), tmp_path / "new" / "loss.safetensors"
    loss.save(path)
    before = torch.get_rng_state()
    same = type(loss).load(str(path))
    assert torch.equal(torch.get_rng_state(), before), "a file draws no random numbers"
    assert type(same) is type(loss)
    assert repr(same) == repr(loss)
    assert [(n, p.dtype, p.requires_grad) for n, p in same.named_parameters()] == [
        (n, p.dtype, p.requires_grad) for n, p in loss.named_parameters()
    ]
    torch.testing.assert_close(same.state_dict(), loss.state_dict(), rtol=0, atol=0)
    assert not any(p.is_meta for p in (*same.parameters(), *same.buffers()))


def test_a_loaded_loss_does_the_same(tmp_path: Path) -> None:
    logits, labels = torch.randn(6, 3), torch.randint(3, (6,))
    for kind in ("network of another kind", "taylor", "classes", "transition with a shape", "weighting"):
        loss = made(kind)
        loss.save(tmp_path / "loss")
        assert torch.equal(type(loss).load(tmp_path / "loss")(logits, labels), loss(logits, labels))


def test_header(tmp_path: Path) -> None:
    LossNetwork(np.int64(4), np.float32(0.5)).save(tmp_path / "loss")
    assert read(tmp_path / "loss") == {
        "format": 1,
        "loss": "LossNetwork",
        "options": {
            "hidden": 4,
            "leak": 0.5,
            "smoothness": 10.0,
            "activation": "smooth_leaky_relu",
            "output": "linear",
            "link": "softmax",
            "residual": None,
            "normalize_slope": False,
            "exact": False,
            "ignore_index": -100,
            "label_smoothing": 0.0,
            "reduction": "mean",
        },
    }
    assert set(safetensors.torch.load_file(tmp_path / "loss")) == {
        "input_weight",
        "hidden_weight",
        "output_weight",
    }


def test_a_file_is_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "other").touch()
    path = tmp_path / "new" / "loss.safetensors"
    TaylorLoss().save(path)
    before = path.read_bytes()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "other").stat().st_mode)
    whole = Path.write_bytes
    for failure in (OSError(28, "No space left on device"), KeyboardInterrupt()):

        def torn(self: Path, data: bytes, failure: BaseException = failure) -> int:
            whole(self, data[: len(data) // 2])
            raise failure

        monkeypatch.setattr(Path, "write_bytes", torn)
        with pytest.raises(type(failure)):
            TaylorLoss().save(path)
        monkeypatch.undo()
        assert path.read_bytes() == before
        assert list(path.parent.iterdir()) == [path]


def refuses(loss: Any, path: Path, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(f'{loss.__name__}.load: {path}')} {message}$"):
        loss.load(path)


def test_refuses_another_loss(tmp_path: Path) -> None:
    path = tmp_path / "loss"
    TaylorLoss().save(path)
    refuses(LossNetwork, path, "must hold a LossNetwork, got a TaylorLoss; use TaylorLoss.load")


def test_refuses_a_newer_file(tmp_path: Path) -> None:
    path = tmp_path / "loss"
    newer = {"format": 2, "loss": "TaylorLoss", "options": {}, "shape": "unheard of"}
    write(path, tensors(TaylorLoss()), newer)
    refuses(TaylorLoss, path, "must have format 1, got 2; update lossmeta")
    write(path, tensors(TaylorLoss()), {"format": 1, "loss": "TaylorLoss", "options": {"wings": 2}})
    refuses(TaylorLoss, path, r"must hold options of this version, got also \['wings'\]; update lossmeta")


@pytest.mark.parametrize("damage", ["empty", "half", "noise", "pickle"])
def test_refuses_what_cannot_be_read(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "loss"
    TaylorLoss().save(path)
    data = path.read_bytes()
    if damage == "pickle":
        torch.save(TaylorLoss().state_dict(), path)
    else:
        path.write_bytes(
            {"empty": b"", "half": data[: len(data) - 9], "noise": b"\x80\x04noise" * 99}[damage]
        )
    refuses(
        TaylorLoss, path, r"must be a file that save wrote, got one that cannot be read \(.+\); save it again"
    )


@pytest.mark.parametrize(
    "header",
    [None, "{", "[]", {"format": "1"}, {"format": 1}, {"format": 1, "loss": "TaylorLoss", "options": 3}],
    ids=str,
)
def test_refuses_foreign_files(header: Any, tmp_path: Path) -> None:
    path = tmp_path / "loss"
    write(path, {"a": torch.ones(2), "b": torch.ones(3)}, header)
    refuses(TaylorLoss, path, "must be a file that save wrote, got one without its header; save it again")


@pytest.mark.parametrize(
    "options",
    [{"order": 4}, {"order": 2, "link": 3}, {"order": 2, "label_smoothing": "much"}, {"order": "2"}],
    ids=str,
)
def test_refuses_options_that_do_not_fit(options: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "loss"
    write(path, tensors(TaylorLoss(2)), {"format": 1, "loss": "TaylorLoss", "options": options})
    refuses(TaylorLoss, path, r"must hold options that fit, got \{.+\} \(.+\); save it again")


def test_refuses_tensors_that_do_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "loss"
    header = {"format": 1, "loss": "TaylorLoss", "options": {"order": 2}}
    expected = r"must hold float tensors {'center': \[2\], 'coefficients': \[3\]}, got "
    good = tensors(TaylorLoss(2))
    for bad, got in (
        ({"coefficients": torch.ones(6)}, r"{'center': \[2\], 'coefficients': \[6\]}"),
        ({"more": torch.ones(1)}, r"{'center': \[2\], 'coefficients': \[3\], 'more': \[1\]}"),
        ({"center": torch.ones(2, dtype=torch.int64)}, r"{'center': \[2\] of int64, 'coefficients': \[3\]}"),
    ):
        write(path, {**good, **bad}, header)
        refuses(TaylorLoss, path, expected + got + "; save it again")
    write(path, {"center": torch.ones(2)}, header)
    refuses(TaylorLoss, path, expected + r"{'center': \[2\]}; save it again")


def test_refuses_to_save_what_cannot_be_loaded(tmp_path: Path) -> None:
    loss = ParametricCrossEntropy(3)
    loss.phi = torch.ones(4, 3, 3)  # of four models
    with pytest.raises(
        ValueError,
        match=r"^ParametricCrossEntropy.save: the loss must hold float tensors {'phi': \[3, 3\]}, got "
        r"{'phi': \[4, 3, 3\]}; give them the shapes that its options ask for$",
    ):
        loss.save(tmp_path / "loss")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_file_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        LossNetwork.load(tmp_path / "nowhere")
    with pytest.raises(OSError, match=re.escape(str(tmp_path))):
        LossNetwork.load(tmp_path)


# ---- State dicts.


@EACH
def test_state_dicts_move_between_equal_losses(kind: str, tmp_path: Path) -> None:
    first, second = made(kind), made(kind)
    state = first.state_dict()
    assert isinstance(state["_extra_state"], Tensor), "so that whatever takes tensors takes a state dict"
    assert state["_extra_state"].device.type == "cpu"
    torch.save(state, tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    for way in (state, {name: value.half() for name, value in state.items()}):
        second.load_state_dict(way)
    second.load_state_dict(state, assign=True)
    torch.testing.assert_close(second.state_dict(), first.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(copy.deepcopy(first).state_dict(), first.state_dict(), rtol=0, atol=0)


@EACH
def test_state_dicts_without_options_are_taken_as_fitting(kind: str) -> None:
    first, second = made(kind), made(kind)
    assert str(second.load_state_dict(tensors(first))) == "<All keys matched successfully>"
    torch.testing.assert_close(tensors(second), tensors(first), rtol=0, atol=0)
    holder = nn.ModuleDict({"loss": second})
    holder.load_state_dict({f"loss.{name}": value for name, value in tensors(made(kind)).items()})


@pytest.mark.parametrize(
    ("one", "other", "difference"),
    [
        (
            LossNetwork(4),
            LossNetwork(4, residual="cross_entropy"),
            ("residual='cross_entropy'", "residual=None"),
        ),
        (LossNetwork(4), LossNetwork(4, link="identity"), ("link='identity'", "link='softmax'")),
        (
            LossNetwork(4),
            LossNetwork(4, activation="relu"),
            ("activation='relu'", "activation='smooth_leaky_relu'"),
        ),
        (LossNetwork(4), LossNetwork(4, output="softplus"), ("output='softplus'", "output='linear'")),
        (LossNetwork(4), LossNetwork(4, 0.02), ("leak=0.02", "leak=0.01")),
        (LossNetwork(4), LossNetwork(4, smoothness=9.0), ("smoothness=9.0", "smoothness=10.0")),
        (
            LossNetwork(4),
            LossNetwork(4, normalize_slope=True),
            ("normalize_slope=True", "normalize_slope=False"),
        ),
        (LossNetwork(4), LossNetwork(3, 0.5), ("hidden=3, leak=0.5", "hidden=4, leak=0.01")),
        (TaylorLoss(2), TaylorLoss(3), ("order=3", "order=2")),
        (TaylorLoss(), TaylorLoss(link="identity"), ("link='identity'", "link='softmax'")),
        (
            ParametricCrossEntropy(3),
            ParametricCrossEntropy(3, activation="identity"),
            ("activation='identity'", "activation='sigmoid'"),
        ),
        (ParametricCrossEntropy(3), ParametricCrossEntropy(2), ("num_classes=2", "num_classes=3")),
        (
            DistanceMixtureLoss(),
            DistanceMixtureLoss(min_distance=0.1),
            ("min_distance=0.1", "min_distance=0.001"),
        ),
        (FocalWeightedLoss(), FocalWeightedLoss(offset=2.0), ("offset=2.0", "offset=1.0")),
        (TransitionLoss(3), TransitionLoss(4), ("num_classes=4", "num_classes=3")),
        (LossWeighting(3), LossWeighting(4), ("hidden=4", "hidden=3")),
        (
            LossWeighting(3),
            LossWeighting(3, normalize_weights=False),
            ("normalize_weights=False", "normalize_weights=True"),
        ),
        (LossNetwork(4), TaylorLoss(), None),
        (FocalWeightedLoss(), DistanceMixtureLoss(), None),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_refuses_the_state_of_another_loss(one: Any, other: Any, difference: tuple[str, str] | None) -> None:
    ours, theirs = difference or ("", "")
    kinds = type(one).__name__, type(other).__name__
    expected = (
        f"{kinds[0]}: the state must be that of {kinds[0]}({theirs}), got that of {kinds[1]}({ours}); make the loss "
        "with the options of the state, or leave '_extra_state' out of it to load the values all the same"
    )
    before = copy.deepcopy(tensors(one))
    for strict in (True, False):
        with pytest.raises(RuntimeError, match=re.escape(expected)):
            one.load_state_dict(other.state_dict(), strict=strict)
    with pytest.raises(RuntimeError, match=re.escape(expected)):
        nn.Sequential(nn.Linear(2, 2), one).load_state_dict(
            nn.Sequential(nn.Linear(2, 2), other).state_dict()
        )
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        one.set_extra_state(other.get_extra_state())
    torch.testing.assert_close(tensors(one), before, rtol=0, atol=0)


def test_how_a_loss_is_applied_may_differ() -> None:
    one = LossNetwork(4, reduction="none", exact=True, ignore_index=3, label_smoothing=0.1)
    one.load_state_dict(LossNetwork(4).state_dict())
    ParametricCrossEntropy(3, reduction="none").load_state_dict(
        ParametricCrossEntropy(3, learnable=True).state_dict()
    )


class Plain(LossNetwork):
    """A subclass with the same options."""


class Of(TaylorLoss):
    """A subclass with options of its own."""

    DEFINING = (*TaylorLoss.DEFINING, "power")

    def __init__(self, power: int = 1, **options: Any) -> None:
        super().__init__(**options)
        self.power = power


def test_subclasses(tmp_path: Path) -> None:
    Plain(4).load_state_dict(LossNetwork(4).state_dict())
    LossNetwork(4).save(tmp_path / "loss")
    assert type(Plain.load(tmp_path / "loss")) is Plain
    Of(3, order=2).save(tmp_path / "loss")
    assert (Of.load(tmp_path / "loss").power, Of.load(tmp_path / "loss").order) == (3, 2)
    with pytest.raises(RuntimeError, match=r"that of Of\(power=1\), got that of Of\(power=3\)"):
        Of().load_state_dict(Of(3).state_dict())
    with pytest.raises(RuntimeError, match=r"that of TaylorLoss\(\), got that of Of\(\)"):
        TaylorLoss().load_state_dict(Of().state_dict())


@pytest.mark.parametrize("state", [torch.ones(5), torch.zeros(0), {"loss": "LossNetwork"}, None], ids=str)
def test_refuses_options_of_no_meaning(state: Any) -> None:
    expected = r"LossNetwork: '_extra_state' must be what get_extra_state gave, got .+; leave it out to load the values"
    with pytest.raises(RuntimeError, match=expected):
        LossNetwork(4).load_state_dict({**LossNetwork(4).state_dict(), "_extra_state": state})


def test_refuses_a_newer_state() -> None:
    newer = torch.tensor(list(b'{"format": 2}'), dtype=torch.uint8)
    with pytest.raises(
        RuntimeError, match=r"LossNetwork: '_extra_state' must have format 1, got 2; update lossmeta"
    ):
        LossNetwork(4).load_state_dict({**LossNetwork(4).state_dict(), "_extra_state": newer})


def test_a_state_keeps_to_the_cpu() -> None:
    with torch.device("meta"):
        loss = LossNetwork(4)
        state = loss.state_dict()
    assert state["_extra_state"].device.type == "cpu"
    assert state["input_weight"].is_meta
    LossNetwork(4).load_state_dict(
        {**LossNetwork(4).state_dict(), "_extra_state": state["_extra_state"].to("meta")}
    )


def test_a_state_goes_through_torch_s_own_tools() -> None:
    loss = LossNetwork(4, residual="cross_entropy")
    logits, labels = torch.randn(6, 3), torch.randint(3, (6,))
    expected = loss(logits, labels)
    assert torch.equal(torch.func.functional_call(loss, loss.state_dict(), (logits, labels)), expected)
    compiled = torch.compile(copy.deepcopy(loss), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(logits, labels), expected)
    compiled.load_state_dict({f"_orig_mod.{name}": value for name, value in loss.state_dict().items()})
    exported = torch.export.export(loss, (logits, labels))
    torch.testing.assert_close(exported.module()(logits, labels), expected)
