"""What the ops of moe have in common: their registration, the bytes that kernels move, and what no kernel serves."""

import pytest
import torch
from moe_cases import BF16, F64, make_handle, rows_of

import k2kernels
from k2kernels import _emu
from k2kernels.ops.moe import balance, dispatch, moe_combine, moe_dispatch, moe_route, moe_sequence_loss, route
from k2kernels.testing.compare import check_op
from k2kernels.testing.inputs import expert_indices


def test_registration():
    logits = torch.randn(7, 8, requires_grad=True)
    bias = torch.randn(8)
    arguments = (logits, bias, 2, 2, 1, "sigmoid", True, 2.5)
    check_op(route._moe_route, arguments, differentiable=True, compiled=lambda: moe_route(logits, bias, top_k=2))
    routing = moe_route(logits.detach(), top_k=2)
    check_op(route._moe_route_backward, (torch.randn(7, 2), logits.detach(), routing.indices, "softmax", True, 2.5))
    cu_seqlens = torch.tensor([0, 3, 7], dtype=torch.int32)
    loss = lambda: moe_sequence_loss(logits, routing.indices, top_k=2, alpha=0.1, cu_seqlens=cu_seqlens)  # noqa: E731
    check_op(
        balance._moe_sequence_loss,
        (logits, routing.indices, cu_seqlens, 0.1, "sigmoid"),
        differentiable=True,
        compiled=loss,
    )
    check_op(
        balance._moe_sequence_loss_backward,
        (torch.tensor(2.0), logits.detach(), routing.indices, None, 0.1, "softmax"),
    )
    for mode in ("sign", "quantile"):
        check_op(balance._moe_update_bias, (bias, routing.counts, 0.1, mode))

    x = torch.randn(7, 16, requires_grad=True)
    weights = routing.weights.clone().requires_grad_()
    d = moe_dispatch(x.detach(), routing.indices, routing.weights, num_experts=8, alignment=4)
    slots = d.handle.slot_of, d.handle.token_of_slot
    check_op(dispatch._moe_dispatch, (x, routing.indices, 8, 4, 40), differentiable=True)
    check_op(dispatch._moe_permute, (x, *slots), differentiable=True)
    for layout in ("row", "column"):
        check_op(dispatch._moe_dispatch_quantize, (x, routing.indices, 8, 4, 40, False, layout))
    y = torch.randn(d.data.shape, requires_grad=True)
    shared = torch.randn(7, 16, dtype=torch.bfloat16, requires_grad=True)
    check_op(dispatch._moe_combine, (y, *slots, weights, shared, None, torch.bfloat16), differentiable=True)
    check_op(dispatch._moe_combine, (y, *slots, None, None, None, torch.float32), differentiable=True)
    check_op(dispatch._moe_combine_backward, (torch.randn(7, 16), y, *slots, weights))


HALF = BF16


def moved_dispatch(**options):
    x, indices = torch.randn(20, 1024, dtype=HALF), expert_indices("uniform", 20, 4, 16)
    return lambda: moe_dispatch(x, indices, torch.ones(20, 4), num_experts=16, alignment=32, **options)


def moved_combine(backward):
    handle = make_handle(20, 16, 4, skew="uniform")
    y, shared = rows_of(handle, 1024, HALF), torch.randn(20, 1024, dtype=HALF)
    if backward:
        return lambda: dispatch._moe_combine_backward(shared, y, *handle[:2], handle.weights)
    return lambda: moe_combine(y, handle, shared=shared)


MOVED = {  # rows of 1024 bfloat16 loaded, bytes stored; what is less than 16 bytes is not counted
    "dispatch": (moved_dispatch(), 20, 20 * 4 * 2048),
    "dispatch and quantize": (moved_dispatch(quantize=True), 20, 20 * 4 * 1024),
    "combine": (moved_combine(False), 20 * 4 + 20, 20 * 2048),
    "combine backward": (moved_combine(True), 20 * 4 + 20, None),
}


@pytest.mark.parametrize("case", MOVED)
def test_kernels_move_each_byte_once_in_vectors(case):
    call, rows, stored = MOVED[case]
    with k2kernels.emulated():
        before = _emu.counters()
        call()
        after = _emu.counters()
    if stored is None:  # every slot is written, as zeros if it is padding
        stored = len(make_handle(20, 16, 4, skew="uniform").token_of_slot) * 2048
    assert after["bytes_loaded"] - before["bytes_loaded"] == rows * 2048
    assert after["bytes_stored"] - before["bytes_stored"] == stored


def test_what_no_kernel_serves():
    call = dict(num_experts=1025)
    indices, weights = torch.zeros(2, 1, dtype=torch.int32), torch.ones(2, 1)
    with k2kernels.emulated():
        with pytest.raises(
            k2kernels.UnsupportedError, match=r"moe_dispatch: .*num_experts must be at most 1024 .* got 1025"
        ):
            moe_dispatch(torch.zeros(2, 16), indices, weights, **call)
        with pytest.raises(k2kernels.UnsupportedError, match=r"moe_route: .*top_k must be at most 32 .* got 33"):
            moe_route(torch.zeros(2, 64), top_k=33)
        with pytest.raises(k2kernels.UnsupportedError, match=r"moe_route: .*n_group must be at most 32 .* got 64"):
            moe_route(torch.zeros(2, 64), top_k=3, n_group=64, topk_group=5)
        with pytest.raises(k2kernels.UnsupportedError, match=r"moe_route: .* float64"):
            moe_route(torch.zeros(2, 64, dtype=F64), top_k=3)
