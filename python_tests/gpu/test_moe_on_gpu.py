"""The kernels of moe on a GPU, at sizes of Kimi-K2: against the definition on the CPU. Run by `make gpu`."""

import pytest
import torch

import k2kernels as k
from k2kernels.ops import grouped_gemm
from k2kernels.ops.moe import DispatchHandle, balance, dispatch, route
from k2kernels.reference import moe as reference
from k2kernels.testing.compare import check_close
from k2kernels.testing.inputs import KIMI_K2

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
EXPERTS, TOP_K, HIDDEN = KIMI_K2.experts, KIMI_K2.top_k, KIMI_K2.hidden
TOKENS = (1, 128, 256, 257, 1000)  # 256: the last batch that is dispatched in one launch


def routing(tokens, skew="uniform"):
    indices = torch.rand(tokens, EXPERTS).topk(TOP_K).indices.int()
    if skew == "hot":
        indices[:, 0] = 7
        indices[::5, 3] = -1
    return indices, torch.rand(tokens, TOP_K)


def on_gpu(x):
    return x.cuda() if isinstance(x, torch.Tensor) else x


def same(got, want):
    got, want = (t.detach().cpu().flatten().view(torch.uint8) for t in (got, want))
    assert torch.equal(got, want), f"{int((got != want).sum())} of {want.numel()} bytes differ"


def launched(op, function, *args, **options):
    before = k.launch_count(op)
    result = function(*map(on_gpu, args), **{name: on_gpu(v) for name, v in options.items()})
    assert k.launch_count(op) > before, "the reference ran instead of the kernel"
    return result


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("skew", ["uniform", "hot"])
@pytest.mark.parametrize("tokens", TOKENS)
def test_dispatch(tokens, skew, dtype):
    x, (indices, weights) = torch.randn(tokens, HIDDEN).to(dtype), routing(tokens, skew)
    for options in (
        dict(),
        dict(alignment=128, quantize=True),
        dict(alignment=16, quantize=True, power_of_two=True, scale_layout="column"),
        dict(alignment=16, capacity=16 * (tokens // 3 + 2)),
    ):
        op = "moe_dispatch_quantize" if "quantize" in options else "moe_dispatch"
        got = launched(op, k.moe_dispatch, x, indices, weights, num_experts=EXPERTS, **options)
        want = k.moe_dispatch(x, indices, weights, num_experts=EXPERTS, **options)
        for g, w in zip(got.handle, want.handle):
            same(g, w)
        real = want.handle.token_of_slot >= 0
        same(got.data.cpu().view(torch.uint8).view(len(real), -1)[real], want.data[real])
        if want.scales is not None:
            assert got.scales.stride() == want.scales.stride()
            same(got.scales.cpu()[real], want.scales[real])


@pytest.mark.parametrize("tokens", [100, 1000])
def test_padding_is_not_written(tokens):
    indices, _ = routing(tokens)
    capacity = 128 * (tokens * TOP_K // 128 + EXPERTS)
    x, indices = torch.randn(tokens, HIDDEN).bfloat16().cuda(), indices.cuda()
    data, *plan = dispatch._dispatch_outputs(x, indices, EXPERTS, capacity)
    dispatch._launch_dispatch(data.fill_(7), *plan, x, indices, 128)
    assert (data[plan[1] < 0] == 7).all() and (plan[1] < 0).sum() == capacity - tokens * TOP_K


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("tokens", TOKENS)
def test_combine_and_its_gradient(tokens, dtype):
    handle = k.moe_dispatch(torch.zeros(tokens, 1), *routing(tokens, "hot"), num_experts=EXPERTS, alignment=4).handle
    y = torch.randn(len(handle.token_of_slot), HIDDEN).to(dtype)
    y[handle.token_of_slot < 0] = float("nan")
    shared, residual = torch.randn(tokens, HIDDEN).bfloat16(), torch.randn(tokens, HIDDEN)
    gpu_handle = DispatchHandle(*map(on_gpu, handle))
    for options in (dict(), dict(shared=shared), dict(shared=shared, residual=residual, out_dtype=torch.float32)):
        got = launched("moe_combine", k.moe_combine, y, gpu_handle, **options)
        same(got, k.moe_combine(y, handle, **options))

    args = shared, y, *handle[:2], handle.weights
    d_y, d_weights = launched("moe_combine_backward", dispatch._moe_combine_backward, *args)
    same(d_y, dispatch._moe_combine_backward(shared, y.nan_to_num(), *args[2:])[0])
    pairs = y.double()[handle.slot_of.long()] * shared.double()[:, None]
    none = handle.slot_of < 0
    # Each of H products and sums is off by half a unit of the sum of magnitudes at most, mostly far less.
    budget = (pairs.abs().sum(-1) * 2**-24 * HIDDEN**0.5).masked_fill(none, 1e-30)
    check_close(d_weights.cpu(), pairs.sum(-1).masked_fill(none, 0), budget=budget)
    rows = shared, *handle[:2]
    same(launched("moe_permute", dispatch._moe_permute, *rows), dispatch._moe_permute(*rows))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
@pytest.mark.parametrize("experts, top_k, groups", [(384, 8, 1), (256, 8, 8), (64, 6, 1), (512, 10, 1), (1024, 32, 32)])
@pytest.mark.parametrize("tokens", [1, 129, 4096])
def test_route_and_its_gradient(tokens, experts, top_k, groups, score, dtype):
    logits, bias = torch.randn(tokens, experts).to(dtype), torch.randn(experts) * 0.1
    options = dict(top_k=top_k, n_group=groups, topk_group=-(-groups // 2), score=score, scale=2.827)
    got = launched("moe_route", k.moe_route, logits, bias, **options)
    index = got.indices.cpu().long()
    exact = logits.double().sigmoid() if score == "sigmoid" else logits.double().softmax(-1)
    # The same experts as in float64, but for a few that are as good.
    want = k.moe_route(logits.double(), bias, **options).indices.long()
    choice = exact + bias.double()
    assert index.sort(-1).values.diff(dim=-1).gt(0).all()
    torch.testing.assert_close(choice.gather(1, index), choice.gather(1, want), rtol=0, atol=1e-5)
    assert torch.equal(got.counts.cpu(), torch.bincount(index.flatten(), minlength=experts))
    weights = exact.gather(1, index)
    weights = weights / weights.sum(-1, keepdim=True) * 2.827
    check_close(got.weights.cpu(), weights, budget=weights * 2e-6)

    grad, rest = torch.randn(tokens, top_k), (index.int(), score, True, 2.827)
    d_logits = launched("moe_route_backward", route._moe_route_backward, grad, logits, *rest)
    want = reference.moe_route_backward(grad.double(), logits.double(), *rest)
    check_close(d_logits.cpu(), want, same_precision=reference.moe_route_backward(grad, logits, *rest))


def test_bad_logits_give_distinct_experts():
    nan, inf = float("nan"), float("inf")
    logits = torch.tensor([[nan] * 8, [-inf] * 8, [inf] * 8, [nan, nan, 1, nan, 2, nan, nan, 0.5], [0.0] * 8])
    for bias in (None, torch.linspace(3, -3, 8)):
        got = launched("moe_route", k.moe_route, logits, bias, top_k=3)
        assert torch.equal(got.indices.cpu(), k.moe_route(logits, bias, top_k=3).indices)
        assert got.weights.isfinite().all()


def test_exchange_in_a_graph():
    """One exchange of each kind: the halves of the buffers differ from replay to replay."""
    from k2kernels.parallel import ExpertParallel

    ep = ExpertParallel(None, num_experts=EXPERTS, hidden=HIDDEN, top_k=TOP_K, max_tokens=64, transport="virtual")
    x = torch.randn(64, HIDDEN).bfloat16().cuda()
    indices, weights = (t.cuda() for t in routing(64))

    def layer():
        sent = ep.dispatch(x, indices, weights)
        return ep.combine(sent.data, sent.handle)

    with torch.no_grad():
        layer()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = layer()
        for replay in range(4):
            x.copy_(torch.randn(64, HIDDEN))
            graph.replay()
            want = k.moe_dispatch(x, indices, weights, num_experts=EXPERTS)
            same(out, k.moe_combine(want.data, want.handle))
            for _ in range(replay % 3):
                layer()
        torch.cuda.synchronize()
        ep.check()


def products(kind, a, b, offsets, counts):
    """Group by group, in a's dtype."""
    groups = [slice(start, start + count) for start, count in zip(offsets.tolist(), counts.tolist())]
    if kind == "wgrad":
        return torch.stack([a[g].T @ b[g] for g in groups])
    return torch.cat([a[g] @ (w.T if kind == "forward" else w) for g, w in zip(groups, b)])


@pytest.mark.parametrize("dtype", FLOATS[:2])
@pytest.mark.parametrize("kind", ["forward", "dgrad", "wgrad"])
@pytest.mark.parametrize("counts", [[1, 0, 16, 3, 0, 40], [300, 0, 129, 7]], ids=["few rows", "many rows"])
def test_products_of_experts(counts, kind, dtype):
    aligned = [-(-n // 16) * 16 for n in counts]
    offsets = torch.tensor([0, *aligned]).cumsum(0).int()
    real = torch.cat([torch.arange(start, start + n) for start, n in zip(offsets.tolist(), counts)])
    n, width = 2 * KIMI_K2.expert_intermediate, HIDDEN
    if kind == "dgrad":
        n, width = width, n

    def rows(columns):
        x = torch.full((int(offsets[-1]), columns), float("nan"), dtype=dtype, device="cuda")
        x[real.cuda()] = torch.randn(len(real), columns, device="cuda").to(dtype)
        return x

    a = rows(n if kind == "wgrad" else width)
    weight = (len(counts), n, width) if kind == "forward" else (len(counts), width, n)
    b = rows(width) if kind == "wgrad" else torch.randn(weight, device="cuda").to(dtype)
    op, body = {
        "forward": ("grouped_gemm", grouped_gemm._grouped_gemm),
        "dgrad": ("grouped_gemm_dgrad", grouped_gemm._grouped_gemm_dgrad),
        "wgrad": ("grouped_gemm_wgrad", grouped_gemm._grouped_gemm_wgrad),
    }[kind]
    places = offsets, torch.tensor(counts, dtype=torch.int32)
    rest = () if kind == "wgrad" else (None,)
    written = slice(None) if kind == "wgrad" else real.cuda()
    got = launched(op, body, a, b, *places, *rest)[written]
    same(got, launched(op, body, a, b, *places, *rest)[written])
    check_close(got, products(kind, a.double(), b.double(), *places), same_precision=products(kind, a, b, *places))


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
@pytest.mark.parametrize("ends", [None, [0, 1, 1, 4000, 4096]])
def test_sequence_loss_and_its_gradient(ends, score):
    logits, (indices, _) = torch.randn(4096, EXPERTS), routing(4096)
    ends = None if ends is None else torch.tensor(ends)
    rest = 0.1, score
    want = reference.moe_sequence_loss(logits.double(), indices, ends, *rest)
    losses = [launched("moe_sequence_loss", balance._moe_sequence_loss, logits, indices, ends, *rest) for _ in range(3)]
    assert len(set(map(float, losses))) == 1
    check_close(losses[0].cpu(), want, budget=float(want) * 4e-6)
    grad = torch.tensor(1.0)
    got = launched(
        "moe_sequence_loss_backward", balance._moe_sequence_loss_backward, grad, logits, indices, ends, *rest
    )
    want = reference.moe_sequence_loss_backward(grad.double(), logits.double(), indices, ends, *rest)
    plain = reference.moe_sequence_loss_backward(grad, logits, indices, ends, *rest)
    check_close(got.cpu(), want, same_precision=plain)


@pytest.mark.parametrize("mode", ["sign", "quantile"])
def test_update_bias(mode):
    bias, counts = torch.randn(EXPERTS), (1 << 24) + torch.randint(0, 3, (EXPERTS,))
    got = launched("moe_update_bias", k.moe_update_bias, bias, counts, rate=1e-3, mode=mode)
    same(got, reference.moe_update_bias(bias, counts, 1e-3, mode))


def experts(dtype):
    """Weights of 16 experts as wide as Kimi-K2's; float8_e4m3fn: pairs."""
    intermediate = KIMI_K2.expert_intermediate
    gate_up = torch.randn(16, 2 * intermediate, HIDDEN, device="cuda") * HIDDEN**-0.5
    down = torch.randn(16, HIDDEN, intermediate, device="cuda") * intermediate**-0.5
    if dtype == torch.float8_e4m3fn:
        return k.quantize_128x128(gate_up), k.quantize_128x128(down)
    return gate_up.to(dtype), down.to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=["bf16", "fp8"])
@pytest.mark.parametrize("tokens", [1, 64, 700])
def test_whole_layer_in_a_graph_without_waiting(tokens, dtype):
    """The host never waits for the device; a graph serves any routing of so many tokens."""
    weights = experts(dtype)
    x, logits = torch.randn(tokens, HIDDEN).bfloat16().cuda(), torch.randn(tokens, 16).cuda()

    def whole(x, logits):
        return k.moe_mlp(x, k.moe_route(logits, top_k=4, scale=2.5), *weights, shared=x)

    torch.cuda.set_sync_debug_mode("error")
    try:
        whole(x, logits)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = whole(x, logits)
    for skew in (0, 10, 1):
        x.copy_(torch.randn(tokens, HIDDEN))
        logits.copy_(torch.randn(tokens, 16))
        logits[:, 3] += skew
        graph.replay()
        torch.cuda.synchronize()
        same(out, whole(x, logits))


def test_whole_layer_is_the_reference_and_differentiable():
    weights = experts(torch.bfloat16)
    inputs = [torch.randn(300, HIDDEN).bfloat16().cuda(), torch.randn(300, 16).cuda(), *weights]
    leaves = [t.requires_grad_() for t in inputs]

    def run():
        routing = k.moe_route(leaves[1], top_k=4, scale=2.5)
        out = k.moe_mlp(leaves[0], routing, *leaves[2:])
        return out, *torch.autograd.grad(out.float().square().sum(), leaves)

    before = k.launch_count("grouped_gemm_wgrad")
    got = run()
    assert k.launch_count("grouped_gemm_wgrad") > before
    with k.backend("reference"):
        want = run()
    for g, w in zip(got, want):
        error = (g.double() - w.double()).norm() / w.double().norm()
        assert error < 2e-2, error  # a few roundings to bfloat16, 2**-9 each


def layer(x, logits, bias):
    routing = k.moe_route(logits, bias, top_k=TOP_K, scale=2.827)
    d = k.moe_dispatch(x, routing.indices, routing.weights, num_experts=EXPERTS, alignment=16)
    return k.moe_combine(d.data, d.handle, shared=x), routing.counts


@pytest.mark.parametrize("tokens", [128, 1000])
def test_graphs_with_changing_routing_and_repeated_runs(tokens):
    x, logits = torch.randn(tokens, HIDDEN).bfloat16().cuda(), torch.randn(tokens, EXPERTS).cuda()
    bias = torch.randn(EXPERTS).cuda() * 0.1
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        layer(x, logits, bias)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, counts = layer(x, logits, bias)
    for _ in range(20):
        x.copy_(torch.randn(tokens, HIDDEN))
        logits.copy_(torch.randn(tokens, EXPERTS))
        graph.replay()
        torch.cuda.synchronize()
        for want in (layer(x, logits, bias) for _ in range(2)):
            same(out, want[0])
            same(counts, want[1])


def test_a_token_does_not_depend_on_its_batch():
    x, logits, bias = torch.randn(300, HIDDEN).bfloat16().cuda(), torch.randn(300, EXPERTS).cuda(), None
    together, _ = layer(x, logits, bias)
    for some in ([0], [299], list(range(17, 150))):
        same(layer(x[some], logits[some], bias)[0], together[some])


def test_compiled():
    x, logits = torch.randn(64, HIDDEN).bfloat16().cuda(), torch.randn(64, EXPERTS).cuda()
    got = torch.compile(layer, fullgraph=True)(x, logits, None)
    for g, w in zip(got, layer(x, logits, None)):
        same(g, w)


def test_more_than_2_to_the_31_elements():
    tokens = 40_000
    indices, weights = (t.cuda() for t in routing(tokens))
    x = torch.randn(tokens, HIDDEN, dtype=torch.bfloat16, device="cuda")
    got = k.moe_dispatch(x, indices, weights, num_experts=EXPERTS, quantize=True)
    assert got.data.numel() > 2**31
    codes, scales = k.quantize_1x128(x)
    for token in (0, 20_001, tokens - 1):
        slots = got.handle.slot_of[token].long()
        same(got.data.view(torch.uint8)[slots], codes[token].view(torch.uint8).expand(TOP_K, -1))
        same(got.scales[slots], scales[token].expand(TOP_K, -1))
    del got
    d = k.moe_dispatch(x, indices, weights, num_experts=EXPERTS)
    out = k.moe_combine(d.data, d.handle)
    want = x.float() * weights.sum(-1, keepdim=True)
    torch.testing.assert_close(out.float(), want, rtol=2**-7, atol=2**-7)
