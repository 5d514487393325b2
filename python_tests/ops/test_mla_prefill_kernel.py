"""The kernels of mla_prefill in the emulator, against attention in float64 (prefill_cases.py)."""

import math

import pytest
import torch
from prefill_cases import (
    SCALE,
    STATE_FLOATS,
    Case,
    backward,
    backward_of_flash_attention,
    cumulative,
    exact,
    forward,
    make,
    of_torch,
    select,
    unwritten,
    workspace_of,
)

import k2kernels
from k2kernels import _emu
from k2kernels.ops.mla_prefill import mla_prefill, mla_prefill_piece
from k2kernels.testing.compare import check_close

SCHEDULES = [("sm_80", 0), ("sm_80", 1), ("sm_89", 2), ("sm_80", 3), ("sm_90a", 1), ("sm_90a", 2)]
TWO_SCHEDULES = [("sm_80", 1), ("sm_90a", 2)]
LENGTHS = [0, 1, 63, 64, 65, 127, 128, 129, 191, 300]
OTHER_LENGTHS = [7, 1, 100, 64, 0, 190, 128, 60, 191, 300]  # shorter, longer, none, equal


def emulated(arch, seed):
    return k2kernels.emulated(arch, seed=seed)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b) if x is not None)


def gradients_of_results(case, got):
    """Random gradients of out and of lse; NaN for the lse of a row that sees nothing, as logaddexp(-inf, -inf) has."""
    grad_out = torch.randn(got.out.shape).to(case.q.dtype)
    return grad_out, torch.randn(got.lse.shape).masked_fill(got.lse == -math.inf, math.nan)


def run(case, **options):
    got = forward(case, **options)
    grads = gradients_of_results(case, got)
    return got, grads, backward(case, *grads, got.out, got.lse, **options)


def check_forward(got, want, same_precision):
    """lse and max_logits by FlashMLA's bounds, as in test_mla_decode_kernel.py."""
    check_close(got.out, want.out, same_precision=same_precision, max_cos_diff=1e-5, name="out")
    check_close(got.lse, want.lse, budget=1e-6 + 8.01 / 65536 * want.lse.abs(), name="lse")
    peak = want.max_logits
    check_close(got.max_logits, peak, budget=1e-6 + 2.01 / 65536 * peak.abs(), name="max_logits")


def check_gradients(got, want, same_precision):
    for name, *three in zip(got._fields, got, want, same_precision):
        if three[0] is not None:
            check_close(three[0], three[1], same_precision=three[2], max_cos_diff=2e-5, name=f"grad_{name}")


@pytest.mark.parametrize("causal, arch, seed", [(True, *s) for s in SCHEDULES] + [(False, *s) for s in TWO_SCHEDULES])
def test_all_lengths(causal, arch, seed):
    """More queries than keys and fewer, rows that see nothing, padding and gaps full of NaN, results between guards."""
    dtype = torch.bfloat16 if seed % 2 == 0 else torch.float16
    case = make(LENGTHS, OTHER_LENGTHS, dtype=dtype, shared=seed != 1, padding=3)
    with emulated(arch, seed):
        got, grads, of_inputs = run(case, causal=causal)
    want, want_of_inputs = exact(case, causal=causal, grads=grads)
    check_forward(got, want, of_torch(case, causal=causal))
    check_gradients(of_inputs, want_of_inputs, backward_of_flash_attention(case, grads, causal=causal))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("arch, dtype", [("sm_80", torch.bfloat16), ("sm_90a", torch.float16)])
def test_gradients_are_as_exact_as_those_of_torch(arch, dtype, causal):
    case = make([97, 130], [97, 130], dtype=dtype, shared=False)
    with emulated(arch, 2):
        got = forward(case, causal=causal)
        grads = torch.randn(got.out.shape).to(dtype), torch.zeros(got.lse.shape)
        of_inputs = backward(case, *grads, got.out, got.lse, causal=causal)
    _, want = exact(case, causal=causal, grads=grads)
    check_gradients(of_inputs, want, of_torch(case, causal=causal, grad_out=grads[0])[1])


@pytest.mark.parametrize("arch, seed", SCHEDULES)
def test_nan_of_one_sequence_stays_there(arch, seed):
    case = make([65, 40, 70], [65, 70, 70])
    with emulated(arch, seed):
        got, grads, of_inputs = run(case)
        queries, keys = slice(65, 105), slice(65, 135)
        for x in (case.q, *grads):
            x[queries] = math.nan
        for x in (case.k, case.v, case.k_rope):
            x[keys] = math.nan
        poisoned = forward(case)
        of_poisoned = backward(case, *grads, poisoned.out, poisoned.lse)
    for x, y in zip((*got, of_inputs.q), (*poisoned, of_poisoned.q)):
        assert torch.equal(x[:65], y[:65]) and torch.equal(x[105:], y[105:]) and y[queries].isnan().all()
    for x, y in zip(of_inputs[1:], of_poisoned[1:]):
        assert torch.equal(x[:65], y[:65]) and torch.equal(x[135:], y[135:]) and y[keys].isnan().all()


@pytest.mark.parametrize("arch, seed", TWO_SCHEDULES)
def test_pairs_that_are_not_seen_have_no_gradient_even_of_nan(arch, seed):
    case = make([70], [70])
    with emulated(arch, seed):
        got, (grad_out, grad_lse), want = run(case)
        of_v = backward(case.replace(v=case.v.index_fill(0, torch.tensor(50), math.nan)), grad_out, grad_lse, *got[:2])
        assert torch.equal(of_v.q[:50], want.q[:50]) and of_v.q[50:].isnan().all()
        grad_out[4:6] = math.nan  # an even and an odd query
        of_grad = backward(case, grad_out, grad_lse, *got[:2])
        assert torch.equal(of_grad.k[6:], want.k[6:]) and of_grad.k[:6].isnan().all()


@pytest.mark.parametrize("arch, dtype", [("sm_80", torch.bfloat16), ("sm_90a", torch.float16)])
def test_rows_of_the_workspace(arch, dtype):
    """lse2 and delta [H, Tq]: +inf and 0 for rows that see nothing, whatever their gradients are."""
    case = make([70, 9], [40, 0], 3, dtype, padding=2)
    tokens = len(case.q)
    with emulated(arch, 2):
        got = forward(case)
        grad_out, grad_lse = gradients_of_results(case, got)
        grad_out[got.lse == -math.inf] = math.nan
        workspace = workspace_of(case)
        backward(case, grad_out, grad_lse, got.out, got.lse, workspace=workspace)
    lse2, delta = (x.T for x in workspace[: 2 * 3 * tokens].view(2, 3, tokens))
    empty = got.lse == -math.inf
    assert empty.sum() == 3 * (30 + 9 + 2) and (lse2[empty] == math.inf).all() and (delta[empty] == 0).all()
    check_close(lse2[~empty], got.lse[~empty].double() / math.log(2), budget=2.0**-22 * got.lse[~empty].abs())
    products = grad_out.double() * got.out.double()
    exact_delta = products.sum(-1) - grad_lse.double()
    # 128 products and their sum, each addition rounded.
    budget = 2.0**-24 * (130 * products.abs().sum(-1) + grad_lse.abs())
    check_close(delta[~empty], exact_delta[~empty], budget=budget[~empty], name="delta")


@pytest.mark.parametrize("arch, seed", TWO_SCHEDULES)
def test_a_sequence_alone_has_the_bits_of_the_batch(arch, seed):
    """With logits of standard deviation 3 maxima grow late."""
    case = make([70, 3, 150, 64], [70, 90, 200, 1], scale_q=3.0)
    with emulated(arch, seed):
        got, grads, of_inputs = run(case)
        for b, ((q0, q1), (k0, k1)) in enumerate(
            [[case.cu_seqlens_q[b : b + 2].tolist(), case.cu_seqlens_k[b : b + 2].tolist()] for b in range(4)]
        ):
            alone = select(case, b)
            found = forward(alone)
            assert same(found, [x[q0:q1] for x in got])
            of_alone = backward(alone, grads[0][q0:q1], grads[1][q0:q1], found.out, found.lse)
            assert torch.equal(of_alone.q, of_inputs.q[q0:q1])
            assert same(of_alone[1:], [x[k0:k1] for x in of_inputs[1:]])


@pytest.mark.parametrize("arch, seed", TWO_SCHEDULES)
def test_the_last_queries_have_the_bits_of_the_whole(arch, seed):
    case = make([140], [170], scale_q=3.0)
    with emulated(arch, seed):
        got, grads, of_inputs = run(case)
        for first in (139, 90, 37):
            last = select(case, 0, first)
            found = forward(last)
            assert same(found, [x[first:] for x in got])
            of_last = backward(last, grads[0][first:], grads[1][first:], found.out, found.lse)
            assert torch.equal(of_last.q, of_inputs.q[first:])


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
@pytest.mark.parametrize("causal", [True, False])
def test_bits_do_not_depend_on_schedule_or_multiprocessors(causal, arch):
    case = make([70, 0, 130], [100, 5, 130], scale_q=3.0)
    with emulated(arch, 0):
        got, grads, of_inputs = run(case, causal=causal)
    for seed, multiprocessors in ((1, 1), (2, 3), (7, 132)):
        with emulated(arch, seed):
            found = forward(case, causal=causal, multiprocessors=multiprocessors)
            of_found = backward(
                case, *grads, found.out, found.lse, causal=causal, multiprocessors=multiprocessors
            )  # fmt: skip
        assert same(found, got) and same(of_found, of_inputs)


@pytest.mark.parametrize(
    "arch, seed, pieces",
    [("sm_80", 1, [64, 64, 128]), ("sm_80", 2, [64, 192, 1])]  # blocks of 64 keys
    + [(*s, p) for s in TWO_SCHEDULES for p in ([128, 0, 192], [256], [128, 128, 1])],
    ids=str,
)
def test_keys_in_pieces_have_the_bits_of_one_call(arch, seed, pieces):
    """Two sequences, of which one ends in an earlier piece; the state is overwritten in place."""
    lengths_q, lengths_k = [70, 33], [230, 100]
    case = make(lengths_q, lengths_k, scale_q=3.0, padding=2)
    state = unwritten(len(case.q), 2, STATE_FLOATS)
    with emulated(arch, seed):
        whole = forward(case)
        begin = 0
        for i, piece in enumerate(pieces):
            last = i == len(pieces) - 1
            spans = [(min(begin, n), n if last else min(begin + piece, n)) for n in lengths_k]
            rows = torch.cat([torch.arange(a, b) + s for (a, b), s in zip(spans, [0, lengths_k[0]])])
            part = case.replace(
                k=case.k[rows], v=case.v[rows], k_rope=case.k_rope[rows],
                cu_seqlens_k=cumulative([b - a for a, b in spans]),
            )  # fmt: skip
            diagonal = torch.tensor([n - m - begin for m, n in zip(lengths_q, lengths_k)], dtype=torch.int32)
            got = forward(
                part, diagonal=diagonal, state_in=state if i else None, state_out=None if last else state
            )  # fmt: skip
            begin += piece
    assert same(got, whole)


@pytest.mark.parametrize("arch, seed", TWO_SCHEDULES)
def test_keys_given_side_by_side_or_concatenated(arch, seed):
    case = make([70, 20], [90, 64])
    joined = case.replace(k=case.full_k(), v=case.v.contiguous(), k_rope=None)
    with emulated(arch, seed):
        got, grads, of_inputs = run(case)
        found = forward(joined)
        of_joined = backward(joined, *grads, found.out, found.lse)
    assert same(found, got)
    assert same((of_joined.q, of_joined.k[..., :128], of_joined.v), of_inputs[:3])
    # The sum of the heads' rounded gradients: half a unit in the last place each, and of the sum.
    parts = of_joined.k[..., 128:].double()
    budget = 2.0**-8 * (parts.abs().sum(1) + parts.sum(1).abs())
    check_close(of_inputs.k_rope, parts.sum(1), budget=budget, name="grad_k_rope")


@pytest.mark.parametrize("arch, seed", TWO_SCHEDULES)
@pytest.mark.parametrize("heads", [1, 33])
def test_the_rope_gradient_of_many_heads(heads, arch, seed):
    case = make([17], [21], heads)
    with emulated(arch, seed):
        _, grads, of_inputs = run(case)
    _, want = exact(case, grads=grads)
    check_gradients(of_inputs, want, backward_of_flash_attention(case, grads))


@pytest.mark.parametrize("lengths_q, lengths_k", [([192], [192]), ([1], [128]), ([64, 1], [64, 65])], ids=str)
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_negative_lse_with_a_tail(arch, lengths_q, lengths_k):
    """Logits of about -120: where tails were not cleared, other kernels computed exp(0 - lse) = inf there."""
    case = make(lengths_q, lengths_k)
    case.q[:], case.k_rope[:] = case.q / 8, case.k_rope / 8
    case.q[..., 0], case.k[..., 0] = 40, -42
    with emulated(arch, 1):
        got, grads, of_inputs = run(case)
    want, want_of_inputs = exact(case, grads=grads)
    assert want.lse.max() < -100
    check_forward(got, want, of_torch(case))
    check_gradients(of_inputs, want_of_inputs, backward_of_flash_attention(case, grads))


@pytest.mark.parametrize("arch, seed", TWO_SCHEDULES)
def test_large_logits(arch, seed):
    case = make([100], [160])
    case.q[..., :2], case.k[..., :2] = 360, 200  # logits of 1e4, and some that differ
    with emulated(arch, seed):
        got, _, of_inputs = run(case)
    want = exact(case)
    assert want.max_logits.min() > 1e4
    # Nearly all of a logit comes from its first two products: 190 additions to them, each rounded, of 2**-24 at most.
    logit_error = 190 * 2.0**-24 * want.max_logits
    check_close(got.max_logits, want.max_logits, budget=logit_error, name="max_logits")
    check_close(got.lse, want.lse, budget=logit_error, name="lse")
    # A logit's error is the relative error of its probability, twice with that of the sum; other logits may err more.
    error = float((got.max_logits - want.max_logits).abs().max())
    budget = (4 * error + 2.0**-8) * float(case.v.abs().max())
    check_close(got.out, want.out, budget=budget, max_cos_diff=1e-4, name="out")
    assert all(x.isfinite().all() for x in of_inputs)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_drift_of_the_total(arch):
    """All logits about 1,000, the maximum among the first keys: no factor but 1 ever multiplies the sums."""
    case = make([2], [4096], 1)
    case.q[:, :, 1:], case.q[..., 0] = 0, 117.5
    case.k[..., 0] = 117
    case.k[:8, :, 0] = 118
    with emulated(arch, 0):
        got = forward(case)
    want = exact(case)
    check_close(got.lse, want.lse, budget=2 * 2.0**-13, name="lse")  # 2 units in the last place of 1,000


@pytest.mark.parametrize("arch, seed", TWO_SCHEDULES)
def test_sizes_out_of_range_stay_inside_the_tensors(arch, seed):
    """The results mean nothing; guard zones report accesses outside."""
    case = make([40, 60], [70, 80])
    wrong = torch.tensor([-5, 2**31 - 1, 30], dtype=torch.int32)
    for cu_q, cu_k in ((wrong, case.cu_seqlens_k), (case.cu_seqlens_q, wrong), (wrong, wrong.flip(0))):
        bad = case.replace(cu_seqlens_q=cu_q, cu_seqlens_k=cu_k)
        with emulated(arch, seed):
            run(bad)
            forward(bad, diagonal=torch.tensor([-(2**31), 2**31 - 1], dtype=torch.int32))


@pytest.mark.parametrize("lengths_q, lengths_k", [([], []), ([0, 0], [3, 2]), ([3, 2], [0, 0]), ([0], [0])], ids=str)
@pytest.mark.parametrize("heads", [0, 2])
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_nothing_to_do(arch, heads, lengths_q, lengths_k):
    case = make(lengths_q, lengths_k, heads)
    with emulated(arch, 0):
        got, _, of_inputs = run(case)
    assert (got.out == 0).all() and (got.lse == -math.inf).all() and (got.max_logits == -math.inf).all()
    assert all((x == 0).all() for x in of_inputs)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_the_op_runs_these_kernels(arch, shared):
    case = make([70, 20], [90, 64], shared=shared)
    leaves = [x.clone().requires_grad_() for x in (case.q, case.k, case.v)]
    k_rope = case.k_rope.clone().requires_grad_() if shared else None
    cu = dict(cu_seqlens_q=case.cu_seqlens_q, cu_seqlens_k=case.cu_seqlens_k, softmax_scale=SCALE)
    before = k2kernels.launch_count("mla_prefill"), k2kernels.launch_count("mla_prefill_backward")
    with emulated(arch, 0):
        want, grads, of_inputs = run(case)
        got = mla_prefill(*leaves, k_rope=k_rope, return_max_logits=True, **cu)
        assert same(got, want)
        wanted = [*leaves, k_rope] if shared else leaves
        of_leaves = torch.autograd.grad([got.out, got.lse], wanted, grads)
        assert same(of_leaves, of_inputs)
    after = k2kernels.launch_count("mla_prefill"), k2kernels.launch_count("mla_prefill_backward")
    assert (after[0] - before[0], after[1] - before[1]) == (2, 8 if shared else 6)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_expanded_and_misaligned_arguments_are_copied(arch):
    """A sum's gradient has strides of 0; rows of a slice may begin anywhere."""
    case = make([70, 20], [90, 64])
    cu = dict(cu_seqlens_q=case.cu_seqlens_q, cu_seqlens_k=case.cu_seqlens_k, softmax_scale=SCALE)
    leaves = [x.contiguous().requires_grad_() for x in (case.q, case.k, case.v, case.k_rope)]

    def gradients(q, k, v, k_rope, loss):
        return torch.autograd.grad(loss(mla_prefill(q, k, v, k_rope=k_rope, **cu).out), leaves)

    def elsewhere(x):
        return torch.nn.functional.pad(x, (1, 2))[..., 1:-2]

    with emulated(arch, 2):
        weights = torch.ones(90, 2, 128).bfloat16()
        want = gradients(*leaves, lambda out: (out * weights).sum())
        for loss in (torch.sum, lambda out: out.sum(1).sum(), lambda out: (out * weights[:, :1]).sum()):
            assert same(gradients(*leaves, loss), want)
        assert same(gradients(*map(elsewhere, leaves), torch.sum), want)
        repeated = leaves[2][:, :1].expand(-1, 2, -1)
        out = mla_prefill(*leaves[:2], repeated, k_rope=leaves[3], **cu).out
        assert torch.equal(out, mla_prefill(*leaves[:2], repeated.contiguous(), k_rope=leaves[3], **cu).out)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_saved_results_may_return_with_other_strides(arch):
    """As hooks that move saved tensors elsewhere and back may leave them."""
    case = make([70], [70])
    cu = dict(cu_seqlens_q=case.cu_seqlens_q, cu_seqlens_k=case.cu_seqlens_k, softmax_scale=SCALE)
    leaves = [x.contiguous().requires_grad_() for x in (case.q, case.k, case.v, case.k_rope)]

    def restrided(x):
        return x if x.dim() < 2 else x.transpose(0, 1).contiguous().transpose(0, 1)

    def gradients():
        out = mla_prefill(*leaves[:3], k_rope=leaves[3], **cu).out
        return torch.autograd.grad(out.float().square().sum(), leaves)

    with emulated(arch, 1):
        want = gradients()
        with torch.autograd.graph.saved_tensors_hooks(restrided, lambda x: x):
            assert same(gradients(), want)


def test_a_scale_that_float32_does_not_hold_is_refused():
    case = make([3], [3])
    cu = dict(cu_seqlens_q=case.cu_seqlens_q, cu_seqlens_k=case.cu_seqlens_k, softmax_scale=1e-46)
    with emulated("sm_80", 0), pytest.raises(k2kernels.UnsupportedError, match="softmax_scale in float32, not 1e-46"):
        mla_prefill(case.q, case.k, case.v, k_rope=case.k_rope, **cu)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_the_op_in_pieces_runs_these_kernels(arch):
    case = make([70], [200])
    cu = dict(cu_seqlens_q=case.cu_seqlens_q, softmax_scale=SCALE, return_max_logits=True)
    with emulated(arch, 2):
        whole = forward(case)
        state = None
        for begin, end in ((0, 128), (128, 200)):
            keys = Case(case.q, *(x[begin:end] for x in case[1:4]), case.cu_seqlens_q, cumulative([end - begin]))
            state = mla_prefill_piece(
                state, keys.q, keys.k, keys.v, k_rope=keys.k_rope, cu_seqlens_k=keys.cu_seqlens_k,
                diagonal=torch.tensor([130 - begin], dtype=torch.int32), last=end == 200, **cu,
            )  # fmt: skip
    assert same(state, whole)


@pytest.mark.parametrize("arch, rows", [("sm_80", 64), ("sm_90a", 128)])
def test_bytes_moved_are_those_of_the_tiles(arch, rows):
    """Queries once; keys and values of a tile's visible blocks; results once. What is read twice is in L2."""
    length, heads = 512, 2
    case = make([length], [length], heads)
    before = dict(_emu.counters())
    with emulated(arch, 0):
        forward(case)
    moved = {name: _emu.counters()[name] - before[name] for name in ("bytes_loaded", "bytes_stored")}
    tiles = length // rows
    blocks = tiles * (tiles + 1) // 2  # as large as a tile
    loaded = heads * (length * 384 + blocks * rows * (384 + 256))
    assert loaded <= moved["bytes_loaded"] <= 1.02 * loaded
    assert moved["bytes_stored"] == heads * length * 256  # out; plain stores, of lse and max_logits, are not counted
