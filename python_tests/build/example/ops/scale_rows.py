"""Row scaling: the public function."""

from torch import Tensor

from k2kernels.ops._check import FLOATS, Arguments
from k2kernels.ops._launch import TYPES, launch, matrices
from k2kernels.ops._register import register
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


def _scale_rows_fake(x: Tensor) -> Tensor:
    return x.new_empty(*x.shape)


def _scale_rows_kernel(x: Tensor) -> Tensor:
    y = _scale_rows_fake(x)
    x, (_, rows, columns), (_, row_stride) = matrices(x.reshape(-1, x.shape[-1]))
    launch(
        "scale_rows",  # the op, for launch_count
        "scale_rows",  # the function of csrc/bind/scale_rows.cpp
        x.device,
        x.data_ptr(),
        y.data_ptr(),
        TYPES[x.dtype],
        rows,
        columns,
        row_stride,
    )
    return y


_scale_rows = register(
    "scale_rows(Tensor x) -> Tensor",
    reference=reference.scale_rows,
    fake=_scale_rows_fake,
    kernel=_scale_rows_kernel,
    unserved=lambda x: "no kernel computes in float64" if x.dtype.itemsize == 8 else None,
)
