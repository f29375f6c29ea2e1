"""GPU kernels in Triton, one file per op. CUDA kernels beside them are compiled into _ops_cuda."""


def register() -> None:
    """Imports every kernel file; each registers itself for CUDA tensors."""
    from lipfast.kernels import beta_abs, conv2d_norm_estimate, interval_conv2d, interval_linear, spatial_shift  # noqa: F401
