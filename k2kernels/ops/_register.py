"""Registration of ops with PyTorch's dispatcher: the only file that uses torch.library.

An op is declared once, by its reference, whose annotations are the schema, by the function that makes its empty
results, and by the function that launches its kernel into them; `declare` makes the rest of these.

`Library.define/impl` is used rather than the `custom_op` decorator, and each op is registered twice, without and with a
backward, because that makes a call cheap when no gradient is required. Calling the body past the dispatcher would gain
little: checking that no mode, transform, tracer, profiler or tensor subclass needs the dispatcher takes as long.
"""

from __future__ import annotations

import inspect
import operator
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from k2kernels import _backend
from k2kernels.ops import _launch

_LIBRARY = torch.library.Library("k2kernels", "DEF")
_TAGS = (torch.Tag.pt2_compliant_tag,)

_DEFAULT = re.compile(r'=("[^"]*"|[^,)]+)')

OPS: dict[str, Op] = {}


class Op:
    """A registered op; calling it picks the overload that has a backward only when a gradient is required.

    Arguments are positional, as those of the reference.

    Attributes:
        plain, autograd: the overloads without and with a backward.
        out: the op that writes its first result into a tensor, given last, and returns the others; where there is one.
        kernel: makes the results and launches the kernel, past the dispatcher; keywords are passed to `launch`.
    """

    out: Op
    kernel: Callable

    def __init__(
        self, name: str, *, has_kernel: bool, mutates: bool, validate: Callable | None, why_not: Callable[..., Any]
    ):
        self.name = name
        self._why_not = why_not
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
                some = () if arg is None else (arg,) if isinstance(arg, Tensor) else arg
                for tensor in some:
                    if tensor.requires_grad:
                        return self.autograd(*args)
        return self.plain(*args)

    def serves(self, *args: Any) -> bool:
        """Whether the kernel serves a call with these arguments, the first of which is a tensor."""
        device = args[0].device.type
        return _backend.choose(self.name, device, self._why_not, device, args) != "reference"


def declare(
    reference: Callable,
    *,
    outputs: Callable | None = None,
    launch: Callable | None = None,
    unserved: Callable | None = None,
    validate: Callable | None = None,
    setup_context: Callable | None = None,
    backward: Callable | None = None,
    mutates: Sequence[str] = (),
    out: Sequence[str] | None = None,
    out_reference: Callable | None = None,
) -> Op:
    """Registers an op of the reference's name under `torch.ops.k2kernels`; returns what the public function calls.

    The functions below name those of the reference's parameters that they take, in any order, and get these. Where
    one serves several ops, a parameter that an op lacks keeps its default; keyword-only ones are no arguments of ops.

    Args:
        reference: the plain PyTorch body. Its annotations are the schema (`torch.library.infer_schema`), without
            defaults; its results must not alias its arguments.
        outputs: makes the results, empty: a tensor, a tuple or a list of them. It is the op's fake implementation too.
            None: the op has no results.
        launch: launches the kernel, which fills them: `launch(*results, ...)`. One body serves CUDA and the emulator,
            because the two extension modules hold the same functions. None: there is no kernel yet.
        unserved: says why the kernel does not take these arguments ("float64 ..."), or None where it does; the
            reference serves them then.
        validate: checks the *contents* of CPU tensors (indices in range ...) and raises ValueError. CUDA tensors
            are never read by the host.
        setup_context, backward: as torch.library.register_autograd takes them. Without a backward, differentiating
            the op raises instead of silently leaving `grad` at None.
        mutates: parameters that the op writes into, for which PyTorch allows no backward.
        out: where the op has an `out=` form, the parameters that may be `out` itself, because each element is read by
            the thread that writes it. `outputs` then takes `out=` too. Any other argument may share memory with `out`:
            the result is then made in a copy.
        out_reference: `out_reference(out, *arguments)`, where the reference writes only some of the elements of `out`.
    """
    schema = torch.library.infer_schema(reference, mutates_args=tuple(mutates))
    schema = _DEFAULT.sub("", schema)  # which the dispatcher would leave out of the arguments
    names = list(inspect.signature(reference).parameters)
    arguments, _, results = schema.rpartition(" -> ")
    made = 0 if outputs is None else results.count("Tensor")
    make, fill = _naming(outputs, names), _naming(launch, names, made)

    def empty(*args: Any) -> Any:
        return None if made == 0 else outputs(*make(args))

    def kernel(*args: Any, **more: Any) -> Any:
        if made == 0:
            return launch(*fill(args), **more)
        results = outputs(*make(args))
        if made == 1:
            launch(results, *fill(args), **more)
        else:
            launch(*results, *fill(args), **more)
        return results

    checks = dict(unserved=unserved, validate=validate)
    bodies = dict(reference=reference, fake=empty, kernel=launch and kernel)
    gradients = dict(setup_context=setup_context, backward=backward)
    op = _define(reference.__name__, schema, names, **bodies, **checks, **gradients, mutates=bool(mutates))
    op.kernel = kernel
    if out is None:
        return op

    others = ", ".join(results.strip("()").split(", ")[1:])
    may_be_out = [names.index(name) for name in out]

    def reference_out(*args: Any) -> Any:
        *args, destination = args
        if out_reference is not None:
            return out_reference(destination, *args)
        first, *rest = _each(reference(*args))
        destination.copy_(first)
        return _others(rest)

    def kernel_out(*args: Any) -> Any:
        *args, destination = args
        results = _each(outputs(*make(args), out=destination))
        launch(*results, *fill(args))
        return _others(results[1:])

    def fake_out(*args: Any) -> Any:
        *args, destination = args
        return _others(_each(outputs(*make(args), out=destination))[1:])

    bodies = dict(
        reference=_apart(reference_out, may_be_out), fake=fake_out, kernel=launch and _apart(kernel_out, may_be_out)
    )
    schema = f"{arguments[:-1]}, Tensor(a!) out) -> ({others})"
    op.out = _define(f"{op.name}_out", schema, [*names, "out"], **bodies, **checks, mutates=True)
    return op


def _each(results: Any) -> Sequence[Any]:
    """What an op returns as a sequence of its results: a list of tensors is one."""
    return results if type(results) is tuple else () if results is None else (results,)


def _others(results: Sequence[Any]) -> Any:
    return tuple(results) if len(results) > 1 else results[0] if results else None


def _naming(
    function: Callable | None, names: Sequence[str], given: int = 0
) -> Callable[[Sequence[Any]], Sequence[Any]]:
    """Which of an op's arguments, called `names`, `function` takes behind the `given` first ones."""
    if function is None:
        return lambda args: ()
    # tuple and itemgetter, not lambdas: calling a Python function would take as long as the rest of a call.
    taken = list(inspect.signature(function).parameters.values())[given:]
    taken = [p for p in taken if p.kind is not p.KEYWORD_ONLY]
    while taken and taken[-1].name not in names and taken[-1].default is not inspect.Parameter.empty:
        taken.pop()  # it keeps its default by itself
    absent = [p for p in taken if p.name not in names]
    if unknown := [p.name for p in absent if p.default is p.empty]:
        raise TypeError(f"{function.__qualname__} takes {unknown}, which are not among {names}")
    names, defaults = [*names, *(p.name for p in absent)], [p.default for p in absent]
    places = [names.index(p.name) for p in taken]
    if places == list(range(len(names))) and not defaults:
        return tuple
    if len(places) == 1:
        pick = operator.itemgetter(slice(places[0], places[0] + 1))
    else:
        pick = operator.itemgetter(*places) if places else lambda args: ()
    return (lambda args: pick((*args, *defaults))) if defaults else pick


def _apart(body: Callable, may_be_out: Sequence[int]) -> Callable:
    """`body`, whose last argument is `out`, writing a copy first where `out` shares memory with what is read.

    A kernel writes some results before it has read all operands.
    """

    def run(*args: Any) -> Any:
        out = args[-1]
        begin, end = _extent(out)
        for i, x in enumerate(args[:-1]):
            if not isinstance(x, Tensor) or x.data_ptr() >= end or begin >= _extent(x)[1]:
                continue
            if i in may_be_out and (x.data_ptr(), x.dtype, x.stride()) == (begin, out.dtype, out.stride()):
                continue
            copy = out.clone()
            results = body(*args[:-1], copy)
            out.copy_(copy)
            return results
        return body(*args)

    return run


def _extent(x: Tensor) -> tuple[int, int]:
    """The addresses where its elements begin and end."""
    begin = x.data_ptr()
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride()))
    return begin, begin + (last + 1) * x.itemsize if x.numel() else begin


def _define(
    name: str,
    schema: str,
    names: Sequence[str],
    *,
    reference: Callable,
    fake: Callable,
    kernel: Callable | None,
    unserved: Callable | None,
    validate: Callable | None,
    setup_context: Callable | None = None,
    backward: Callable | None = None,
    mutates: bool,
) -> Op:
    """Registers one name, as a `schema` of arguments called `names`, with all its overloads."""
    unserved_takes, validate_takes = _naming(unserved, names), _naming(validate, names)

    def why_not(device: str, args: tuple) -> str | None:
        if kernel is None:
            return "no kernel yet"
        where = _launch.why_not_emulated() if device == "cpu" else _launch.why_not_cuda(_device_index(args))
        return where or (unserved(*unserved_takes(args)) if unserved is not None else None)

    declared = [name] if mutates else [name, f"{name}_autograd"]
    for overload in declared:
        _LIBRARY.define(f"{overload}{schema}", tags=_TAGS)
    op = OPS[name] = Op(name, has_kernel=kernel is not None, mutates=mutates, validate=validate, why_not=why_not)
    aliases = [argument.alias_info for argument in op.plain._schema.arguments]
    written = [i for i, alias in enumerate(aliases) if alias is not None and alias.is_write]

    def body(device: str) -> Callable:
        def run(*args: Any) -> Any:
            chosen = _backend.choose(name, device, why_not, device, args)
            if device == "cpu" and op.validate is not None:
                op.validate(*validate_takes(args))
            if chosen == "reference":
                return reference(*args)
            results = kernel(*args)
            if written:  # PyTorch did not see the write, but autograd may have saved the tensor for a backward
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
