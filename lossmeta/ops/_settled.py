"""Whether what is computed from a tensor may be kept for the next call."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad


def is_settled(tensor: Tensor) -> bool:
    """Whether what one call reads of it holds in the next, unless torch has counted a change."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or tensor.requires_grad
        or tensor.is_inference()
        or (tensor.is_cuda and torch.cuda.is_current_stream_capturing())
    )


def state_of(tensor: Tensor) -> tuple[int, int]:
    """What changes with the contents of a settled tensor."""
    return tensor._version, tensor.data_ptr()
