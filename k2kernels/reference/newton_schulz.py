"""Newton-Schulz orthogonalisation: the definitions.

    X_0 = X / |X|_F,    X_{t+1} = (a_t I + b_t X_t X_tᵀ + c_t (X_t X_tᵀ)²) X_t

The products are taken on the short side: X Xᵀ when m <= n, Xᵀ X when m > n; no transpose is copied. Every intermediate
is held in the iteration's dtype as a tensor-core kernel holds it: operands rounded to it, sums in float32, the epilogue
(the added multiple of another matrix) in float32 too, one rounding at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import sqrt

import numpy as np
import torch
from torch import Tensor

from k2kernels.reference._numeric import wide

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
