"""Log-probabilities of tokens from hidden states and the output head, without the logits of all tokens in memory."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from k2kernels.ops._check import FLOATS, INDICES, Arguments

ROWS, COLUMNS = 256, 4096  # of the logits that exist at a time: 4 MB in float32


class LogProbs(NamedTuple):
    log_probs: Tensor
    entropy: Tensor


def linear_log_probs(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, temperature: float = 1.0, entropy: bool = False
) -> Tensor | LogProbs:
    """`log_softmax(hidden · weightᵀ / temperature)` at the targets; differentiable in hidden and weight.

    At most ROWS x COLUMNS logits exist at a time, where 8,192 tokens and a vocabulary of 163,840 would have 5.4 GB in
    float32. The log-sum-exp is updated from chunk to chunk of the vocabulary; the backward pass computes the logits
    again. Logits, sums over chunks and gradients before their last rounding are float32 (float64 for float64), also
    where the operands are bfloat16: sums in bfloat16 drift.

    Products have ROWS rows whatever T is, the last ones padded by zeros: a token's results, and the gradient of its
    hidden state, do not depend on the other tokens. They have the same bits in any batch if the matrix product computes
    all its rows alike. The CPU products of PyTorch 2.13 do where this was tested; no GPU was tried.

    Args:
        hidden: [..., H]; float32, bfloat16, float16 or float64.
        weight: [V, H] in hidden's dtype, as of `lm_head`.
        targets: [...] int64 or int32, from 0 to V - 1. On a GPU, where the host does not read them, others give NaN.
        temperature: logits are divided by it.
        entropy: return the entropy of each distribution too.

    Returns:
        [...] float32 (float64 for float64), in nats; with `entropy` LogProbs(log_probs, entropy), both of this kind and
        both differentiable, once. torch.compile unrolls the loops over the chunks.

    Raises:
        TypeError, ValueError: for dtypes and shapes, and, on a CPU, for targets out of range. A backward pass with
            create_graph raises RuntimeError.

    Source: Milakov and Gimelshein, "Online normalizer calculation for softmax" (2018), arXiv 1805.02867.
    """
    args = Arguments("linear_log_probs")
    hidden = args.tensor("hidden", hidden, ("...", "H"), FLOATS)
    weight = args.tensor("weight", weight, ("V", "H"), hidden.dtype)
    targets = args.tensor("targets", targets, hidden.shape[:-1], INDICES)
    temperature = args.number("temperature", temperature, positive=True)
    args.boolean("entropy", entropy)
    vocabulary = weight.shape[0]
    args.require(vocabulary > 0, "weight", "of 1 or more rows", weight.shape)
    if targets.device.type == "cpu" and targets.numel() and not torch.compiler.is_compiling():
        low, high = map(int, targets.aminmax())
        good = low >= 0 and high < vocabulary
        args.require(good, "targets", lambda: f"from 0 to {vocabulary - 1}", lambda: f"{low} to {high}")
    rows = hidden.reshape(targets.numel(), hidden.shape[-1])
    results = _LinearLogProbs.apply(rows, weight, targets.reshape(-1).long(), temperature, entropy)
    results = [result.view(targets.shape) for result in (results if entropy else (results,))]
    return LogProbs(*results) if entropy else results[0]


class _LinearLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, entropy: bool) -> Any:
        results = []
        for rows, some in zip(_parts(hidden), _parts(targets)):
            # Of each row: the largest logit so far; sums of e and of e (z - largest), with e = exp(z - largest).
            largest = rows.new_full((ROWS, 1), torch.finfo(_exact(rows.dtype)).min, dtype=_exact(rows.dtype))
            total, weighted, chosen = torch.zeros_like(largest), torch.zeros_like(largest), largest * torch.nan
            for first in range(0, weight.shape[0], COLUMNS):
                logits = _product(rows, weight[first : first + COLUMNS].mT) / temperature
                inside, place = _places(some, first, logits.shape[1])
                chosen = torch.where(inside, logits.gather(1, place), chosen)
                larger = torch.maximum(largest, logits.amax(dim=1, keepdim=True))
                shift, logits = largest - larger, logits - larger
                scale, e = shift.exp(), logits.exp()
                if entropy:
                    weighted = (weighted + total * shift) * scale + (e * logits).sum(dim=1, keepdim=True)
                total = total * scale + e.sum(dim=1, keepdim=True)
                largest = larger
            # chosen - largest first: the rounding is that of a small number, wherever the logits are
            log_total = total.log()
            results.append(torch.cat([chosen - largest - log_total, largest, log_total, weighted / total], dim=1))
        joined = torch.cat([hidden.new_empty(0, 4, dtype=_exact(hidden.dtype)), *results])[: len(hidden)]
        log_probs, largest, log_total, mean = joined.unbind(dim=1)
        spread = log_total - mean  # the entropy
        ctx.temperature = temperature
        ctx.save_for_backward(hidden, weight, targets, largest, log_total, spread if entropy else None)
        return (log_probs.clone(), spread.clone()) if entropy else log_probs.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_entropy: Tensor | None = None) -> tuple:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "linear_log_probs: has a first derivative only, and create_graph=True would need a second; use "
                "torch.nn.functional.log_softmax where that is needed"
            )
        hidden, weight, targets, *of_rows, entropy = ctx.saved_tensors
        of_rows = [grad, *of_rows] if entropy is None else [grad, *of_rows, grad_entropy, entropy]
        of_rows = torch.stack(of_rows, dim=1)
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        exact = grad.dtype
        parts = list(zip(_parts(hidden), _parts(targets), _parts(of_rows)))
        d_hidden = [torch.zeros_like(rows, dtype=exact) for rows, *_ in parts] if need_hidden else []
        d_weight = torch.empty_like(weight) if need_weight else None
        for first in range(0, weight.shape[0], COLUMNS):
            columns = weight[first : first + COLUMNS]
            of_columns = torch.zeros_like(columns, dtype=exact) if need_weight else None
            for i, (rows, some, numbers) in enumerate(parts):
                grads, largest, log_total, *more = numbers.split(1, dim=1)
                log_p = _product(rows, columns.mT) / ctx.temperature - largest - log_total
                p = log_p.exp()
                d_logits = -grads * p
                if more:  # d entropy / d z = -p (log p + entropy)
                    grads_entropy, entropies = more
                    d_logits -= grads_entropy * p * (log_p + entropies)
                inside, place = _places(some, first, p.shape[1])
                d_logits = d_logits.scatter_add(1, place, torch.where(inside, grads, 0)) / ctx.temperature
                d_logits = d_logits.to(hidden.dtype) if hidden.is_cuda else d_logits
                if need_hidden:
                    d_hidden[i] += _product(d_logits, columns)
                if need_weight:
                    of_columns += _product(d_logits.mT, rows)
            if need_weight:
                d_weight[first : first + COLUMNS] = of_columns
        if need_hidden:
            joined = torch.cat([hidden.new_empty(0, hidden.shape[1], dtype=exact), *d_hidden])
            d_hidden = joined[: len(hidden)].to(hidden.dtype)
        return d_hidden if need_hidden else None, d_weight, None, None, None


def _parts(x: Tensor) -> list[Tensor]:
    """x [T, ...] in parts of ROWS rows, the last one padded by zeros."""
    parts = list(x.split(ROWS)) if len(x) else []
    if parts and len(parts[-1]) < ROWS:
        padding = parts[-1].new_zeros(ROWS - len(parts[-1]), *x.shape[1:])
        parts[-1] = torch.cat([parts[-1], padding])
    return parts


def _places(targets: Tensor, first: int, count: int) -> tuple[Tensor, Tensor]:
    """Whether each target is one of `count` columns from `first` on, and its place, or any, among them: [T, 1] each."""
    place = (targets - first)[:, None]
    return (place >= 0) & (place < count), place.clamp(0, count - 1)


def _exact(dtype: torch.dtype) -> torch.dtype:
    """Of logits and sums."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a · b, not rounded to a half precision of the operands."""
    exact = _exact(b.dtype)
    if b.dtype == exact:
        return a @ b
    return torch.mm(a, b, out_dtype=exact) if b.is_cuda else a.to(exact) @ b.to(exact)
