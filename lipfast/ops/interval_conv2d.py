"""Interval propagation through a two-dimensional convolution: :mod:`lipfast.ops.interval_linear` with the same algebra."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lipfast import rounding
from lipfast.ops._arguments import check_alike, check_shape
from lipfast.ops._definition import name_definition


def interval_conv2d(
    lower: Tensor,  # (*, C, H, W)
    upper: Tensor,  # (*, C, H, W)
    weight: Tensor,  # (O, C / groups, kernel height, kernel width)
    bias: Tensor | None = None,  # (O,)
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    outward: bool = False,
) -> tuple[Tensor, Tensor]:  # (*, O, H', W') twice
    """Bounds on ``conv2d(x, weight, bias, ...)`` over every ``x`` with ``lower <= x <= upper``.

    Args:
        lower, upper: the input box, of one shape; ``lower <= upper`` is not checked.
        weight, bias, stride, padding, dilation, groups: as in :func:`torch.nn.functional.conv2d`, "same" and "valid"
            padding included. Padding is with exact zeros.
        outward: as in :func:`lipfast.interval_linear`, with I = (C / groups) x kernel height x kernel width terms.

    Returns:
        ``(lower, upper)`` of the image box, the smallest in real arithmetic (Gowal et al. 2018, eq. 6).

    Dtypes, soundness and gradient: as :func:`lipfast.interval_linear`.
    Raises: ValueError if a shape, dtype, device or the geometry does not fit; the message names the argument.

    >>> low, high = interval_conv2d(-torch.ones(1, 3, 3), torch.ones(1, 3, 3), torch.ones(1, 1, 2, 2))
    >>> high
    tensor([[[4., 4.],
             [4., 4.]]])
    """
    name = "interval_conv2d"
    check_alike(name, lower=lower, upper=upper, weight=weight, bias=bias)
    check_shape(name, "lower", lower, ("*", "C", "H", "W"))
    check_shape(name, "upper", upper, lower.shape)
    stride, padding, dilation = geometry(name, lower, weight, stride, padding, dilation, groups)
    if bias is not None:
        check_shape(name, "bias", bias, weight.shape[:1])
    where = (weight, bias, stride, padding, dilation, groups, outward)
    if lower.ndim == 4:  # no views: writing over one, as relu_ does, costs a copy in the backward
        return torch.ops.lipfast.interval_conv2d(lower, upper, *where)
    images = [t.reshape(-1, *t.shape[-3:]) for t in (lower, upper)]
    out = torch.ops.lipfast.interval_conv2d(*images, *where)
    return tuple(t.reshape(*lower.shape[:-3], *t.shape[1:]) for t in out)


def geometry(op, image, weight, stride, padding, dilation, groups) -> tuple[list[int], list[int], list[int]]:
    """Stride, padding and dilation as pairs, checked against the shapes of one convolution."""
    check_shape(op, "weight", weight, ("O", "C/groups", "kernel height", "kernel width"))
    if not isinstance(groups, int) or groups < 1 or weight.shape[0] % groups or image.shape[-3] != weight.shape[1] * groups:
        channels = f"{image.shape[-3]} input and {weight.shape[0]} output channels"
        raise ValueError(f"{op}: groups must divide {channels} and match weight {tuple(weight.shape)}, got {groups!r}")
    pairs = {"stride": _pair(op, "stride", stride, 1), "dilation": _pair(op, "dilation", dilation, 1)}
    kernel = [d * (k - 1) + 1 for d, k in zip(pairs["dilation"], weight.shape[2:], strict=True)]
    if padding == "valid":
        padding = 0
    elif padding == "same":
        if pairs["stride"] != [1, 1] or any(k % 2 == 0 for k in kernel):
            raise ValueError(f"{op}: padding 'same' needs stride 1 and an odd extent of the kernel, got {kernel}")
        padding = [k // 2 for k in kernel]
    pairs["padding"] = _pair(op, "padding", padding, 0)
    for side, size, pad, extent in zip("HW", image.shape[-2:], pairs["padding"], kernel, strict=True):
        if size + 2 * pad < extent:
            raise ValueError(f"{op}: weight spans {extent} pixels, more than {side} = {size} with padding {pad}")
    return pairs["stride"], pairs["padding"], pairs["dilation"]


def _pair(op, name, value, least) -> list[int]:
    pair = [value, value] if isinstance(value, int) else value
    if isinstance(pair, str) or len(pair) != 2 or any(not isinstance(v, int) or v < least for v in pair):
        raise ValueError(f"{op}: {name} must be one or two integers of at least {least}, got {value!r}")
    return list(pair)


def reference(
    lower: Tensor,
    upper: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    outward: bool = False,
) -> tuple[Tensor, Tensor]:
    where = (stride, padding, dilation, groups)
    if outward:
        bias = None if bias is None else bias[:, None, None]
        terms = weight[0].numel()
        return rounding.image(lower, upper, weight, bias, terms, lambda x, w: plain_conv2d(x, w, *where))
    center = F.conv2d((lower + upper) / 2, weight, bias, *where)
    radius = F.conv2d((upper - lower) / 2, weight.abs(), None, *where)
    return center - radius, center + radius


def plain_conv2d(x: Tensor, weight: Tensor, stride, padding, dilation, groups) -> Tensor:
    # conv2d may use transforms (Winograd, FFT) whose rounding is not that of a sum of products; unfold and matmul may not.
    O, _, KH, KW = weight.shape
    B = x.shape[0]
    columns = F.unfold(x, (KH, KW), dilation, padding, stride).unflatten(1, (groups, -1))  # (B, G, I, P)
    out = weight.reshape(groups, O // groups, -1) @ columns
    return out.reshape(B, O, *_output_size(x, weight, stride, padding, dilation))


def _output_size(x: Tensor, weight: Tensor, stride, padding, dilation) -> list[int]:
    sizes = zip(x.shape[2:], padding, dilation, weight.shape[2:], stride, strict=True)
    return [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, p, d, k, s in sizes]


def fake(lower, upper, weight, bias, stride, padding, dilation, groups, outward=False):
    size = _output_size(lower, weight, stride, padding, dilation)
    out = lower.new_empty(lower.shape[0], weight.shape[0], *size)
    return out, torch.empty_like(out)


def save(ctx, inputs, output):
    lower, upper, weight, bias, *ctx.where, _ = inputs
    ctx.save_for_backward(lower, upper, weight)
    ctx.has_bias = bias is not None


def backward(ctx, grad_lower, grad_upper):
    need = ctx.needs_input_grad
    grads = torch.ops.lipfast.interval_conv2d_backward(
        grad_lower, grad_upper, *ctx.saved_tensors, *ctx.where, need[0] or need[1], need[2]
    )
    low, high, weight = (g if used else None for g, used in zip(grads, (need[0], need[1], need[2]), strict=True))
    bias = grad_lower.sum((0, 2, 3)) + grad_upper.sum((0, 2, 3)) if ctx.has_bias and need[3] else None
    return low, high, weight, bias, None, None, None, None, None


def backward_reference(
    grad_lower: Tensor,  # (B, O, H', W')
    grad_upper: Tensor,  # (B, O, H', W')
    lower: Tensor,  # (B, C, H, W)
    upper: Tensor,  # (B, C, H, W)
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    need_input: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the two inputs and the weight; an empty tensor for what is not needed."""

    def pull(grad, x, w):
        return torch.ops.aten.convolution_backward(
            grad, x, w, None, stride, padding, dilation, False, [0, 0], groups, [need_input, need_weight, False]
        )

    through_center, from_center, _ = pull((grad_upper + grad_lower) / 2, lower + upper, weight)
    through_radius, from_radius, _ = pull((grad_upper - grad_lower) / 2, upper - lower, weight.abs())
    empty = lambda: lower.new_empty(0)
    return (
        through_center - through_radius if need_input else empty(),
        through_center + through_radius if need_input else empty(),
        from_center + weight.sign() * from_radius if need_weight else empty(),
    )


def backward_fake(grad_lower, grad_upper, lower, upper, weight, stride, padding, dilation, groups, need_input, need_weight):
    empty = lambda like, needed: torch.empty_like(like) if needed else like.new_empty(0)
    return empty(lower, need_input), empty(upper, need_input), empty(weight, need_weight)


def backward_save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:5])
    ctx.rest = inputs[5:]


def backward_backward(ctx, *grads):
    pull = torch.func.vjp(lambda *t: backward_reference(*t, *ctx.rest), *ctx.saved_tensors)[1]
    return (*pull(grads), *[None] * len(ctx.rest))


_op = torch.library.custom_op("lipfast::interval_conv2d", reference, mutates_args=())
_op.register_fake(fake)
_op.register_autograd(backward, setup_context=save)
_backward = torch.library.custom_op("lipfast::interval_conv2d_backward", backward_reference, mutates_args=())
_backward.register_fake(backward_fake)
_backward.register_autograd(backward_backward, setup_context=backward_save)
name_definition("lipfast::interval_conv2d", reference)
name_definition("lipfast::interval_conv2d_backward", backward_reference)
