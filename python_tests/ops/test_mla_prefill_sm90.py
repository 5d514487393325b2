"""Hopper's forward and dQ of mla_prefill in the emulator: tiles of 128 queries, blocks of 128 and 96 keys, the tails
of both, and what bits do not depend on. What all kernels must do is in test_mla_prefill_kernel.py."""

import math

import pytest
import torch
from prefill_cases import (
    SCALE,
    STATE_FLOATS,
    backward,
    backward_of_flash_attention,
    cumulative,
    exact,
    forward,
    make,
    of_torch,
    select,
    unwritten,
)

import k2kernels
from k2kernels import _emu
from k2kernels.ops._launch import EMULATED_CHIPS
from k2kernels.testing.compare import check_close

SEEDS = range(4)  # round robin, depth first, two random schedules
BF16, FP16 = torch.bfloat16, torch.float16
# Logits are float32 sums of 192 products of normals: partial sums are at most about 192, and a few of their roundings
# (2**-24) do not cancel.
LOGIT_ERROR = 4 * 2.0**-24 * 192 * SCALE

# Around multiples of a warpgroup's 64 rows and of 96 and 128 keys; more queries than keys, fewer, none; no keys.
LENGTHS_Q = [0, 1, 63, 65, 127, 129, 70, 3, 9, 0, 140]
LENGTHS_K = [0, 1, 63, 95, 97, 129, 65, 420, 0, 5, 192]


def hopper(case, **options):
    """The results of Hopper's kernels; it is asserted that these are what runs."""
    assert _emu.mla_prefill_plan(EMULATED_CHIPS["sm_90a"], case.q, case.k, case.v, case.k_rope).kernel == "sm90"
    before = k2kernels.launch_count("mla_prefill")
    got = forward(case, **options)
    assert k2kernels.launch_count("mla_prefill") - before == 1
    return got


def with_dq(case, grads=None, **options):
    """The results, gradients of out and lse, and that of q."""
    got = hopper(case, **options)
    if grads is None:
        lse = torch.randn(got.lse.shape).masked_fill(got.lse == -math.inf, math.nan)
        grads = torch.randn(got.out.shape).to(case.q.dtype), lse
    return got, grads, backward(case, *grads, got.out, got.lse, **options).q


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b))


@pytest.mark.parametrize(
    "causal, dtype, scale_q, seed",
    [(True, BF16, 1.0, 0), (False, BF16, 1.0, 1), (True, FP16, 8.0, 2), (False, FP16, 8.0, 3)],
)
def test_equals_attention(causal, dtype, scale_q, seed):
    torch.manual_seed(seed)
    case = make(LENGTHS_Q, LENGTHS_K, dtype=dtype, shared=seed != 2, padding=131, scale_q=scale_q)
    with k2kernels.emulated("sm_90a", seed=seed):
        got, grads, dq = with_dq(case, causal=causal)
    want, of_inputs = exact(case, causal=causal, grads=grads)
    check_close(got.out, want.out, same_precision=of_torch(case, causal=causal), max_cos_diff=1e-5, name="out")
    for name, x, y in (("lse", got.lse, want.lse), ("max_logits", got.max_logits, want.max_logits)):
        check_close(x, y, budget=scale_q * LOGIT_ERROR + 4 * 2.0**-24 * y.abs(), name=name)
    same_precision = backward_of_flash_attention(case, grads, causal=causal).q
    check_close(dq, of_inputs.q, same_precision=same_precision, max_cos_diff=2e-5, name="grad_q")


@pytest.mark.parametrize("seed", SEEDS)
def test_nan_of_neighbours_stays_there(seed):
    # Boxes reach from the first and third sequence into the next one.
    lengths_q, lengths_k = [70, 5, 130, 64], [190, 3, 130, 100]
    torch.manual_seed(seed)
    case = make(lengths_q, lengths_k, padding=131)
    with k2kernels.emulated("sm_90a", seed=seed):
        got, grads, dq = with_dq(case, causal=False)
        for tensors, lengths in (((case.q, *grads), lengths_q), ((case.k, case.v, case.k_rope), lengths_k)):
            for x in tensors:
                _, second, _, fourth = x[: sum(lengths)].split(lengths)
                second[:] = fourth[:] = math.nan
        poisoned, _, of_poisoned = with_dq(case, grads, causal=False)
    for clean, x in zip((*got, dq), (*poisoned, of_poisoned)):
        assert torch.equal(clean[:70], x[:70]) and torch.equal(clean[75:205], x[75:205])
        assert x[70:75].isnan().all() and x[205:269].isnan().all()
        assert torch.equal(clean[269:], x[269:])


def test_bits_depend_on_the_row_and_its_keys_alone():
    torch.manual_seed(0)
    lengths = [130, 37, 0, 230]
    case = make(lengths, lengths, scale_q=3.0)
    with k2kernels.emulated("sm_90a"):
        whole, grads, dq = with_dq(case)
    # Other schedules, other numbers of SMs.
    for seed, multiprocessors in ((1, 1), (2, 3), (3, 132)):
        with k2kernels.emulated("sm_90a", seed=seed):
            got, _, other_dq = with_dq(case, grads, multiprocessors=multiprocessors)
        assert same(got, whole) and torch.equal(other_dq, dq)
    # A sequence alone; its last queries, at other places of a tile.
    for queries in (230, 173, 1):
        last = [x[-queries:] for x in (*grads, *whole, dq)]
        with k2kernels.emulated("sm_90a"):
            got, _, other_dq = with_dq(select(case, 3, 230 - queries), last[:2])
        assert same((*got, other_dq), last[2:])
    # Keys with a rope part of their own; values apart.
    apart = case.replace(k=case.full_k(), v=case.v.contiguous(), k_rope=None)
    with k2kernels.emulated("sm_90a"):
        got, _, other_dq = with_dq(apart, grads)
    assert same(got, whole) and torch.equal(other_dq, dq)


@pytest.mark.parametrize("pieces", [[128, 172], [256, 0, 44], [128, 128, 44]], ids=str)
def test_keys_in_pieces_have_the_bits_of_one_call(pieces):
    # The second sequence begins with 100 keys of context, and ends with the first piece.
    torch.manual_seed(0)
    lengths_q, lengths_k = [300, 28], [300, 128]
    case = make(lengths_q, lengths_k, scale_q=3.0, padding=2)
    state, begin = unwritten(len(case.q), 2, STATE_FLOATS), 0
    with k2kernels.emulated("sm_90a"):
        whole = hopper(case)
    for i, size in enumerate(pieces):
        first, last = i == 0, i == len(pieces) - 1
        spans = [(min(begin, n), min(begin + size, n)) for n in lengths_k]
        rows = torch.cat([torch.arange(a, b) + start for (a, b), start in zip(spans, (0, 300))])
        piece = case.replace(
            k=case.k[rows], v=case.v[rows], k_rope=case.k_rope[rows], cu_seqlens_k=cumulative([b - a for a, b in spans])
        )
        diagonal = torch.tensor([n - m - begin for m, n in zip(lengths_q, lengths_k)], dtype=torch.int32)
        if len(rows) == 0:  # TMA takes no empty tensor
            piece = case.replace(cu_seqlens_k=cumulative([0, 0]))
        with k2kernels.emulated("sm_90a", seed=i):
            got = hopper(piece, diagonal=diagonal, state_in=None if first else state, state_out=None if last else state)
        begin += size
    assert same(got, whole)


def test_first_piece_without_keys():
    torch.manual_seed(0)
    case = make([70], [130])
    state = unwritten(70, 2, STATE_FLOATS)
    with k2kernels.emulated("sm_90a", seed=2):
        whole = hopper(case)
        empty = case.replace(cu_seqlens_k=cumulative([0]))
        hopper(empty, diagonal=torch.tensor([60], dtype=torch.int32), state_out=state)
        got = hopper(case, state_in=state)
    assert same(got, whole)
