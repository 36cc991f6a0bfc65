"""The mean loss over fixed samples, as a function of a model's weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel

from lossmeta._batches import Output, call_model, checked, prediction_of, samples
from lossmeta._checks import check_scalar
from lossmeta._model_state import ModelState, ThreadModes, evaluating, refuse_shards

Weights = dict[str, Tensor]
"""A tensor for each trainable parameter, by its name."""


class Objective:
    r"""The mean loss over samples that are read once and kept, :math:`L(\theta) = \frac1N \sum_n \ell_n(\theta)`.

    Args:
        where: who asks, for errors.
        model: any module; of ``DistributedDataParallel`` the module inside. What is trained are its parameters with
            ``requires_grad``, tied ones once.
        loss_fn: ``loss_fn(prediction, target) -> []``, the mean over the samples of a batch; where the batches are
            mappings, ``loss_fn(output, batch)``; ``None`` takes the ``loss`` of the output, as transformers give it.
        data: a pair (inputs, target), or batches: pairs, or mappings that the model takes as keyword arguments.
        output: what of the model's output is the prediction of a pair, see :func:`~lossmeta._batches.prediction_of`.
        autocast: dtype under which the model runs, or ``None``.

    Attributes:
        parameters: what is trained, by name.
        batches: as they are given to the model, on its device.
        samples: N.

    Raises:
        ValueError: for a model without trainable parameters, or with such that are sparse, sharded or not real, and for
            no data.
        TypeError: for data that is neither.
    """

    def __init__(
        self,
        where: str,
        model: nn.Module,
        loss_fn: Callable[..., Tensor] | None,
        data: Any,
        *,
        output: Output = None,
        autocast: torch.dtype | None = None,
    ) -> None:
        self.where, self.loss_fn, self.output, self.autocast = where, loss_fn, output, autocast
        self.model: nn.Module = model.module if isinstance(model, DistributedDataParallel) else model
        refuse_shards(where, self.model, "gather it first")
        self.parameters: Weights = {
            name: p for name, p in self.model.named_parameters() if p.requires_grad and p.numel()
        }
        if not self.parameters:
            frozen = sum(1 for _ in self.model.parameters())
            raise ValueError(
                f"{where}: model must have parameters that require a gradient, got {frozen} frozen ones and no other; "
                "call requires_grad_() on what is to move"
            )
        for name, p in self.parameters.items():
            if p.layout is not torch.strided or not p.is_floating_point() or p.is_meta:
                kind = "meta" if p.is_meta else f"{p.layout} {p.dtype}".replace("torch.", "")
                raise ValueError(
                    f"{where}: trainable parameters must be dense and real, got {name}, which is {kind}; freeze it or "
                    "convert the model"
                )
        self.device = next(iter(self.parameters.values())).device
        self.batches, self._sizes = self._read(data)
        self.samples = sum(self._sizes)

    def _read(self, data: Any) -> tuple[list[Any], list[int]]:
        one = isinstance(data, Mapping) or (
            isinstance(data, Sequence) and len(data) == 2 and isinstance(data[1], Tensor)
        )
        if not (one or isinstance(data, Iterable)) or isinstance(data, (str, Tensor)):
            raise TypeError(
                f"{self.where}: data must be a pair (inputs, target) or batches, such as a DataLoader, got "
                f"{type(data).__name__}"
            )
        batches, sizes = [], []
        for batch in [data] if one else data:
            if isinstance(batch, Mapping):
                sizes.append(next((samples(v) for v in batch.values() if isinstance(v, Tensor)), 1))
            else:
                batch = checked(self.where, "a batch of data", batch)
                sizes.append(samples(batch[1]))
            batches.append(moved(batch, self.device))
        if not batches:
            raise ValueError(f"{self.where}: data must hold at least one batch, got none")
        return batches, sizes

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """The model is in evaluation mode; afterwards its mode, buffers and random numbers are as before."""
        modes = ThreadModes(self.device.type)
        state = ModelState(self.model, self.device)
        try:
            with evaluating(self.model):
                yield
        finally:
            modes.bring_back()
            state.bring_back()

    def twin(self) -> nn.Module:
        """A model with parameters of its own, empty ones to be put anywhere, that shares all else with this one.

        Raises:
            Exception: whatever copying the model raises.
        """
        shared: dict[int, Any] = {id(t): t for t in (*self.model.parameters(), *self.model.buffers())}
        empty = {id(p): nn.Parameter(p.new_empty(0), requires_grad=False) for p in self.parameters.values()}
        return copy.deepcopy(self.model, shared | empty)

    def __iter__(self) -> Iterator[tuple[Any, float]]:
        """Batches, and the share of the samples that each holds."""
        for batch, size in zip(self.batches, self._sizes, strict=True):
            yield batch, size / self.samples

    def loss(self, weights: Weights, batch: Any) -> Tensor:
        """Of a batch, ``[]``, at some weights; differentiable in them. To be called in :meth:`quiet`."""
        return self.loss_of(lambda *a, **k: functional_call(self.model, weights, a, k), batch)

    def loss_of(self, model: Callable[..., Any], batch: Any) -> Tensor:
        """Of a batch, ``[]``, as a model, or a function in its place, gives it."""
        context: Any = nullcontext()
        if self.autocast is not None:
            context = torch.autocast(self.device.type, dtype=self.autocast)
        with context:
            if isinstance(batch, Mapping):
                found = model(**batch)
                value = found.loss if self.loss_fn is None else self.loss_fn(found, batch)
            else:
                found = call_model(model, batch[0])
                if self.loss_fn is None:
                    value = found.loss
                else:
                    prediction = prediction_of(self.where, found, self.output)
                    value = self.loss_fn(
                        prediction if self.autocast is None else prediction.float(), batch[1]
                    )
        check_scalar(self.where, "loss_fn", value, " (reduction='mean')")
        return value

    def value(self, weights: Weights) -> Tensor:
        """The mean loss, ``[]``, in float64; without a gradient."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        with torch.no_grad():
            for batch, share in self:
                total += share * self.loss(weights, batch).double()
        return total

    def gradient(self, weights: Weights | None = None) -> Weights:
        """Of the mean loss, in the dtypes of the parameters."""
        at = self._leaves(weights)
        total = {name: torch.zeros_like(p) for name, p in at.items()}
        for batch, share in self:
            with torch.enable_grad():
                found = torch.autograd.grad(self.loss(at, batch), list(at.values()), materialize_grads=True)
            _add(total, found, share)
        return total

    def hessian_product(self, vector: Weights, weights: Weights | None = None) -> Weights:
        """The Hessian of the mean loss times a vector, exactly, by two backward passes."""
        return self.hessian_products([vector], weights)[0]

    def hessian_products(self, vectors: Sequence[Weights], weights: Weights | None = None) -> list[Weights]:
        """The same for several vectors; the graph of a batch's gradient is made once for all of them."""
        at = self._leaves(weights)
        leaves = list(at.values())
        totals = [{name: torch.zeros_like(p) for name, p in at.items()} for _ in vectors]
        for batch, share in self:
            with self._twice_differentiable(), torch.enable_grad():
                slope = torch.autograd.grad(
                    self.loss(at, batch), leaves, create_graph=True, materialize_grads=True
                )
                # The others do not depend on the weights: the loss is linear in theirs.
                moving = {name: g for name, g in zip(at, slope, strict=True) if g.requires_grad}
                for total, vector in zip(totals, vectors, strict=True):
                    if moving:
                        along = [vector[name] for name in moving]
                        found = torch.autograd.grad(
                            list(moving.values()), leaves, along, retain_graph=True, materialize_grads=True
                        )
                        _add(total, found, share)
        return totals

    @contextmanager
    def _twice_differentiable(self) -> Iterator[None]:
        """Fused attention and cuDNN's recurrent layers, which have no second derivative, make way for plain ones."""
        recurrent = any(isinstance(m, nn.RNNBase) for m in self.model.modules())
        cudnn: Any = torch.backends.cudnn.flags(enabled=False) if recurrent else nullcontext()
        with sdpa_kernel(SDPBackend.MATH), cudnn:
            yield

    def _leaves(self, weights: Weights | None) -> Weights:
        return {
            name: p.detach().requires_grad_()
            for name, p in (self.parameters if weights is None else weights).items()
        }


@torch.no_grad()
def _add(total: Weights, found: Sequence[Tensor], share: float) -> None:
    torch._foreach_add_(list(total.values()), list(found), alpha=share)


def moved(value: Any, device: torch.device) -> Any:
    """Tensors in containers, on a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: moved(v, device) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [moved(v, device) for v in value]
    return value
