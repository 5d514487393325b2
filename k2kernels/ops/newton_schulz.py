"""Newton-Schulz orthogonalisation: the public functions."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from k2kernels.ops._check import FLOATS, Arguments
from k2kernels.ops._launch import TYPES, address, chip, launch_numbers as launch, matrices_numbers as matrices, module
from k2kernels.ops._register import register
from k2kernels.reference import newton_schulz as reference

# A call with more is cut into several, one after another: each still fills a GPU many times over (20 of Kimi-K2's
# expert matrices take 2 GiB, and 20 waves of tiles a product on 132 multiprocessors).
WORKSPACE_BYTES = 4 << 30


def newton_schulz(
    x: Tensor,
    *,
    steps: int = 5,
    schedule: str | Sequence[Sequence[float]] = "quintic",
    algorithm: str = "auto",
    iterate_dtype: torch.dtype = torch.float16,
) -> Tensor:
    """Approximate polar factor U Vᵀ of every matrix X = U S Vᵀ: the singular values go to about 1.

    Args:
        x: [..., m, n], any m and n, leading axes batched; float32, bfloat16, float16 or float64. It is not changed.
        steps: iterations, 1 to 100.
        schedule: the coefficients of X <- a X + b (X Xᵀ) X + c (X Xᵀ)² X. "quintic": 3.4445, -4.7750, 2.0315 in every
            step (fast; singular values end in about 0.7 .. 1.2); "polar_express": the best odd quintic for each step
            (arXiv 2505.16932); or `steps` triples (a, b, c).
        algorithm: "standard" iterates on X, "gram" on the Gram matrix X Xᵀ of the short side with restarts against the
            growth of rounding errors; "auto" takes "gram" when the long side is at least 1.5 times the short one.
        iterate_dtype: what the intermediates are rounded to: float16 (sums in float32; better than bfloat16 on nearly
            low-rank matrices at the same speed), bfloat16, float32 or float64. On a CPU float32 is the fastest.

    Returns:
        Like x, contiguous. Each matrix is first divided by its Frobenius norm in float32 (float64 for float64) without
        an epsilon, so its scale does not matter. A zero matrix gives zero. A matrix with NaN or an infinity gives NaN
        throughout, and the others of the batch are unaffected. Not differentiable.

    Raises:
        TypeError: x is not a floating tensor.
        ValueError: x has fewer than two axes, an option is out of range, or `schedule` does not have `steps` triples.

    Source: Jordan et al., "Muon" (2024); Gram iteration: Dao-AILab/gram-newton-schulz, gram_newton_schulz.py.
    """
    args = Arguments("newton_schulz")
    x = args.tensor("x", x, ("...", "m", "n"), FLOATS)
    return _newton_schulz(x, *_options(args, steps, schedule, algorithm, iterate_dtype))


def newton_schulz_grouped(
    xs: Sequence[Tensor],
    *,
    steps: int = 5,
    schedule: str | Sequence[Sequence[float]] = "quintic",
    algorithm: str = "auto",
    iterate_dtype: torch.dtype = torch.float16,
) -> list[Tensor]:
    """`newton_schulz` of every tensor of a list, whose shapes may differ; they must be on one device.

    Same options, results and errors as `newton_schulz`; "auto" decides for each shape.
    """
    args = Arguments("newton_schulz_grouped")
    if isinstance(xs, Tensor) or not isinstance(xs, Sequence):
        raise TypeError(f"newton_schulz_grouped: xs must be a list of tensors, got {type(xs).__name__}")
    options = _options(args, steps, schedule, algorithm, iterate_dtype)
    # m and n differ from tensor to tensor, so their letters do too.
    xs = [args.tensor(f"xs[{i}]", x, ("...", f"m{i}", f"n{i}"), FLOATS) for i, x in enumerate(xs)]
    return _newton_schulz_grouped(xs, *options) if xs else []


def muon_update(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    momenta: Sequence[Tensor],
    *,
    lr: float | Tensor,
    weight_decay: float = 0.1,
    momentum: float = 0.95,
    nesterov: bool = True,
    rms_scale: float = 0.2,
    copies: Sequence[Tensor] = (),
    row_scales: Sequence[Tensor] = (),
    grad_scale: Tensor | None = None,
    skip: Tensor | None = None,
    steps: int = 5,
    schedule: str | Sequence[Sequence[float]] = "quintic",
    algorithm: str = "auto",
    iterate_dtype: torch.dtype = torch.float16,
) -> None:
    """One step of Muon for lists of stacked matrices [B, m, n], in place and without waiting for a GPU:

        G = grads / grad_scale;  M <- M + (1 - momentum) (G - M);  U = M, or G + momentum (M - G) with Nesterov
        W <- row_scales * ((1 - lr weight_decay) W - lr rms_scale sqrt(max(m, n)) NewtonSchulz(U))

    Args:
        weights: floats [B, m, n] each, of any shapes, on one device. They are computed in float32 (float64 for
            float64) and rounded once.
        grads: like the weights in shape, of any float dtype; they are not changed.
        momenta: M, in the same shapes, of any float dtype; U takes M as it is stored.
        lr: a number, or a tensor of one float32 on the device, which a captured graph reads at each replay.
        copies: none, or one [B, m, n] for each weight, which gets the new weight rounded to its dtype.
        row_scales: none, or a float32 or float64 [B, m] for each weight (empty: none for that one), by which its rows
            are multiplied last: QK-Clip.
        grad_scale: a tensor of one float32: the factor that the gradients carry.
        skip: a bool tensor of one element: where it is True (a step with overflow), nothing at all is changed.
        steps, schedule, algorithm, iterate_dtype: as in `newton_schulz`.

    Raises:
        TypeError, ValueError: for lists of different lengths, tensors of other shapes, dtypes or devices, and options
            out of range.
    """
    args = Arguments("muon_update")
    options = _options(args, steps, schedule, algorithm, iterate_dtype)
    for name, xs in (("grads", grads), ("momenta", momenta), ("copies", copies), ("row_scales", row_scales)):
        wanted = f"a list of {len(weights)}, as many as weights"
        args.require(len(xs) == len(weights) or (not len(xs) and name[0] in "cr"), name, wanted, f"{len(xs)}")
    for i, w in enumerate(weights):
        shape = (f"B{i}", f"m{i}", f"n{i}")
        args.writable(f"weights[{i}]", args.tensor(f"weights[{i}]", w, shape, FLOATS))
        args.tensor(f"grads[{i}]", grads[i], shape, FLOATS)
        args.writable(f"momenta[{i}]", args.tensor(f"momenta[{i}]", momenta[i], shape, FLOATS))
        if copies:
            args.writable(f"copies[{i}]", args.tensor(f"copies[{i}]", copies[i], shape, FLOATS))
        if row_scales and row_scales[i].numel():
            args.tensor(f"row_scales[{i}]", row_scales[i], shape[:2], (torch.float32, torch.float64))
    if isinstance(lr, Tensor):
        args.tensor("lr", lr, (), torch.float32)
    else:
        lr = args.number("lr", lr)
    args.optional("grad_scale", grad_scale, (), torch.float32)
    args.optional("skip", skip, (), torch.bool)
    if weights:
        rate, tensor = (1.0, lr) if isinstance(lr, Tensor) else (lr, None)
        _muon_update(
            list(weights), list(grads), list(momenta), list(copies), list(row_scales), tensor, grad_scale, skip,
            rate, weight_decay, momentum, nesterov, rms_scale, *options,
        )  # fmt: skip


@torch.compiler.assume_constant_result  # a few numbers: torch.compile shall take them, not trace how they come about
def _polar_express(steps: int) -> tuple[tuple[float, float, float], ...]:
    return reference.polar_express(steps)


def _options(
    args: Arguments, steps: Any, schedule: Any, algorithm: Any, iterate_dtype: Any
) -> tuple[list[float], str, torch.dtype]:
    """The checked options in the form the ops take them; the coefficients in one flat list."""
    args.integer("steps", steps, 1, 100)
    args.choice("algorithm", algorithm, ("auto", "standard", "gram"))
    args.choice("iterate_dtype", iterate_dtype, FLOATS)
    if isinstance(schedule, str):
        args.choice("schedule", schedule, ("quintic", "polar_express"))
        triples = (reference.QUINTIC,) * steps if schedule == "quintic" else _polar_express(steps)
    else:
        wanted = "'quintic', 'polar_express' or a sequence of (a, b, c)"
        triples = list(schedule) if isinstance(schedule, Sequence) else []
        good = bool(triples) and all(isinstance(t, Sequence) and len(t) == 3 for t in triples)
        good = good and all(isinstance(v, (int, float)) and math.isfinite(v) for t in triples for v in t)
        args.require(good, "schedule", wanted + " of finite numbers", repr(schedule))
        args.require(
            len(triples) == steps,
            "schedule",
            f"one (a, b, c) for each of the {steps} steps",
            f"{len(triples)}",
            f"pass steps={len(triples)}",
        )
    return [float(v) for t in triples for v in t], algorithm, iterate_dtype


class _Update(NamedTuple):
    """What else belongs to a tensor in a step of Muon; each [B, m, n]."""

    weight: Tensor
    momentum: Tensor
    copy: Tensor | None
    row_scale: Tensor | None  # [B, m]
    scale: float

    def description(self, first: int) -> tuple:
        """As csrc/bind/newton_schulz.cpp takes it, from matrix `first` on."""
        views = []
        for t in (self.momentum, self.weight, self.copy):
            if t is None:
                views.append((0, (0, 0), 0))
            else:
                batch_stride, row_stride, _ = t.stride()
                start = t.data_ptr() + first * batch_stride * t.element_size()
                views.append((start, (batch_stride, row_stride), TYPES[t.dtype]))
        s = self.row_scale
        rows = (0, 0) if s is None else (s.data_ptr() + first * s.stride(0) * s.element_size(), s.stride(0))
        return (*views, *rows, self.scale)


class _Part(NamedTuple):
    """Matrices of one tensor that are worked on in one call."""

    x: Tensor  # [B, m, n] or [m, n], columns side by side
    result: Tensor | None  # contiguous
    update: _Update | None  # in its place
    sizes: tuple[int, int, int]  # B, m, n
    strides: tuple[int, int]  # of x
    gram: bool
    kind: int  # place in the counts of launch.h
    capability: int  # of the chip, x 10
    bytes: tuple[int, int]  # of workspace, for a matrix and for a tensor
    first: int  # of B
    count: int

    def description(self) -> tuple:
        """As csrc/bind/newton_schulz.cpp takes it."""
        _, m, n = self.sizes
        result = 0
        if self.result is not None:
            result = self.result.data_ptr() + self.first * m * n * self.result.element_size()
        return (
            self.x.data_ptr() + self.first * self.strides[0] * self.x.element_size(),
            result,
            (self.count, m, n),
            self.strides,
            TYPES[self.x.dtype],
            self.gram,
        )


def _parts(
    xs: Sequence[Tensor], results: Sequence[Tensor] | None, updates: Sequence[_Update] | None, algorithm: str
) -> list[_Part]:
    """What there is to do, by kinds, and of each kind first those with the longest sums."""
    parts = []
    for i, x in enumerate(xs):
        if x.numel() > 0:
            rows, sizes, strides = matrices(x)
            gram = reference.on_gram_matrix(algorithm, *sizes[1:])
            result, update = (results[i], None) if updates is None else (None, updates[i])
            capability, _, shared_memory = chip(x.device)
            blocks, *num_bytes = module(x.device).newton_schulz_plan(
                *sizes[1:], gram, update is not None, shared_memory
            )
            kind = 1 + blocks if blocks else int(gram)
            parts.append(
                _Part(rows, result, update, sizes, strides, gram, kind, capability, tuple(num_bytes), 0, sizes[0])
            )
    return sorted(parts, key=lambda part: (part.kind, -max(part.sizes[1:])))


def _calls(parts: list[_Part]) -> Iterator[tuple[list[_Part], int]]:
    """The parts cut so that the workspace of each call stays below the limit, if single matrices do; and its bytes."""
    call: list[_Part] = []
    used = 0
    for part in parts:
        each, fixed = part.bytes
        left = part.count
        while left > 0:
            fits = min(left, (WORKSPACE_BYTES - used - fixed) // each)
            if fits <= 0 and call:
                yield call, used
                call, used = [], 0
                continue
            count = max(fits, 1)
            call.append(part._replace(first=part.count - left, count=count))
            used += fixed + count * each
            left -= count
    if call:
        yield call, used


def _launch(
    op: str, parts: list[_Part], coefficients: Sequence[float], iterate_dtype: torch.dtype, rule: tuple | None = None
) -> None:
    restarts = list(reference.restarts(len(coefficients) // 3, iterate_dtype))
    for call, num_bytes in _calls(parts):
        workspace = call[0].x.new_empty(num_bytes, dtype=torch.uint8)
        kinds = [part.kind for part in call]
        launch(
            op,
            "newton_schulz",
            workspace.device,
            [part.description() for part in call],
            [kinds.count(kind) for kind in range(5)],
            coefficients,
            restarts,
            TYPES[iterate_dtype],
            workspace.data_ptr(),
            [part.update.description(part.first) for part in call if part.update is not None],
            rule,
            call[0].capability,
        )


def _kernel(x: Tensor, coefficients: Sequence[float], algorithm: str, iterate_dtype: torch.dtype) -> Tensor:
    result = x.new_empty(x.shape)
    _launch("newton_schulz", _parts([x], [result], None, algorithm), coefficients, iterate_dtype)
    return result


def _grouped_kernel(
    xs: Sequence[Tensor], coefficients: Sequence[float], algorithm: str, iterate_dtype: torch.dtype
) -> list[Tensor]:
    results = [x.new_empty(x.shape) for x in xs]
    _launch("newton_schulz_grouped", _parts(xs, results, None, algorithm), coefficients, iterate_dtype)
    return results


def _update_kernel(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    momenta: Sequence[Tensor],
    copies: Sequence[Tensor],
    row_scales: Sequence[Tensor],
    lr_tensor: Tensor | None,
    grad_scale: Tensor | None,
    skip: Tensor | None,
    lr: float,
    weight_decay: float,
    momentum: float,
    nesterov: bool,
    rms_scale: float,
    coefficients: Sequence[float],
    algorithm: str,
    iterate_dtype: torch.dtype,
) -> None:
    updates = []
    for i, w in enumerate(weights):
        scales = row_scales[i] if row_scales and row_scales[i].numel() else None
        if scales is not None:
            scales = scales.float().contiguous()
        scale = rms_scale * math.sqrt(max(w.shape[1:]))
        updates.append(_Update(w, momenta[i], copies[i] if copies else None, scales, scale))
    found = [address(t) for t in (skip, lr_tensor, grad_scale)]
    rule = (*found, lr, weight_decay, momentum, nesterov)
    _launch("muon_update", _parts(grads, None, updates, algorithm), coefficients, iterate_dtype, rule)


def _unserved(xs: Sequence[Tensor], coefficients: Any, algorithm: str, iterate_dtype: torch.dtype) -> str | None:
    """Why the kernels do not serve these arguments."""
    if iterate_dtype not in (torch.float16, torch.bfloat16):
        return f"kernels iterate in float16 and bfloat16, not {iterate_dtype}"
    if any(x.dtype == torch.float64 for x in xs):
        return "no kernel takes float64"
    if any(max(x.shape[-2:]) >= 2**30 for x in xs):
        return "kernels take sides below 2**30"
    return None


def _update_unserved(
    weights: Sequence[Tensor], grads: Sequence[Tensor], momenta: Sequence[Tensor], copies: Sequence[Tensor], *rest: Any
) -> str | None:
    """The same for `muon_update`."""
    if any(m.dtype not in (torch.float32, torch.bfloat16) for m in momenta):
        return "kernels take momenta of float32 and bfloat16"
    if any(t.numel() and t.stride(-1) != 1 for t in (*weights, *momenta, *copies)):
        return "kernels write into rows whose elements lie side by side"
    return _unserved((*weights, *grads, *copies), *rest[-3:])


_newton_schulz = register(
    "newton_schulz(Tensor x, float[] coefficients, str algorithm, ScalarType iterate_dtype) -> Tensor",
    reference=reference.newton_schulz,
    fake=lambda x, coefficients, algorithm, iterate_dtype: x.new_empty(x.shape),
    kernel=_kernel,
    unserved=lambda x, *options: _unserved([x], *options),
)
_newton_schulz_grouped = register(
    "newton_schulz_grouped(Tensor[] xs, float[] coefficients, str algorithm, ScalarType iterate_dtype) -> Tensor[]",
    reference=reference.newton_schulz_grouped,
    fake=lambda xs, coefficients, algorithm, iterate_dtype: [x.new_empty(x.shape) for x in xs],
    kernel=_grouped_kernel,
    unserved=_unserved,
)
_muon_update = register(
    "muon_update(Tensor(a!)[] weights, Tensor[] grads, Tensor(b!)[] momenta, Tensor(c!)[] copies, Tensor[] row_scales, "
    "Tensor? lr_tensor, Tensor? grad_scale, Tensor? skip, float lr, float weight_decay, float momentum, bool nesterov, "
    "float rms_scale, float[] coefficients, str algorithm, ScalarType iterate_dtype) -> ()",
    reference=reference.muon_update,
    fake=lambda *args: None,
    kernel=_update_kernel,
    unserved=_update_unserved,
    mutates=True,
)
