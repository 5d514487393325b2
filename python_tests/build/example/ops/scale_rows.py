"""Row scaling: the public function."""

from torch import Tensor

from k2kernels.ops._check import FLOATS, Arguments
from k2kernels.ops._launch import launch, matrices
from k2kernels.ops._register import declare
from k2kernels.reference import scale_rows as reference


def scale_rows(x: Tensor) -> Tensor:
    """Divides each row by its largest magnitude, in float32 (float64 for float64); a row of zeros becomes NaN.

    Args:
        x: [..., M, K]; float32, bfloat16, float16 or float64; any strides.

    Returns:
        [..., M, K] in x's dtype, contiguous. Not differentiable.

    Raises:
        TypeError, ValueError: for dtype and shape.
    """
    args = Arguments("scale_rows")
    x = args.tensor("x", x, ("...", "M", "K"), FLOATS)
    args.require(x.shape[-1] > 0, "x", "at least one column wide", list(x.shape))
    return _scale_rows(x)


_scale_rows = declare(
    reference.scale_rows,
    outputs=lambda x: x.new_empty(*x.shape),
    launch=lambda y, x: launch("scale_rows", matrices(x.reshape(-1, x.shape[-1])), y),
    unserved=lambda x: "no kernel computes in float64" if x.dtype.itemsize == 8 else None,
)
