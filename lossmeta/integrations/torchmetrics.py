"""Our metrics as metrics of torchmetrics, and theirs as ours."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lossmeta._checks import dtype_name
from lossmeta.metrics import Metric

try:
    import torchmetrics
except ImportError as error:
    raise ImportError(
        f"lossmeta.integrations.torchmetrics: torchmetrics must be installed, got {str(error)!r}; "
        'pip install "lossmeta[integrations]"'
    ) from error


def as_torchmetrics(metric: Metric) -> torchmetrics.Metric:
    """A metric of torchmetrics that counts what ours counts.

    It starts empty, and leaves the given metric as it is. ``update(preds, target, weight=None)`` and a call take what
    ours takes. It moves, is saved, goes into a ``MetricCollection`` and joins processes as others do. A process may
    have seen nothing. Its class has the name of ours.

    Args:
        metric: of ``lossmeta.metrics``, or another one that says in ``joined`` how its state joins over processes.

    Raises:
        TypeError: for something else than a metric.
        ValueError: for a metric that does not say how it joins. When computed, where processes have batches that do not
            go together, such as some with weights.

    Example:
        >>> metric = as_torchmetrics(lossmeta.metrics.ErrorRate())
        >>> metric(torch.tensor([[2.0, 1.0], [0.0, 3.0]]), torch.tensor([0, 0])).item()
        0.5
    """
    if not isinstance(metric, Metric):
        raise TypeError(f"as_torchmetrics: metric must be a lossmeta.metrics.Metric, got {_name(metric)}")
    if not metric.joined:
        raise ValueError(
            "as_torchmetrics: metric must say in `joined` how its state joins over processes, "
            f"got {_name(metric)}"
        )
    return _class_of(_name(metric), metric.higher_is_better)(metric)


def from_torchmetrics(metric: torchmetrics.Metric, higher_is_better: bool | None = None) -> Metric:
    """A metric that a loss can be adapted to, counted by one of torchmetrics.

    The metric itself is used, not a copy, on the device of the scores. Where torchmetrics joins processes, so does
    ``compute``: every process has to call it.

    Args:
        metric: gives one number for ``update(scores, labels)``; not a collection.
        higher_is_better: its direction, where it does not say itself.

    Raises:
        TypeError: for something else than a metric of torchmetrics.
        ValueError: without a direction, and against its own. When updated, for a weight, for which torchmetrics has no
            convention. When computed, for what is not one number.

    Example:
        >>> metric = from_torchmetrics(torchmetrics.MeanSquaredError())
        >>> metric(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0])).item()
        2.0
        >>> metric.higher_is_better
        False
    """
    if not isinstance(metric, torchmetrics.Metric):
        raise TypeError(f"from_torchmetrics: metric must be one metric of torchmetrics, got {_name(metric)}")
    says = metric.higher_is_better
    if says is None and higher_is_better is None:
        raise ValueError(f"from_torchmetrics: higher_is_better must be given, {_name(metric)} does not say")
    if says is not None and higher_is_better not in (None, says):
        raise ValueError(
            f"from_torchmetrics: higher_is_better must be {says}, as {_name(metric)} says, got {higher_is_better}"
        )
    return _FromTorchmetrics(metric, bool(higher_is_better if says is None else says))


def _name(metric: object) -> str:
    return type(metric).__name__


# ---- Ours as theirs.


class _AsTorchmetrics(torchmetrics.Metric):  # type: ignore[misc]  # Any where torchmetrics is missing
    """Holds the state of a metric of ours, and lends it to a copy for every update."""

    is_differentiable = False
    # A call counts a batch twice, alone and with the others, which refuse what does not go together.
    full_state_update = True

    def __init__(self, metric: Metric) -> None:
        super().__init__()
        self.empty = copy.copy(metric)
        self.empty.reset()
        for name, state in self.empty.state_dict().items():
            self.add_state(name, state, dist_reduce_fx=metric.joined[name])
        # A collection lets metrics share a state that is equal after one batch, as two thresholds' may be; NaN is not.
        self.add_state("unshared", torch.tensor(torch.nan), dist_reduce_fx="max")

    def __reduce__(self) -> tuple[Any, ...]:
        return as_torchmetrics, (self.empty,), self.__getstate__()

    def update(self, preds: Tensor, target: Tensor, weight: Tensor | None = None) -> None:
        metric = self._filled()
        metric.update(preds, target, weight)
        for name, state in metric.state_dict().items():
            setattr(self, name, state)

    def compute(self) -> Tensor:
        return self._filled().compute()

    def _filled(self) -> Metric:
        metric = copy.copy(self.empty)
        metric.load_state_dict({name: self._own(name) for name in metric.joined})
        return metric

    def _own(self, name: str) -> Tensor | list[Tensor]:
        state = getattr(self, name)
        if self.empty.joined[name] == "cat" and isinstance(state, Tensor):  # as processes have joined it
            return [state] if len(state) else []
        return state  # type: ignore[no-any-return]

    def sync(
        self,
        dist_sync_fn: Callable[..., Any] | None = None,
        process_group: Any = None,
        should_sync: bool = True,
        distributed_available: Callable[[], bool] | None = None,
    ) -> None:
        available = distributed_available or self.distributed_available_fn
        if should_sync and not self._is_synced and available() and torch.distributed.is_initialized():
            self._agree(process_group or self.process_group)
        super().sync(dist_sync_fn, process_group, should_sync, distributed_available)

    def _agree(self, group: Any) -> None:
        """Every process learns the kind of batches that it may have none of: torchmetrics would guess it."""
        lists = {name: getattr(self, name) for name, how in self.empty.joined.items() if how == "cat"}
        alike = {name: torch.cat([t[:0] for t in state]) for name, state in lists.items() if len(state)}
        own = {name: (tuple(t.shape[1:]), t.dtype) for name, t in alike.items()}
        kinds: list[Any] = [None] * torch.distributed.get_world_size(group)
        torch.distributed.all_gather_object(kinds, own, group)
        given = [kind for kind in kinds if kind]
        for kind in given:
            if kind != given[0]:
                raise ValueError(
                    f"{_name(self.empty)}: the batches of all processes must be of one kind, "
                    f"got {_words(given[0])} and {_words(kind)}"
                )
        if given and not own:
            for name, (shape, dtype) in given[0].items():
                setattr(self, name, [torch.empty(0, *shape, dtype=dtype, device=self.device)])


def _words(kind: dict[str, tuple[tuple[int, ...], torch.dtype]]) -> str:
    return ", ".join(
        f"{name} [{', '.join(['N', *map(str, shape)])}] {dtype_name(torch.empty(0, dtype=dtype))}"
        for name, (shape, dtype) in kind.items()
    )


@cache
def _class_of(name: str, higher_is_better: bool) -> type[_AsTorchmetrics]:
    """A collection calls a metric by its class."""
    return type(name, (_AsTorchmetrics,), {"higher_is_better": higher_is_better})


# ---- Theirs as ours.


class _FromTorchmetrics(Metric):
    def __init__(self, metric: torchmetrics.Metric, higher_is_better: bool) -> None:
        self.metric = metric
        self.higher_is_better = higher_is_better

    def reset(self) -> None:
        self.metric.reset()

    def update(self, scores: Tensor, labels: Tensor, weight: Tensor | None = None) -> None:
        self._to(scores, weight).update(scores, labels)

    def compute(self) -> Tensor:
        if not any(metric.update_called for _, metric in self._parts()):
            return torch.full((), torch.nan, dtype=torch.float64)
        return self._number(self.metric.compute())

    def __call__(self, scores: Tensor, labels: Tensor, weight: Tensor | None = None) -> Tensor:
        return self._number(self._to(scores, weight)(scores, labels))

    def state_dict(self) -> dict[str, Any]:
        """Of the metric and those within it, persistent or not."""
        found: dict[str, Any] = {}
        for prefix, metric in self._parts():
            found[f"{prefix}.updates"] = metric.update_count
            for name, state in metric.metric_state.items():
                found[f"{prefix}.{name}"] = _copied(state)
        return found

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for prefix, metric in self._parts():
            metric.reset()
            metric._update_count = state[f"{prefix}.updates"]
            for name in metric.metric_state:
                setattr(metric, name, _copied(state[f"{prefix}.{name}"]))

    def _parts(self) -> Iterator[tuple[str, torchmetrics.Metric]]:
        for prefix, module in self.metric.named_modules():
            if isinstance(module, torchmetrics.Metric):
                yield prefix, module

    def _to(self, scores: Tensor, weight: Tensor | None) -> torchmetrics.Metric:
        if weight is not None:
            raise ValueError(f"from_torchmetrics: weight must be None, {_name(self.metric)} takes none")
        return self.metric if self.metric.device == scores.device else self.metric.to(scores.device)

    def _number(self, value: Any) -> Tensor:
        if isinstance(value, Tensor) and value.numel() == 1:
            return value.detach().double().reshape(())
        got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"from_torchmetrics: {_name(self.metric)} must give one number, got {got}")


def _copied(state: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
    """torchmetrics adds to tensors in place."""
    return state.clone() if isinstance(state, Tensor) else list(state)
