"""beta-Abs: the absolute value of the first channels (LipNeXt, Hu et al. 2026, https://arxiv.org/abs/2601.18513).

1-Lipschitz and norm preserving in every l_p norm; so is its derivative, at 0 too. Between free orthogonal matrices beta-Abs
with beta = 1/2 contains MaxMin (its theorem 2): with

    R = 1/sqrt(2) [[I, -I], [I, I]],        max_min(x) = R^T beta_abs(R x).

In a block of LipNeXt a bias comes before and the next block's positional map after; both are part of the operator, which then
is one pass over the image each way. All that the backward needs are the signs of the folded channels, one bit each: the
output has lost them, and the input, a product that no other derivative reads, would take 16 or 32 bits a number.
"""

from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from lipfast.ops._arguments import check_alike, check_shape


def beta_abs(
    x: Tensor,  # (B, C, ...)
    beta: float = 0.5,
    bias: Tensor | None = None,  # (C,)
    position: Tensor | None = None,  # (H, W)
) -> Tensor:  # (B, C, ...)
    """``|x + bias|`` in the first ``floor(beta C)`` channels of dimension 1, ``x + bias`` in the others; then ``+ position``.

    Args:
        x: (B, C) or (B, C, ...), of any strides; channels last stays channels last.
        beta: from 0, the identity, to 1, the absolute value.
        bias: one number per channel.
        position: one number per pixel, for x of shape (B, C, H, W).

    Dtypes: float64, float32, bfloat16, float16; CPU and CUDA. NaN stays NaN.
    Raises: ValueError if ``x`` has no dimension 1 or another dtype, ``beta`` is not in [0, 1], or ``bias`` or ``position``
        does not fit ``x``.
    Gradient: to x, bias and position. Turned in sign where ``x + bias < 0`` in those channels, so at 0 it is kept, where
        torch's ``abs`` has 0 (as ``max_min``, whose ties count as sorted). The second derivatives are 0.

    >>> beta_abs(torch.tensor([[-1.0, 2.0, -3.0, 4.0]]))
    tensor([[ 1.,  2., -3.,  4.]])
    """
    if has_torch_function((x, bias, position)):  # so that a network's trace shows the call
        return handle_torch_function(beta_abs, (x, bias, position), x, beta, bias, position)
    check_alike("beta_abs", x=x, bias=bias, position=position)
    if x.ndim < 2:
        raise ValueError(f"beta_abs: x must be (B, C, ...), got {tuple(x.shape)}")
    check_beta("beta_abs", beta)
    if bias is not None:
        check_shape("beta_abs", "bias", bias, x.shape[1:2])
    if position is not None:
        if x.ndim != 4:
            raise ValueError(f"beta_abs: x must be (B, C, H, W) where there is a position, got {tuple(x.shape)}")
        check_shape("beta_abs", "position", position, x.shape[2:])
    if torch.compiler.is_compiling():  # a composition of torch's own, which the compiler fuses with its neighbours
        return reference(x, beta, bias, position)
    return _beta_abs(x, beta, bias, position)


def check_beta(op: str, beta: float) -> None:
    if not 0 <= beta <= 1:
        raise ValueError(f"{op}: beta must be from 0 to 1, got {beta}")


def folded(beta: float, C: int) -> int:
    """How many channels of C have their absolute value taken."""
    return int(beta * C + 1e-6)  # 0.29 of 100 is 29, though the float 0.29 lies below


def plane(n: int) -> int:
    """Into how many channels of bytes the bits of n channels go; many of them in steps of 16, whose loads are aligned."""
    return -(-n // 128) * 16 if n >= 128 else -(-n // 8)


def reference(x: Tensor, beta: float = 0.5, bias: Tensor | None = None, position: Tensor | None = None) -> Tensor:
    y = x if bias is None else x + _column(bias, x)
    n = folded(beta, x.shape[1])
    first, rest = y[:, :n], y[:, n:]
    y = torch.cat((torch.where(first < 0, -first, first), rest), 1)  # abs would lose the gradient at 0
    return y if position is None else y + position


def one_pass(
    x: Tensor, beta: float = 0.5, bias: Tensor | None = None, position: Tensor | None = None, keep_signs: bool = True
) -> tuple[Tensor, Tensor]:  # (B, C, ...), (B, plane, ...)
    """``reference`` and, if ``keep_signs``, bits: that of value 2^k in channel j is 1 where channel k plane + j is negative."""
    n = folded(beta, x.shape[1])
    y = x.clone() if bias is None else x + _column(bias, x)
    signs = torch.zeros_like(x[:, : plane(n) if keep_signs else 0], dtype=torch.uint8)
    if keep_signs:
        for k, part in _planes(y, n, signs):
            signs[:, : part.shape[1]] |= (part < 0).to(torch.uint8) << k
    y[:, :n].abs_()
    return y if position is None else y.add_(position), signs


def fake(x, beta=0.5, bias=None, position=None, keep_signs=True):
    n = folded(beta, x.shape[1])
    return torch.empty_like(x), torch.empty_like(x[:, : plane(n) if keep_signs else 0], dtype=torch.uint8)


def backward_reference(
    grad: Tensor,  # (B, C, ...)
    signs: Tensor,  # (B, plane, ...)
    n: int,
    need_x: bool,
    need_bias: bool,
    need_position: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # (B, C, ...), (C,), (H, W)
    """Gradients of x, the bias and the position; an empty tensor for what is not needed."""
    none = grad.new_empty(0)
    position = grad.sum((0, 1)) if need_position else none
    if not (need_x or need_bias):
        return none, none.clone(), position
    turned = grad.clone()
    for k, part in _planes(turned, n, signs):
        part *= 1 - 2 * ((signs[:, : part.shape[1]] >> k) & 1).to(grad.dtype)
    bias = turned.sum([d for d in range(grad.ndim) if d != 1]) if need_bias else none.clone()
    return turned if need_x else none, bias, position


def backward_fake(grad, signs, n, need_x, need_bias, need_position):
    empty = lambda shape, needed: grad.new_empty(shape if needed else 0)
    x = torch.empty_like(grad) if need_x else grad.new_empty(0)
    return x, empty(grad.shape[1:2], need_bias), empty(grad.shape[2:], need_position)


class _BetaAbs(torch.autograd.Function):
    @staticmethod
    def forward(x, beta, bias, position, keep_signs):
        return torch.ops.lipfast.beta_abs_pass(x, beta, bias, position, keep_signs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        x, beta, *_ = inputs
        ctx.n = folded(beta, x.shape[1])
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1])

    @staticmethod
    def backward(ctx: Any, grad, _):
        need = [ctx.needs_input_grad[i] for i in (0, 2, 3)]
        grads = _Backward.apply(grad, *ctx.saved_tensors, ctx.n, *need)
        x, bias, position = (g if used else None for g, used in zip(grads, need, strict=True))
        return x, None, bias, position, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *args):  # whose derivative may be asked for outside
        return _vmap(lambda *a: (reference(*a[:4]), one_pass(*a)[1]), info, in_dims, *args)


class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(grad, signs, n, need_x, need_bias, need_position):
        return torch.ops.lipfast.beta_abs_backward(grad, signs, n, need_x, need_bias, need_position)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        grad, signs, ctx.n, *ctx.needs = inputs
        ctx.shape = grad.shape
        ctx.save_for_backward(signs)

    @staticmethod
    def backward(ctx: Any, through_x, through_bias, through_position):
        need_x, need_bias, need_position = ctx.needs
        through = through_x if need_x else through_x.new_zeros(ctx.shape)
        if need_bias:
            through = through + _column(through_bias, through)
        if need_x or need_bias:
            through = _Backward.apply(through, *ctx.saved_tensors, ctx.n, True, False, False)[0]
        return through + through_position if need_position else through, *(None,) * 5

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *args):
        return _vmap(backward_reference, info, in_dims, *args)


def _vmap(function, info, in_dims, first, *rest):
    """The plain function under torch's own vmap; what it writes to, made of ``first``, must have the batch."""
    if in_dims[0] is None:
        first, in_dims = first.expand(info.batch_size, *first.shape), (0, *in_dims[1:])
    out = torch.vmap(function, in_dims)(first, *rest)
    return out, (0,) * len(out)


def _planes(x: Tensor, n: int, signs: Tensor):
    """The number of a bit and the channels whose bit it is. Slices, not a split: its parts may not be written to."""
    width = signs.shape[1]
    return ((k, x[:, k * width : min((k + 1) * width, n)]) for k in range(8) if k * width < n)


def _column(bias: Tensor, x: Tensor) -> Tensor:
    return bias.reshape(-1, *(1,) * (x.ndim - 2))


def _beta_abs(x: Tensor, beta: float = 0.5, bias: Tensor | None = None, position: Tensor | None = None) -> Tensor:
    return _BetaAbs.apply(x, beta, bias, position, torch.is_grad_enabled())[0]


_pass = torch.library.custom_op("lipfast::beta_abs_pass", one_pass, mutates_args=())
_pass.register_fake(fake)
_backward = torch.library.custom_op("lipfast::beta_abs_backward", backward_reference, mutates_args=())
_backward.register_fake(backward_fake)
torch.library.define("lipfast::beta_abs", torch.library.infer_schema(reference, mutates_args=()))
torch.library.impl("lipfast::beta_abs", "CompositeImplicitAutograd", _beta_abs)
