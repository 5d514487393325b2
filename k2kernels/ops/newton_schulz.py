"""Newton-Schulz orthogonalisation: the public functions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from k2kernels.ops._check import FLOATS, Arguments, short
from k2kernels.ops._launch import chip, launch, matrices, module
from k2kernels.ops._register import declare
from k2kernels.reference import newton_schulz as reference

# A call with more is cut into several, one after another: each still fills a GPU many times over (20 of Kimi-K2's
# expert matrices take 2 GiB, and 20 waves of tiles a product on 132 SMs).
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


def _polar_express(steps: int) -> tuple[tuple[float, float, float], ...]:
    return reference.polar_express(steps)


# A few numbers, which torch.compile need not trace: torch.compiler.assume_constant_result sets the same attribute, and
# imports torch._dynamo, which takes as long as torch.
_polar_express._dynamo_marked_constant = True


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


def _launch(
    op: str,
    xs: Sequence[Tensor],
    coefficients: Sequence[float],
    algorithm: str,
    iterate_dtype: torch.dtype,
    plan: str,
    *operands: Any,
) -> None:
    """Launches the calls that the extension's function `plan` makes for an op on `xs`."""
    xs = [matrices(x) for x in xs]
    device = xs[0].device
    grams = [reference.on_gram_matrix(algorithm, *x.shape[-2:]) for x in xs]
    restarts = list(reference.restarts(len(coefficients) // 3, iterate_dtype))
    options = grams, coefficients, restarts, iterate_dtype == torch.bfloat16, WORKSPACE_BYTES, chip(device)
    for call in getattr(module(device), plan)(xs, *operands, options):
        launch("newton_schulz", call, xs[0].new_empty(call.workspace_bytes, dtype=torch.uint8), op=op)


def _launch_one(
    result: Tensor, x: Tensor, coefficients: Sequence[float], algorithm: str, iterate_dtype: torch.dtype
) -> None:
    _launch("newton_schulz", [x], coefficients, algorithm, iterate_dtype, "newton_schulz_plan", [result])


def _launch_list(
    results: list[Tensor],
    xs: Sequence[Tensor],
    coefficients: Sequence[float],
    algorithm: str,
    iterate_dtype: torch.dtype,
) -> None:
    _launch("newton_schulz_grouped", xs, coefficients, algorithm, iterate_dtype, "newton_schulz_plan", results)


def _launch_update(
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
    row_scales = [s.float().contiguous() for s in row_scales]
    lists, rule = (weights, momenta, copies, row_scales), (lr, weight_decay, momentum, nesterov, rms_scale)
    operands = *lists, lr_tensor, grad_scale, skip, *rule
    _launch("muon_update", grads, coefficients, algorithm, iterate_dtype, "muon_update_plan", *operands)


def _unserved(name: str, xs: Sequence[Tensor], iterate_dtype: torch.dtype) -> str | None:
    """Why the kernels do not serve tensors `xs`, called `name`."""
    if iterate_dtype not in (torch.float16, torch.bfloat16):
        return f"iterate_dtype must be float16 or bfloat16, got {short(iterate_dtype)}"
    for x in xs:
        if x.dtype == torch.float64:
            return f"{name} must be float32, bfloat16 or float16, got float64"
        if max(x.shape[-2:]) >= 2**30:
            return f"{name} must have sides below 2**30, got {list(x.shape)}"
    return None


def _update_unserved(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    momenta: Sequence[Tensor],
    copies: Sequence[Tensor],
    iterate_dtype: torch.dtype,
) -> str | None:
    for m in momenta:
        if m.dtype not in (torch.float32, torch.bfloat16):
            return f"momenta must be float32 or bfloat16, got {short(m.dtype)}"
    for name, xs in (("weights", weights), ("grads", grads), ("copies", copies), ("momenta", momenta)):
        if reason := _unserved(name, xs, iterate_dtype):
            return reason
        for x in xs if name != "grads" else ():
            if x.numel() and x.stride(-1) != 1:
                return f"{name} must have stride 1 in the last axis, got {x.stride(-1)}"
    return None


_newton_schulz = declare(
    reference.newton_schulz,
    outputs=lambda x: x.new_empty(x.shape),
    launch=_launch_one,
    unserved=lambda x, iterate_dtype: _unserved("x", [x], iterate_dtype),
)
_newton_schulz_grouped = declare(
    reference.newton_schulz_grouped,
    outputs=lambda xs: [x.new_empty(x.shape) for x in xs],
    launch=_launch_list,
    unserved=lambda xs, iterate_dtype: _unserved("xs", xs, iterate_dtype),
)
_muon_update = declare(
    reference.muon_update,
    launch=_launch_update,
    unserved=_update_unserved,
    mutates=("weights", "momenta", "copies"),
)
