"""k2kernels: kernels, a thin model and the MuonClip optimizer for the Kimi-K2 / DeepSeek-V3 family."""

from k2kernels._backend import UnsupportedError, backend, emulated, launch_count
from k2kernels.ops.quant import swiglu

__version__ = "0.1.0"

__all__ = ["UnsupportedError", "backend", "emulated", "launch_count", "swiglu"]
