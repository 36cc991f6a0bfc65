"""What every operator shares on its Python floor: fake kernels, autograd, transforms and the fallback."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from lossmeta import _build, _checks
from lossmeta.ops._precision import accumulation_dtype, in_full_precision
from lossmeta.ops._refusals import refusal

_functorch = torch._C._functorch
_BelowAutograd = torch._C._AutoDispatchBelowAutograd


class FallbackWarning(UserWarning):
    """An operator runs its slow reference because its device has no compiled kernel."""


OPERATORS: dict[str, Operator] = {}


class Operator:
    """A compiled operator ``torch.ops.lossmeta.<name>`` as torch sees it.

    Its schema has the tensor arguments first and the options after them. It returns ``num_outputs`` differentiable
    results, then whatever its backward wants saved. The backward operator is
    ``<name>_backward(*grad_outputs, *arguments, *saved, *needs)``. It returns a gradient for each argument that
    ``differentiable`` numbers, of a single one no tuple; ``needs`` holds one ``bool`` for each of them.

    Args:
        name: the operator's name.
        reference: the formula in plain PyTorch. It takes the same arguments and returns the differentiable outputs, one
            tensor or a tuple. It serves devices without a kernel, second derivatives, forward mode and nested
            transforms.
        fake: shapes and dtypes of the operator's results.
        differentiable: positions of the differentiable arguments; empty for an operator without gradient.
        num_tensors: how many of the arguments are tensors (or ``None`` in the place of one).
        num_outputs: how many of the results are differentiable.
        vmap: batching rule ``(info, in_dims, *args) -> (outputs, out_dims)``; without it the batch is looped over.
        vmap_backward: the same for the backward operator.
        shortcut: ``(i, rule)`` where output ``i`` already holds the gradient of the first differentiable argument.
            ``rule(output, grad_outputs, dtype)`` returns that gradient, where it can in that dtype, or ``None`` where
            the backward operator must compute it. The gradient's own derivative goes through the operator's backward,
            not through the reference.
    """

    def __init__(
        self,
        name: str,
        *,
        reference: Callable[..., Any],
        fake: Callable[..., Any],
        differentiable: Sequence[int] = (),
        num_tensors: int = 0,
        num_outputs: int = 1,
        vmap: Callable[..., Any] | None = None,
        vmap_backward: Callable[..., Any] | None = None,
        shortcut: tuple[int, Callable[..., Tensor | None]] | None = None,
    ) -> None:
        self.name = name
        self.reference = in_full_precision(reference)
        self.fake = fake
        self.differentiable = tuple(differentiable)
        self.num_tensors = num_tensors
        self.num_outputs = num_outputs
        self.shortcut = shortcut
        self.op = getattr(torch.ops.lossmeta, name).default
        self._tensor_arguments = [
            (i, argument.name, str(argument.type) == "Tensor")
            for i, argument in enumerate(self.op._schema.arguments)
            if "Tensor" in str(argument.type)
        ]
        OPERATORS[name] = self
        torch.library.register_fake(f"lossmeta::{name}", self._checked_fake)
        torch.library.impl(f"lossmeta::{name}", "CompositeExplicitAutograd", self._fallback)
        torch.library.register_vmap(f"lossmeta::{name}", vmap or looped(self.op))
        if self.differentiable:
            backward = f"{name}_backward"
            self.backward_op = getattr(torch.ops.lossmeta, backward).default
            torch.library.register_fake(f"lossmeta::{backward}", self._fake_backward)
            torch.library.impl(f"lossmeta::{backward}", "CompositeExplicitAutograd", self._fallback_backward)
            torch.library.register_vmap(f"lossmeta::{backward}", vmap_backward or looped(self.backward_op))
            self._eager, self._transformed, self._transformed_backward = _functions(self)
            torch.library.register_autograd(
                f"lossmeta::{name}", self._transformed.backward, setup_context=self._transformed.setup_context
            )
            torch.library.register_autograd(
                f"lossmeta::{backward}",
                self._transformed_backward.backward,
                setup_context=self._transformed_backward.setup_context,
            )

    @property
    def public_name(self) -> str:
        """The function that users call: forms that write in place have names of their own."""
        return self.name.removesuffix("_out").removesuffix("_")

    def __call__(self, *args: Any) -> Any:
        """The differentiable outputs, by the cheapest path that is right where it is called."""
        self._check(args)
        if torch.compiler.is_compiling():
            if self.differentiable:
                return self._outputs(self.op(*args))
            with torch.no_grad():
                return self._outputs(self.op(*args))
        try:
            if _checks.debugging:
                self._check_on_cpu(args)
            if _functorch.peek_interpreter_stack() is not None:
                if self.differentiable and _is_first_order():
                    return self._outputs(self._transformed.apply(*args))
                return self.reference(*args)
            if forward_ad._current_level >= 0:
                return self.reference(*args)
            if self.differentiable and torch.is_grad_enabled():
                return self._eager.apply(*args)
            with _BelowAutograd():  # the result of an operator without gradient does not require one
                return self._outputs(self.op(*args))
        except RuntimeError as error:
            if (refused := refusal(self.public_name, error)) is None:
                raise
            raise refused from None

    def without_autograd(self, *args: Any) -> tuple[Tensor, ...]:
        """All results, the ones that the backward operator wants too, for callers who will call it themselves."""
        self._check(args)
        try:
            if _checks.debugging:
                self._check_on_cpu(args)
            with _BelowAutograd():
                return tuple(self.op(*args))
        except RuntimeError as error:
            if (refused := refusal(self.public_name, error)) is None:
                raise
            raise refused from None

    def backward_without_autograd(self, *args: Any) -> tuple[Tensor, ...]:
        with _BelowAutograd():
            return _as_tuple(self.backward_op(*args))

    def _check(self, args: Sequence[Any]) -> None:
        for i, name, required in self._tensor_arguments:
            if not isinstance(args[i], Tensor) and (required or args[i] is not None):
                raise TypeError(f"{self.public_name}: {name} must be a tensor, got {type(args[i]).__name__}")

    @torch.no_grad()
    def _check_on_cpu(self, args: Sequence[Any]) -> None:
        if any(isinstance(a, Tensor) and a.is_cuda for a in args):
            self.op(*(a.cpu() if isinstance(a, Tensor) else a for a in args))

    def _outputs(self, results: Any) -> Any:
        if not isinstance(results, (tuple, list)):
            return results
        return results[0] if self.num_outputs == 1 else tuple(results[: self.num_outputs])

    def _checked_fake(self, *args: Any) -> Any:
        tensors = [
            (a, t) for a, t in zip(self.op._schema.arguments, args, strict=True) if isinstance(t, Tensor)
        ]
        first, reference = tensors[0]
        for argument, tensor in tensors[1:]:
            if tensor.device != reference.device:
                raise ValueError(
                    f"{self.public_name}: {argument.name} and {first.name} must be on the same device, "
                    f"got {tensor.device} and {reference.device}; move one with .to()"
                )
        return self.fake(*args)

    # ---- Positions in the argument list of the backward operator: grads, arguments, saved, needs.

    def _split_backward(self, args: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any], Sequence[bool]]:
        grads, rest = args[: self.num_outputs], args[self.num_outputs :]
        num_arguments = len(self.op._schema.arguments)
        return grads, rest[:num_arguments], rest[len(rest) - len(self.differentiable) :]

    def _given(self, arguments: Sequence[Any]) -> list[int]:
        """The positions of the differentiable arguments that are not left out."""
        return [i for i in self.differentiable if arguments[i] is not None]

    def _reference_at(self, arguments: Sequence[Any], primals: Sequence[Tensor]) -> tuple[Tensor, ...]:
        arguments = list(arguments)
        for i, primal in zip(self._given(arguments), primals, strict=True):
            arguments[i] = primal
        return _as_tuple(self.reference(*arguments))

    def reference_backward(self, *args: Any) -> tuple[Tensor | None, ...]:
        """The backward operator by differentiating the reference: itself differentiable. None for what is left out."""
        grads, arguments, _ = self._split_backward(args)
        given = self._given(arguments)
        outputs, pullback = torch.func.vjp(  # type: ignore[misc]  # its stub names the form with aux
            lambda *primals: self._reference_at(arguments, primals), *(arguments[i] for i in given)
        )
        values = pullback(
            tuple(
                torch.zeros_like(o) if g is None else g.to(o.dtype)
                for o, g in zip(outputs, grads, strict=True)
            )
        )
        found = dict(zip(given, values, strict=True))
        return tuple(found.get(i) for i in self.differentiable)

    def _fake_backward(self, *args: Any) -> Any:
        return _as_result(self._fake_gradients(*args))

    def _fake_gradients(self, *args: Any) -> tuple[Tensor, ...]:
        _, arguments, needs = self._split_backward(args)
        accumulated = accumulation_dtype(arguments[0].dtype)
        like = arguments[0]
        return tuple(
            like.new_empty(
                arguments[i].shape if need else (0,),
                dtype=arguments[i].dtype if i == self.differentiable[0] else accumulated,
            )
            for i, need in zip(self.differentiable, needs, strict=True)
        )

    # ---- Devices without a kernel.

    def _fallback(self, *args: Any) -> Any:
        self._warn(args)
        if not self.num_tensors:
            return self.reference(*args)
        results = self.fake(*args)
        if results is None or isinstance(results, Tensor):
            return self.reference(*args)
        outputs = _as_tuple(self.reference(*args))
        return (*outputs, *(torch.zeros_like(r) for r in results[len(outputs) :]))

    def _fallback_backward(self, *args: Any) -> Any:
        needs = self._split_backward(args)[2]
        fakes = self._fake_gradients(*args)
        return _as_result(
            tuple(
                f if g is None or not need else g.to(f.dtype)
                for g, f, need in zip(self.reference_backward(*args), fakes, needs, strict=True)
            )
        )

    def _warn(self, args: Sequence[Any]) -> None:
        device = next(a.device for a in args if isinstance(a, Tensor))
        warnings.warn(
            f"{self.public_name}: no compiled kernel for device {device}, running the slow PyTorch reference. "
            f"{_build.why_no_kernel(device.type)}",
            FallbackWarning,
            stacklevel=3,
        )


def _as_tuple(results: Any) -> tuple[Tensor, ...]:
    return (results,) if isinstance(results, Tensor) else tuple(results)


def _as_result(results: tuple[Tensor, ...]) -> Any:
    """As an operator returns them: a single one is no tuple."""
    return results[0] if len(results) == 1 else results


def _is_first_order() -> bool:
    """Whether the active transforms are vmap and at most one reverse-mode level."""
    keys = [interpreter.key() for interpreter in _functorch.get_interpreter_stack()]
    kinds = _functorch.TransformType
    return all(k in (kinds.Vmap, kinds.Grad) for k in keys) and keys.count(kinds.Grad) <= 1


def looped(op: Callable[..., Any]) -> Callable[..., Any]:
    """A batching rule that runs the operator once per element of the batch."""

    def rule(info: Any, in_dims: Sequence[int | None], *args: Any) -> tuple[Any, Any]:
        results = [
            op(*(a if d is None else a.select(d, i) for a, d in zip(args, in_dims, strict=True)))
            for i in range(info.batch_size)
        ]
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        return tuple(torch.stack(r) for r in zip(*results, strict=True)), (0,) * len(results[0])

    return rule


def _functions(operator: Operator) -> tuple[Any, Any, Any]:
    """The operator's three ``autograd.Function``: eager, under a functorch transform, and the latter's backward."""
    op, backward_op = operator.op, operator.backward_op
    num_tensors, num_outputs = operator.num_tensors, operator.num_outputs
    differentiable = operator.differentiable
    num_arguments = len(op._schema.arguments)

    shortcut = operator.shortcut

    def is_wanted(ctx: Any, i: int) -> bool:
        """Whether this backward pass leads to argument ``i``."""
        if not ctx.needs_input_grad[i]:
            return False
        try:
            return torch._C._will_engine_execute_node(ctx.next_functions[i][0])
        except RuntimeError:  # what it raises, slowly, for a leaf that is wanted
            return True

    def wanted(ctx: Any) -> list[bool]:
        needs = [ctx.needs_input_grad[i] for i in differentiable]
        # A meta-gradient asks for the first argument alone, or for the others alone; these come out of one kernel.
        if shortcut and not any(is_wanted(ctx, i) for i in differentiable[1:]):
            needs[1:] = [False] * (len(needs) - 1)
        if shortcut:
            needs[0] = is_wanted(ctx, differentiable[0])
        return needs

    def saved_results(results: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return (*results[num_outputs:], *([results[shortcut[0]]] if shortcut else ()))

    def gradients(
        ctx: Any, needs: list[bool], grads: Sequence[Any], run: Callable[..., Any]
    ) -> tuple[Tensor | None, ...]:
        result: list[Tensor | None] = [None] * num_arguments
        if all(g is None for g in grads):
            return tuple(result)
        saved = ctx.saved_tensors
        if shortcut:
            *saved, output = saved
            if needs[0]:
                result[differentiable[0]] = shortcut[1](output, grads, saved[differentiable[0]].dtype)
                needs[0] = result[differentiable[0]] is None
        if any(needs):
            values = _as_tuple(run(*grads, *saved[:num_tensors], *ctx.options, *saved[num_tensors:], *needs))
            for i, g, need in zip(differentiable, values, needs, strict=True):
                if need:
                    result[i] = g
        return tuple(result)

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            with _BelowAutograd():
                results = op(*args)
            ctx.save_for_backward(*args[:num_tensors], *saved_results(results))
            ctx.options = args[num_tensors:]
            ctx.set_materialize_grads(False)
            return results[0] if num_outputs == 1 else tuple(results[:num_outputs])

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            needs = wanted(ctx)
            if torch.is_grad_enabled():
                return gradients(ctx, needs, grads, backward_op)
            with _BelowAutograd():
                return gradients(ctx, needs, grads, backward_op)

    class Transformed(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*args: Any) -> Any:
            return tuple(op(*args))

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            ctx.save_for_backward(*inputs[:num_tensors], *saved_results(output))
            ctx.options = tuple(inputs[num_tensors:])
            ctx.mark_non_differentiable(*output[num_outputs:])
            ctx.set_materialize_grads(False)

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            transformed = _functorch.peek_interpreter_stack() is not None
            needs = [ctx.needs_input_grad[i] for i in differentiable]
            run = TransformedBackward.apply if transformed else backward_op
            return gradients(ctx, needs, grads[:num_outputs], run)

    class TransformedBackward(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*args: Any) -> Any:
            return _as_tuple(backward_op(*args))

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            ctx.save_for_backward(*(a for a in inputs if isinstance(a, Tensor)))
            ctx.others = tuple(None if isinstance(a, Tensor) else (a,) for a in inputs)

        @staticmethod
        def backward(ctx: Any, *grad_grads: Any) -> Any:
            saved = iter(ctx.saved_tensors)
            args = [next(saved) if other is None else other[0] for other in ctx.others]
            needs = operator._split_backward(args)[2]
            # Differentiate the gradient that the reference gives, with respect to grads and differentiable arguments.
            positions = [i for i in range(num_outputs) if args[i] is not None]
            positions += [num_outputs + i for i in differentiable if args[num_outputs + i] is not None]

            def gradient(*variables: Tensor) -> tuple[Tensor | None, ...]:
                at = list(args)
                for i, v in zip(positions, variables, strict=True):
                    at[i] = v
                return tuple(
                    g for g, need in zip(operator.reference_backward(*at), needs, strict=True) if need
                )

            values, pullback = torch.func.vjp(gradient, *(args[i] for i in positions))  # type: ignore[misc]
            wanted = [g for g, need in zip(grad_grads, needs, strict=True) if need]
            grads = pullback(
                tuple(torch.zeros_like(v) if g is None else g for v, g in zip(values, wanted, strict=True))
            )
            result: list[Tensor | None] = [None] * len(args)
            for i, g in zip(positions, grads, strict=True):
                result[i] = g
            return tuple(result)

    return Eager, Transformed, TransformedBackward
