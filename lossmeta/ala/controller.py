"""The paper's controller: a policy that moves loss parameters while the model trains."""

from __future__ import annotations

import copy
import math
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import lossmeta
from lossmeta._batches import Batch, Output, call_model, prediction_of
from lossmeta._checks import check_at_least_one, check_fraction, check_positive_and_finite, dtype_name
from lossmeta._model_state import RandomState, evaluating
from lossmeta.ala._fitness import Fitness
from lossmeta.ala._reinforce import Episode, Experience, Reinforce
from lossmeta.ala._states import States
from lossmeta.ala._validation import Validation
from lossmeta.ala.policy import PARTS, Policy, choose
from lossmeta.ala.records import ControllerReport
from lossmeta.ala.schedule import Schedule
from lossmeta.ala.space import LEARNING_RATE, Coordinates, LossSpace
from lossmeta.ala.space_loss import SpaceLoss


class Controller:
    r"""Adapts a loss to a metric by a learned policy, as the paper does.

    After every K training steps the policy sees validation statistics of each entry of the loss's parameters, and moves
    it one step down, not at all, or up: :math:`\Phi_{t+1} = \Phi_t + a_t`. Its reward is whether the metric, higher
    the better here, then improved (Eq. 4 and 5),

    .. math:: r_t = \mathrm{sign}(M_{t+1} - M_t), \qquad M_{t+1} = \sum_{j=1}^K \gamma^{K-j} M(f_{w_j}),

    and it learns by REINFORCE with a moving baseline, from the latest rewards and from remembered ones (Eq. 3).
    Training goes on as ever, in the caller's loop. In the first K steps the loss has its default values.

    Processes that train one model together must all call :meth:`step`; the values of the first one hold.

    For most purposes :class:`Population` is the better choice: ``docs/results/ala.md`` has the comparison.

    Args:
        space: of losses.
        metric: what the loss is adapted to: a metric of :mod:`lossmeta.metrics`, a single one of torchmetrics, or a
            function ``metric(prediction, target) -> number``; or several as pairs ``(metric, weight)``, whose rewards
            are averaged with these weights.
        valid: what statistics and metric are measured on: a batch ``(inputs, target)``, or batches that start again
            where they end. All of it is predicted ``evaluations`` times every K steps: that is what a controller costs.
        steps: of the whole training.
        children: models that train side by side, each with a loss of its own, and share the policy.
        window: K.
        discount: :math:`\gamma`.
        evaluations: at how many of the K steps the metric is measured. They split the weights of Eq. 4 evenly; K of
            them are the sum as it stands.
        step_size: of an action, in units of each parameter's scale. The paper's :math:`\beta = 0.1` is one unit of
            :class:`ClassCorrelation` and :class:`DistanceMixture`.
        episode: T, time steps whose rewards an action answers for.
        hidden: sizes of the policy's hidden layers.
        history: time steps that the policy sees.
        parts: what the policy sees, see :class:`Policy`.
        learning_rate: of the policy, by Adam.
        memory: experiences that are remembered.
        batch: experiences that an update of the policy takes, the latest ones among them.
        rewarded_on: what the metric is measured on where that is not ``valid``, such as training data.
        policy: to start from: a :class:`Policy`, which then learns in place, or the path of a file. ``hidden``,
            ``history`` and ``parts`` are then the policy's own.
        learn: whether the policy learns.
        record: whether the values of each window are kept for :meth:`schedule`: 4 bytes an entry and window.
        higher_is_better: the metric's direction; asked of the metric where it is not given, for a function ``True``.
        output: what of the model's output is the prediction, see :func:`lossmeta.adalfl.meta_gradient`.
        seed: of the policy's first weights, its actions and its memory.

    Attributes:
        losses: of the children, each a :class:`SpaceLoss`.
        policy: as learned so far.
        steps_done: training steps so far.
        windows: finished ones.
        ties: windows without a change of the metric, whose reward is 0.
        skipped: windows whose metric was not finite: they bring no reward and no action.

    Raises:
        TypeError: for arguments of another type.
        ValueError: for options out of range, a space that adapts the learning rate, which is not the loss's, a policy
            that sees other statistics than the space has, and validation data without samples.

    Sources:
        Huang et al., "Addressing the Loss-Metric Mismatch with Adaptive Loss Alignment" (2019).

    Example:
        >>> model = torch.nn.Linear(4, 3)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> (x, y), valid = [(torch.randn(16, 4), torch.randint(3, (16,))) for _ in range(2)]
        >>> controller = lossmeta.ala.Controller(
        ...     lossmeta.ala.ClassCorrelation(3), lossmeta.metrics.ErrorRate(), valid, steps=600
        ... )
        >>> for _ in range(600):
        ...     loss = controller(model(x), y)  # was: torch.nn.functional.cross_entropy(model(x), y)
        ...     optimizer.zero_grad()
        ...     loss.backward()
        ...     optimizer.step()
        ...     report = controller.step(model)
        >>> controller.windows, list(controller.values)
        (3, ['diagonal', 'pairs'])
    """

    def __init__(
        self,
        space: LossSpace,
        metric: Any,
        valid: Batch | Iterable[Batch],
        *,
        steps: int,
        children: int = 1,
        window: int = 200,
        discount: float = 0.9,
        evaluations: int = 4,
        step_size: float = 1.0,
        episode: int = 1,
        hidden: Sequence[int] = (32, 32),
        history: int = 10,
        parts: Sequence[str] = PARTS,
        learning_rate: float = 1e-3,
        memory: int = 100,
        batch: int = 32,
        rewarded_on: Batch | Iterable[Batch] | None = None,
        policy: Policy | str | os.PathLike[str] | None = None,
        learn: bool = True,
        record: bool = True,
        higher_is_better: bool | None = None,
        output: Output = None,
        seed: int = 0,
    ) -> None:
        for name, count in (
            ("steps", steps),
            ("children", children),
            ("window", window),
            ("evaluations", evaluations),
            ("episode", episode),
            ("memory", memory),
            ("batch", batch),
        ):
            _check_integer("Controller", name, count)
            check_at_least_one("Controller", name, count)
        _check_integer("Controller", "seed", seed)
        if evaluations > window:
            raise ValueError(
                f"Controller: evaluations must be at most the window's {window}, got {evaluations}"
            )
        check_fraction("Controller", "discount", discount)
        check_positive_and_finite("Controller", "discount", discount)
        check_positive_and_finite("Controller", "step_size", step_size)
        check_positive_and_finite("Controller", "learning_rate", learning_rate)
        self.space, self.coordinates = space, Coordinates(space, "Controller")
        if LEARNING_RATE in self.coordinates.places:
            raise ValueError(
                f"Controller: space must not adapt the {LEARNING_RATE}, which is the optimizer's; leave LearningRate "
                "out, or use Population"
            )
        self.metrics, self.weights = _weighted(metric)
        self.valid = Validation("Controller", valid)
        self.rewarded_on = (
            self.valid if rewarded_on is None else Validation("Controller", rewarded_on, "rewarded_on")
        )
        self.fitness = [
            Fitness("Controller", m, self.rewarded_on.valid, higher_is_better, 0.0) for m in self.metrics
        ]
        self.steps, self.window, self.step_size, self.episode = steps, window, step_size, episode
        self.measured = _measured(window, discount, evaluations)
        self.output, self.learns = output, learn
        self.losses = [SpaceLoss(space) for _ in range(children)]
        self.generator = torch.Generator().manual_seed(seed)
        self.groups: dict[str, list[str]] = {}
        for p in self.coordinates.parameters:
            self.groups.setdefault(p.policy or p.name, []).append(p.name)
        self._training = learning_rate, memory, batch
        self._options: dict[str, Any] = {"hidden": hidden, "history": history, "parts": parts}
        given = Policy.load(policy) if isinstance(policy, (str, os.PathLike)) else policy
        if given is not None and not isinstance(given, Policy):
            raise TypeError(f"Controller: policy must be a Policy or a path, got {type(policy).__name__}")
        for w in () if given is None else given.parameters():
            if w.dtype != torch.float32 or w.device.type != "cpu":
                raise ValueError(
                    f"Controller: policy must be float32 on the CPU, got {dtype_name(w)} on {w.device}; call "
                    "policy.float().cpu()"
                )
            if learn and not w.requires_grad:
                raise ValueError(
                    "Controller: policy must be trainable where it learns, got frozen weights; call "
                    "policy.requires_grad_(), or give learn=False"
                )
        if given is not None and given.features.keys() != self.groups.keys():
            raise ValueError(
                f"Controller: policy must move {', '.join(self.groups)}, as the space asks for, got one that moves "
                f"{', '.join(given.features)}"
            )
        with torch.random.fork_rng(devices=[]):
            # Refuses bad options now, though the statistics are not known yet.
            self._layout = Policy({"any": 1}, **self._options).layout
        self.learner: Reinforce | None = None
        self.states: list[dict[str, States]] = []
        if given is not None:
            self._begin(given)
        self.episodes = [Episode() for _ in range(children)]
        self.pending: list[Experience | None] = [None] * children
        # The first step of windows, and the coordinates that hold in each.
        self.paths: list[list[tuple[int, Tensor]]] | None = [[] for _ in range(children)] if record else None
        self.before: Tensor | None = None  # the metrics of the last window, [metrics, children]
        self.sum: Tensor | None = None  # of this one so far
        self.steps_done = self.windows = self.ties = self.skipped = 0

    # ---- What the user sees.

    def __call__(self, prediction: Tensor, target: Tensor) -> Tensor:
        """The loss of the only child; with several use ``losses``."""
        if len(self.losses) > 1:
            raise ValueError(
                f"Controller: with {len(self.losses)} children the loss must be one of losses, got a call of the "
                "controller"
            )
        found: Tensor = self.losses[0](prediction, target)
        return found

    @property
    def values(self) -> dict[str, Tensor]:
        """Of the first child's loss, by name, on the CPU. Move them by ``losses[0].move_to``."""
        return self.losses[0].values

    @property
    def policy(self) -> Policy | None:
        """``None`` before the first window has ended, unless one was given."""
        return None if self.learner is None else self.learner.policy

    def save_policy(self, path: str | os.PathLike[str]) -> None:
        """Writes the policy, and how it was learned, for ``Controller(policy=path)``.

        Raises:
            ValueError: before the first window has ended, when there is no policy yet.
            OSError: where the file cannot be written.
        """
        policy = self.policy
        if policy is None:
            raise ValueError(
                f"Controller.save_policy: a window of {self.window} steps must have ended, got {self.steps_done} steps"
            )
        if self.learns:
            policy.record = self._record()
        policy.save(path)

    def _record(self) -> dict[str, Any]:
        """How policy and values came about."""
        return {
            "lossmeta": lossmeta.__version__,
            "space": [[p.name, p.count, p.low, p.high, p.scale] for p in self.coordinates.parameters],
            "metric": [type(m).__name__ if hasattr(m, "update") else _name(m) for m in self.metrics],
            "weights": self.weights,
            "steps": self.steps,
            "steps_done": self.steps_done,
            "window": self.window,
            "step_size": self.step_size,
            "children": len(self.losses),
            "learned": self.learns,
        }

    def schedule(self, child: int = 0) -> Schedule:
        """The values of a child's loss by training step, to train under once more.

        Raises:
            ValueError: before the first window has ended, and where they were not recorded.
        """
        if self.paths is None:
            raise ValueError("Controller: record must be True for a schedule, got False")
        described = self._record()
        return Schedule.of_path(
            "Controller", self.space, self.paths[child], {"controller": "Controller", **described}
        )

    @torch.inference_mode(False)  # where the policy cannot learn
    def step(self, model: nn.Module | Sequence[nn.Module]) -> ControllerReport | None:
        """To be called after every step of the optimizer; measures the metric now and then, and moves the loss.

        Whatever raises, in the model, the metric or the statistics: nothing has changed, and the step is not counted.

        Args:
            model: that trains, or of several children a list.

        Returns:
            At the end of a window what happened, else ``None``.

        Raises:
            TypeError: for what is no model.
            ValueError: for another number of models than ``children``, a metric that is no number, a space whose
                statistics do not fit its parameters, and a policy that sees another number of them.
        """
        place = self.steps_done % self.window + 1
        weight, last = self.measured.get(place), place == self.window
        found: Tensor | None = None
        statistics: list[dict[str, Tensor]] = []
        if weight is not None:
            models: list[Any] = list(model) if isinstance(model, (list, tuple)) else [model]
            self._check(models)
            measured = []
            for one, loss in zip(models, self.losses, strict=True):
                values, seen = self._look(one, loss, last)
                measured.append(values)
                statistics.append(seen)
            found = weight * torch.stack(measured, 1)
            found = found if self.sum is None else self.sum.to(found.device) + found
            if last:
                with torch.autocast("cpu", enabled=False):
                    return self._act(found.cpu(), statistics)
            self.sum = found
        self.steps_done += 1
        return None

    # ---- A window's end.

    def _check(self, models: list[Any]) -> None:
        for one in models:
            if not isinstance(one, nn.Module):
                raise TypeError(f"Controller: model must be a torch.nn.Module, got {type(one).__name__}")
        if len(models) != len(self.losses):
            raise ValueError(
                f"Controller: model must be {len(self.losses)} models, one of each child, got {len(models)}"
            )

    @torch.no_grad()
    def _look(self, model: nn.Module, loss: SpaceLoss, last: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """The metrics ``[metrics]`` now and, at a window's end, the statistics by parameter.

        The random numbers of the training go on as without: iterating over a DataLoader draws one.
        """
        random = RandomState(next((p.device for p in model.parameters()), torch.device("cpu")))
        try:
            return self._seen(model, loss, last)
        finally:
            random.bring_back()

    def _seen(self, model: nn.Module, loss: SpaceLoss, last: bool) -> tuple[Tensor, dict[str, Tensor]]:
        def predict(inputs: Any) -> Tensor:
            return prediction_of("Controller", call_model(model, inputs), self.output)[None]

        with evaluating(model):
            predictions, target = self.rewarded_on.predicted(predict)
            values = torch.stack([f.of_predictions(predictions, target)[0] for f in self.fitness])
            if not last:
                return values, {}
            if self.rewarded_on is not self.valid:
                predictions, target = self.valid.predicted(predict)
        prediction = predictions[0].float() if predictions.dtype != torch.float64 else predictions[0]
        seen = self.space.statistics(prediction, target, loss.placed(prediction))
        for p in self.coordinates.parameters:
            t = seen.get(p.name)
            if t is None or t.dim() != 2 or len(t) != p.count or not t.shape[1]:
                got = "none" if t is None else str(list(t.shape))
                raise ValueError(
                    f"Controller: the space's statistics of {p.name} must be [{p.count}, S], got {got}"
                )
        return values, {name: t.detach().float().cpu() for name, t in seen.items()}

    def _act(self, found: Tensor, statistics: list[dict[str, Tensor]]) -> ControllerReport:
        """Rewards the last actions, learns, and takes the next ones."""
        for name, members in self.groups.items():
            widths = {p: statistics[0][p].shape[1] for p in members}
            if len(set(widths.values())) > 1:
                raise ValueError(
                    f"Controller: parameters that share the policy {name!r} must have equally many statistics of an "
                    f"entry, got {widths}"
                )
        grouped = [
            {name: torch.cat([seen[p] for p in members]) for name, members in self.groups.items()}
            for seen in statistics
        ]
        learner = self._ready({name: t.shape[1] for name, t in grouped[0].items()})
        places = [self._places(loss) for loss in self.losses]
        progress = min(1.0, (self.steps_done + 1) / self.steps)
        # From here on nothing raises but for want of memory.
        finite = found.isfinite().all(0)
        reward = None
        latest = []
        if self.before is not None:
            # The sign of NaN is 0.
            sign = (found - self.before).sign().where(finite & self.before.isfinite().all(0), torch.nan)
            weights = torch.tensor(self.weights, dtype=torch.float64, device="cpu")
            reward = (weights @ sign) / weights.sum()
            self._count(finite, sign)
            rewarded = [
                (i, experience, float(reward[i]))
                for i, experience in enumerate(self.pending)
                if experience is not None and math.isfinite(float(reward[i]))
            ]
            gains = learner.gains([r for _, _, r in rewarded])
            for (i, experience, _), gain in zip(rewarded, gains, strict=True):
                latest += self.episodes[i].rewarded(experience, gain, self.episode)
            if self.learns:
                learner.learn(latest)
        elif not finite.all():
            self._count(finite, None)
        entropies = []
        for i, loss in enumerate(self.losses):
            self.pending[i] = None
            if finite[i]:
                self.pending[i], entropy = self._move(
                    i, loss, grouped[i], places[i], progress, learner.policy
                )
                entropies.append(entropy)
        self._agree()
        if self.paths is not None:
            for path, loss in zip(self.paths, self.losses, strict=True):
                path.append((self.steps_done + 1, loss._u.float()))
        self.before = found.where(finite, found if self.before is None else self.before)
        if not self.before.isfinite().all(0).any():
            self.before = None
        self.sum = None
        self.steps_done += 1
        self.windows += 1
        mean = sum(entropies) / len(entropies) if entropies else math.nan
        return ControllerReport(found / sum(self.measured.values()), reward, mean)

    def _ready(self, features: dict[str, int]) -> Reinforce:
        """What learns the policy, made as soon as it is known what there is to see."""
        if self.learner is None:
            return self._begin(self._new_policy(features))
        if self.learner.policy.features != features:
            raise ValueError(
                f"Controller: policy must see {features} statistics of an entry, as the space has them, got one that "
                f"sees {self.learner.policy.features}"
            )
        return self.learner

    def _begin(self, policy: Policy) -> Reinforce:
        learning_rate, memory, batch = self._training
        self.learner = Reinforce(policy, learning_rate, memory, batch, self.generator)
        self.states = [{name: States(policy, name) for name in self.groups} for _ in self.losses]
        return self.learner

    def _new_policy(self, features: dict[str, int]) -> Policy:
        with torch.random.fork_rng(devices=[]):
            # Not torch.manual_seed, which seeds the GPUs too.
            torch.default_generator.manual_seed(
                int(torch.randint(1 << 31, (), generator=self.generator, device="cpu"))
            )
            return Policy(features, **self._options)

    def _places(self, loss: SpaceLoss) -> dict[str, Tensor]:
        """Where each entry stands between its bounds, in [-1, 1], by the network's name."""
        c = self.coordinates
        place = ((loss._u - c.low) / (c.high - c.low) * 2 - 1).float()
        return {
            name: torch.cat([place[c.places[p]] for p in members]) for name, members in self.groups.items()
        }

    def _move(
        self,
        child: int,
        loss: SpaceLoss,
        statistics: dict[str, Tensor],
        places: dict[str, Tensor],
        progress: float,
        policy: Policy,
    ) -> tuple[Experience, float]:
        """One action of each entry; the experience and the policy's mean entropy."""
        u = loss._u.clone()
        seen, done, likely = {}, {}, {}
        entropy, entries = 0.0, 0
        for name, members in self.groups.items():
            states, known = self.states[child][name].observe(statistics[name], places[name], progress)
            uniform = torch.rand(len(states), generator=self.generator, device="cpu", dtype=torch.float32)
            actions, log_p, spread = choose(policy.of(name), states, uniform)
            actions = actions.where(known, 0)
            entropy += spread
            entries += len(states)
            start = 0
            for p in members:
                place = self.coordinates.places[p]
                count = place.stop - place.start
                u[place] += self.step_size * actions[start : start + count].double()
                start += count
            whole = bool(known.all())
            seen[name] = states if whole else states[known]
            done[name] = actions if whole else actions[known]
            likely[name] = log_p if whole else log_p[known]
        loss._set(u)
        return Experience(seen, done, likely), entropy / entries

    def _count(self, finite: Tensor, sign: Tensor | None) -> None:
        if not finite.all():
            if self.skipped == 0:
                warnings.warn(
                    "Controller: the metric was not finite; there is no reward and no action. Look at the learning "
                    "rate, and at what the metric needs of the validation data. Controller.skipped counts such windows",
                    stacklevel=5,
                )
            self.skipped += 1
        elif sign is not None and not sign.any():
            if self.ties == 0:
                warnings.warn(
                    "Controller: the metric has not changed; the reward is 0. Where that goes on, the metric does not "
                    "see what the loss changes. Controller.ties counts such windows",
                    stacklevel=5,
                )
            self.ties += 1

    def _agree(self) -> None:
        """Processes that train one model together train it by the values of the first."""
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            kept = [[loss._u for loss in self.losses]]
            dist.broadcast_object_list(kept, src=0)
            for loss, u in zip(self.losses, kept[0], strict=True):
                loss._set(u)

    # ---- State.

    def state_dict(self) -> dict[str, Any]:
        """All that a run needs to go on to the same bits, beside the models' and the optimizers' own."""
        return {
            "names": {p.name: p.count for p in self.coordinates.parameters},
            "count": len(self.losses),
            "window": self.window,
            "values": [loss._u.clone() for loss in self.losses],
            "layout": None if self.learner is None else copy.deepcopy(self.learner.policy.layout),
            "learner": None if self.learner is None else self.learner.state_dict(),
            "states": [{name: s.state_dict() for name, s in states.items()} for states in self.states],
            "episodes": [[dict(vars(e)) for e in episode.steps] for episode in self.episodes],
            "pending": [None if e is None else dict(vars(e)) for e in self.pending],
            "paths": None if self.paths is None else [list(path) for path in self.paths],
            "before": self.before,
            "sum": self.sum,
            "generator": self.generator.get_state(),
            **{name: getattr(self, name) for name in _NUMBERS},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a state.

        Raises:
            ValueError: for the state of another space, window, number of children or layout of the policy. Nothing has
                changed then.
        """
        names = {p.name: p.count for p in self.coordinates.parameters}
        if state["names"] != names or state["count"] != len(self.losses):
            raise ValueError(
                f"Controller: the state must be of {len(self.losses)} children and the parameters {names}, got "
                f"{state['count']} and {state['names']}"
            )
        if state["window"] != self.window:
            raise ValueError(
                f"Controller: the state must be of windows of {self.window} steps, got {state['window']}"
            )
        layout = state["layout"]
        if layout is None:
            self.learner, self.states = None, []
        else:
            own = (
                {**self._layout, "features": layout["features"]}
                if self.policy is None
                else self.policy.layout
            )
            if layout != own:
                raise ValueError(f"Controller: the state must be of a policy of layout {own}, got {layout}")
            learner = self._ready(layout["features"])
            learner.load_state_dict(state["learner"])
            for own, saved in zip(self.states, state["states"], strict=True):
                for name, s in own.items():
                    s.load_state_dict(saved[name])
        for loss, u in zip(self.losses, state["values"], strict=True):
            loss._set(u.clone())
        self.episodes = [Episode([Experience(**e) for e in steps]) for steps in state["episodes"]]
        self.pending = [None if e is None else Experience(**e) for e in state["pending"]]
        self.paths = None if state["paths"] is None else [list(path) for path in state["paths"]]
        self.before, self.sum = state["before"], state["sum"]
        self.generator.set_state(state["generator"])
        for name in _NUMBERS:
            setattr(self, name, state[name])


_NUMBERS = ("steps_done", "windows", "ties", "skipped")


def _weighted(metric: Any) -> tuple[list[Any], list[float]]:
    if not isinstance(metric, (list, tuple)):
        return [metric], [1.0]
    if not metric or not all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in metric):
        raise ValueError(f"Controller: metric must be one, or pairs (metric, weight), got {metric!r}")
    for _, weight in metric:
        check_positive_and_finite("Controller", "a metric's weight", weight)
    return [m for m, _ in metric], [float(weight) for _, weight in metric]


def _check_integer(name: str, argument: str, number: Any) -> None:
    if not isinstance(number, int):
        raise TypeError(f"{name}: {argument} must be an int, got {type(number).__name__}")


def _measured(window: int, discount: float, evaluations: int) -> dict[int, float]:
    """At which steps of a window, from 1, the metric is measured, and its weight: the sum of Eq. 4 in as many parts."""
    weights = torch.tensor(
        [discount ** (window - j) for j in range(1, window + 1)], dtype=torch.float64, device="cpu"
    )
    # Steps whose share of the weights, counted from the end, passes 0/n, 1/n, ...: the last one is always there.
    share = weights.flip(0).cumsum(0) / weights.sum()
    found: dict[int, float] = {}
    back = -1
    for i in range(evaluations):
        back = max(back + 1, int((share <= i / evaluations + 1e-12).sum()))
        if back < window:
            found[window - back] = 0.0
    if evaluations == window:
        return {j: float(w) for j, w in enumerate(weights, 1)}
    return dict.fromkeys(sorted(found), 1.0)


def _name(metric: Any) -> str:
    return str(getattr(metric, "__name__", type(metric).__name__))
