"""The file of a surface: what is in it is right, and goes on where it was stopped."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from surface_models import Observer, mlp, samples
from torch import Tensor, nn

from lossmeta.landscape import LossSurface, _surface_file, loss_surface, random_directions
from lossmeta.landscape.surface import read


def test_what_was_refused_is_not_taken_up_again(tmp_path: Path) -> None:
    path = tmp_path / "surface.safetensors"
    for _ in range(2):
        with pytest.raises(ValueError, match=r"the loss must depend on the weights alone"):
            loss_surface(Observer(), F.cross_entropy, samples(), span=5.0, points=5, path=path)


def test_a_surface_comes_back_from_its_file(tmp_path: Path) -> None:
    path = tmp_path / "surface.safetensors"
    surface = loss_surface(mlp(), F.cross_entropy, samples(), points=9, refine=0.2)
    surface.save(path)
    again = LossSurface.load(path)
    for name in ("losses", "x", "y", "evaluated"):
        assert torch.equal(getattr(again, name), getattr(surface, name))
    assert (again.error, again.samples) == (surface.error, surface.samples)


def interrupted(after: int, *, always: bool = False) -> Callable[[Tensor, Tensor], Tensor]:
    """After some calls, once or from then on."""
    calls = 0

    def loss(prediction: Tensor, target: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == after + 1 or (always and calls > after):
            raise KeyboardInterrupt
        return F.cross_entropy(prediction, target)

    return loss


@pytest.mark.parametrize("refine", [None, 0.01])
def test_a_surface_that_was_stopped_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refine: float | None
) -> None:
    monkeypatch.setattr("lossmeta.landscape._points.MOST", 8)
    path = tmp_path / "surface.safetensors"
    options: Any = {"points": 21, "refine": refine, "path": path}
    with pytest.raises(KeyboardInterrupt):
        loss_surface(mlp(), interrupted(32), samples(), **options)
    with pytest.raises(ValueError, match="must be finished, got one that was stopped"):
        LossSurface.load(path)
    calls = 0

    def counted(prediction: Tensor, target: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return F.cross_entropy(prediction, target)

    whole = loss_surface(mlp(), F.cross_entropy, samples(), points=21, refine=refine)
    again = loss_surface(mlp(), counted, samples(), **options)
    assert torch.equal(again.losses, whole.losses) and torch.equal(again.evaluated, whole.evaluated)
    assert again.error == whole.error
    # But for those that were finished: of 32, two were at the centre, and three looked for layers to spare.
    assert 3 < calls <= int(whole.evaluated.sum()) + 6 - 27
    assert torch.equal(LossSurface.load(path).losses, whole.losses)
    calls = 0
    loss_surface(mlp(), counted, samples(), **options)
    assert calls == 3  # at the centre, before and after


def test_an_interrupt_leaves_no_points_of_which_some_may_be_wrong(tmp_path: Path) -> None:
    """A buffer has moved, so that points depend on those before them."""
    path = tmp_path / "surface.safetensors"
    with pytest.raises(KeyboardInterrupt):
        loss_surface(Observer(), interrupted(40), samples(), span=5.0, points=9, path=path)
    surface, _, finished = read(path)
    assert not finished and not surface.evaluated.any()


def test_an_interrupt_of_the_check_leaves_what_was_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "surface.safetensors"
    whole = loss_surface(mlp(), F.cross_entropy, samples(), points=9)
    for every, known in ((100.0, False), (-1.0, True)):
        monkeypatch.setattr(_surface_file, "EVERY", every)
        with pytest.raises(KeyboardInterrupt):
            loss_surface(mlp(), interrupted(50, always=True), samples(), points=9, path=path)
        surface, _, finished = read(path)
        assert not finished and bool(surface.evaluated.any()) == known
        torch.testing.assert_close(surface.losses[surface.evaluated], whole.losses[surface.evaluated])


def test_points_are_checked_before_they_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_surface_file, "EVERY", -1.0)
    calls = 0

    def counted(prediction: Tensor, target: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return F.cross_entropy(prediction, target)

    path = tmp_path / "surface.safetensors"
    with pytest.raises(ValueError, match=r"got .* before and .* after other points at the same weights"):
        loss_surface(Observer(), counted, samples(), span=5.0, points=9, path=path)
    assert calls < 20
    assert not read(path)[0].evaluated.any()
    # The check is made at the model's own weights, whatever the points before and after.
    model, data = nn.Linear(9, 3), (torch.randn(20, 9), samples()[1])
    found = loss_surface(model, F.cross_entropy, data, points=9, path=tmp_path / "other")
    monkeypatch.undo()
    whole = loss_surface(model, F.cross_entropy, data, points=9)
    assert torch.equal(found.losses, whole.losses)


def test_a_line_of_another_direction_is_refused(tmp_path: Path) -> None:
    path, model = tmp_path / "line.safetensors", mlp()
    for seed in (0, 1):
        options: Any = {"directions": random_directions(model, 1, seed=seed), "points": 3, "path": path}
        with pytest.raises(ValueError, match="differs in directions") if seed else nullcontext():
            loss_surface(model, F.cross_entropy, samples(), **options)


def test_a_path_that_cannot_be_written_is_said_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0

    def counted(prediction: Tensor, target: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return F.cross_entropy(prediction, target)

    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"surface|file"):
        loss_surface(mlp(), counted, samples(), points=3, path=tmp_path / "file" / "surface")
    assert calls == 2
    write, count = _surface_file.write, 0

    def full(*arguments: Any) -> None:
        nonlocal count
        count += 1
        if count > 1:
            raise OSError(28, "No space left on device")
        write(*arguments)

    monkeypatch.setattr(_surface_file, "write", full)
    with pytest.warns(
        RuntimeWarning, match="could not be written .*No space left.* the surface is returned all the same"
    ):
        surface = loss_surface(mlp(), F.cross_entropy, samples(), points=3, path=tmp_path / "surface")
    assert bool(surface.evaluated.all())


def test_a_file_of_another_surface_is_refused(tmp_path: Path) -> None:
    path, model = tmp_path / "surface.safetensors", mlp()
    loss_surface(model, F.cross_entropy, samples(), points=3, path=path)
    kept = path.read_bytes()
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[0].weight *= 2
    for changed, what in (
        ({"model": other}, "loss, weights"),
        ({"points": 5}, "axes"),
        ({"span": 0.5}, "axes"),
        ({"seed": 3}, "directions"),
        ({"data": samples(10)}, "samples"),
        ({"refine": 0.1}, "refine"),
    ):
        options: Any = {"model": model, "loss_fn": F.cross_entropy, "data": samples(), "points": 3, **changed}
        with pytest.raises(ValueError, match=f"must hold the same surface, got one that differs in .*{what}"):
            loss_surface(path=path, **options)
    assert path.read_bytes() == kept


def test_files_that_are_no_surfaces(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with pytest.raises(FileNotFoundError):
        LossSurface.load(path)
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="got one that cannot be read"):
        LossSurface.load(path)
    with pytest.raises(ValueError, match="got one that cannot be read"):
        loss_surface(mlp(), F.cross_entropy, samples(), points=3, path=path)
    path.unlink()
    loss_surface(mlp(), F.cross_entropy, samples(), points=3, path=path)
    whole = path.read_bytes()
    for damaged in (whole[:-9], whole.replace(b'format\\": 1', b'format\\": 9')):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"cannot be read|must have format 1, got 9"):
            LossSurface.load(path)
