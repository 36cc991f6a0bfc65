"""Whether what is computed from a tensor may be kept for the next call."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad


def is_settled(tensor: Tensor) -> bool:
    """Whether it is a tensor with values of its own, which no transform follows and no optimizer is to move."""
    return type(tensor) in (Tensor, nn.Parameter) and not (
        torch.compiler.is_compiling()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._len_torch_dispatch_stack() > 0
        or forward_ad._current_level >= 0
        or tensor.requires_grad
        or tensor.is_inference()
        or (tensor.is_cuda and torch.cuda.is_current_stream_capturing())
    )
