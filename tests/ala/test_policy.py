"""The policy: what it sees, how it chooses, and its file."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lossmeta.ala import Policy
from lossmeta.ala._states import States
from lossmeta.ala.policy import PARTS, choose, log_probability

HEADER = "lossmeta policy"


def written(path: Path, policy: Policy, **changed: Any) -> None:
    """The policy's file with other entries in its header."""
    description = {"format": 1, "layout": policy.layout, "record": {}, **changed}
    save_file(policy.state_dict(), path, {HEADER: json.dumps(description)})


# ---- What it sees and does.


@pytest.mark.parametrize(
    ("parts", "sees"),
    [
        (PARTS, 3 * 4 + 3 + 2),
        (("history",), 3 * 4),
        (("values", "history"), 3 * 4 + 1),
        (("change",), 3 + 3),
        ((), 3),
    ],
)
def test_how_much_it_sees(parts: tuple[str, ...], sees: int) -> None:
    policy = Policy({"a": 3}, history=4, parts=parts, hidden=(5, 6))
    assert policy.sees == {"a": sees}
    sizes = [(m.in_features, m.out_features) for m in policy.of("a").modules() if isinstance(m, nn.Linear)]
    assert sizes == [(sees, 5), (5, 6), (6, 3)]
    states = States(policy, "a")
    for _ in range(3):
        found, known = states.observe(torch.randn(2, 3), torch.zeros(2), 0.5)
        assert found.shape == (2, sees) and found.dtype == torch.float32 and known.all()


def test_states_against_a_loop() -> None:
    """Standardised statistics of the last steps, change from the average, place and progress."""
    policy, history, steps = Policy({"a": 2}, history=3), 3, 6
    states = States(policy, "a")
    generator = torch.Generator().manual_seed(0)
    seen = [torch.rand(4, 2, generator=generator) * torch.tensor([1.0, 100.0]) + 3 for _ in range(steps)]
    places = torch.linspace(-1, 1, 4)
    mean = square = average = [[0.0]]
    past: list[list[list[float]]] = []
    for t, found in enumerate(seen):
        rows = found.double().tolist()
        now_mean = [math.fsum(r[s] for r in rows) / 4 for s in range(2)]
        now_square = [math.fsum(r[s] ** 2 for r in rows) / 4 for s in range(2)]
        if t == 0:
            mean, square, average = now_mean, now_square, rows  # type: ignore[assignment]
        else:
            mean = [0.9 * m + 0.1 * n for m, n in zip(mean, now_mean, strict=True)]  # type: ignore[assignment, operator]
            square = [0.9 * m + 0.1 * n for m, n in zip(square, now_square, strict=True)]  # type: ignore[assignment, operator]
        deviation = [math.sqrt(q - m * m) for q, m in zip(square, mean, strict=True)]  # type: ignore[operator]
        past.insert(0, [[(r[s] - mean[s]) / deviation[s] for s in range(2)] for r in rows])  # type: ignore[operator]
        if t == 0:
            past = past * history
        change = [[(r[s] - a[s]) / a[s] for s in range(2)] for r, a in zip(rows, average, strict=True)]
        average = [[0.9 * a[s] + 0.1 * r[s] for s in range(2)] for r, a in zip(rows, average, strict=True)]
        expected = [
            [v for step in past[:history] for v in step[e]] + change[e] + [float(places[e]), t / 10]
            for e in range(4)
        ]
        state, known = states.observe(found, places, t / 10)
        assert known.all()
        torch.testing.assert_close(state, torch.tensor(expected).clamp(-5, 5), rtol=1e-3, atol=1e-4)


def test_states_do_not_depend_on_the_unit() -> None:
    generator = torch.Generator().manual_seed(0)
    seen = [torch.randn(5, 2, generator=generator) + 4 for _ in range(4)]
    for unit in (1e-3, 1e6, 1e30):
        plain, scaled = (States(Policy({"a": 2}), "a") for _ in range(2))
        for found in seen:
            a, _ = plain.observe(found, torch.zeros(5), 0.0)
            b, _ = scaled.observe(unit * found, torch.zeros(5), 0.0)
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_an_entry_that_is_unknown_at_first() -> None:
    """Its average begins where it is first known."""
    states = States(Policy({"a": 1}, history=1, parts=("history", "change")), "a")
    found = torch.tensor([[3.0], [torch.nan]])
    for _ in range(3):
        state, known = states.observe(found, torch.zeros(2), 0.0)
        assert known.tolist() == [True, False] and not state[1].any() and state.isfinite().all()
    state, known = states.observe(torch.tensor([[3.0], [7.0]]), torch.zeros(2), 0.0)
    assert known.all() and state[1, 1] == 0
    state, _ = states.observe(torch.tensor([[3.0], [7.7]]), torch.zeros(2), 0.0)
    assert state[1, 1].item() == pytest.approx(0.1, rel=1e-4)


@given(st.integers(0, 1000), st.integers(1, 60))
def test_actions_follow_the_softmax(seed: int, entries: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    network = Policy({"a": 2}, history=1).of("a")
    with torch.no_grad():
        network[-1].bias.copy_(torch.randn(3, generator=generator))  # type: ignore[index, union-attr, operator]
    states = torch.randn(entries, 6, generator=generator)
    uniform = torch.rand(entries, generator=generator)
    actions, log_p, entropy = choose(network, states, uniform)
    p = torch.softmax(network(states).detach().double(), 1)
    for a, u, row in zip(actions.tolist(), uniform.tolist(), p.tolist(), strict=True):
        expected = -1 if u <= row[0] else 0 if u <= row[0] + row[1] else 1
        assert a == expected or min(abs(u - row[0]), abs(u - row[0] - row[1])) < 1e-5
    assert entropy == pytest.approx(float(-(p * p.log()).sum()), rel=1e-4)
    taken = p[torch.arange(entries), actions.long() + 1].log()
    for found in (log_p, log_probability(network(states), actions)):
        torch.testing.assert_close(found.double(), taken, rtol=1e-4, atol=1e-5)


def test_many_entries_are_chosen_in_pieces() -> None:
    network = Policy({"a": 2}).of("a")
    states, uniform = torch.randn(9000, 24), torch.rand(9000)
    actions, log_p, entropy = choose(network, states, uniform)
    parts = [choose(network, states[i : i + 1000], uniform[i : i + 1000]) for i in range(0, 9000, 1000)]
    assert torch.equal(actions, torch.cat([a for a, _, _ in parts]))
    assert entropy == pytest.approx(sum(e for _, _, e in parts), rel=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"features": {}}, "features must name at least one network, got none"),
        ({"features": {"a": 0}}, "Policy: a must be at least 1, got 0"),
        ({"hidden": (0,)}, "hidden must be at least 1, got 0"),
        ({"history": 0}, "history must be at least 1, got 0"),
        (
            {"parts": ("values", "future")},
            "parts must be among history, change, values, progress, got future",
        ),
    ],
)
def test_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Policy(**{"features": {"a": 2}, **options})


# ---- Its file.


def test_a_file(tmp_path: Path) -> None:
    policy = Policy(
        {"a": 2, "b": 3}, hidden=(7,), history=4, parts=("values", "history"), record={"by": [1, None]}
    )
    path = tmp_path / "new" / "policy.safetensors"
    policy.save(path)
    with safe_open(str(path), framework="pt") as file:
        header = json.loads(file.metadata()[HEADER])
    assert header == {
        "format": 1,
        "layout": {"features": {"a": 2, "b": 3}, "hidden": [7], "history": 4, "parts": ["history", "values"]},
        "record": {"by": [1, None]},
    }
    assert all(torch.equal(t, policy.state_dict()[name]) for name, t in load_file(path).items())
    other = Policy.load(path)
    assert other.layout == policy.layout and other.record == policy.record and other.hidden == (7,)
    assert all(torch.equal(t, policy.state_dict()[name]) for name, t in other.state_dict().items())
    x = torch.randn(5, 13)
    assert torch.equal(other.of("b")(x), policy.of("b")(x))


@pytest.mark.parametrize("no_hidden", [False, True])
def test_without_hidden_layers(no_hidden: bool, tmp_path: Path) -> None:
    policy = Policy({"a": 2}, hidden=() if no_hidden else (3,))
    policy.save(tmp_path / "p")
    assert Policy.load(tmp_path / "p").hidden == policy.hidden


def test_a_file_is_replaced_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "policy.safetensors"
    Policy({"a": 2}).save(path)
    before = path.read_bytes()
    replaced = []
    rename = Path.replace

    def watched(self: Path, target: Any) -> Any:
        assert path.read_bytes() == before and self.parent == path.parent and Policy.load(self)
        replaced.append(target)
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", watched)
    Policy({"a": 2}, record={"other": 1}).save(path)
    assert replaced == [path] and path.read_bytes() != before and Policy.load(path).record == {"other": 1}
    before = path.read_bytes()

    def full(self: Path, content: bytes) -> int:
        with self.open("wb") as file:
            file.write(content[:100])
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="no space left"):
        Policy({"a": 2}).save(path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("record", [{"by": object()}, {"score": float("nan")}, {"score": float("inf")}])
def test_a_record_that_is_not_json(record: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "p"
    Policy({"a": 2}).save(path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"Policy\.save: record must be JSON"):
        Policy({"a": 2}, record=record).save(path)
    assert path.read_bytes() == before


def test_files_that_are_refused(tmp_path: Path) -> None:
    path, policy = tmp_path / "p", Policy({"a": 2})
    with pytest.raises(FileNotFoundError):
        Policy.load(path)
    with pytest.raises(OSError):  # noqa: PT011
        policy.save(tmp_path)
    with pytest.raises(OSError):  # noqa: PT011
        Policy.load(tmp_path)
    policy.save(path)
    content = path.read_bytes()
    for damaged in (b"", content[:5], content[:300], content[:-8], content + b"more", b"\xff" * 2000):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"Policy\.load: .*/p must be a file that save wrote"):
            Policy.load(path)
    for metadata in (None, {"other": "1"}, {HEADER: ""}, {HEADER: "[]"}, {HEADER: "3"}, {HEADER: "{}"}):
        save_file(policy.state_dict(), path, metadata)
        with pytest.raises(ValueError, match="must be a file that save wrote, got one without its header"):
            Policy.load(path)
    written(path, policy, format=2)
    with pytest.raises(ValueError, match="must have format 1, got 2; update lossmeta"):
        Policy.load(path)


@pytest.mark.parametrize(
    "changed",
    [
        {"features": {"a": 3}},
        {"features": {"b": 2, "a": 2}},
        {"features": {}},
        {"features": {"a": 2.5}},
        {"features": ["a"]},
        {"features": 2},
        {"hidden": [32]},
        {"hidden": "many"},
        {"hidden": [-1]},
        {"history": 3},
        {"history": None},
        {"parts": ["history"]},
        {"parts": ["future"]},
        {"more": 1},
    ],
)
def test_a_layout_that_is_not_that_of_the_weights(changed: dict[str, Any], tmp_path: Path) -> None:
    policy = Policy({"a": 2})
    written(tmp_path / "p", policy, layout={**policy.layout, **changed})
    with pytest.raises(ValueError, match=r"must hold a policy whose weights fit its layout, got another"):
        Policy.load(tmp_path / "p")


@pytest.mark.parametrize("changed", [{"layout": []}, {"layout": None}, {"record": 3}, {"record": "text"}])
def test_a_header_of_other_types(changed: dict[str, Any], tmp_path: Path) -> None:
    written(tmp_path / "p", Policy({"a": 2}), **changed)
    with pytest.raises(ValueError, match="must hold a policy whose weights fit its layout"):
        Policy.load(tmp_path / "p")


def test_a_loaded_policy_is_on_the_cpu_in_float32(tmp_path: Path) -> None:
    """Whatever PyTorch's defaults are; and loading one draws no random numbers."""
    Policy({"a": 2}).save(tmp_path / "p")
    start = torch.get_rng_state()
    try:
        torch.set_default_device("meta")
        torch.set_default_dtype(torch.float64)
        loaded, fresh = Policy.load(tmp_path / "p"), Policy({"a": 2})
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    for policy in (loaded, fresh):
        assert all(p.device.type == "cpu" and p.dtype == torch.float32 for p in policy.parameters())
    torch.set_rng_state(start)
    Policy.load(tmp_path / "p")
    assert torch.equal(start, torch.get_rng_state())


def test_a_file_outlives_changes_of_the_policy(tmp_path: Path) -> None:
    policy = Policy({"a": 2})
    kept: dict[str, Tensor] = copy.deepcopy(dict(policy.state_dict()))
    policy.save(tmp_path / "p")
    with torch.no_grad():
        for p in policy.parameters():
            p.zero_()
    loaded = Policy.load(tmp_path / "p")
    policy.save(tmp_path / "p")
    assert all(torch.equal(t, kept[name]) for name, t in loaded.state_dict().items())
