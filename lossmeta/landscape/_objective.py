"""The mean loss over fixed samples, as a function of a model's weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from lossmeta._batches import Output, call_model, checked, prediction_of, samples
from lossmeta._checks import check_scalar
from lossmeta._model_state import ModelState, RandomState, ThreadModes, evaluating, refuse_shards
from lossmeta.landscape.directions import inside, trainable

Weights = dict[str, Tensor]
"""A tensor for each trainable parameter, by its name."""


class Objective:
    r"""The mean loss over samples that are read once and kept, :math:`L(\theta) = \frac1N \sum_n \ell_n(\theta)`.

    Batches count by their samples: of a mapping, the commonest length of its tensors. Where the loss of a batch is a
    mean over something else, as over the labels that are not ignored, give one batch.

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
        self.model = inside(model)
        refuse_shards(where, self.model, "gather it first")
        self.parameters: Weights = trainable(where, self.model)
        for name, p in self.parameters.items():
            if p.layout is not torch.strided or not p.is_floating_point() or p.is_meta:
                kind = "meta" if p.is_meta else f"{p.layout} {p.dtype}".replace("torch.", "")
                raise ValueError(
                    f"{where}: trainable parameters must be dense and real, got {name}, which is {kind}; freeze it or "
                    "convert the model"
                )
        places: dict[int, str] = {}
        for name, p in self.parameters.items():
            other = places.setdefault(p.data_ptr(), name)
            if other != name:
                raise ValueError(
                    f"{where}: parameters must have memory of their own, got {other} and {name} in the same; tie them "
                    "as one parameter"
                )
        self.device = next(iter(self.parameters.values())).device
        random = RandomState(self.device)  # a DataLoader draws some
        try:
            self.batches, self._sizes = self._read(data)
        finally:
            random.bring_back()
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
                lengths = [len(v) for v in batch.values() if isinstance(v, Tensor) and v.dim()]
                sizes.append(max(set(lengths), key=lengths.count, default=1))
            else:
                batch = checked(self.where, "a batch of data", batch)
                sizes.append(samples(batch[1]))
            batches.append(moved(batch, self.device))
        if not batches:
            raise ValueError(f"{self.where}: data must hold at least one batch, got none")
        return batches, sizes

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Model and loss are in evaluation mode; afterwards mode, buffers and random numbers are as before.

        Raises:
            ValueError: for a model whose weights :meth:`eval` changes.
        """
        modes = ThreadModes(self.device.type)
        modules = [m for m in (self.model, self.loss_fn) if isinstance(m, nn.Module)]
        states = [ModelState(m, self.device) for m in modules]
        self._check_eval()
        try:
            with ExitStack() as stack:
                for module in modules:
                    stack.enter_context(evaluating(module))
                yield
        finally:
            torch.clear_autocast_cache()
            modes.bring_back()
            for state in states:
                state.bring_back()

    def _check_eval(self) -> None:
        """Refuses a model that merges its weights, as some do with low-rank ones; it is left in training mode."""
        if not any(m.training and type(m).train is not nn.Module.train for m in self.model.modules()):
            return
        kinds = [(m, m.training) for m in self.model.modules()]
        before = [float(p.detach().double().sum()) for p in self.model.parameters()]
        self.model.eval()
        after = [float(p.detach().double().sum()) for p in self.model.parameters()]
        self.model.train()
        for module, training in kinds:
            module.training = training
        if not np.array_equal(before, after, equal_nan=True):
            raise ValueError(
                f"{self.where}: eval() must leave the weights as they are, got a model in which it changes them; call "
                "eval() first"
            )

    @contextmanager
    def at(self, weights: Weights | None) -> Iterator[None]:
        """The parameters have other values, wherever the model, its hooks or the loss keep them."""
        own = {name: p.data for name, p in self.parameters.items()}
        try:
            for name, value in (weights or {}).items():
                self.parameters[name].data = value
            yield
        finally:
            for name, p in self.parameters.items():
                p.data = own[name]

    def __iter__(self) -> Iterator[tuple[Any, float]]:
        """Batches, and the share of the samples that each holds."""
        for batch, size in zip(self.batches, self._sizes, strict=True):
            yield batch, size / self.samples

    def loss(self, batch: Any) -> Tensor:
        """Of a batch, ``[]``, at the weights as they are. To be called in :meth:`quiet`."""
        return self._loss_of(self.model, batch)

    def functional_loss(self, weights: Weights, batch: Any) -> Tensor:
        """Of a batch, ``[]``, at some weights; wrong for a loss that has weights of the model from elsewhere."""
        return self._loss_of(lambda *a, **k: functional_call(self.model, weights, a, k), batch)

    def _loss_of(self, model: Callable[..., Any], batch: Any) -> Tensor:
        # Around the call there may be another context, which keeps the cast weights of another point.
        torch.clear_autocast_cache()
        context: Any = nullcontext()
        if self.autocast is not None:
            context = torch.autocast(self.device.type, dtype=self.autocast)
        with context:
            if isinstance(batch, Mapping):
                found = model(**batch)
                value = self._own_loss(found) if self.loss_fn is None else self.loss_fn(found, batch)
            else:
                found = call_model(model, batch[0])
                if self.loss_fn is None:
                    value = self._own_loss(found)
                else:
                    prediction = prediction_of(self.where, found, self.output)
                    value = self.loss_fn(
                        prediction if self.autocast is None else prediction.float(), batch[1]
                    )
        check_scalar(self.where, "loss_fn", value, " (reduction='mean')")
        return value

    def _own_loss(self, found: Any) -> Tensor:
        value: Tensor | None = getattr(found, "loss", None)
        if value is None:
            raise ValueError(
                f"{self.where}: loss_fn must be given where the model's output has no loss of its own, got a "
                f"{type(found).__name__} without one; models of transformers need labels in the batch"
            )
        return value

    def value(self, weights: Weights | None = None) -> float:
        """The mean loss; without a gradient."""
        with torch.no_grad(), self.at(weights):
            return self.value_here()

    def value_here(self) -> float:
        """The same at the weights as they are; to be called where no gradient is recorded."""
        if len(self.batches) == 1:
            return self.loss(self.batches[0]).item()
        # Read at the end, for which a GPU need not be waited for in between.
        return torch.stack([share * self.loss(batch).double() for batch, share in self]).sum().item()

    def gradient(self, weights: Weights | None = None) -> Weights:
        """Of the mean loss, in the dtypes of the parameters."""
        self._refuse_hooks()
        parameters = list(self.parameters.values())
        total = {name: torch.zeros_like(p) for name, p in self.parameters.items()}
        with torch.inference_mode(False), self.at(weights):
            for batch, share in self:
                with torch.enable_grad():
                    found = torch.autograd.grad(self.loss(batch), parameters, materialize_grads=True)
                _add(total, found, share)
        return total

    def hessian_products(self, vectors: Sequence[Weights], weights: Weights | None = None) -> list[Weights]:
        """The Hessian of the mean loss times vectors, exactly, by two backward passes; one graph serves all of them."""
        self._refuse_hooks()
        parameters = list(self.parameters.values())
        totals = [{name: torch.zeros_like(p) for name, p in self.parameters.items()} for _ in vectors]
        with torch.inference_mode(False), self.at(weights):
            for batch, share in self:
                with self._twice_differentiable(), torch.enable_grad():
                    slope = torch.autograd.grad(
                        self.loss(batch), parameters, create_graph=True, materialize_grads=True
                    )
                    # The others do not depend on the weights: the loss is linear in theirs.
                    moving = {n: g for n, g in zip(self.parameters, slope, strict=True) if g.requires_grad}
                    for total, vector in zip(totals, vectors, strict=True):
                        if moving:
                            along = [vector[name] for name in moving]
                            found = torch.autograd.grad(
                                list(moving.values()),
                                parameters,
                                along,
                                retain_graph=True,
                                materialize_grads=True,
                            )
                            _add(total, found, share)
        return totals

    def _refuse_hooks(self) -> None:
        for name, p in self.parameters.items():
            if p._backward_hooks:  # type: ignore[attr-defined]
                raise ValueError(
                    f"{self.where}: parameters must have no gradient hooks, which would change derivatives, got one on "
                    f"{name}; remove it"
                )

    @contextmanager
    def _twice_differentiable(self) -> Iterator[None]:
        """Fused attention and cuDNN's recurrent layers, which have no second derivative, make way for plain ones."""
        recurrent = any(isinstance(m, nn.RNNBase) for m in self.model.modules())
        cudnn: Any = torch.backends.cudnn.flags(enabled=False) if recurrent else nullcontext()
        with sdpa_kernel(SDPBackend.MATH), cudnn:
            yield


def kept(data: Any) -> Any:
    """Data that may be read again and again: what is no container is read once."""
    return data if isinstance(data, (Mapping, Sequence)) or not isinstance(data, Iterable) else list(data)


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
