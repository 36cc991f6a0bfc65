"""The controller that adapts a loss to a metric by a population of children."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from lossmeta._batches import Batch, Output, checked
from lossmeta._checks import check_at_least_one, check_fraction, check_positive_and_finite
from lossmeta._model_state import refuse_shards
from lossmeta._optimizers import unwrapped
from lossmeta.ala._children import Alone, Children
from lossmeta.ala._fitness import Fitness
from lossmeta.ala._heads import head_of
from lossmeta.ala._ranks import Ranks
from lossmeta.ala.records import PopulationReport
from lossmeta.ala.schedule import Schedule
from lossmeta.ala.space import LEARNING_RATE, Coordinates, LossSpace
from lossmeta.ala.spaces import LearningRate


class Population:
    r"""Adapts a loss to any metric while the model trains, in one run.

    Steps come in windows. In each, B children start from the same weights and see the same batches, but every child
    trains under values of its own: :math:`u_i = m \pm \sigma \varepsilon_i`, in units of each parameter's scale, in
    antithetic pairs. What they then reach on the same validation data is their fitness :math:`f_i`. With
    :math:`w = \mathrm{softmax}(2 (f - \bar f) / \mathrm{std} f)` the mean :math:`m` of the values, the weights and the
    optimizer's state become the weighted means of the children's; :math:`\sigma` shrinks. Only what the values do
    differs among the children, so that small differences count. Fitness is the metric's mean over the last two
    evaluations of a window, and over copies of the predictions with fixed noise, which turns a metric that moves in
    steps into a slope.

    After every window the model that was given holds the mean, in the optimizer's state too, so that schedulers,
    checkpoints and evaluation work on it as they are; the children of the next window set out from what it holds then.
    Towards the end of ``steps`` the model trains alone, under the mean of the values of the last third of the windows.

    One more copy trains beside them under the space's defaults, the plain loss, and nothing else. The model becomes it
    in the end, unless the metric finds the model better by more than a standard error of the difference: where nothing
    is wrong that the loss could mend, the search costs a little. This is decided at the last of ``steps``, or, where
    those are not given, by :meth:`settle`. Where you change the model between windows, the copy sets out from there
    too. A window that is undone is not undone in the copy, but for the first, and for the optimizer's count of steps.

    With one child there is no search: after every window the metric itself says, by moving the validation logits of
    each class up and down, which classes should gain, and the margins follow. That is for spaces with such margins, as
    :class:`LogitAdjustment`.

    Args:
        model: whose copies the children are. Memory is B times the model's and the optimizer's, once more with
            ``fallback``, and that of a batch. A model that ``torch.func.vmap`` does not take, or not rightly, has its
            children run in turn; ``in_turn`` says why. Random numbers are the same in all children.
        optimizer: of its parameters; any that moves each weight by its own gradient. A scheduler of it works.
        space: what of the loss is adapted, and the loss.
        metric: what it is adapted to: a metric of :mod:`lossmeta.metrics`, a single one of torchmetrics, or a function
            ``metric(prediction, target) -> number``.
        valid: what it is measured on: a batch ``(inputs, target)``, or batches that start again where they end. They
            must not be training data.
        steps: of the whole training, so that its end can be kept for the mean; without it :meth:`settle` does that.
        children: B, even, or 1.
        head: where B models do not fit: a module of the model, or its name, such as ``"fc"``. Only that is each child's
            own, with its part of the optimizer's state; the rest, the trunk, is one for all. Its forward and backward
            pass runs once a batch, and it trains on the mean of the children's losses (of those whose gradient is
            finite) in one step of the optimizer; its buffers move once. Memory is then two models, of which one is for
            a window that is undone, and B heads. What a value does shows within a window in the heads alone, and the
            learning rate does not adapt. ``None`` for whole children.
        window: steps of one.
        spread: :math:`\sigma` of the first window.
        least_spread: below which it does not shrink.
        spread_decay: by which it shrinks with every window.
        tail: share of the steps, at the end, that the model trains alone.
        fallback: whether there is a copy under the plain loss; not with one child, or a head.
        learning_rate: whether the learning rate adapts too, as by a factor :class:`LearningRate` of the space; not with
            one child, or a head. Where it does, start from the rate that suits the plain loss.
        higher_is_better: the metric's direction; asked of the metric where it is not given, for a function ``True``.
        output: what of the model's output is the prediction, see :func:`lossmeta.adalfl.meta_gradient`.
        seed: of the values that are tried.
        process_group: processes of ``torch.distributed`` that share the children, each of them B over their number;
            ``torch.distributed.group.WORLD`` are all. They make the same population, whose first weights are those of
            the first process, and call :meth:`step` with the same batches: other targets are refused at a window's end.
            Where a step raises in one of them, the others wait. ``None`` for this one alone.

    Attributes:
        values: the mean, by name, on the CPU.
        spread: :math:`\sigma` now.
        steps_done: training steps so far.
        windows: finished ones.
        ties: windows in which all children were equally good, so that the values and :math:`\sigma` stayed.
        skipped: windows that were undone, since no child had a finite fitness.
        in_turn: why the children run one after the other, or ``None``.
        fell_back: whether the model became the copy under the plain loss; ``None`` while that is open.

    Raises:
        TypeError: for arguments of another type, and an optimizer whose step for one weight depends on others.
        ValueError: for options out of range, an optimizer with parameters that are not the model's, a space without
            parameters, one child where the space has no margins, children that the processes cannot share evenly,
            validation data without samples, and a head that the model does not have, that has no trained weights or
            shares them with the trunk, or that is given with one child, several processes or an adapted learning rate.

    Sources:
        Huang et al., "Addressing the Loss-Metric Mismatch with Adaptive Loss Alignment" (2019), has the aim. Its
        controller is another one.

    Example:
        >>> model = torch.nn.Linear(4, 3)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> train, valid = [(torch.randn(16, 4), torch.randint(3, (16,))) for _ in range(2)]
        >>> population = lossmeta.ala.Population(
        ...     model, optimizer, lossmeta.ala.Robust(), lossmeta.metrics.ErrorRate(), valid, steps=60
        ... )
        >>> for _ in range(60):
        ...     report = population.step(train)
        >>> population.windows, list(population.values)
        (2, ['q', 'learning_rate'])
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        space: LossSpace,
        metric: Any,
        valid: Batch | Iterable[Batch],
        *,
        steps: int | None = None,
        children: int = 8,
        head: str | nn.Module | None = None,
        window: int = 20,
        spread: float = 1.5,
        least_spread: float = 0.4,
        spread_decay: float = 0.9,
        tail: float = 0.05,
        fallback: bool = True,
        learning_rate: bool = True,
        higher_is_better: bool | None = None,
        output: Output = None,
        seed: int = 0,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"Population: model must be a torch.nn.Module, got {type(model).__name__}")
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            raise TypeError(
                f"Population: model must not be wrapped, got {type(model).__name__}; give its module, and as "
                "process_group the processes that are to share the children"
            )
        refuse_shards("Population", model, "the children must fit on one device")
        if not isinstance(unwrapped(optimizer), Optimizer):
            raise TypeError(
                f"Population: optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}"
            )
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        if several and process_group is None:
            warnings.warn(
                f"Population: each of the {dist.get_world_size()} processes trains a model and values of its own; "
                "nothing is shared among them, unless they are given as process_group",
                stacklevel=2,
            )
        if children != 1 and (children < 2 or children % 2):
            raise ValueError(f"Population: children must be even, or 1, got {children}")
        check_at_least_one("Population", "window", window)
        for name, number in (
            ("spread", spread),
            ("least_spread", least_spread),
            ("spread_decay", spread_decay),
        ):
            check_positive_and_finite("Population", name, number)
        check_fraction("Population", "spread_decay", spread_decay)
        check_fraction("Population", "tail", tail)
        if steps is not None and steps < window:
            raise ValueError(f"Population: steps must be at least the {window} of a window, got {steps}")
        self.coordinates = Coordinates(space)
        if learning_rate and children > 1 and head is None and LEARNING_RATE not in self.coordinates.places:
            space = space * LearningRate()
            self.coordinates = Coordinates(space)
        if children == 1 and space.shift is None:
            raise ValueError(
                "Population: children must be 2 or more for a space without margins, such as LogitAdjustment has, got 1"
            )
        self.head = None if head is None else head_of(model, head)
        if self.head is not None and (children == 1 or LEARNING_RATE in self.coordinates.places):
            raise ValueError(
                "Population: head must be left out with one child, and where the space adapts the learning rate, which "
                "is the trunk's too, got one"
            )
        self.model, self.optimizer, self.space = model, optimizer, space
        self.count, self.window = children, window
        self.spread, self.least_spread, self.spread_decay = spread, least_spread, spread_decay
        self.tail = 0 if steps is None else round(tail * steps)
        self.fallback = fallback and children > 1 and head is None
        self.steps, self.output = steps, output
        self.fitness = Fitness("Population", metric, valid, higher_is_better, space.jitter)
        self.alone = Alone(model, optimizer, space, output)
        self.ranks = Ranks(process_group, children)
        if self.head is not None and self.ranks.size > 1:
            raise ValueError(
                f"Population: head must be left out where processes share the children, got {self.ranks.size} of them; "
                "give one process all heads"
            )
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self.ranks.check_same(device, children=children, window=window, seed=seed, fallback=fallback)
        self.ranks.agree(t.detach() for t in (*model.parameters(), *model.buffers()))
        self.children = self._new_children() if children > 1 else None
        self.generator = torch.Generator().manual_seed(seed)
        self.mean = torch.zeros(self.coordinates.size, dtype=torch.float64, device="cpu")
        self.path: list[tuple[int, Tensor]] = []  # since which step, and where the mean was
        self.steps_done = self.windows = self.ties = self.skipped = 0
        self.step_of_window = 0
        self.settled = False
        self.fell_back: bool | None = None
        self.plain: Children | None = None  # the copy under the plain loss, once there are no other children
        self.found: list[Tensor] = []
        self.targets: Tensor  # their sum in a window, where processes share the children
        self.draws = self._drawn()
        self._moves: dict[str, object] = {}
        self._begin()

    def _new_children(self) -> Children:
        return self._copies(self.ranks, self.head, int(self.fallback))

    def _copies(self, ranks: Ranks, head: nn.Module | None = None, apart: int = 0) -> Children:
        return Children(self.model, unwrapped(self.optimizer), self.space, self.output, ranks, head, apart)

    # ---- What the user sees.

    @property
    def values(self) -> dict[str, Tensor]:
        return self.coordinates.values(self.mean)

    @property
    def in_turn(self) -> str | None:
        return self.children.in_turn if self.children is not None else None

    def move_to(self, **values: object) -> None:
        """Puts the mean where you want it, from the next window on; at once where the model trains alone.

        Args:
            values: by the parameters' names, a number for all of a vector; those that are left out stay.

        Raises:
            ValueError: for another name, size, or a value out of bounds. Nothing has moved then.
        """
        moved = self.coordinates.moved(self.mean, values)
        if self.children is not None and self.step_of_window:
            self._moves |= values  # this window's children are on their way
            return
        self.mean = moved
        if self.children is None:
            self.path.append((self.steps_done, moved))
        self._begin()

    def schedule(self) -> Schedule:
        """The values that were found, by training step: of each window those that it ended with (of one child, began).

        A run of its own under them can have all data, those of the validation too.

        Raises:
            ValueError: before the first window has ended.
        """
        record = {
            "controller": "Population",
            "children": self.count,
            "window": self.window,
            "steps": self.steps,
        }
        return Schedule.of_path("Population", self.space, self.path, record)

    def settle(self) -> None:
        """Ends the search: from here on the model trains alone, under the mean values of the last third of windows.

        A window that is not finished ends with the plain mean of its children whose weights are finite.
        """
        if self.settled:
            return
        if self.children is not None and self.step_of_window:
            alive = self.children.finite().double()
            if alive.any():
                self.children.merge(alive / alive.sum())
        last = self.path[-max(1, round(len(self.path) / 3)) :]
        if last:
            self.mean = torch.stack([mean for _, mean in last]).mean(0)
        self.path.append((self.steps_done, self.mean))
        if self.children is not None and self.fallback:
            self.plain = self._copies(Ranks(None, 1))
            self.plain.take(self.children)
        self.settled, self.children = True, None
        self._begin()
        if self.steps is None:
            self._choose()

    def _choose(self) -> None:
        """Between the model and the copy under the plain loss, once."""
        plain, self.plain = self.plain, None
        if plain is None:
            return
        ours, target = self.fitness.validation.predicted(self.alone.predict)
        theirs, _ = self.fitness.validation.predicted(plain.predict)
        ahead = torch.tensor(int(self.fitness.ahead(torch.cat([ours, theirs]), target)), device=target.device)
        self.ranks.agree([ahead])
        self.fell_back = not bool(ahead)
        if self.fell_back:
            plain.saw_the_model()
            plain.merge(torch.ones(1, dtype=torch.float64, device="cpu"))
            self.mean = torch.zeros_like(self.mean)
            self.path = [(0, self.mean)]
            self._begin()

    def step(self, batch: Batch) -> PopulationReport:
        """One training step of all children; after the last of a window they are judged, and become one.

        Args:
            batch: inputs and target. Several inputs are a sequence or a mapping.

        Whatever raises, in the model, the loss or the metric: the window starts again with the next step, and the model
        is as at its start.

        Raises:
            TypeError: for a batch that is no pair.
            ValueError: for an empty batch, a metric that is no number, a model whose weights somebody else has changed
                inside a window, and an optimizer of other parameters than at the start.
        """
        inputs, target = checked("Population", "batch", batch)
        # A window that would not be finished is not begun.
        at_its_start = self.windows > 0 and not self.step_of_window and not self.settled
        if at_its_start and self.steps is not None and self.steps - self.steps_done < self.window + self.tail:
            self.settle()
        try:
            return self._step(inputs, target)
        except BaseException:
            # What the children have done since the window's start is lost; the model was not touched.
            if self.children is not None:
                self._begin()
            raise

    def _step(self, inputs: Any, target: Tensor) -> PopulationReport:
        if self.children is not None and not self.step_of_window:
            self.children.spread()
        if self.ranks.size > 1:
            self.targets = self.targets.to(target.device) + target.detach().double().sum()
        losses = (self.children or self.alone).train(inputs, target, self._placed(target))
        if self.fallback and self.children is not None:
            losses = losses[:-1]
        if self.plain is not None:
            self.plain.train(inputs, target, self._defaults(target))
        # Schedulers look at this to see that they come after a step.
        self.optimizer._opt_called = True  # type: ignore[attr-defined]
        self.steps_done += 1
        if self.settled:
            if self.steps_done == self.steps:
                self._choose()
            return PopulationReport(losses.mean())
        self.step_of_window += 1
        every = max(1, self.window // 8)
        left = self.window - self.step_of_window
        if self.children is not None and left in (0, every):
            self.found.append(self.fitness.of(self.children.predict)[: self.ranks.children])
        if left:
            return PopulationReport(losses.mean())
        fitness = self._search() if self.children is not None else self._probe()
        self.windows += 1
        self._begin()
        return PopulationReport(losses.mean(), fitness)

    # ---- A window.

    def _begin(self) -> None:
        """Sets out from the mean."""
        if self._moves:
            self.mean, self._moves = self.coordinates.moved(self.mean, self._moves), {}
        self.step_of_window, self.found = 0, []
        self.targets = torch.zeros((), dtype=torch.float64, device="cpu")
        self.tried = (
            self.mean[None]
            if self.children is None
            else self.coordinates.clip(self.mean + self.spread * torch.cat([self.draws, -self.draws]))
        )
        self._on_device: dict[str, Tensor] = {}
        self._plain_on_device: dict[str, Tensor] = {}

    def _drawn(self) -> Tensor:
        return torch.randn(
            self.count // 2,
            self.coordinates.size,
            generator=self.generator,
            dtype=torch.float64,
            device="cpu",
        )

    def _placed(self, target: Tensor) -> dict[str, Tensor]:
        """What the children train under."""
        if not self._on_device:
            tried = self.tried
            if self.children is not None:
                tried = self.ranks.own(tried)
                if self.fallback:
                    tried = torch.cat([tried, torch.zeros_like(tried[:1])])
            self._on_device = self._on(target, tried)
        return self._on_device

    def _defaults(self, target: Tensor) -> dict[str, Tensor]:
        if not self._plain_on_device:
            self._plain_on_device = self._on(target, torch.zeros_like(self.mean[None]))
        return self._plain_on_device

    def _on(self, target: Tensor, tried: Tensor) -> dict[str, Tensor]:
        return {
            name: v.to(target.device, torch.float32) for name, v in self.coordinates.values(tried).items()
        }

    def _search(self) -> Tensor:
        """Recombines the children; their fitness."""
        assert self.children is not None
        self.ranks.check_same_targets(self.targets)
        fitness = self.ranks.gathered(torch.stack(self.found).mean(0)).cpu()
        finite = fitness.isfinite()
        known = fitness[finite]
        if not len(known):
            self.draws = self._drawn()
            self.skipped += 1
            if self.skipped == 1:
                warnings.warn(
                    "Population: no child had a finite fitness; the window was undone. Look at the learning rate, and "
                    "at what the metric needs of the validation data. Population.skipped counts such windows",
                    stacklevel=3,
                )
            return fitness
        deviation = float(known.std(correction=0))
        if deviation > 1e-7 * max(1.0, float(known.abs().max())):
            score = (fitness - known.mean()) / deviation
            weight = torch.where(finite, 2 * score, -torch.inf).softmax(0)
            self.mean = self.coordinates.clip(self.mean + weight @ (self.tried - self.mean))
            self.spread = max(self.least_spread, self.spread * self.spread_decay)
        else:
            weight = finite.double() / len(known)
            self.ties += 1
            if self.ties == 1:
                warnings.warn(
                    "Population: all children had the same fitness; the values stay. Where that goes on, the metric "
                    "does not see what the space changes. Population.ties counts such windows",
                    stacklevel=3,
                )
        self.children.merge(weight)
        self.path.append((self.steps_done - self.window, self.mean))
        self.draws = self._drawn()
        return fitness

    def _probe(self) -> Tensor:
        """Moves the margins against what the metric would gain from; the fitness."""
        assert self.space.shift is not None
        fitness, slope = self.fitness.slopes(self.alone.predict)
        slope = slope - slope.mean()
        largest = float(slope.abs().max())
        if not slope.isfinite().all():
            self.skipped += 1
        elif largest == 0:
            self.ties += 1
        else:
            place = self.coordinates.places[self.space.shift]
            moved = self.mean.clone()
            moved[place] -= slope / largest
            self.mean = self.coordinates.clip(moved)
        self.path.append((self.steps_done, self.mean))
        return fitness[None]

    # ---- State.

    def state_dict(self) -> dict[str, Any]:
        """All that a run needs to go on to the same bits, beside the model's and the optimizer's own."""
        return {
            "names": {p.name: p.count for p in self.coordinates.parameters},
            "children": None if self.children is None else self.children.state_dict(),
            "plain": None if self.plain is None else self.plain.state_dict(),
            "count": self.count,
            "fallback": self.fallback,
            "mean": self.mean.clone(),
            "draws": self.draws.clone(),
            "moves": dict(self._moves),
            "path": [(step, mean.clone()) for step, mean in self.path],
            "found": [f.clone() for f in self.found],
            "generator": self.generator.get_state(),
            **{name: getattr(self, name) for name in _NUMBERS},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a state. Load the model's and the optimizer's first.

        Raises:
            ValueError: for the state of another space, model or number of children. Nothing has changed then.
        """
        names = {p.name: p.count for p in self.coordinates.parameters}
        if state["names"] != names or state["count"] != self.count or state.get("fallback") != self.fallback:
            raise ValueError(
                f"Population: the state must be of {self.count} children, fallback={self.fallback} and the parameters "
                f"{names}, got {state['count']}, {state.get('fallback')} and {state['names']}"
            )
        if state["children"] is None:
            self.children = None
        else:
            children = self.children or self._new_children()
            children.load_state_dict(state["children"])
            self.children = children
        self.plain = None
        if state["plain"] is not None:
            self.plain = self._copies(Ranks(None, 1))
            self.plain.load_state_dict(state["plain"])
        self.mean, self.draws = state["mean"].clone(), state["draws"].clone()
        self.path = [(step, mean.clone()) for step, mean in state["path"]]
        self.generator.set_state(state["generator"])
        for name in _NUMBERS:
            setattr(self, name, state[name])
        step, self._moves = self.step_of_window, {}
        self._begin()
        self.step_of_window, self._moves = step, dict(state["moves"])
        self.found = [f.clone() for f in state["found"]]


_NUMBERS = ("spread", "steps_done", "windows", "ties", "skipped", "step_of_window", "settled", "fell_back")
