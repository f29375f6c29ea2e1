"""Compiles every Triton kernel ahead of time, without a GPU, for each architecture, dtype and tile that the launchers use.

The launchers themselves are called, on CPU tensors, with a recorder in place of each kernel: what is compiled is what they
would launch, down to the sizes that Triton specialises on. Prints registers, shared memory and spills; fails on a compile
error, on a spill that is not allowed below, or on a tile of the launchers' tables that no case reached.

    python tools/triton_aot.py [80 90 100]
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lipfast.kernels import beta_abs, conv2d_norm_estimate, interval_conv2d, interval_linear, launch, spatial_shift

ARCHITECTURES = (80, 90, 100)
EPILOGUE = "two full accumulators meet two rounded results, once per tile; the loop over the terms keeps to registers"
FRAGMENTS = "no tensor core: ptxas holds a whole step of W, |W|, m and r; sm_80 and sm_90 have none at this tile"
ADDRESSES = "a few loop-invariant addresses; ptxas stops at 128 registers for the sake of a fourth block per processor"
# Without one of them it is another kernel.
OPTIONAL = ("mask_ptr", "parts_ptr", "sigma_ptr", "bias_ptr", "position_ptr", "signs_ptr", "turned_ptr")
# (kernel, number, architecture): bytes of stack a thread, and why that is accepted.
ALLOWED_SPILLS = {
    ("interval_linear_kernel", "half", 90): (32, EPILOGUE),
    ("interval_conv2d_kernel", "half", 90): (8, EPILOGUE),
    ("interval_linear_kernel", "ieee", 100): (128, FRAGMENTS),
    ("interval_conv2d_kernel", "ieee", 100): (96, FRAGMENTS),
    ("interval_linear_kernel", "double", 90): (32, ADDRESSES),
    ("interval_conv2d_kernel", "double", 90): (56, ADDRESSES),
    ("interval_conv2d_weight_kernel", "double", 90): (40, ADDRESSES),
}
NUMBERS = {"half": torch.bfloat16, "tf32": torch.float32, "ieee": torch.float32, "double": torch.float64}
TYPES = {
    torch.bool: "*i1", torch.uint8: "*u8",
    torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.float64: "*fp64",
    int: "i32", float: "fp32", type(None): "constexpr",
}  # fmt: skip
# Sizes that lead to each tile of the tables: from large to small.
LINEAR = [(1024, 4096, 4096), (512, 1024, 1024), (256, 512, 512), (64, 64, 64)]  # M, I, O
CONV2D = [(64, 128, 16, 128), (256, 64, 16, 64), (2, 64, 8, 64)]  # B, C, H = W, O
NORM = [(128, 32, 32), (128, 64, 16), (1, 64, 16), (1, 3, 5)]  # B, C, H = W: whole samples, chunks of one, a small one
POINTWISE = [(8, 1024, 16, "channels_last"), (8, 1024, 16, "contiguous_format"), (2, 6, 5, "channels_last")]  # B, C, H = W


class Recorder:
    """Stands for a kernel: keeps the arguments of each launch."""

    def __init__(self, kernel, launches):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        return lambda *args, **options: self.launches.append((self.kernel, args, options))


def launches(number: str, architecture: int) -> list:
    """What the launchers would launch for every case."""
    found: list = []
    kind = 9 if architecture >= 90 else 8
    patches = [mock.patch.object(launch, "family", return_value=kind)]
    for module in (launch, beta_abs, conv2d_norm_estimate, interval_linear, interval_conv2d, spatial_shift):
        names = [
            name for name, value in vars(module).items() if isinstance(value, triton.JITFunction) and name.endswith("_kernel")
        ]
        patches += [mock.patch.object(module, name, Recorder(getattr(module, name), found)) for name in names]
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32" if number == "tf32" else "ieee"
    for patch in patches:
        patch.start()
    try:
        call_launchers(NUMBERS[number])
        if number == "half":
            call_launchers(torch.float16)
    finally:
        mock.patch.stopall()
        torch.backends.cuda.matmul.fp32_precision = before
    return found


def call_launchers(dtype: torch.dtype) -> None:
    new = lambda *size: torch.empty(size, dtype=dtype)
    for M, I, O in LINEAR:
        x, w, g = new(M, I), new(O, I), new(M, O)
        interval_linear.interval_linear(x, x, w, new(O), True)
        interval_linear.interval_linear_backward(g, g, x, x, w, True, True)
    for B, C, H, O in CONV2D:
        x, w, g = new(B, C, H, H), new(O, C, 3, 3), new(B, O, H, H)
        where = ([1, 1], [1, 1], [1, 1], 1)
        interval_conv2d.interval_conv2d(x, x, w, new(O), *where, True)
        interval_conv2d.interval_conv2d_backward(g, g, x, x, w, *where, True, True)
    for B, O in ((64, 64), (2, 32)):  # a first layer has few channels
        x, w, g = new(B, 3, 32, 32), new(O, 3, 3, 3), new(B, O, 32, 32)
        interval_conv2d.interval_conv2d(x, x, w, new(O), *where, True)
        interval_conv2d.interval_conv2d_backward(g, g, x, x, w, *where, True, True)
    for B, C, H in NORM if dtype != torch.float64 else ():  # the convolutions do run: one tap for each channel
        w, x = new(C, 1, 1, 1), new(B, C, H, H)
        for mask, start in ((x.bool(), x), (None, None)):
            where = ([H, H], [1, 1], [0, 0], [1, 1], C)
            conv2d_norm_estimate.conv2d_norm_estimate(w, mask, mask, start, *where, 1)
    for B, C, H, layout in POINTWISE:
        x = new(B, C, H, H).to(memory_format=getattr(torch, layout))
        spatial_shift.spatial_shift(x, 0.125 if C % 8 == 0 else 1 / 6, True)
        for bias, position, keep in ((new(C), new(H, H), True), (None, None, False)):
            _, signs = beta_abs.beta_abs(x, 0.5, bias, position, keep)
            beta_abs.beta_abs_backward(x, signs, C // 2 if keep else 0, True, keep, keep)


def source(kernel, args, options):
    """The launch as Triton's own specialisation sees it: ones are constants, multiples of 16 are known as such."""
    values = dict(zip(kernel.arg_names, args, strict=False))
    values.update({k: v for k, v in options.items() if k in kernel.arg_names})
    constants = {p.name for p in kernel.params if p.is_constexpr}
    constants |= {k for k, v in values.items() if v is None or (type(v) is int and v == 1)}
    kind = lambda v: v.dtype if isinstance(v, torch.Tensor) else type(v)
    signature = {k: "constexpr" if k in constants else TYPES[kind(values[k])] for k in kernel.arg_names}
    divisible = lambda v: isinstance(v, torch.Tensor) or (type(v) is int and v % 16 == 0)
    known = [i for i, k in enumerate(kernel.arg_names) if k not in constants and divisible(values[k])]
    return ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(kernel.arg_names.index(k),): values[k] for k in constants},
        attrs={(i,): [["tt.divisibility", 16]] for i in known},
    )


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers a thread, and bytes of stack: what did not fit in registers."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", text).groups()
    return int(registers), int(stack)


def compile_all(architecture: int, number: str) -> list[str]:
    """One line per kernel on the screen; the faults, one line each."""
    faults, seen, reached = [], set(), set()
    for kernel, args, options in launches(number, architecture):
        name = kernel.__name__
        tile = tuple(
            v for k, v in options.items() if k in ("ROWS", "COLUMNS", "BN", "BM", "BP", "BK", "BLOCK", "PARTS", "T", "J")
        )
        chosen = {k: options[k] for k in ("num_warps", "num_stages")}
        reached.add((*tile, *chosen.values()))
        flags = [k for k in ("OUTWARD", "FLAT", "TRANSPOSE", "UNIT") if options.get(k)]
        src = source(kernel, args, options)
        flags += [f"no {k[:-4]}" for k, kind in src.signature.items() if k in OPTIONAL and kind == "constexpr"]
        dtype = next(kind for kind in src.signature.values() if kind.startswith("*"))[1:]
        variant = (name, dtype, tile, *chosen.values(), *flags)
        if variant in seen:
            continue
        seen.add(variant)
        compiled = triton.compile(src, target=GPUTarget("cuda", architecture, 32), options=chosen)
        registers, stack = resources(compiled.asm["cubin"])
        label = f"sm_{architecture} {name} {number} {dtype} {'x'.join(map(str, tile))} {' '.join(flags)}"
        print(f"{label:84} registers {registers:3} shared {compiled.metadata.shared:6} spills {stack:3}", flush=True)
        if stack > ALLOWED_SPILLS.get((name, number, architecture), (0, ""))[0]:
            faults.append(f"{label}: {stack} bytes of stack a thread are not on the list of allowed spills")
    kind = 9 if architecture >= 90 else 8
    tables = (interval_linear.TILES, interval_linear.WEIGHT_TILES)
    tables += (interval_conv2d.TILES, interval_conv2d.FEW_CHANNELS, interval_conv2d.WEIGHT_TILES)
    missed = {tile for table in tables for tile in table[kind, number]} - reached
    return faults + [f"sm_{architecture} {number}: no case above reaches {tile}" for tile in missed]


def main() -> int:
    architectures = [int(a) for a in sys.argv[1:]] or ARCHITECTURES
    faults = [fault for a in architectures for number in NUMBERS for fault in compile_all(a, number)]
    print("\n".join(faults))
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
