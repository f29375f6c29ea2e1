"""The least work of each op: its floor is this over what the machine can do.

Each tensor is read or written once per pass, and the backward pass reads the arguments again. FLOPs are those of the best
algorithm known; products whose result is symmetric or skew count half. Where nothing is said, an op is bound by its bytes.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from bench.cases import Call
from bench.ceilings import Work

# FLOPs of the forward and of the backward pass, from the first output and the call.
FLOPS: dict[str, Callable[[Tensor, Call], tuple[float, float]]] = {
    "interval_linear": lambda out, c: _twice(4 * out.numel() * c.args[2][0].numel()),
    "interval_conv2d": lambda out, c: _twice(4 * out.numel() * c.args[2][0].numel()),
    "ball_linear": lambda out, c: _twice(2 * out.numel() * c.args[2][0].numel() + 2 * c.args[2].numel()),
    "ball_conv2d": lambda out, c: _twice(2 * out.numel() * c.args[2][0].numel() + 2 * c.args[2].numel()),
    "pairwise_distance": lambda out, c: _twice(c.args[0].numel() * c.args[0].shape[-2]),  # symmetric: half of K x K
    "spectral_norm_estimate": lambda out, c: _power(c, out.numel() * c.args[0][0].numel() * c.args[0].shape[-2]),
    "conv2d_norm_estimate": lambda out, c: _power(c, _outputs(out, c) * c.args[0][0].numel()),
    "cayley": lambda out, c: (_products(out), 2 * _products(out)),
    "cayley_around": lambda out, c: (2 * _products(out), 2.5 * _products(out)),
    "skew_exponential": lambda out, c: (2.5 * _products(out), 5 * _products(out)),  # four products, and two for each
    "polar": lambda out, c: (1.5 * _products(out), 3 * _products(out)),  # one cubic step
    "cholesky_orthogonal": lambda out, c: _twice(
        2 * out.numel() * out.shape[-2] + out.numel() / out.shape[-1] * out.shape[-2] ** 2 / 3
    ),
    "beta_abs": lambda out, c: _twice(3 * out.numel()),
    "max_min": lambda out, c: (out.numel(), out.numel()),
    "clipped_relu": lambda out, c: (2 * out.numel(), 2 * out.numel()),
    "grafted_relu": lambda out, c: (3 * out.numel(), 3 * out.numel()),
    "l2_pool": lambda out, c: _twice(2 * c.args[0].numel()),
    "certified_radius": lambda out, c: (3 * c.args[0].numel(), 3 * out.numel()),
    "skew": lambda out, c: (2 * out.numel(), 2 * out.numel()),
}
UNKNOWN = {"spectral_norm_bound", "conv2d_norm_bound"}  # as many products as the matrix asks for, in float64


def of_op(call: Call, outs: tuple[Tensor, ...], backward: bool) -> Work | None:
    if call.name in UNKNOWN:
        return None
    size = lambda ts: sum(t.numel() * t.element_size() for t in ts if isinstance(t, Tensor))
    read = size(call.args)
    if call.name == "certified_radius":  # of a sample's constants one row
        read = size(call.args[:1]) + min(size(call.args[:1]), size(call.args[1:]))
    moved = read + size(outs)
    forth, back = FLOPS[call.name](outs[0], call) if call.name in FLOPS else (0, 0)
    if backward:  # what was read, once more, and a gradient of every argument
        moved, forth = moved + read + size(outs) + size(call.args), forth + back
    return Work(moved, round(forth))


def of_network(net: nn.Module, x: Tensor) -> Work:
    """The nominal network's forward pass: parameters and images once, what its products take."""
    read = sum(t.numel() * t.element_size() for t in (*net.parameters(), x))
    return Work(read, flops(lambda: net(x)))


def flops(run: Callable[[], object]) -> int:
    """As torch counts the products and convolutions of a run."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def _twice(flops: float) -> tuple[float, float]:
    return flops, 2 * flops


def _products(out: Tensor) -> int:
    """The FLOPs of one product of all square matrices."""
    return 2 * out.numel() * out.shape[-1]


def _outputs(sigma: Tensor, call: Call) -> int:
    """Numbers of the convolutions' results, of all samples."""
    options, kernel = call.options, call.args[0].shape[2:]
    parts = zip(options["input_size"], kernel, options["stride"], options["padding"], options["dilation"], strict=True)
    pixels = [(size + 2 * padding - dilation * (k - 1) - 1) // stride + 1 for size, k, stride, padding, dilation in parts]
    return sigma.numel() * call.args[0].shape[0] * math.prod(pixels)


def _power(call: Call, products: int) -> tuple[int, int]:
    """Two products per iteration and one at the end; the gradient is one of two vectors."""
    return 2 * products * (2 * call.options["iterations"] + 1), 2 * products
