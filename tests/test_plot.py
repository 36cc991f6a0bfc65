from __future__ import annotations

import sys
from pathlib import Path

import pytest

from lossmeta import _files, plot

matplotlib = pytest.importorskip("matplotlib")


def test_panels_have_one_style() -> None:
    before = dict(matplotlib.rcParams)
    drawing, panels = plot.figure("test", 2, 3, size=(4, 2))
    assert len(panels) == 6
    assert tuple(drawing.get_size_inches()) == (4, 2)
    assert not panels[0].spines["top"].get_visible()
    assert dict(matplotlib.rcParams) == before, "the user's own style stays"


def test_file_names() -> None:
    assert plot.file_name("ala", "CIFAR-10, 8 × 8") == "ala-cifar-10-8-8"


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    assert plot.installed()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert not plot.installed()
    with pytest.raises(ImportError, match=r'^here: matplotlib must .* pip install "lossmeta\[plot\]"$'):
        plot.figure("here")


def test_shades_go_from_dark_to_bright() -> None:
    colours, scale = plot.shades([0, 5, 10])
    brightness = [sum(colour[:3]) for colour in colours]
    assert brightness == sorted(brightness)
    assert scale.get_clim() == (0, 10)


def test_intervals() -> None:
    _, (axes,) = plot.figure("test")
    plot.intervals(axes, ["a", "b"], [1.0, 2.0], [0.1, 0.2])
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b"]
    assert axes.get_ylim() == (1.5, -0.5), "the first on top"


@pytest.mark.parametrize("suffix", ["png", "pdf", "svg"])
def test_figures_are_replaced_whole(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new" / f"figure.{suffix}"
    drawing, _ = plot.figure("test")
    plot.save(drawing, path)
    before = path.read_bytes()
    assert before

    def torn(temporary: Path, **_: object) -> None:
        temporary.write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr(drawing, "savefig", torn)
    with pytest.raises(KeyboardInterrupt):
        plot.save(drawing, path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_json_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.json"
    _files.write_json(path, {"Φ": 1})
    with pytest.raises(ValueError, match="Out of range float"):
        _files.write_json(path, {"Φ": float("nan")})
    assert path.read_text() == '{\n  "Φ": 1\n}\n'
    assert list(path.parent.iterdir()) == [path]
