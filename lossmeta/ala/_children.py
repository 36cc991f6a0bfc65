"""Copies of a model that train side by side on the same batches, each under a loss of its own."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lossmeta._batches import Output, call_model, prediction_of
from lossmeta._model_state import RandomState, Watch, evaluating
from lossmeta._optimizers import refuse_changed_steps, shadow, unwrapped
from lossmeta.ala._heads import shared_names, without_lost
from lossmeta.ala._places import Places
from lossmeta.ala._ranks import Ranks
from lossmeta.ala._separable import check_separable
from lossmeta.ala._step_length import before_step, scale_step
from lossmeta.ala.space import LossSpace

Values = dict[str, Tensor]


class Alone:
    """The model itself, as the only child."""

    def __init__(self, model: nn.Module, optimizer: Optimizer, space: LossSpace, output: Output) -> None:
        self.model, self.optimizer, self.space, self.output = model, optimizer, space, output

    def train(self, inputs: Any, target: Tensor, values: Values) -> Tensor:
        """One step, with values of one child, ``[1, ...]``; the loss ``[1]``."""
        self.optimizer.zero_grad()
        prediction = _predicted(self.model, inputs, self.output)
        _refuse_half(prediction)
        losses, slope = self.space.of_children(prediction.detach()[None], target, values)
        prediction.backward(slope[0])  # type: ignore[no-untyped-call]
        before = before_step(values, [p for g in self.optimizer.param_groups for p in g["params"]])
        self.optimizer.step()
        scale_step(before, {name: v[0] for name, v in values.items()})
        self.optimizer.zero_grad()
        return losses

    @torch.no_grad()
    def predict(self, inputs: Any) -> Tensor:
        """In evaluation mode, ``[1, N, ...]``."""
        with evaluating(self.model):
            return _predicted(self.model, inputs, self.output)[None]


class Children:
    """B copies. Weights, buffers and the optimizer's state are one tensor each, ``[B, ...]``.

    Where several processes share the children, B are those of this one. ``apart`` more come after them, which go their
    own way: they neither become the model nor does the model become them, unless somebody else has changed it.

    Of a head alone, and none apart, the weights, buffers and states are ``[B, ...]``. The rest of the model, the trunk,
    is one, whose gradient is the mean of the children's.

    Attributes:
        shared: names of the trunk's trained weights and of its buffers.
        in_turn: why the children run one after the other, or ``None`` where they run as one.

    Raises:
        TypeError: for an optimizer whose step for one child would depend on the others.
        ValueError: for parameters of the optimizer that are not the model's, and a head without some of its own.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        space: LossSpace,
        output: Output,
        ranks: Ranks,
        head: nn.Module | None = None,
        apart: int = 0,
    ) -> None:
        self.model, self.optimizer, self.space, self.output = model, unwrapped(optimizer), space, output
        self.ranks, self.joined, self.count = ranks, ranks.children, ranks.children + apart
        self.head = head
        named = dict(model.named_parameters())
        names = {id(p): name for name, p in named.items()}
        self.trained: dict[str, nn.Parameter] = {}
        for group in self.optimizer.param_groups:
            for p in group["params"]:
                if id(p) not in names:
                    raise ValueError(
                        f"Population: the optimizer must hold parameters of the model alone, got one {list(p.shape)} "
                        "that is not"
                    )
                if p.requires_grad:
                    self.trained[names[id(p)]] = p
        for name, p in named.items():
            if nn.parameter.is_lazy(p):
                raise ValueError(
                    f"Population: the model must have its weights, {name} is still to be made; run it on a batch first"
                )
        if not self.trained:
            raise ValueError("Population: the optimizer must hold a parameter to train, got none")
        owners: dict[int, set[type[nn.Module]]] = {}
        for module in model.modules():
            for p in module._parameters.values():
                if p is not None:
                    owners.setdefault(id(p), set()).add(type(module))
        self.shared = set() if head is None else shared_names(model, head, self.trained)
        self.linear = {
            p
            for name, p in self.trained.items()
            if owners[id(p)] == {nn.Linear} and p.dim() == 2 and name not in self.shared
        }
        self.weights = {name: self._own_of(name, p, p in self.linear) for name, p in self.trained.items()}
        for w in self.weights.values():
            w.requires_grad_()
        self.buffers = {name: self._own_of(name, b) for name, b in model.named_buffers()}
        self.places = Places(model, {**self.trained, **dict(model.named_buffers())})
        self.device = next(iter(self.weights.values())).device
        self._own = {p: self.weights[name] for name, p in self.trained.items()}
        refuse_changed_steps("Population", self.optimizer, self.trained.values())
        self.per_element = check_separable(self.optimizer)
        self.stacked = shadow(self.optimizer, self._groups(), {})
        self._left: list[int] | None = None  # the versions of the model's weights as merge left them
        self.spread()
        self.in_turn: str | None = None
        self.checked: Any = None  # the autocast context for which it is known
        self.watch = Watch(model, self.device)

    # ---- Copies.

    def _own_of(self, name: str, t: Tensor, transposed: bool = False) -> Tensor:
        return t.detach().clone() if name in self.shared else self._stacked(t, transposed)

    @torch.no_grad()
    def _stacked(self, t: Tensor, transposed: bool = False) -> Tensor:
        if transposed:
            # As the gradient of a batched product with it comes: else each pass would copy it across its strides.
            return self._stacked(t.T).transpose(1, 2)
        return t.detach()[None].repeat(self.count, *[1] * t.dim())

    def _groups(self) -> list[dict[str, Any]]:
        """The optimizer's groups as they are now, a scheduler's doing included."""
        now = {p for group in self.optimizer.param_groups for p in group["params"] if p.requires_grad}
        if now != self._own.keys():
            raise ValueError(
                "Population: the parameters that are trained must stay those of the start, got others in the "
                "optimizer, or another requires_grad; make a new Population"
            )
        return [
            {**group, "params": [self._own[p] for p in group["params"] if p in self._own]}
            for group in self.optimizer.param_groups
        ]

    def _take_state(self, joined: int) -> None:
        """The optimizer's state, for the first children; the others keep their own."""
        for name, p in self.trained.items():
            w = self.weights[name]
            each = set() if name in self.shared else self.per_element
            before = self.stacked.state.get(w, {})
            self.stacked.state[w] = {
                key: self._stacked(value, p in self.linear) if key in each else _copied(value)
                for key, value in self.optimizer.state.get(p, {}).items()
            }
            for key in each & self.stacked.state[w].keys() & before.keys():
                self.stacked.state[w][key][joined:] = before[key][joined:]
            if not self.stacked.state[w]:
                del self.stacked.state[w]

    # ---- Passes.

    def train(self, inputs: Any, target: Tensor, values: Values) -> Tensor:
        """One step of each child, with its values ``[B, ...]``; the losses ``[B]``."""
        weights, alive = self.weights, None
        if self.shared:
            heads, alive = without_lost({k: w for k, w in weights.items() if k not in self.shared})
            weights = {**weights, **heads}
        predictions = self._of_each(inputs, weights)
        _refuse_half(predictions)
        losses, slope = self.space.of_children(predictions, target, values)
        for w in self.weights.values():
            w.grad = None
        if alive is not None:
            alive = alive & slope.flatten(1).isfinite().all(1)
            slope = slope.where(alive.view(-1, *[1] * (slope.dim() - 1)), 0)
        predictions.backward(slope)  # type: ignore[no-untyped-call]
        if alive is not None:
            for name, w in self.weights.items():
                if name in self.shared and w.grad is not None:
                    w.grad /= alive.sum().clamp_min(1)
        before = before_step(values, list(self.weights.values()))
        self.stacked.param_groups = self._groups()
        self.stacked.step()
        scale_step(before, values)
        for w in self.weights.values():
            w.grad = None
        return losses.detach()

    @torch.no_grad()
    def predict(self, inputs: Any) -> Tensor:
        """In evaluation mode, ``[B, N, ...]``."""
        with evaluating(self.model):
            return self._of_each(inputs, self.weights)

    def _of_each(self, inputs: Any, weights: Values) -> Tensor:
        """The predictions, ``[B, N, ...]``."""
        kind = self.device.type
        context = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        if self.checked != context:
            self.in_turn = self._why_in_turn(inputs)
            if self.head is not None:
                self._check_head(inputs)
            self.checked = context
        if self.in_turn is not None:
            return self._one_by_one(inputs, self.count)
        predictions, buffers = self._together(inputs, weights)
        self._keep(buffers)
        return predictions

    def _together(self, inputs: Any, weights: Values) -> tuple[Tensor, Values]:
        given = {**weights, **self.buffers}
        trunk = {name: t for name, t in given.items() if name in self.shared}
        stacked = {name: t for name, t in given.items() if name not in self.shared}

        def one(*own: Tensor) -> tuple[Tensor, ...]:
            tensors = {**trunk, **dict(zip(stacked, own, strict=True))}
            output = self.places.call(tensors, inputs)
            prediction = prediction_of("Population", output, self.output)
            return prediction, *(tensors[name] for name in self.buffers)

        # What does not depend on the children runs once; its buffers are no child's own.
        ways: Any = (0, *(None if name in self.shared else 0 for name in self.buffers))
        # The children draw the same random numbers, so that they differ in their loss alone.
        prediction, *buffers = torch.func.vmap(one, out_dims=ways, randomness="same")(*stacked.values())
        return prediction, dict(zip(self.buffers, buffers, strict=True))

    def _one_by_one(self, inputs: Any, count: int) -> Tensor:
        start = RandomState(self.device, self.watch, everything=True)
        predictions = []
        for i in range(count):
            start.bring_back()
            own = {name: self._of_child(name, b, i) for name, b in self.buffers.items()}
            tensors = {**{name: self._of_child(name, w, i) for name, w in self.weights.items()}, **own}
            output = self.places.call(tensors, inputs)
            for name, b in self.buffers.items():
                if tensors[name] is not own[name]:
                    self._of_child(name, b, i).copy_(tensors[name])
            predictions.append(prediction_of("Population", output, self.output))
        return torch.stack(predictions)

    def _of_child(self, name: str, t: Tensor, i: int) -> Tensor:
        return t if name in self.shared else t[i]

    @torch.no_grad()
    def _keep(self, buffers: Values) -> None:
        """Those that a pass has put in the place of the old ones."""
        for name, new in buffers.items():
            if new.data_ptr() != self.buffers[name].data_ptr():
                self.buffers[name].copy_(new)

    def _check_head(self, inputs: Any) -> None:
        """Refuses a model whose trunk cannot run once, and one whose predictions the head has no part in."""
        if self.in_turn is not None:
            raise ValueError(
                "Population: head must be left out for a model whose children run in turn, as their trunk must run "
                f"once; {self.in_turn}"
            )
        random = RandomState(self.device, self.watch, everything=True)
        buffers = {name: b.clone() for name, b in self.buffers.items()}
        found: tuple[Tensor | None, ...] = ()
        try:
            with torch.enable_grad():
                prediction, _ = self._together(inputs, self.weights)
                heads = [w for name, w in self.weights.items() if name not in self.shared]
                if prediction.requires_grad:
                    found = torch.autograd.grad(prediction.float().sum(), heads, allow_unused=True)
        finally:
            self._restore(buffers)
            random.bring_back()
        if all(g is None for g in found):
            raise ValueError(
                "Population: head must have a part in the model's predictions, got one that they do not depend on"
            )

    @torch.no_grad()
    def _why_in_turn(self, inputs: Any) -> str | None:
        """Why the children cannot run as one and give the same as each alone, or ``None``."""
        random = RandomState(self.device, self.watch, everything=True)
        buffers = {name: b.clone() for name, b in self.buffers.items()}
        try:
            together, _ = self._together(inputs, self.weights)
            self._restore(buffers)
            random.bring_back()
            alone = self._one_by_one(inputs, 1)
            whole = alone.dtype in (torch.float32, torch.float64)
            tolerance = 1e-3 if whole and not torch.is_autocast_enabled(self.device.type) else 5e-2
            if together.dtype != alone.dtype:
                return f"under torch.func.vmap the model gives {together.dtype}, otherwise {alone.dtype}"
            scale = float(alone.abs().max()) if alone.numel() else 0.0
            if not torch.allclose(together[:1], alone, rtol=0, atol=tolerance * scale, equal_nan=True):
                return "under torch.func.vmap the model gives another prediction"
            return None
        except Exception as error:
            return f"torch.func.vmap does not take the model ({type(error).__name__}: {error})".split("\n")[0]
        finally:
            self._restore(buffers)
            random.bring_back()

    def _restore(self, buffers: Values) -> None:
        for name, b in buffers.items():
            self.buffers[name].copy_(b)

    # ---- Becoming one again.

    @torch.no_grad()
    def merge(self, weight: Tensor) -> None:
        """The model, with its optimizer's state, becomes the mean of all children, those of other processes too.

        ``weight`` is of all of them.

        A child of weight 0 has no part in it, whatever it holds. What is no floating-point number is the heaviest's.

        Raises:
            ValueError: where somebody else has changed the model's weights since :meth:`saw_the_model`.
        """
        if self._versions != self._seen():
            raise ValueError(
                "Population: the model's weights must stay as they are inside a window, whose end overwrites them; "
                "change them when a report has a fitness"
            )
        weight = weight.to(self.device)
        heaviest = int(weight.argmax())
        # All is there before anything is overwritten.
        weights = {name: self._merged(name, w, weight, heaviest) for name, w in self.weights.items()}
        buffers = {name: self._merged(name, b, weight, heaviest) for name, b in self.buffers.items()}
        states = {
            p: {
                key: self._merged(name, value, weight, heaviest)
                if key in self.per_element
                else _copied(value)
                for key, value in self.stacked.state.get(self.weights[name], {}).items()
            }
            for name, p in self.trained.items()
        }
        for name, p in self.trained.items():
            p.copy_(weights[name])
        for name, b in self.model.named_buffers():
            b.copy_(buffers[name])
        for p, state in states.items():
            if state:
                self.optimizer.state[p].update(state)
        self._left = self._seen()

    def _merged(self, name: str, t: Tensor, weight: Tensor, heaviest: int) -> Tensor:
        if name in self.shared:
            return t.detach().clone()
        if not t.is_floating_point():
            return self.ranks.of_child(t, heaviest)
        own = self.ranks.own(weight)
        part = t[: self.joined]
        part = part.where(own.view(-1, *[1] * (t.dim() - 1)) > 0, 0)
        dtype = torch.promote_types(t.dtype, torch.float32)
        return self.ranks.total(torch.tensordot(own.to(dtype), part.to(dtype), 1)).to(t.dtype)

    def finite(self) -> Tensor:
        """Of which children, those of other processes too, all weights are."""
        own = torch.stack(
            [
                w.isfinite().all().expand(self.count)
                if name in self.shared
                else w.flatten(1).isfinite().all(1)
                for name, w in self.weights.items()
            ]
        ).all(0)
        return self.ranks.gathered(own[: self.joined].to(torch.uint8)).bool().cpu()

    @torch.no_grad()
    def spread(self) -> None:
        """Every child becomes the model, as it is now, and so does its optimizer's state.

        Those apart do so only where somebody else has changed the model since :meth:`merge`.
        """
        torch.clear_autocast_cache()  # a cast of the trunk as it was
        self.saw_the_model()
        joined = self.joined if self._versions == self._left else self.count
        for own, theirs in (
            (self.weights, self.trained.items()),
            (self.buffers, self.model.named_buffers()),
        ):
            for name, t in theirs:
                kept = own[name] if name in self.shared else own[name][:joined]
                kept.copy_(t.expand_as(kept))
        self._take_state(joined)

    def saw_the_model(self) -> None:
        """From here on nobody else may change the model's weights until :meth:`merge`."""
        self._versions = self._seen()

    def _seen(self) -> list[int]:
        return [p._version for p in self.trained.values()]

    @torch.no_grad()
    def take(self, other: Children) -> None:
        """The child of this one, which has only one, becomes the last of another's, with its optimizer's state."""
        for own, theirs in ((self.weights, other.weights), (self.buffers, other.buffers)):
            for name, t in own.items():
                t.copy_(theirs[name][-1:])
        for name, w in self.weights.items():
            self.stacked.state[w] = {
                key: value[-1:].clone() if key in self.per_element else _copied(value)
                for key, value in other.stacked.state.get(other.weights[name], {}).items()
            }
            if not self.stacked.state[w]:
                del self.stacked.state[w]

    def state_dict(self) -> dict[str, Any]:
        return {
            "weights": {name: w.detach().clone() for name, w in self.weights.items()},
            "buffers": {name: b.clone() for name, b in self.buffers.items()},
            "optimizer": {
                name: {key: _copied(value) for key, value in self.stacked.state.get(w, {}).items()}
                for name, w in self.weights.items()
            },
            "merged": self._left is not None,
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        for kind, own in (("weights", self.weights), ("buffers", self.buffers)):
            given = {name: t.shape for name, t in state[kind].items()}
            if given != {name: t.shape for name, t in own.items()}:
                raise ValueError(
                    f"Population: the {kind} of the state must be those of this model's children"
                )
        for kind, own in (("weights", self.weights), ("buffers", self.buffers)):
            for name, t in own.items():
                t.copy_(state[kind][name])
        for name, w in self.weights.items():
            saved = state["optimizer"][name]
            self.stacked.state[w] = {
                key: value.to(w.device if key in self.per_element else value.device).clone()
                if isinstance(value, Tensor)
                else value
                for key, value in saved.items()
            }
            if not saved:
                del self.stacked.state[w]
        self.saw_the_model()
        self._left = self._seen() if state.get("merged", True) else None


def _predicted(model: nn.Module, inputs: Any, output: Output) -> Tensor:
    return prediction_of("Population", call_model(model, inputs), output)


def _refuse_half(prediction: Tensor) -> None:
    if prediction.dtype == torch.float16:
        raise ValueError(
            "Population: the prediction must not be float16, whose gradients a GradScaler does not see here; use "
            "bfloat16"
        )


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else copy.deepcopy(value)
