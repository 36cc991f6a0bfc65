"""The learned loss of AdaLFL, a small network, together with its slope (AdaLFL, Eq. 3 and 4)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import one_hot, softplus
from torch.utils.weak import WeakIdKeyDictionary

from lossmeta._build import _core
from lossmeta._checks import check_fraction, check_positive_and_finite, check_tensors, choice
from lossmeta.ops._operator import Operator
from lossmeta.ops._precision import accumulation_dtype
from lossmeta.ops._settled import is_settled

LINKS = {"identity": 0, "softmax": 1, "sigmoid": 2}
HIDDEN = {"smooth_leaky_relu": True, "relu": False}
OUTPUTS = {"linear": False, "softplus": True}
MIN_TABLE_SIZE, MAX_TABLE_SIZE = _core.LOSS_NETWORK_MIN_INTERVALS, _core.LOSS_NETWORK_MAX_INTERVALS
ELEMENTS_PER_NODE = _core.LOSS_NETWORK_ELEMENTS_PER_NODE  # with fewer there is no table
SMALL_TABLE_SIZE = 256  # with fewer intervals the table of a loss that has learned for long is refused
SMALL_BATCH = 600  # outputs, with fewer of which even that table costs more than it saves


def loss_network(
    pred: Tensor,
    target: Tensor,
    input_weight: Tensor,
    hidden_weight: Tensor,
    output_weight: Tensor,
    *,
    link: str = "identity",
    leak: float = 0.01,
    smoothness: float = 10.0,
    hidden: str = "smooth_leaky_relu",
    output: str = "linear",
    ignore_index: int = -100,
    exact: bool = False,
    table_size: int = 512,
) -> tuple[Tensor, Tensor]:
    r"""Loss given by a network :math:`\ell_\phi`, and its slope from the same pass (AdaLFL, Eq. 3 and 4).

    .. math::
        \mathcal{M}_n = \frac{1}{C} \sum_{i=1}^{C} \ell_\phi(y_{ni}, f_{ni}), \qquad
        \ell_\phi(y, f) = w_3 \, \varphi(W_2 \, \varphi(W_1 (y, f))), \qquad
        \varphi(x) = \frac{1 - \gamma}{\beta} \log(1 + e^{\beta x}) + \gamma x

    The weights have the layout of :class:`torch.nn.Linear` without bias. ``hidden="relu"`` with ``output="softplus"``
    is the loss of ML³.

    With ``link="sigmoid"`` every output is a label on its own, and has a loss of its own: there is no mean over C.

    With class indices and the softmax link, or labels and the sigmoid link, and the smooth activation,
    :math:`\ell_\phi` is only two functions of a probability. From N·C = 600 on (on GPUs 8 ``table_size`` + 24) they
    are read from a table. An element then costs what it costs cross-entropy, whatever the width.

    * The slope is a piecewise cubic through the network's slopes at equally spaced probabilities: ``table_size`` + 3 of
      them, in small batches N·C / 4, but 259 at least. The loss is its integral, and the gradients are the exact
      derivatives of both.
    * The error of the slope, relative to its largest value on [0, 1], is about 3e-8 with 512 intervals and 5e-7 with
      256, for weights as they are drawn. Those of a loss that learns grow: after 1,600 steps on MNIST it was 6e-5 and
      7e-4. Where its estimate is above 1e-3 the table is refused, and every element goes through the network.
    * The gradient of the slope with respect to ``pred`` has an error of about 1e-4 in float32: curvature comes from
      differences of neighbouring nodes. After those 1,600 steps it was 4e-4 of its largest value with 512 intervals and
      4e-3 with 256, and that of the weights' gradients 3e-4 and 2e-3.

    On the CPU the table of weights that require no gradient is kept until they have other values; a compiled graph
    makes it in every call.

    On the CPU numbers below the smallest normal one (1e-38 in float32) count as 0.

    Args:
        pred: predictions, ``[N, C]``; float32, float64, bfloat16 or float16 (accumulated and returned in float32).
        target: class indices (int64, ``[N]``; targets are one-hot), with the sigmoid link labels (int64, ``[N, C]``; 0
            or 1); or the targets themselves (``[N, C]``, floating).
        input_weight: :math:`W_1`, ``[H, 2]``: the first column meets the target, the second the prediction.
        hidden_weight: :math:`W_2`, ``[H, H]``.
        output_weight: :math:`w_3`, ``[1, H]``.
        link: ``"identity"`` (:math:`f` is ``pred``), ``"softmax"`` or ``"sigmoid"`` (``pred`` are logits).
        leak: :math:`\gamma` of the smooth leaky ReLU, in [0, 1].
        smoothness: :math:`\beta` of the smooth leaky ReLU, positive.
        hidden: activation of both hidden layers, ``"smooth_leaky_relu"`` or ``"relu"``.
        output: ``"linear"`` or ``"softplus"``.
        ignore_index: class index whose rows, or label whose outputs, have loss 0, slope 0 and no gradient.
        exact: never use the table.
        table_size: most intervals of the table, 16 to 1024 (float64 on GPUs of compute capability 8.6 and 8.9: 896).

    Returns:
        The loss ``[N]``, with the sigmoid link ``[N, C]``, and ``slope`` ``[N, C]``, its derivative with respect to
        ``pred`` (that of ``loss[n]`` to ``pred[n]``). Both are differentiable in ``pred`` and the weights, so that
        ``autograd.grad(slope, weights, u)`` is the mixed second derivative of the loss in one pass; so is
        differentiating ``autograd.grad(loss, pred, create_graph=True)``. Higher derivatives run the reference formula.
        Kept for the backward pass besides the arguments: the slope, and the table if there is one.

    Raises:
        ValueError: for an unknown link or activation, for leak, smoothness or table_size out of range, for shapes,
            dtypes or devices that do not fit, for labels outside [0, C), with the sigmoid link [0, 2), and for a target
            that requires a gradient.
        TypeError: for something that is not a tensor.

    Example:
        >>> w1, w2, w3 = torch.randn(40, 2), torch.randn(40, 40) / 6, torch.randn(1, 40) / 6
        >>> logits, labels = torch.randn(8, 3, requires_grad=True), torch.randint(3, (8,))
        >>> loss, slope = loss_network(logits, labels, w1, w2, w3, link="softmax")
        >>> loss.mean().backward()
    """
    options = _options(pred, target, link, leak, smoothness, hidden, output, ignore_index, exact, table_size)
    weights = input_weight, hidden_weight, output_weight
    return _operator(pred, target, *weights, _kept_table(pred, target, weights, options), *options)


def with_mixed_derivative(
    pred: Tensor,
    target: Tensor,
    *weights: Tensor,
    link: str = "identity",
    leak: float = 0.01,
    smoothness: float = 10.0,
    hidden: str = "smooth_leaky_relu",
    output: str = "linear",
    ignore_index: int = -100,
    exact: bool = False,
    table_size: int = 512,
) -> tuple[Tensor, Tensor, Callable[[Tensor], tuple[Tensor, ...]]]:
    r""":func:`loss_network` without autograd, which for a small batch costs as much as the operator.

    Args:
        pred, target, weights: and all else as in :func:`loss_network`.

    Returns:
        The loss and the slope as there, and the function that takes ``u`` [N, C] to the gradients of
        :math:`\langle \mathrm{slope}, u \rangle` with respect to the three weights.

    Example:
        >>> w = torch.randn(40, 2), torch.randn(40, 40) / 6, torch.randn(1, 40) / 6
        >>> loss, slope, mixed = with_mixed_derivative(torch.rand(8, 3), torch.rand(8, 3), *w)
        >>> [g.shape for g in mixed(torch.rand(8, 3))]
        [torch.Size([40, 2]), torch.Size([40, 40]), torch.Size([1, 40])]
    """
    options = _options(pred, target, link, leak, smoothness, hidden, output, ignore_index, exact, table_size)
    loss, slope, table = _operator.without_autograd(pred, target, *weights, None, *options)

    def mixed(u: Tensor) -> tuple[Tensor, ...]:
        arguments = (None, u, pred, target, *weights, None, *options, table)
        return _operator.backward_without_autograd(*arguments, False, True, True, True)[1:]

    return loss, slope, mixed


def _options(
    pred: Tensor,
    target: Tensor,
    link: str,
    leak: float,
    smoothness: float,
    hidden: str,
    output: str,
    ignore_index: int,
    exact: bool,
    table_size: int,
) -> tuple[int, bool, float, float, bool, int, int]:
    """What the operator takes after its tensors."""
    link_number = choice("loss_network", "link", link, LINKS)
    smooth = choice("loss_network", "hidden", hidden, HIDDEN)
    has_softplus = choice("loss_network", "output", output, OUTPUTS)
    check_fraction("loss_network", "leak", leak)
    check_positive_and_finite("loss_network", "smoothness", smoothness)
    if not MIN_TABLE_SIZE <= table_size <= MAX_TABLE_SIZE:
        raise ValueError(
            f"loss_network: table_size must lie in [{MIN_TABLE_SIZE}, {MAX_TABLE_SIZE}], got {table_size}"
        )
    check_tensors("loss_network", pred=pred, target=target)
    if target.requires_grad:
        raise ValueError(
            "loss_network: target must not require a gradient, which it would not get; detach it"
        )
    intervals = 0 if exact else _intervals(table_size, pred)
    return link_number, smooth, float(leak), float(smoothness), has_softplus, ignore_index, intervals


def _intervals(most: int, pred: Tensor) -> int:
    """As many as leave two outputs for each of the 2 (intervals + 3) nodes, but not below SMALL_TABLE_SIZE; or 0."""
    if pred.device.type != "cpu":  # where the network itself is cheap, and a table one more kernel
        return most if pred.numel() >= 2 * 4 * (most + 3) else 0
    fitting = pred.numel() // 4 - 3
    if fitting >= min(most, SMALL_TABLE_SIZE):
        return min(fitting, most)
    return min(most, SMALL_TABLE_SIZE) if pred.numel() >= SMALL_BATCH else 0


def _is_tabulated(target: Tensor, link: int, smooth: bool, intervals: int) -> bool:
    return intervals > 0 and link != LINKS["identity"] and smooth and not target.dtype.is_floating_point


# Of a network's first weight: the options and copies of all its weights at the last call, and their table from the
# second such call on.
_tables: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _kept_table(
    pred: Tensor,
    target: Tensor,
    weights: Sequence[Tensor],
    options: tuple[int, bool, float, float, bool, int, int],
) -> Tensor | None:
    """The table of a network that does not learn, which costs more than to read it.

    Weights are compared by their values: torch does not count the steps of fused optimizers or what other processes
    send. On a GPU that would wait, and nothing is kept.
    """
    if torch.compiler.is_compiling():
        return None
    link, smooth, leak, smoothness, has_softplus, _, intervals = options
    if not (
        _is_tabulated(target, link, smooth, intervals)
        and not torch.is_inference_mode_enabled()
        and all(is_settled(w) and w.device.type == "cpu" for w in weights)
        and pred.device.type == "cpu"
    ):
        return None
    key = (
        leak,
        smoothness,
        has_softplus,
        intervals,
        accumulation_dtype(pred.dtype),
        [w.dtype for w in weights],
    )
    kept = _tables.get(weights[0])
    if kept is None or kept[0] != key or not all(map(torch.equal, kept[1], weights)):
        _tables[weights[0]] = key, [w.clone() for w in weights], None
        return None
    if kept[2] is None:
        table = _operator.without_autograd(pred.detach(), target, *weights, None, *options)[2]
        _tables[weights[0]] = kept = (*kept[:2], table)
    return kept[2]  # type: ignore[no-any-return]


def _reference(
    pred: Tensor,
    target: Tensor,
    input_weight: Tensor,
    hidden_weight: Tensor,
    output_weight: Tensor,
    kept_table: Tensor | None,
    link: int,
    smooth: bool,
    leak: float,
    smoothness: float,
    has_softplus: bool,
    ignore_index: int,
    table_size: int,
) -> tuple[Tensor, Tensor]:
    dtype = accumulation_dtype(pred.dtype)
    classes, on_their_own = pred.shape[-1], link == LINKS["sigmoid"]
    pred = pred.to(dtype)
    w1, w2, w3 = (w.to(dtype) for w in (input_weight, hidden_weight, output_weight))
    valid = None
    if not target.dtype.is_floating_point:
        ignored = target == ignore_index
        valid = (target >= 0) & (target < (2 if on_their_own else classes)) & ~ignored
        # What an ignored row holds, NaN perhaps, must not reach the weights' gradients.
        pred = pred.where(valid if on_their_own else valid[:, None], 0.0)
        target = target.where(valid, 0)
        target = target if on_their_own else one_hot(target, classes)
    f = pred.softmax(-1) if link == LINKS["softmax"] else pred.sigmoid() if on_their_own else pred

    def activation(x: Tensor) -> tuple[Tensor, Tensor]:
        if not smooth:
            return x.relu(), torch.where(x <= 0, 0.0, 1.0).to(dtype)
        gate = (smoothness * x).sigmoid()
        # From 40 on softplus is the line to the rounding of float64.
        return (1 - leak) * softplus(x, smoothness, 40.0) + leak * x, (1 - leak) * gate + leak

    h1, d1 = activation(torch.stack([target.to(dtype), f], -1) @ w1.mT)
    h2, d2 = activation(h1 @ w2.mT)
    value = (h2 @ w3.mT).squeeze(-1)
    slope = ((d2 * ((d1 * w1[:, 1]) @ w2.mT)) @ w3.mT).squeeze(-1)
    if has_softplus:
        value, slope = softplus(value, 1.0, 40.0), value.sigmoid() * slope
    if on_their_own:
        loss, slope = value, slope * f * (1 - f)
    else:
        loss, slope = value.mean(-1), slope / classes
    if link == LINKS["softmax"]:
        slope = f * (slope - (f * slope).sum(-1, keepdim=True))
    if valid is None:
        return loss, slope
    # Labels out of range are seen by their loss.
    loss = loss.where(valid, torch.where(ignored, 0.0, torch.nan))
    return loss, slope.where(valid if on_their_own else valid[:, None], 0.0)


def _fake(
    pred: Tensor,
    target: Tensor,
    input_weight: Tensor,
    hidden_weight: Tensor,
    output_weight: Tensor,
    kept_table: Tensor | None,
    link: int,
    smooth: bool,
    leak: float,
    smoothness: float,
    has_softplus: bool,
    ignore_index: int,
    table_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = accumulation_dtype(pred.dtype)
    tabulates = kept_table is None and _is_tabulated(target, link, smooth, table_size)
    # loss_network_nodes and loss_network_table_size of csrc/math/loss_network.h
    table = (
        10 * table_size + 1 if tabulates and pred.numel() >= 2 * ELEMENTS_PER_NODE * (table_size + 3) else 0
    )
    return (
        pred.new_empty(pred.shape if link == LINKS["sigmoid"] else pred.shape[:1], dtype=dtype),
        pred.new_empty(pred.shape, dtype=dtype),
        pred.new_empty((table,), dtype=dtype),
    )


def _gradient_from_slope(slope: Tensor, grads: Sequence[Tensor | None], dtype: torch.dtype) -> Tensor | None:
    grad_loss, grad_slope = grads
    if grad_loss is None or grad_slope is not None:
        return None
    factor = grad_loss if grad_loss.dim() == slope.dim() else grad_loss[..., None]
    if slope.dtype == dtype or torch.is_grad_enabled() or _is_batched(factor):
        return factor * slope
    # In the slope's precision, before it is rounded, the product would take as much memory again.
    return torch.mul(factor, slope, out=torch.empty_like(slope, dtype=dtype))


def _is_batched(t: Tensor) -> bool:
    """By ``torch.func.vmap``, or by ``is_grads_batched=True``; such tensors have no ``out=``."""
    functorch = torch._C._functorch
    return functorch.is_batchedtensor(t) or functorch.is_legacy_batchedtensor(t)


_operator = Operator(
    "loss_network",
    reference=_reference,
    fake=_fake,
    differentiable=(0, 2, 3, 4),
    num_tensors=6,
    num_outputs=2,
    shortcut=(1, _gradient_from_slope),
)
