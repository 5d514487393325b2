"""dK and dV of mla_prefill on Hopper, in the emulator, against the formula in float64."""

import math
from typing import NamedTuple

import pytest
import torch
from prefill_cases import NOPE, ROPE, SCALE, VALUE, cumulative
from torch import Tensor

import k2kernels
from k2kernels import _emu
from k2kernels.ops._launch import Chip, launch
from k2kernels.testing.compare import check_close

SEEDS = range(4)  # round robin, depth first, two random schedules
BF16, FP16 = torch.bfloat16, torch.float16

# (queries, keys) of each sequence. A tile has 64 keys, a block 128 queries.
LENGTHS = {
    "one": [(300, 300)],
    "exact": [(128, 128), (256, 64)],
    "mixed": [(0, 5), (1, 1), (63, 63), (64, 64), (65, 65), (127, 127), (128, 128), (129, 129), (191, 191), (3, 0)],
    "extended": [(1, 300), (64, 191), (129, 200), (63, 129)],
    "more queries": [(300, 65), (130, 1), (191, 64), (129, 127), (20, 0)],
}


class Case(NamedTuple):
    """Inputs of a call. The tokens behind the last sequence are in none."""

    lengths: list[tuple[int, int]]
    q: Tensor  # [Tq, H, 192]
    k: Tensor  # [Tk, H, 128], or 192 with its rope part
    v: Tensor  # [Tk, H, 128]
    k_rope: Tensor | None  # [Tk, 64]
    grad_out: Tensor  # [Tq, H, 128]
    grad_lse: Tensor  # [Tq, H]; NaN where a row sees no key
    out: Tensor
    lse: Tensor
    causal: bool
    exact: tuple[tuple[Tensor, Tensor], ...]  # of dK (nope), dK (rope, by head), dV: value and the error allowed


class Grads(NamedTuple):
    k: Tensor  # [Tk, H, 128]
    rope: Tensor  # [Tk, H, 64]
    v: Tensor  # [Tk, H, 128]


def ranges(lengths):
    """The slices of each sequence's queries and keys, and those of the tokens behind them."""
    q = k = 0
    for s_q, s_k in lengths:
        yield slice(q, q + s_q), slice(k, k + s_k)
        q, k = q + s_q, k + s_k


def views(lengths, heads, dtype, *, shared, strided, padding=2, spread=1.0):
    """q, k, v, k_rope, grad_out, normal inside of sequences, NaN elsewhere."""
    tokens = [sum(column) for column in zip(*lengths)]

    def normal(side, *sizes, factor=1.0):
        x = torch.full((tokens[side] + padding, *sizes), math.nan, dtype=dtype)
        x[: tokens[side]] = factor * torch.randn(tokens[side], *sizes)
        return x

    def apart(x, before, behind):
        """The same numbers as columns of wider rows."""
        if not strided:
            return x
        wide = torch.full((*x.shape[:-1], before + x.shape[-1] + behind), math.nan, dtype=dtype)
        wide[..., before : before + x.shape[-1]] = x
        return wide[..., before : before + x.shape[-1]]

    q = apart(normal(0, heads, NOPE + ROPE, factor=spread), 0, 64)
    grad_out = apart(normal(0, heads, VALUE), 8, 8)
    k_rope = apart(normal(1, ROPE), 8, 56) if shared else None
    if strided and shared:  # views of one tensor, as the expansion of the latent leaves them
        kv = normal(1, heads, NOPE + VALUE)
        return q, kv[..., :NOPE], kv[..., NOPE:], k_rope, grad_out
    return q, apart(normal(1, heads, NOPE + ROPE * (not shared)), 8, 8), normal(1, heads, VALUE), k_rope, grad_out


def make(lengths, *, causal=True, heads=2, dtype=BF16, shared=True, strided=False, spread=1.0):
    q, k, v, k_rope, grad_out = views(lengths, heads, dtype, shared=shared, strided=strided, spread=spread)
    keys = k if k_rope is None else torch.cat([k, k_rope[:, None].expand(-1, heads, -1)], dim=-1)
    out = torch.zeros(len(q), heads, VALUE, dtype=dtype)
    lse, grad_lse = torch.full((len(q), heads), -math.inf), torch.randn(len(q), heads)
    names = (("k", NOPE + ROPE), ("v", VALUE))
    grads = {name: torch.zeros(len(k), heads, columns).double() for name, columns in names}
    allowed = {name: torch.zeros_like(x) for name, x in grads.items()}
    # Rounding of a number to the dtype: relative, and absolute below its smallest normal number.
    unit = torch.finfo(dtype).eps / 2
    least = 2.0**-25 if dtype == FP16 else 0.0
    for of_q, of_k in ranges(lengths):
        one = [x.double().transpose(0, 1) for x in (q[of_q], keys[of_k], v[of_k], grad_out[of_q])]
        q_HQD, k_HKD, v_HKD, grad_out_HQD = one
        s_q, s_k = q_HQD.shape[1], k_HKD.shape[1]
        hidden_QK = torch.zeros(s_q, s_k, dtype=torch.bool)
        if causal:
            hidden_QK = torch.arange(s_k) >= torch.arange(s_q)[:, None] + s_k - s_q + 1
        scores_HQK = (SCALE * q_HQD @ k_HKD.mT).masked_fill(hidden_QK, -math.inf)
        lse_HQ = torch.logsumexp(scores_HQK, -1)
        lse[of_q] = lse_HQ.mT.float()
        empty_HQ = lse_HQ == -math.inf
        p_HQK = (scores_HQK - lse[of_q].double().mT[..., None].masked_fill(empty_HQ[..., None], 0)).exp()
        out[of_q] = (p_HQK @ v_HKD).transpose(0, 1).to(dtype)
        grad_lse[of_q] = grad_lse[of_q].masked_fill(empty_HQ.mT, math.nan)
        delta_HQ = (grad_out_HQD * out[of_q].double().transpose(0, 1)).sum(-1) - grad_lse[of_q].double().mT
        offset_HQK = grad_out_HQD @ v_HKD.mT - delta_HQ.masked_fill(empty_HQ, 0)[..., None]
        ds_HQK = p_HQK * offset_HQK
        grads["v"][of_k] = (p_HQK.mT @ grad_out_HQD).transpose(0, 1)
        grads["k"][of_k] = SCALE * (ds_HQK.mT @ q_HQD).transpose(0, 1)
        # P is rounded, dS by that and once more; sums in float32, logits of up to 2 bits less than lse, are exact
        # beside it.
        seen_HQK = (~hidden_QK).double()
        p_error_HQK = (unit * p_HQK + least) * seen_HQK
        ds_error_HQK = p_error_HQK * offset_HQK.abs() + (unit * ds_HQK.abs() + least) * seen_HQK
        allowed["v"][of_k] = (p_error_HQK.mT @ grad_out_HQD.abs()).transpose(0, 1)
        allowed["k"][of_k] = SCALE * (ds_error_HQK.mT @ q_HQD.abs()).transpose(0, 1)
    for error in allowed.values():
        error *= 1.05  # the sums in float32
    grads_k, allowed_k = grads["k"].split([NOPE, ROPE], -1), allowed["k"].split([NOPE, ROPE], -1)
    rounded = [unit * x.abs() + least for x in (*grads_k, grads["v"])]
    if shared:
        rounded[1] *= 0  # the parts are floats
    exact = tuple(
        (x, error + rounding) for x, error, rounding in zip((*grads_k, grads["v"]), (*allowed_k, allowed["v"]), rounded)
    )
    return Case(lengths, q, k, v, k_rope, grad_out, grad_lse, out, lse, causal, exact)


def rows_of(case):
    """The workspace's rows: lse in base 2 and delta, [2, H, Tq]."""
    lse2 = (case.lse.double() / math.log(2)).masked_fill(case.lse == -math.inf, math.inf)
    delta = (case.grad_out.double() * case.out.double()).sum(-1) - case.grad_lse.double()
    return torch.stack([lse2, delta]).transpose(1, 2).float()


def run(case, *, seed=0, multiprocessors=3, strided=False):
    """The kernel's results; canaries around them are checked."""
    tokens, heads = case.k.shape[:2]
    shared = case.k_rope is not None
    canary = torch.tensor(7.0, dtype=case.q.dtype)
    columns = NOPE if shared else NOPE + ROPE
    # Gradients of k and v as views of one tensor, or each its own; a row before and behind belongs to nobody.
    buffer = canary.expand(tokens + 2, heads, columns + VALUE + 16 * strided).contiguous()
    grad_k = buffer[1:-1, :, 8 * strided : 8 * strided + columns]
    grad_v = buffer[1:-1, :, columns + 8 * strided : columns + VALUE + 8 * strided]
    if not strided:
        buffers = [canary.expand(tokens + 2, heads, n).contiguous() for n in (columns, VALUE)]
        grad_k, grad_v = (x[1:-1] for x in buffers)
    grad_q = torch.empty_like(case.q, memory_format=torch.contiguous_format)
    grad_k_rope = torch.empty_like(case.k_rope, memory_format=torch.contiguous_format) if shared else None
    plan = _emu.mla_prefill_plan(Chip(90, multiprocessors, 232448), case.q, case.k, case.v, case.k_rope)
    assert plan.kernel == "sm90"
    floats = plan.workspace_floats(case.q, case.k, shared)
    workspace = torch.full((floats + 4,), math.nan)
    rows = rows_of(case).flatten()
    workspace[: len(rows)] = rows
    tickets = torch.zeros(2, dtype=torch.int32)
    cu_seqlens = [cumulative(column) for column in zip(*case.lengths)]
    with k2kernels.emulated("sm_90a", seed=seed):
        launch(
            "mla_prefill_backward", case.grad_out, case.grad_lse, case.q, case.k, case.v, case.k_rope, case.out,
            case.lse, *cu_seqlens, SCALE, case.causal, grad_q, grad_k, grad_v, grad_k_rope, workspace, tickets, plan,
        )  # fmt: skip
    # Nothing else was written.
    touched = [buffer] if strided else buffers
    assert all((x[[0, -1]] == canary).all() for x in touched)
    if strided:
        assert (buffer[..., :8] == canary).all() and (buffer[..., -8:] == canary).all()
    assert workspace[floats:].isnan().all()
    if not shared:
        return Grads(grad_k[..., :NOPE].clone(), grad_k[..., NOPE:].clone(), grad_v.clone())
    parts = workspace[floats - heads * tokens * ROPE : floats].view(heads, tokens, ROPE)
    return Grads(grad_k.clone(), parts.transpose(0, 1).clone(), grad_v.clone())


def check(got, case):
    for name, x, (value, allowed) in zip(("dK", "dK of rope", "dV"), got, case.exact):
        check_close(x, value, budget=allowed, name=name)


@pytest.mark.parametrize(
    "lengths, causal, dtype, shared, strided, spread, seed",
    [
        ("one", True, BF16, True, True, 1, 0),
        ("one", True, FP16, False, False, 1, 3),
        ("one", False, BF16, True, False, 8, 2),
        ("exact", True, BF16, False, True, 8, 1),
        ("mixed", True, BF16, True, True, 1, 2),
        ("mixed", False, FP16, False, True, 1, 0),
        ("mixed", True, FP16, True, False, 8, 1),
        ("mixed", True, BF16, False, False, 1, 3),
        ("extended", True, BF16, True, True, 1, 1),
        ("extended", False, BF16, False, False, 1, 3),
        ("more queries", True, BF16, True, False, 1, 0),
        ("more queries", True, FP16, False, True, 8, 2),
    ],
    ids=str,
)
def test_equals_the_formula(lengths, causal, dtype, shared, strided, spread, seed):
    case = make(LENGTHS[lengths], causal=causal, dtype=dtype, shared=shared, strided=strided, spread=spread)
    check(run(case, seed=seed, strided=strided), case)


BATCH = [(65, 65), (200, 130), (0, 64), (129, 200), (20, 0), (130, 191)]


@pytest.fixture(scope="module")
def batch():
    torch.manual_seed(5)
    case = make(BATCH, strided=True, spread=3)
    return case, run(case, seed=0, multiprocessors=4)


def equal(got, want, where=slice(None)):
    return all(torch.equal(x[where], y[where]) for x, y in zip(got, want))


@pytest.mark.parametrize("multiprocessors", [1, 2, 6])
def test_bits_do_not_depend_on_who_takes_which_task(batch, multiprocessors):
    case, want = batch
    assert equal(run(case, seed=1 + multiprocessors % 3, multiprocessors=multiprocessors), want)


@pytest.mark.parametrize("index", [i for i, (s_q, s_k) in enumerate(BATCH) if s_q and s_k])
def test_bits_of_a_sequence_are_those_of_it_alone(batch, index):
    case, want = batch
    of_q, of_k = list(ranges(BATCH))[index]
    parts = dict(lengths=BATCH[index : index + 1])
    for name in ("q", "grad_out", "grad_lse", "out", "lse"):
        parts[name] = getattr(case, name)[of_q]
    for name in ("k", "v", "k_rope"):
        parts[name] = getattr(case, name)[of_k]
    assert equal(run(case._replace(**parts), seed=2), [x[of_k] for x in want])


@pytest.mark.parametrize("first", [0, 1])
def test_neighbours_full_of_nan_change_nothing(batch, first):
    case, want = batch
    changed = case._replace(
        **{name: getattr(case, name).clone() for name in ("q", "k", "v", "k_rope", "grad_out", "grad_lse", "out")}
    )
    for of_q, of_k in list(ranges(BATCH))[first::2]:
        for name in ("q", "grad_out", "grad_lse", "out"):
            getattr(changed, name)[of_q] = math.nan
        for name in ("k", "v", "k_rope"):
            getattr(changed, name)[of_k] = math.nan
    got = run(changed, seed=3)
    for i, (_, of_k) in enumerate(ranges(BATCH)):
        if i % 2 != first:
            assert equal(got, want, of_k)


def test_concatenated_keys_have_the_bits_of_separate_ones(batch):
    case, want = batch
    k = torch.cat([case.k, case.k_rope[:, None].expand(-1, case.k.shape[1], -1)], dim=-1)
    got = run(case._replace(k=k, k_rope=None), seed=1)
    assert torch.equal(got.k, want.k) and torch.equal(got.v, want.v)
    assert torch.equal(got.rope, want.rope.to(k.dtype))


def test_sizes_beyond_the_tensors_are_clamped(batch):
    case, want = batch
    # The last sequence takes all that is left: what it computes is its own, the others' results are the same.
    lengths = [*BATCH[:-1], (10**6, 10**6)]
    of_k = slice(0, sum(s_k for _, s_k in BATCH[:-1]))
    assert equal(run(case._replace(lengths=lengths), seed=0), want, of_k)


def test_nan_in_the_gradient_of_a_row_reaches_dk_of_the_keys_that_it_sees(batch):
    case, want = batch
    query = 10
    assert BATCH[0] == (65, 65)
    grad_out = case.grad_out.clone()
    grad_out[query] = math.nan
    got = run(case._replace(grad_out=grad_out), seed=1)
    assert equal(got[:2], want[:2], slice(query + 1, None))
    assert got.k[: query + 1].isnan().all()
