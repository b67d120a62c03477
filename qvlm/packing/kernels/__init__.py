"""The products that packed layers compute with, a file each."""

KERNELS = ("auto", "reference", "bf16", "native", "int_mm", "int4_weight_only", "triton")


def names() -> tuple[str, ...]:
    """Returns the values that the option `kernel` accepts."""
    return KERNELS
