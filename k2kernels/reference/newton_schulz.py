"""Newton-Schulz orthogonalisation: the definitions.

    X_0 = X / |X|_F,    X_{t+1} = (a_t I + b_t X_t X_tᵀ + c_t (X_t X_tᵀ)²) X_t

The products are taken on the short side: X Xᵀ when m <= n, Xᵀ X when m > n; no transpose is copied. Every intermediate
is held in the iteration's dtype as a tensor-core kernel holds it: operands rounded to it, sums in float32, the epilogue
(the added multiple of another matrix) in float32 too, one rounding at the end.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import lru_cache
from math import sqrt

import numpy as np
import torch
from torch import Tensor

from k2kernels.reference._numeric import wide, wide_dtype

QUINTIC = (3.4445, -4.7750, 2.0315)  # https://kellerjordan.github.io/posts/muon; also torch.optim.Muon
GRAM_ASPECT = 1.5  # long / short side from which iterating on the Gram matrix is used: below, it gains little
CUSHION = 0.02407327424182761  # of Polar Express; the value behind the coefficients printed in the paper


def newton_schulz(x: Tensor, coefficients: Sequence[float], algorithm: str, iterate_dtype: torch.dtype) -> Tensor:
    """Approximate polar factor of every matrix of [..., m, n]; `coefficients` = a, b, c of each step in turn."""
    if x.numel() == 0:
        return x.new_empty(x.shape)
    matrices = x.contiguous().view(-1, *x.shape[-2:])
    steps = [tuple(coefficients[i : i + 3]) for i in range(0, len(coefficients), 3)]
    iterate = _gram if on_gram_matrix(algorithm, *x.shape[-2:]) else _standard
    result = iterate(_normalized(matrices).to(iterate_dtype), steps)
    return result.to(x.dtype).contiguous().view(x.shape)


def newton_schulz_grouped(
    xs: Sequence[Tensor], coefficients: Sequence[float], algorithm: str, iterate_dtype: torch.dtype
) -> list[Tensor]:
    """`newton_schulz` of each tensor of a list; shapes may differ."""
    return [newton_schulz(x, coefficients, algorithm, iterate_dtype) for x in xs]


def muon_update(
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
    """One step of Muon for lists of [B, m, n], in place; nothing at all where `skip` holds.

        G = grads / grad_scale;  M <- M + (1 - momentum) (G - M);  U = M, or G + momentum (M - G) with Nesterov
        W <- row_scales * ((1 - rate weight_decay) W - rate rms_scale sqrt(max(m, n)) NewtonSchulz(U))

    rate = lr * lr_tensor. M enters U as it is stored. `copies` (none, or one for each weight) get W too, rounded.
    `row_scales` are [B, m] each, or none. Numbers that are on a GPU stay tensors, so that the host does
    not wait for them.
    """
    buckets: dict[tuple[torch.dtype, torch.dtype, torch.Size], list[int]] = defaultdict(list)
    for i, (w, m) in enumerate(zip(weights, momenta)):
        if w.numel():
            buckets[w.dtype, m.dtype, w.shape[1:]].append(i)
    directions = newton_schulz_grouped(
        [_direction([(grads[i], momenta[i]) for i in bucket], wide_dtype(dtype), grad_scale, skip, momentum, nesterov)
         for (dtype, *_), bucket in buckets.items()],
        coefficients, algorithm, iterate_dtype,
    )  # fmt: skip
    rate = lr if lr_tensor is None else lr * lr_tensor
    for ((dtype, _, shape), bucket), direction in zip(buckets.items(), directions):
        members = [weights[i] for i in bucket]
        updated = members if dtype == wide_dtype(dtype) else [w.to(wide_dtype(dtype)) for w in members]
        decay, scale = 1 - rate * weight_decay, rate * rms_scale * sqrt(max(shape))
        if skip is not None:
            one = direction.new_ones(())
            direction = torch.where(skip, 0, direction)
            decay = torch.where(skip, one, decay * one)
        torch._foreach_mul_(updated, decay)
        if isinstance(scale, Tensor):
            direction, scale = direction * scale, 1.0
        torch._foreach_add_(updated, direction.split([len(w) for w in members]), alpha=-scale)
        for i, w in zip(bucket, updated):
            if row_scales and row_scales[i].numel():
                factors = row_scales[i].to(w.dtype).unsqueeze(-1)
                w.mul_(factors if skip is None else torch.where(skip, 1, factors))
        if updated is not members:
            torch._foreach_copy_(members, updated)
        if copies:
            targets = [copies[i] for i in bucket]
            if skip is not None:
                updated = [torch.where(skip, c, w.to(c.dtype)) for c, w in zip(targets, updated)]
            torch._foreach_copy_(targets, updated)


def _direction(
    bucket: list[tuple[Tensor, Tensor]],
    dtype: torch.dtype,
    grad_scale: Tensor | None,
    skip: Tensor | None,
    momentum: float,
    nesterov: bool,
) -> Tensor:
    """Updates the momentum of (grad, momentum) of one shape and stacks what is to be orthogonalised [B, m, n]."""
    momenta = [m for _, m in bucket]
    grad = torch.cat([g for g, _ in bucket]).to(dtype)
    if grad_scale is not None:
        grad /= grad_scale
    average = torch.cat(momenta).to(dtype)
    if skip is None:
        average.lerp_(grad, 1 - momentum)
    else:
        average = torch.where(skip, average, torch.lerp(average, grad, 1 - momentum))
    average = average.to(momenta[0].dtype)
    torch._foreach_copy_(momenta, average.split([len(m) for m in momenta]))
    average = average.to(dtype)
    return grad.lerp_(average, momentum) if nesterov else average


def on_gram_matrix(algorithm: str, m: int, n: int) -> bool:
    """Whether matrices of that shape are iterated on by way of their Gram matrix."""
    return algorithm == "gram" or (algorithm == "auto" and max(m, n) >= GRAM_ASPECT * min(m, n))


def restarts(steps: int, dtype: torch.dtype) -> range:
    """The steps before which the Gram iteration recomputes X and its Gram matrix.

    Rounding makes X Xᵀ slightly indefinite, and the recurrence amplifies the negative eigenvalues
    (Dao-AILab/gram-newton-schulz, restart_autotune.py). Recomputing after step 2 contains that for five steps in
    float16, at every third step after that for longer schedules; bfloat16 needs it at every second step.
    """
    return range(2, steps, 2 if dtype == torch.bfloat16 else 3)


@lru_cache
def polar_express(steps: int, lower: float = 1e-3, safety: float = 1.01) -> tuple[tuple[float, float, float], ...]:
    """Coefficients of the Polar Express schedule (arXiv 2505.16932), in float64.

    Step t takes the odd quintic that is closest to 1 on the interval where the singular values can be by then, starting
    from [lower, 1]. All but the last are evaluated at x / safety, so that singular values pushed slightly above 1 by
    rounding stay inside. Once the interval has shrunk to 1 the same polynomial (15/8, -10/8, 3/8) repeats.
    """
    result = []
    low, high = lower, 1.0
    for step in range(steps):
        fitted = max(low, CUSHION * high)
        a, b, c = _minimax_quintic(fitted, high)
        if fitted > low:
            # Fitting the smallest singular values too would spoil the large ones, so the interval was cut short; centre
            # the values over the whole interval on 1 instead.
            centre = (_odd(a, b, c, low) + _odd(a, b, c, high)) / 2
            a, b, c = a / centre, b / centre, c / centre
        low = _odd(a, b, c, low)
        high = 2 - low
        s = safety if step < steps - 1 else 1.0
        result.append((a / s, b / s**3, c / s**5))
    return tuple(result)


def _normalized(x: Tensor) -> Tensor:
    """x / |x|_F per matrix, in float32 (float64 for float64); zero stays zero, a NaN or an infinity makes it all NaN.

    Dividing by the largest element first keeps the squares in range whatever the scale of x, so no epsilon is needed,
    which would shrink small matrices.
    """
    x = wide(x)
    largest = x.abs().amax(dim=(-2, -1), keepdim=True)
    x = x / largest.masked_fill(largest == 0, 1.0)
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
    return x.div_(norm.masked_fill(norm == 0, 1.0))


def _standard(x: Tensor, steps: list[tuple[float, float, float]]) -> Tensor:
    tall = x.shape[-2] > x.shape[-1]
    for a, b, c in steps:
        gram = _gram_matrix(x)
        z = _multiply_add(gram, gram, gram, alpha=c, beta=b)
        x = _multiply_add(x, z, x, beta=a) if tall else _multiply_add(z, x, x, beta=a)
    return x


def _gram(x: Tensor, steps: list[tuple[float, float, float]]) -> Tensor:
    """The same iteration on R = X Xᵀ alone: X_t = Q_t X_0 with Q_{t+1} = Q_t (a I + Z_t), R_{t+1} = (a I + Z_t)² R_t.

    Source: Dao-AILab/gram-newton-schulz, gram_newton_schulz.py.
    """
    tall = x.shape[-2] > x.shape[-1]
    restart_at = restarts(len(steps), x.dtype)
    gram, q = _gram_matrix(x), None
    for step, (a, b, c) in enumerate(steps):
        if step in restart_at:
            x = _multiply_add(x, q) if tall else _multiply_add(q, x)
            gram, q = _gram_matrix(x), None
        z = _multiply_add(gram, gram, gram, alpha=c, beta=b)
        if q is None:
            q = z.clone()
            q.diagonal(dim1=-2, dim2=-1).add_(a)
        else:
            q = _multiply_add(q, z, q, beta=a)
        if step + 1 < len(steps) and step + 1 not in restart_at:
            gram = _multiply_add(gram, z, gram, beta=a)
            gram = _multiply_add(z, gram, gram, beta=a)
    return _multiply_add(x, q) if tall else _multiply_add(q, x)


def _gram_matrix(x: Tensor) -> Tensor:
    tall = x.shape[-2] > x.shape[-1]
    return _multiply_add(x.mT, x) if tall else _multiply_add(x, x.mT)


def _multiply_add(a: Tensor, b: Tensor, c: Tensor | None = None, *, alpha: float = 1.0, beta: float = 0.0) -> Tensor:
    """alpha a b + beta c of [B, ., .] matrices, summed in float32 (float64 for float64), rounded once to a's dtype."""
    dtype = a.dtype
    if dtype in (torch.float16, torch.bfloat16) and a.device.type != "cuda":
        # A GPU accumulates half precision in float32; what a CPU does depends on its instructions, so widen explicitly.
        a, b, c = a.float(), b.float(), None if c is None else c.float()
    result = torch.bmm(a, b) if c is None else torch.baddbmm(c, a, b, alpha=alpha, beta=beta)
    return result.to(dtype)


def _odd(a: float, b: float, c: float, x: float) -> float:
    return x * (a + x * x * (b + x * x * c))


def _minimax_quintic(low: float, high: float) -> tuple[float, float, float]:
    """The odd quintic whose largest distance from 1 on [low, high] is smallest: Remez exchange on four points."""
    if low > (1 - 5e-6) * high:
        # The exchange is ill-conditioned on a point; there the limit is the Taylor polynomial of the sign function.
        return 15 / 8 / high, -10 / 8 / high**3, 3 / 8 / high**5
    inner = (3 * low + high) / 4, (low + 3 * high) / 4
    for _ in range(30):  # converges quadratically: about six rounds
        points = np.array([low, *inner, high])
        system = np.stack([points, points**3, points**5, [1.0, -1.0, 1.0, -1.0]], axis=1)
        a, b, c, _error = map(float, np.linalg.solve(system, np.ones(4)))
        # The extrema of the polynomial inside the interval: roots of a + 3b x² + 5c x⁴.
        root = sqrt(9 * b * b - 20 * a * c)
        last, inner = inner, (sqrt((-3 * b - root) / (10 * c)), sqrt((-3 * b + root) / (10 * c)))
        if abs(inner[0] - last[0]) + abs(inner[1] - last[1]) < 1e-14 * high:
            break
    return a, b, c
