"""What all operators share: the fallback of devices without kernels, and the memory that the kernels take."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from contract import assert_close

import lossmeta
from lossmeta.ops._operator import OPERATORS
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
    assert "move the tensors there" in text
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


def test_debug_leaves_the_cpu_alone() -> None:
    with lossmeta.ops.debug():
        loss = lossmeta.ops.parametric_cross_entropy(torch.zeros(2, 3), torch.tensor([0, 1]), torch.eye(3))
    assert_close(loss, torch.tensor(-0.25))


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
