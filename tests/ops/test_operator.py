"""What all operators share: the fallback of devices without kernels, and the memory that the kernels take."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from contract import assert_close
from torch import Tensor

import lossmeta
from lossmeta.ops._operator import OPERATORS, Operator
from lossmeta.ops.parametric_cross_entropy import _operator


@pytest.mark.parametrize("name", sorted(OPERATORS))
def test_every_operator_has_a_cpu_kernel_and_a_fallback(name: str) -> None:
    operator = OPERATORS[name]
    backward = [f"lossmeta::{name}_backward"] if operator.differentiable else []
    for qualified in [f"lossmeta::{name}", *backward]:
        for key in ("CPU", "CompositeExplicitAutograd", "Meta"):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(qualified, key), (qualified, key)


def test_fallback_runs_the_reference_and_says_so() -> None:
    logits = torch.randn(4, 3, dtype=torch.float64)
    phi = torch.randn(3, 3, dtype=torch.float64)
    arguments = (logits, torch.tensor([0, 1, 2, -100]), phi, None, -100, True, 1)
    with pytest.warns(lossmeta.ops.FallbackWarning) as caught:
        loss, statistics = _operator._fallback(*arguments)
    text = str(caught[0].message)
    assert text.startswith("parametric_cross_entropy: no compiled kernel for device cpu")
    assert "this operator has no kernel in it" in text
    kernel_loss, kernel_statistics = _operator.op(*arguments)
    assert_close(loss, kernel_loss)
    assert statistics.shape == kernel_statistics.shape
    grad = torch.ones((), dtype=torch.float64)
    kernel = _operator.backward_op(grad, *arguments, kernel_statistics, True, True)
    assert_close(_operator._fallback_backward(grad, *arguments, statistics, True, True), kernel)
    only_phi = _operator._fallback_backward(grad, *arguments, statistics, False, True)
    assert only_phi[0].numel() == 0
    assert_close(only_phi[1], kernel[1])


def test_a_kernel_names_both_devices() -> None:
    on_cpu = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)  # past the check that the fake kernel makes
    statistics = torch.ops.lossmeta.pwl_statistics.default
    with pytest.raises(
        RuntimeError,
        match=r"^pwl_statistics: knots and theta must be on the same device, got meta and cpu; move one",
    ):
        statistics.redispatch(on_cpu, torch.zeros(4), None, torch.zeros(2, device="meta"))


class OnDevice(Tensor):
    """A CPU tensor that says that it lies on a GPU."""

    is_cuda = property(lambda self: True)  # type: ignore[assignment]

    def cpu(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.as_subclass(Tensor)


def test_debug_looks_before_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[str] = []
    monkeypatch.setattr(Operator, "_check_on_cpu", lambda self, args: looked.append(self.name))
    arguments = torch.zeros(2, 3), torch.tensor([0, 1]), torch.eye(3)
    lossmeta.ops.parametric_cross_entropy(*arguments)
    assert looked == []
    with lossmeta.ops.debug():
        lossmeta.ops.parametric_cross_entropy(*arguments)
        with lossmeta.ops.debug(False):
            lossmeta.ops.parametric_cross_entropy(*arguments)
    lossmeta.ops.parametric_cross_entropy(*arguments)
    assert looked == ["parametric_cross_entropy"]


def test_debug_raises_what_the_cpu_kernel_finds() -> None:
    labels = torch.tensor([0, 7]).as_subclass(OnDevice)
    arguments = (torch.zeros(2, 3), labels, torch.eye(3), None, -100, True, 1)
    with pytest.raises(RuntimeError, match=r"labels must lie in \[0, 3\), got 7 at index 1"):
        _operator._check_on_cpu(arguments)
    sums, counts = torch.zeros(3, 3, dtype=torch.float64), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(RuntimeError, match=r"class_confusion: labels must lie in \[0, 3\), got 7 at index 1"):
        OPERATORS["class_confusion_"]._check_on_cpu((sums, counts, torch.zeros(2, 3), labels, -100))


def test_debug_by_environment() -> None:
    code = "from lossmeta import _checks; print(_checks.debugging)"
    for value, expected in (("1", "True"), ("0", "False"), ("", "False")):
        environment = {**os.environ, "LOSSMETA_DEBUG": value}
        result = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
        )
        assert result.stdout.strip() == expected


@pytest.mark.parametrize("name", sorted(OPERATORS))
def test_arguments_that_are_no_tensors_are_refused(name: str) -> None:
    operator = OPERATORS[name]
    arguments = [None] * len(operator.op._schema.arguments)
    first = next(a.name for a in operator.op._schema.arguments if str(a.type) == "Tensor")
    message = f"^{operator.public_name}: {first} must be a tensor, got NoneType$"
    with pytest.raises(TypeError, match=message):
        operator(*arguments)


PEAK = """
import resource, torch
from lossmeta.ops import class_confusion, parametric_cross_entropy
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
torch.set_num_threads(2)
samples, classes = 40_000, 1_000                                  # 153 MiB of logits
logits, phi = torch.randn(samples, classes), torch.eye(classes)
target = torch.randint(classes, (samples,))
small = logits[:2].clone().requires_grad_()
parametric_cross_entropy(small, target[:2], phi).backward()
class_confusion(logits[:2], target[:2])
before = peak()
with torch.no_grad():
    parametric_cross_entropy(logits, target, phi)
class_confusion(logits, target)
forward = peak() - before
logits.requires_grad_()
parametric_cross_entropy(logits, target, phi).backward()
print(forward, peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory that Linux reports")
def test_no_temporary_of_the_size_of_the_logits() -> None:
    result = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True)
    forward, backward = map(float, result.stdout.split())
    assert forward < 40, "MiB beside the logits: the statistics of class_confusion are 8"
    assert backward < 153 + 40, "MiB beside the logits: their gradient is 153"
