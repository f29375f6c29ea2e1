"""Spatial shift: groups of channels move by one pixel around a torus (LipNeXt, Hu et al. 2026,
https://arxiv.org/abs/2601.18513, section 3).

A depthwise convolution with circular padding keeps the l_2 norm of every image only if its kernel has a single entry, 1 or -1
(its theorem 1, for images of sides n >= 2k - 1 with kernels of side k): then it is a shift. A permutation of its input, hence
norm preserving in every l_p.

The paper names the five groups and their ratio, not their order nor which way "up" is; both are fixed here.
"""

from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from lipfast.ops._arguments import check_alike, check_shape


def spatial_shift(x: Tensor, ratio: float = 0.125) -> Tensor:  # (B, C, H, W) -> (B, C, H, W)
    """Five groups of channels move up, down, left, right and not at all, each by one pixel; what leaves enters opposite.

    With n = ratio C, row 0 at the top and column 0 at the left:

        channels 0 .. n-1    up       out[h, w] = x[h + 1, w]
                 n .. 2n-1   down     out[h, w] = x[h - 1, w]
                2n .. 3n-1   left     out[h, w] = x[h, w + 1]
                3n .. 4n-1   right    out[h, w] = x[h, w - 1]
                4n .. C-1    stay

    Args:
        x: (B, C, H, W), of any strides; channels last stays channels last.
        ratio: part of the channels that moves in each direction, from 0 to 1/4, so that the paper's 1/8 moves half of all.

    Dtypes: float64, float32, bfloat16, float16; CPU and CUDA. The numbers are copied: exact.
    Raises: ValueError for another shape or dtype, a ratio beyond [0, 1/4], or channels that do not divide: ratio C must be
        whole.
    Gradient: moved back. The second derivatives are 0.

    >>> spatial_shift(torch.arange(3.0).expand(1, 4, 1, 3), 0.25)[0, :, 0]
    tensor([[0., 1., 2.],
            [0., 1., 2.],
            [1., 2., 0.],
            [2., 0., 1.]])
    """
    if has_torch_function_unary(x):  # so that a network's trace shows the call
        return handle_torch_function(spatial_shift, (x,), x, ratio)
    check_alike("spatial_shift", x=x)
    check_shape("spatial_shift", "x", x, ("B", "C", "H", "W"))
    if not 0 <= ratio <= 0.25:
        raise ValueError(f"spatial_shift: ratio must be from 0 to 1/4, got {ratio}")
    if abs(ratio * x.shape[1] - round(ratio * x.shape[1])) > 1e-6:  # a ratio such as 1/3 is itself rounded
        raise ValueError(f"spatial_shift: ratio must make a whole number of the {x.shape[1]} channels of x, got {ratio}")
    if torch.compiler.is_compiling():  # a composition of torch's own, which the compiler fuses with its neighbours
        return reference(x, ratio)
    return _SpatialShift.apply(x, ratio, False)


def reference(x: Tensor, ratio: float = 0.125) -> Tensor:
    n = round(ratio * x.shape[1])
    up, down, left, right, stay = x.split([n, n, n, n, x.shape[1] - 4 * n], 1)
    return torch.cat((up.roll(-1, 2), down.roll(1, 2), left.roll(-1, 3), right.roll(1, 3), stay), 1)


def one_pass(x: Tensor, ratio: float = 0.125, back: bool = False) -> Tensor:
    """``reference``, or its inverse, written in place: half the memory traffic of rolls and a concatenation."""
    out, n = x.clone(), round(ratio * x.shape[1])
    for group, (dim, step) in enumerate(((2, -1), (2, 1), (3, -1), (3, 1))):
        source, to = (t.narrow(1, group * n, n) for t in (x, out))
        size = x.shape[dim]
        k = (-step if back else step) % max(size, 1)
        to.narrow(dim, k, size - k).copy_(source.narrow(dim, 0, size - k))
        to.narrow(dim, 0, k).copy_(source.narrow(dim, size - k, k))
    return out


def fake(x, ratio=0.125, back=False):
    return torch.empty_like(x)


class _SpatialShift(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, ratio: float, back: bool) -> Tensor:
        return torch.ops.lipfast.spatial_shift_pass(x, ratio, back)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float, bool], output: Tensor) -> None:
        _, ctx.ratio, ctx.back = inputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _SpatialShift.apply(grad, ctx.ratio, not ctx.back), None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple, x: Tensor, ratio: float, back: bool) -> tuple[Tensor, int]:
        x = x.movedim(in_dims[0], 0)
        return _SpatialShift.apply(x.flatten(0, 1), ratio, back).unflatten(0, x.shape[:2]), 0


def _spatial_shift(x: Tensor, ratio: float = 0.125) -> Tensor:
    return _SpatialShift.apply(x, ratio, False)


_pass = torch.library.custom_op("lipfast::spatial_shift_pass", one_pass, mutates_args=())
_pass.register_fake(fake)
torch.library.define("lipfast::spatial_shift", torch.library.infer_schema(reference, mutates_args=()))
torch.library.impl("lipfast::spatial_shift", "CompositeImplicitAutograd", _spatial_shift)
