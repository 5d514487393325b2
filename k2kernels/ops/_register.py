"""Registration of ops with PyTorch's dispatcher: the only file that talks to torch.library.

`Library.define/impl` is used rather than the `custom_op` decorator, and each op is registered twice, without and with a
backward, because that makes a call cheap when no gradient is wanted. Calling the body past the dispatcher would gain
little: to make sure that no mode, transform, tracer, profiler or odd tensor needs it takes about as long as it does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from k2kernels import _backend
from k2kernels.ops import _launch

_LIBRARY = torch.library.Library("k2kernels", "DEF")
_TAGS = (torch.Tag.pt2_compliant_tag,)

OPS: dict[str, Op] = {}


class Op:
    """A registered op; calling it picks the overload that has a backward only when a gradient is wanted.

    Arguments are positional, as in the schema.
    """

    def __init__(self, name: str, *, has_kernel: bool, mutates: bool, validate: Callable | None):
        self.name = name
        self.has_kernel = has_kernel
        self.validate = validate
        self.plain = getattr(torch.ops.k2kernels, name).default
        twin = name if mutates else f"{name}_autograd"
        self.autograd = getattr(torch.ops.k2kernels, twin).default
        self._tensors = [i for i, a in enumerate(self.plain._schema.arguments) if "Tensor" in str(a.type)]

    def __call__(self, *args: Any) -> Any:
        if torch.is_grad_enabled():
            for i in self._tensors:
                arg = args[i]  # a tensor, some, or None
                some = () if arg is None else (arg,) if isinstance(arg, torch.Tensor) else arg
                for tensor in some:
                    if tensor.requires_grad:
                        return self.autograd(*args)
        return self.plain(*args)


def register(
    schema: str,
    *,
    reference: Callable,
    fake: Callable,
    kernel: Callable | None = None,
    unserved: Callable | None = None,
    validate: Callable | None = None,
    setup_context: Callable | None = None,
    backward: Callable | None = None,
    mutates: bool = False,
) -> Op:
    """Registers one op under `torch.ops.k2kernels` and returns what the public function calls.

    Args:
        schema: "name(Tensor x, int n) -> Tensor", as torch.library.define takes it.
        reference: the plain PyTorch body; same arguments. Its results must not alias its arguments.
        fake: shapes and dtypes of the results, without data.
        kernel: launches the compiled kernel; same arguments. One body serves CUDA and the emulator, because the two
            extension modules hold the same functions: see `_launch.launch`.
        unserved: says why the kernel does not take these arguments ("float64 ..."), or None where it does; the
            reference serves them then.
        validate: looks into the *contents* of CPU tensors (indices in range ...) and raises ValueError. CUDA tensors
            are never read by the host.
        setup_context, backward: as torch.library.register_autograd takes them. Without a backward, differentiating
            the op raises instead of silently leaving `grad` at None.
        mutates: the schema writes into an argument, for which PyTorch allows no backward.
    """
    name, arguments = schema.split("(", 1)

    def why_not(device: str, args: tuple) -> str | None:
        if kernel is None:
            return "no kernel yet"
        where = _launch.why_not_emulated() if device == "cpu" else _launch.why_not_cuda(_device_index(args))
        return where or (unserved(*args) if unserved is not None else None)

    declared = [name] if mutates else [name, f"{name}_autograd"]
    for overload in declared:
        _LIBRARY.define(f"{overload}({arguments}", tags=_TAGS)
    op = OPS[name] = Op(name, has_kernel=kernel is not None, mutates=mutates, validate=validate)
    aliases = [argument.alias_info for argument in op.plain._schema.arguments]
    written = [i for i, alias in enumerate(aliases) if alias is not None and alias.is_write]

    def body(device: str) -> Callable:
        def run(*args: Any) -> Any:
            chosen = _backend.choose(name, device, why_not, device, args)
            if device == "cpu" and op.validate is not None:
                op.validate(*args)
            if chosen == "reference":
                return reference(*args)
            results = kernel(*args)
            if written:  # PyTorch saw no write, and autograd must know: it may have saved the tensor for a backward
                for i in written:
                    torch.autograd.graph.increment_version(args[i])
            return results

        return run

    for overload in declared:
        _LIBRARY.impl(overload, body("cpu"), "CPU")
        _LIBRARY.impl(overload, body("cuda"), "CUDA")
        torch.library.register_fake(f"k2kernels::{overload}", fake, lib=_LIBRARY)
    if not mutates:
        torch.library.register_autograd(
            f"k2kernels::{name}_autograd",
            backward or _no_backward(name),
            setup_context=setup_context,
            lib=_LIBRARY,
        )
    return op


def _device_index(args: tuple) -> int:
    for arg in args:
        if isinstance(arg, torch.Tensor):
            return arg.device.index
        if isinstance(arg, (list, tuple)) and arg and isinstance(arg[0], torch.Tensor):
            return arg[0].device.index
    raise TypeError("no tensor among the arguments")


def _no_backward(name: str) -> Callable:
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(f"{name}: this op has no backward; call it under torch.no_grad() or on detached tensors")

    return backward
