"""Inputs of the tests of mla_prefill's kernels, the kernels called by themselves, and attention in float64."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from k2kernels import _emu
from k2kernels.ops import _launch
from k2kernels.testing.inputs import KIMI_K2, guarded

SCALE = KIMI_K2.softmax_scale
NOPE, ROPE, VALUE = KIMI_K2.nope, KIMI_K2.rope, KIMI_K2.value
STATE_FLOATS = VALUE + 8


class Case(NamedTuple):
    q: Tensor  # [Tq, H, 192]
    k: Tensor  # [Tk, H, 128], or 192 without k_rope
    v: Tensor  # [Tk, H, 128]
    k_rope: Tensor | None  # [Tk, 64]
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor

    def full_k(self) -> Tensor:
        if self.k_rope is None:
            return self.k
        return torch.cat([self.k, self.k_rope[:, None].expand(-1, self.k.shape[1], -1)], -1)

    def replace(self, **changed) -> "Case":
        return self._replace(**changed)


class Forward(NamedTuple):
    out: Tensor
    lse: Tensor
    max_logits: Tensor


class Gradients(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    k_rope: Tensor | None


def cumulative(lengths) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def strided(x: Tensor, gap: int = 8) -> Tensor:
    """A copy of x [..., D] between guard zones, with NaN between its rows."""
    storage = x.new_full((*x.shape[:-1], x.shape[-1] + gap), math.nan)
    storage[..., : x.shape[-1]] = x
    return guarded(storage)[..., : x.shape[-1]]


def make(lengths_q, lengths_k, heads=2, dtype=torch.bfloat16, *, shared=True, padding=0, scale_q=1.0) -> Case:
    """Random numbers of unit variance. k and v are views of one tensor if k_rope is shared. `padding` tokens behind
    the last sequence, and what lies between rows, are NaN."""
    tokens_q, tokens_k = sum(lengths_q), sum(lengths_k)

    def random(tokens, *shape):
        return torch.cat([torch.randn(tokens, *shape), torch.full((padding, *shape), math.nan)]).to(dtype)

    q = strided(random(tokens_q, heads, NOPE + ROPE) * scale_q)
    k_rope = None
    if shared:
        kv = strided(random(tokens_k, heads, NOPE + VALUE))
        k, v, k_rope = kv[..., :NOPE], kv[..., NOPE:], strided(random(tokens_k, ROPE))
    else:
        k, v = strided(random(tokens_k, heads, NOPE + ROPE)), strided(random(tokens_k, heads, VALUE))
    return Case(q, k, v, k_rope, guarded(cumulative(lengths_q)), guarded(cumulative(lengths_k)))


def select(case: Case, b: int, first: int = 0) -> Case:
    """Sequence b alone, its queries from `first` on."""
    (q0, q1), (k0, k1) = case.cu_seqlens_q[b : b + 2].tolist(), case.cu_seqlens_k[b : b + 2].tolist()
    keys = slice(k0, k1)
    k_rope = None if case.k_rope is None else case.k_rope[keys]
    cu_q, cu_k = (torch.tensor([0, n], dtype=torch.int32) for n in (q1 - q0 - first, k1 - k0))
    return Case(case.q[q0 + first : q1], case.k[keys], case.v[keys], k_rope, cu_q, cu_k)


def _plan(case: Case, multiprocessors: int | None):
    chip = _launch.chip(case.q.device)
    chip = chip if multiprocessors is None else chip._replace(multiprocessors=multiprocessors)
    return _emu.mla_prefill_plan(chip, case.q, case.k, case.v, case.k_rope)


def unwritten(*shape, dtype=torch.float32) -> Tensor:
    """A result between guard zones, full of NaN."""
    return guarded(torch.full(shape, math.nan, dtype=dtype))


def workspace_of(case: Case) -> Tensor:
    """Of the backward."""
    return unwritten(_plan(case, None).workspace_floats(case.q, case.k, case.k_rope is not None))


def forward(
    case: Case,
    *,
    causal=True,
    scale=SCALE,
    diagonal=None,
    state_in=None,
    state_out=None,
    multiprocessors=None,
) -> Forward:
    tokens, heads, _ = case.q.shape
    results = Forward(unwritten(tokens, heads, VALUE, dtype=case.q.dtype), unwritten(tokens, heads),
                      unwritten(tokens, heads))  # fmt: skip
    ticket = guarded(torch.zeros(1, dtype=torch.int32))
    _launch.launch(
        "mla_prefill", case.q, case.k, case.v, case.k_rope, case.cu_seqlens_q, case.cu_seqlens_k, diagonal, scale,
        causal, *results, state_in, state_out, ticket, _plan(case, multiprocessors),
    )  # fmt: skip
    return results


def backward(
    case: Case, grad_out: Tensor, grad_lse: Tensor, out: Tensor, lse: Tensor, *, causal=True, scale=SCALE,
    multiprocessors=None, workspace=None,
) -> Gradients:  # fmt: skip
    (tokens_q, heads, _), tokens_k, dtype = case.q.shape, len(case.k), case.q.dtype
    grad_q = unwritten(tokens_q, heads, NOPE + ROPE, dtype=dtype)
    if case.k_rope is None:
        grad_k, grad_v = (unwritten(tokens_k, heads, n, dtype=dtype) for n in (NOPE + ROPE, VALUE))
        grad_k_rope = None
    else:
        grad_kv = unwritten(tokens_k, heads, NOPE + VALUE, dtype=dtype)
        grad_k, grad_v = grad_kv[..., :NOPE], grad_kv[..., NOPE:]
        grad_k_rope = unwritten(tokens_k, ROPE, dtype=dtype)
    plan = _plan(case, multiprocessors)
    if workspace is None:
        workspace = workspace_of(case)
    tickets = guarded(torch.zeros(2, dtype=torch.int32))
    _launch.launch(
        "mla_prefill_backward", grad_out, grad_lse, case.q, case.k, case.v, case.k_rope, out, lse,
        case.cu_seqlens_q, case.cu_seqlens_k, scale, causal, grad_q, grad_k, grad_v, grad_k_rope, workspace, tickets,
        plan,
    )  # fmt: skip
    return Gradients(grad_q, grad_k, grad_v, grad_k_rope)


def visible(s_q: int, s_k: int, causal: bool, diagonal: int | None = None) -> Tensor:
    """bool [s_q, s_k]: which query sees which key."""
    diagonal = s_k - s_q if diagonal is None else diagonal
    rows, columns = torch.arange(s_q)[:, None], torch.arange(s_k)
    return columns <= rows + diagonal if causal else torch.ones(s_q, s_k, dtype=torch.bool)


def _of_sequences(case: Case, tensors, function, causal, diagonal):
    """The results of function(q, k, v [H, s, D], mask) for each sequence, joined; zeros for other tokens."""
    results, filled = None, 0
    for b in range(len(case.cu_seqlens_q) - 1):
        (q0, q1), (k0, k1) = case.cu_seqlens_q[b : b + 2].tolist(), case.cu_seqlens_k[b : b + 2].tolist()
        q, k, v = tensors[0][q0:q1], tensors[1][k0:k1], tensors[2][k0:k1]
        mask = visible(q1 - q0, k1 - k0, causal, None if diagonal is None else int(diagonal[b]))
        got = [x.transpose(0, 1) for x in function(*(x.transpose(0, 1) for x in (q, k, v)), mask)]
        results = [[x] for x in got] if results is None else [[*a, x] for a, x in zip(results, got)]
        filled = q1
    return [F.pad(torch.cat(x), (0,) * (2 * x[0].ndim - 1) + (len(case.q) - filled,)) for x in results]


def exact(case: Case, *, causal=True, scale=SCALE, diagonal=None, grads=None):
    """Forward in float64, and with grads (of out and of lse) Gradients.

    Of keys and queries that no sequence owns: 0, -inf, -inf, and no gradient.
    """
    shared = case.k_rope is not None
    leaves = [x.double().nan_to_num(0).requires_grad_() for x in (case.q, case.k, case.v)]
    if shared:
        leaves.append(case.k_rope.double().nan_to_num(0).requires_grad_())
    k = case.replace(k=leaves[1], k_rope=leaves[3] if shared else None).full_k()

    def attention(q, k, v, mask):
        seen = mask.any(-1)
        logits = (q @ k.mT * scale).masked_fill(~mask, -math.inf)
        rows = torch.where(seen[:, None], logits, 0) if logits.shape[-1] else logits
        out = torch.where(seen[:, None], torch.softmax(rows, -1) @ v, 0)
        infinite = torch.full(logits.shape[:-1], -math.inf, dtype=torch.float64)
        lse = torch.where(seen, torch.logsumexp(rows, -1), infinite) if logits.shape[-1] else infinite
        return out, lse, logits.amax(-1) if logits.shape[-1] else infinite

    out, lse, peak = _of_sequences(case, (leaves[0], k, leaves[2]), attention, causal, diagonal)
    owned = torch.arange(len(case.q)) < int(case.cu_seqlens_q[-1])
    lse, peak = (torch.where(owned[:, None], x, -math.inf) for x in (lse, peak))
    result = Forward(out.detach(), lse.detach(), peak.detach())
    if grads is None:
        return result
    grad_out, grad_lse = (torch.where(g.double().isfinite(), g.double(), 0) for g in grads)
    finite = lse.isfinite()
    loss = (out * grad_out).sum() + (lse[finite] * grad_lse[finite]).sum()
    of = torch.autograd.grad(loss, leaves, allow_unused=True)
    return result, Gradients(*of, *[None] * (4 - len(of)))


def of_torch(case: Case, *, causal=True, scale=SCALE, grad_out=None):
    """PyTorch's own attention in the dtype of the inputs: out, and with grad_out its Gradients, that of k_rope
    summed over the heads."""
    leaves = [x.nan_to_num(0).requires_grad_() for x in (case.q, case.full_k(), case.v)]

    def attention(q, k, v, mask):
        if mask.shape[1] == 0:
            return [q[..., :VALUE] * 0]
        seen = mask.any(-1)
        out = F.scaled_dot_product_attention(q[:, seen], k, v, attn_mask=mask[seen], scale=scale)
        return [q.new_zeros(*q.shape[:-1], VALUE).index_copy(1, seen.nonzero().squeeze(1), out)]

    (out,) = _of_sequences(case, leaves, attention, causal, None)
    if grad_out is None:
        return out.detach()
    return out.detach(), _split_rope(case, torch.autograd.grad(out, leaves, grad_out.nan_to_num(0)))


def _split_rope(case: Case, grads) -> Gradients:
    q, k, v = grads
    return Gradients(q, k, v, None) if case.k_rope is None else Gradients(q, k[..., :NOPE], v, k[..., NOPE:].sum(1))


def backward_of_flash_attention(case: Case, grads, *, causal=True, scale=SCALE) -> Gradients:
    """Gradients as FlashAttention rounds them, with the gradient of lse, which PyTorch's attention lacks: P and dS in
    the dtype of the inputs, everything else in float32."""
    dtype = case.q.dtype
    tensors = [x.nan_to_num(0) for x in (case.q, case.full_k(), case.v)]
    grad_out, grad_lse = (x.nan_to_num(0, 0, 0) for x in grads)
    found = [torch.zeros_like(x) for x in tensors]
    for b in range(len(case.cu_seqlens_q) - 1):
        (q0, q1), (k0, k1) = case.cu_seqlens_q[b : b + 2].tolist(), case.cu_seqlens_k[b : b + 2].tolist()
        rows = slice(q0, q1), slice(k0, k1), slice(k0, k1)
        q, k, v = (x[r].transpose(0, 1).float() for x, r in zip(tensors, rows))
        grad = grad_out[q0:q1].transpose(0, 1).float()
        logits = (q @ k.mT * scale).masked_fill(~visible(q1 - q0, k1 - k0, causal), -math.inf)
        p = torch.softmax(logits, -1).nan_to_num(0) if k1 > k0 else logits
        delta = (grad * (p @ v)).sum(-1) - grad_lse[q0:q1].T
        grad_scores = (p * (grad @ v.mT - delta[..., None])).to(dtype).float()
        of = grad_scores @ k * scale, grad_scores.mT @ q * scale, p.to(dtype).float().mT @ grad
        for x, r, y in zip(found, rows, of):
            x[r] = y.transpose(0, 1).to(dtype)
    return _split_rope(case, found)
