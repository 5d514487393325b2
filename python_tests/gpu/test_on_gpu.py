"""The kernels on a GPU, at sizes of Kimi-K2: against the reference bit for bit, on other streams, in CUDA graphs.

Every instance of every kernel, at larger sizes than in the emulator. Run by `make gpu`.
"""

import pytest
import torch

import k2kernels as k
from k2kernels.ops.newton_schulz import muon_update
from k2kernels.testing.compare import check_close, check_rms_norm_quantize
from k2kernels.testing.inputs import KIMI_K2, exact_rms_rows, poisoned_cache

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
GROUPS = dict(
    offsets=torch.tensor([0, 256, 512, 640, 1024], dtype=torch.int32),
    counts=torch.tensor([200, 256, 0, 300], dtype=torch.int32),
)
REAL = torch.cat([torch.arange(start, start + n) for start, n in ((0, 200), (256, 256), (640, 300))])


def rows(*shape, dtype=torch.bfloat16):
    return (torch.randn(*shape) * torch.logspace(-4, 4, shape[-2])[:, None]).to(dtype)


def grouped_rows(columns, dtype=torch.bfloat16):
    """Rows of the groups; the padding around them is NaN."""
    x = torch.full((1024, columns), float("nan"), dtype=dtype)
    x[REAL] = rows(len(REAL), columns, dtype=dtype)
    return x


def paged(cache):
    """A cache of that dtype; torch.uint8: of 656-byte rows."""
    torch.manual_seed(7)
    dtype, quantize = (torch.bfloat16, True) if cache == torch.uint8 else (cache, False)
    made = poisoned_cache([torch.randn(n, KIMI_K2.cache_row).to(dtype) for n in (100, 7, 333)], 64, quantize=quantize)
    positions = torch.tensor([0, 99, 5, 6, 64, 332])
    return made.kv_cache, made.block_table, positions


def append(kv, cache, table, positions):
    cache = cache.clone()
    k.mla_append(kv, cache, table, positions)
    return cache


# name -> (the op whose launches are counted, function, arguments on the CPU)
CASES = {
    "quantize_1x128 narrow": ("quantize_1x128", k.quantize_1x128, lambda: (rows(33, 200),)),
    "quantize_128x128 stacked": ("quantize_128x128", k.quantize_128x128, lambda: (rows(3, 200, 300),)),
}
for dtype in FLOATS:
    for layout in ("row", "column"):
        CASES[f"quantize_1x128 {dtype} {layout}"] = (
            "quantize_1x128",
            lambda x, layout=layout: k.quantize_1x128(x, scale_layout=layout, power_of_two=layout == "column"),
            lambda dtype=dtype: (rows(515, 7168, dtype=dtype),),
        )
    CASES[f"quantize_1x128 {dtype} groups"] = (
        "quantize_1x128",
        lambda x, offsets, counts: [t[REAL.to(t.device)] for t in k.quantize_1x128(x, offsets=offsets, counts=counts)],
        lambda dtype=dtype: (grouped_rows(2048, dtype), *GROUPS.values()),
    )
    CASES[f"quantize_1x128 {dtype} transposed"] = (
        "quantize_1x128",
        lambda x: k.quantize_1x128(x, transpose=True),
        lambda dtype=dtype: (rows(515, 7168, dtype=dtype),),
    )
    CASES[f"quantize_1x128 {dtype} transposed groups"] = (
        "quantize_1x128",
        lambda x, offsets, counts: k.quantize_1x128(x, transpose=True, offsets=offsets, counts=counts),
        lambda dtype=dtype: (grouped_rows(2048, dtype), *GROUPS.values()),
    )
    CASES[f"quantize_128x128 {dtype}"] = (
        "quantize_128x128",
        k.quantize_128x128,
        lambda dtype=dtype: (rows(576, 7168, dtype=dtype),),
    )
    for block, quantize in ((1, k.quantize_1x128), (128, k.quantize_128x128)):
        CASES[f"dequantize {block}x128 {dtype}"] = (
            "dequantize",
            lambda data, scales, block=block, dtype=dtype: k.dequantize(data, scales, block=(block, 128), dtype=dtype),
            lambda quantize=quantize: quantize(rows(576, 7168)),
        )
    for columns in (7168, 1536, 512, 200):
        for layout in ("row", "column"):
            CASES[f"rms_norm_quantize {columns} {dtype} {layout}"] = (
                "rms_norm_quantize",
                lambda x, weight, layout=layout: k.rms_norm_quantize(x, weight, eps=0.0, scale_layout=layout),
                lambda columns=columns, dtype=dtype: (
                    exact_rms_rows(515, columns).to(dtype),
                    torch.randn(columns).to(dtype),
                ),
            )
    for cache in (*FLOATS, torch.uint8):
        CASES[f"mla_append {dtype} into {cache}"] = (
            "mla_append",
            append,
            lambda dtype=dtype, cache=cache: (torch.randn(6, KIMI_K2.cache_row).to(dtype), *paged(cache)),
        )
        CASES[f"mla_gather {dtype} from {cache}"] = (
            "mla_gather",
            lambda *args, dtype=dtype: k.mla_gather(*args, dtype=dtype),
            lambda cache=cache: paged(cache),
        )


def rounding(want, dtype):
    """The most that one rounding to dtype changes: half a unit, or the smallest denormal."""
    info = torch.finfo(dtype)
    return info.eps / 2 * want.abs() + info.tiny * info.eps


def to(device, values):
    return tuple(v.to(device) if isinstance(v, torch.Tensor) else v for v in values)


def bits(result):
    """The tensors of a result as bytes: NaN equals NaN, and -0 is not 0."""
    flat = [result] if isinstance(result, torch.Tensor) else list(result)
    return [t.detach().cpu().contiguous().view(torch.uint8) for t in flat]


@pytest.mark.parametrize("name", CASES)
def test_kernel_equals_the_reference_bit_for_bit(name):
    op, function, arguments = CASES[name]
    on_cpu = arguments()
    before = k.launch_count(op)
    got = function(*to("cuda", on_cpu))
    assert k.launch_count(op) > before, "the reference ran instead of the kernel"
    for g, w in zip(bits(got), bits(function(*on_cpu))):
        assert torch.equal(g, w), f"{int((g != w).sum())} of {w.numel()} bytes differ"


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("grouped", [False, True])
def test_swiglu_quantize(grouped, weighted, dtype):
    x = grouped_rows(4096, dtype) if grouped else torch.randn(515, 4096).to(dtype)
    options = dict(GROUPS if grouped else {}, weights=torch.rand(len(x)) if weighted else None)
    got = k.swiglu_quantize(x.cuda(), **{name: None if v is None else v.cuda() for name, v in options.items()})
    want = k.swiglu_quantize(x, **options)
    real = REAL if grouped else slice(None)
    steps = got[0].cpu().view(torch.uint8)[real].int() - want[0].view(torch.uint8)[real].int()
    assert steps.abs().max() <= 1 and (steps != 0).float().mean() < 1e-3  # the last bit of exp is free
    torch.testing.assert_close(got[1].cpu()[real], want[1][real], rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("columns", [7168, 1536, 512, 8192])
def test_rms_norm_quantize(columns, dtype):
    x, weight = rows(515, columns, dtype=dtype), torch.randn(columns).to(dtype)
    for options in (dict(eps=1e-6), dict(eps=0.25, power_of_two=True)):
        before = k.launch_count("rms_norm_quantize")
        got = k.rms_norm_quantize(x.cuda(), weight.cuda(), **options)
        assert k.launch_count("rms_norm_quantize") > before
        check_rms_norm_quantize(*(t.cpu() for t in got), x, weight, **options)


@pytest.mark.parametrize("dtype", FLOATS)
def test_swiglu(dtype):
    x = torch.randn(515, 4096).to(dtype)
    exact = x.double()
    want = torch.nn.functional.silu(exact[:, :2048]) * exact[:, 2048:]
    # In float32: exp 2 units, sum, quotient and product a half each; then one rounding.
    budget = 4 * 2.0**-23 * want.abs() + rounding(want, dtype)
    check_close(k.swiglu(x.cuda()).cpu(), want, budget=budget)


@pytest.mark.parametrize("dtype", FLOATS)
def test_swiglu_backward(dtype):
    x, grad = (torch.randn(515, 4096) * 4).to(dtype), torch.randn(515, 2048).to(dtype)
    on_gpu = x.cuda().requires_grad_()
    before = k.launch_count("swiglu_backward")
    k.swiglu(on_gpu).backward(grad.cuda())
    assert k.launch_count("swiglu_backward") > before
    exact = x.double().requires_grad_()
    gate, up = exact.chunk(2, dim=-1)
    (torch.nn.functional.silu(gate) * up).backward(grad.double())
    gate, up = exact.detach().chunk(2, dim=-1)
    want, d_up = exact.grad, exact.grad[:, 2048:].abs()
    # Of float32, 8 units of what d_gate is before terms of both signs cancel, and of d_up; then one rounding.
    lost = torch.cat([(grad.double() * up * torch.sigmoid(gate)).abs() * (1 + gate.abs()), d_up], dim=-1)
    check_close(on_gpu.grad.cpu(), want, budget=8 * 2.0**-23 * lost + rounding(want, dtype))


# op -> a call of it, and its arguments on the CPU: what is asked of every op that has a kernel, besides its numbers
EACH = {op: (function, arguments) for op, function, arguments in reversed(CASES.values())}
EACH["swiglu"] = k.swiglu, lambda: (rows(515, 4096),)
EACH["swiglu_backward"] = torch.ops.k2kernels.swiglu_backward, lambda: (rows(515, 2048), rows(515, 4096))
EACH["swiglu_quantize"] = k.swiglu_quantize, lambda: (rows(515, 4096),)


def decode_arguments(dtype=torch.bfloat16):
    cache, table, _ = paged(dtype)
    return torch.randn(3, 2, 64, KIMI_K2.cache_row).to(dtype), cache, table, torch.tensor([100, 7, 333]).int()


def decode_into(*args):
    out = torch.empty_like(args[0][..., :512], memory_format=torch.contiguous_format)
    return k.mla_decode(*args, softmax_scale=0.04, out=out)[:2]


EACH["mla_decode"] = lambda *args: k.mla_decode(*args, softmax_scale=0.04)[:2], decode_arguments
EACH["mla_decode_out"] = decode_into, decode_arguments
EACH["merge_attention_states"] = (
    k.merge_attention_states,
    lambda: (torch.randn(5, 64, 512), torch.randn(5, 64), torch.randn(5, 64, 512), torch.randn(5, 64)),
)


def prefill_arguments():
    """Two sequences and padding; the second has a context."""
    cu_q, cu_k = (torch.tensor(x, dtype=torch.int32) for x in ([0, 200, 270], [0, 200, 500]))
    q, kv, k_rope = (torch.randn(n, *size).bfloat16() for n, *size in ((280, 4, 192), (510, 4, 256), (510, 64)))
    return q, kv, k_rope, cu_q, cu_k


def prefill(q, kv, k_rope, cu_q, cu_k):
    options = dict(cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, softmax_scale=0.07, return_max_logits=True)
    return k.mla_prefill(q, kv, None, k_rope=k_rope, **options)


def piece_arguments():
    """The second sequence's keys in two pieces, the first of which has all keys of the first sequence too."""
    q, kv, k_rope, cu_q, _ = prefill_arguments()
    pieces = []
    for first, begin, end, lengths in ((0, 0, 328, [200, 128]), (128, 328, 500, [0, 172])):
        numbers = [torch.tensor(x, dtype=torch.int32) for x in ([0, lengths[0], sum(lengths)], [-first, 230 - first])]
        pieces += [kv[begin:end], k_rope[begin:end], *numbers]
    return q, cu_q, *pieces


def prefill_pieces(q, cu_q, *pieces):
    state = None
    for i in (0, 4):
        kv, k_rope, cu_k, diagonal = pieces[i : i + 4]
        state = k.mla_prefill_piece(
            state, q, kv, None, k_rope=k_rope, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, diagonal=diagonal,
            softmax_scale=0.07, last=i > 0,
        )  # fmt: skip
    return state[:2]


def prefill_gradients(grad, *args):
    out, lse, _ = prefill(*args)
    q, kv, k_rope, cu_q, cu_k = args
    backward = torch.ops.k2kernels.mla_prefill_backward
    return backward(grad, torch.zeros_like(lse), q, kv, None, k_rope, out, lse, cu_q, cu_k, 0.07, True)


EACH["mla_prefill"] = lambda *args: tuple(prefill(*args)), prefill_arguments
EACH["mla_prefill_piece"] = prefill_pieces, piece_arguments
EACH["mla_prefill_backward"] = prefill_gradients, lambda: (torch.randn(280, 4, 128).bfloat16(), *prefill_arguments())
EACH["newton_schulz"] = k.newton_schulz, lambda: (torch.randn(3, 200, 333),)
EACH["newton_schulz_grouped"] = (
    lambda *xs: tuple(k.newton_schulz_grouped(xs)),
    lambda: tuple(torch.randn(shape) for shape in [(3, 128, 512), (200, 210), (2, 512, 128), (5, 7)]),
)


def muon_step(*tensors):
    """Weights and momenta after a step; the arguments are left alone, as those of the other ops are."""
    w, g, m = ([t.clone() for t in tensors[i::3]] for i in range(3))
    muon_update(w, g, m, lr=0.02)
    return *w, *m


EACH["muon_update"] = (
    muon_step,
    lambda: tuple(torch.randn(shape) for shape in [(3, 200, 333), (1, 210, 200), (4, 64, 300)] for _ in range(3)),
)


def factors(*groups):
    """A and B of an FP8 product [384, 512] x [640, 512] and their scales; with `groups`, one B of each, and where its
    128 rows begin."""
    offsets = (torch.arange(0, 385, 128).int(), torch.full((3,), 128).int()) if groups else ()
    return *k.quantize_1x128(torch.randn(384, 512)), *k.quantize_128x128(torch.randn(*groups, 640, 512)), *offsets


def product(*args, into=False):
    """The grouped product if there are offsets and counts."""
    options = dict(out=args[0].new_empty(384, 640, dtype=torch.bfloat16)) if into else {}
    if len(args) == 4:
        return k.fp8_gemm(*args, **options)
    return k.grouped_fp8_gemm(*args[:4], offsets=args[4], counts=args[5], **options)


EACH["fp8_gemm"] = product, factors
EACH["fp8_gemm_out"] = lambda *args: product(*args, into=True), factors
EACH["grouped_fp8_gemm"] = product, lambda: factors(3)
EACH["grouped_fp8_gemm_out"] = lambda *args: product(*args, into=True), lambda: factors(3)
EACH["fp8_gemm_swiglu"] = k.fp8_gemm_swiglu, factors
EACH["grouped_fp8_gemm_swiglu"] = (
    lambda *args: k.grouped_fp8_gemm_swiglu(*args[:4], offsets=args[4], counts=args[5]),
    lambda: factors(3),
)
EACH["grouped_fp8_wgrad"] = (
    lambda *args: k.grouped_fp8_wgrad(*args[:4], offsets=args[4], counts=args[5]),
    lambda: (*(t for n in (512, 640) for t in k.quantize_1x128(torch.randn(n, 384))), *factors(3)[4:]),
)


def routed(*names):
    """Of what the ops of moe take, the tensors of these names; `rows` are in slots, without padding."""
    indices, weights = torch.rand(300, KIMI_K2.experts).topk(KIMI_K2.top_k).indices.int(), torch.rand(300, 8)
    x, logits = torch.randn(300, KIMI_K2.hidden).bfloat16(), torch.randn(300, KIMI_K2.experts)
    d = k.moe_dispatch(x, indices, weights, num_experts=KIMI_K2.experts)
    slot_of, token_of_slot = d.handle[:2]
    values = dict(x=x, logits=logits, indices=indices, weights=weights, offsets=d.offsets, counts=d.counts)
    values.update(slot_of=slot_of, token_of_slot=token_of_slot, rows=d.data, one=torch.ones(()))
    values.update(narrow=d.data[:, :200].contiguous(), experts=torch.randn(KIMI_K2.experts, 264, 200).bfloat16())
    values.update(grad=torch.randn(len(d.data), 264).bfloat16(), ends=torch.tensor([0, 7, 7, 300]))
    values.update(narrow_grad=torch.randn(len(d.data), 72).bfloat16(), masters=torch.randn(3, 72, 192) / 8)
    if "packed" in names:
        codes = torch.randint(256, (KIMI_K2.experts, 72, 96), dtype=torch.uint8).view(torch.int32)
        values.update(columns=d.data[:, :192].contiguous())
        values.update(packed=k.pack_w4(codes, (torch.rand(KIMI_K2.experts, 72, 6) / 4).bfloat16()).data)
    return tuple(values[name] for name in names)


def w4_gemm_into(*args):
    out = args[0].new_zeros(len(args[0]), 72)
    OPS.grouped_w4_gemm_out(*args, "int4", 72, 192, False, False, None, out)
    return out


def dispatched(*args, **options):
    d = k.moe_dispatch(*args, num_experts=KIMI_K2.experts, **options)
    return [t for t in (*d[:4], *d.handle[:2]) if t is not None]


OPS = torch.ops.k2kernels
for op, function, names in (
    ("moe_route", lambda logits: k.moe_route(logits, logits[0], top_k=8, n_group=8, topk_group=4), ("logits",)),
    (
        "moe_route_backward",
        lambda *args: OPS.moe_route_backward(*args, "sigmoid", True, 2.5),
        ("weights", "logits", "indices"),
    ),
    ("moe_dispatch", dispatched, ("x", "indices", "weights")),
    ("moe_dispatch_quantize", lambda *args: dispatched(*args, quantize=True), ("x", "indices", "weights")),
    ("moe_permute", OPS.moe_permute, ("x", "slot_of", "token_of_slot")),
    (
        "moe_combine",
        lambda *args: OPS.moe_combine(*args, None, torch.bfloat16),
        ("rows", "slot_of", "token_of_slot", "weights", "x"),
    ),
    ("moe_combine_backward", OPS.moe_combine_backward, ("x", "rows", "slot_of", "token_of_slot", "weights")),
    ("grouped_gemm", lambda *args: OPS.grouped_gemm(*args, None), ("narrow", "experts", "offsets", "counts")),
    ("grouped_gemm_dgrad", lambda *args: OPS.grouped_gemm_dgrad(*args, None), ("grad", "experts", "offsets", "counts")),
    ("grouped_gemm_wgrad", OPS.grouped_gemm_wgrad, ("grad", "narrow", "offsets", "counts")),
    (
        "grouped_w4_gemm",
        lambda *args: OPS.grouped_w4_gemm(*args, "int4", 72, 192, False, False, None),
        ("columns", "packed", "offsets", "counts"),
    ),
    ("grouped_w4_gemm_out", w4_gemm_into, ("columns", "packed", "offsets", "counts")),
    (
        "grouped_w4_gemm_dgrad",
        lambda grad, *args: OPS.grouped_w4_gemm_dgrad(grad, None, *args, "int4", 72, 192, None),
        ("narrow_grad", "packed", "offsets", "counts"),
    ),
    ("w4_pack_masters", lambda w: OPS.w4_pack_masters(w, "int4"), ("masters",)),
    (
        "moe_sequence_loss",
        lambda *args: OPS.moe_sequence_loss(*args, 0.1, "sigmoid"),
        ("logits", "indices", "ends"),
    ),
    (
        "moe_sequence_loss_backward",
        lambda *args: OPS.moe_sequence_loss_backward(*args, 0.1, "softmax"),
        ("one", "logits", "indices", "ends"),
    ),
    (
        "moe_update_bias",
        lambda logits, counts: OPS.moe_update_bias(logits[0], counts, 0.1, "quantile"),
        ("logits", "counts"),
    ),
):
    EACH[op] = function, lambda names=names: routed(*names)
each = pytest.mark.parametrize("op", EACH)


def assert_same(got, want):
    for g, w in zip(bits(got), bits(want)):
        assert torch.equal(g, w), f"{int((g != w).sum())} of {w.numel()} bytes differ"


@each
def test_on_another_stream(op):
    """A kernel on any other stream than the current one would run before its inputs are ready."""
    function, arguments = EACH[op]
    there = to("cuda", arguments())
    want = function(*there)
    late = [torch.zeros_like(t) for t in there]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # cycles: some 30 ms
        for target, source in zip(late, there):
            target.copy_(source)
        got = function(*late)
    stream.synchronize()
    assert_same(got, want)


@each
def test_in_a_graph_with_changing_inputs(op):
    function, arguments = EACH[op]
    held = to("cuda", arguments())
    function(*held)  # loads the kernel
    graph, before = torch.cuda.CUDAGraph(), k.launch_count()
    with torch.cuda.graph(graph):
        results = function(*held)
    assert k.launch_count() > before
    for _ in range(2):
        new = to("cuda", arguments())
        for target, source in zip(held, new):
            target.copy_(source)
        graph.replay()
        assert_same(results, function(*new))


@each
def test_compiled(op):
    function, arguments = EACH[op]
    there = to("cuda", arguments())
    torch._dynamo.reset()
    before = k.launch_count()
    got = torch.compile(lambda *args: function(*args), fullgraph=True)(*there)
    assert k.launch_count() > before
    assert_same(got, function(*there))


@each
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_the_device_of_the_tensors_counts_not_the_current_one(op):
    function, arguments = EACH[op]
    on_cpu = arguments()
    with torch.cuda.device(0):
        got = function(*to("cuda:1", on_cpu))
        assert torch.cuda.current_device() == 0
        assert all(t.device.index == 1 for t in ([got] if isinstance(got, torch.Tensor) else got))
        assert_same(got, function(*to("cuda:0", on_cpu)))


def test_fp8_operands_that_repeat_or_interleave():
    """Tensor maps of operands that share all of their memory, and of operands interleaved in each other's rows.

    The driver's manual does not say whether a stride may be less than the ones of inner dimensions.
    """
    groups, rows_of_group, n, kk = 3, 256, 640, 512
    masked = torch.tensor([256, 1, 100], dtype=torch.int32).cuda()
    a, a_scales = k.quantize_1x128(torch.randn(rows_of_group, groups, kk).cuda())  # a token's rows of all groups
    a, a_scales = a.transpose(0, 1), a_scales.transpose(0, 1)
    b, b_scales = k.quantize_128x128(torch.randn(n, kk).cuda())
    b, b_scales = b.expand(groups, -1, -1), b_scales.expand(groups, -1, -1)
    got = k.grouped_fp8_gemm(a, a_scales, b, b_scales, masked_m=masked)
    copies = [x.clone(memory_format=torch.contiguous_format) for x in (a, a_scales, b, b_scales)]
    want = k.grouped_fp8_gemm(*copies, masked_m=masked)
    for group, count in enumerate(masked.tolist()):
        assert torch.equal(got[group, :count], want[group, :count])
    row, scale = k.quantize_1x128(torch.randn(1, kk).cuda())
    row, scale = row.expand(200, -1), scale.expand(200, -1)
    assert torch.equal(k.fp8_gemm(row, scale, b[0], b_scales[0]), k.fp8_gemm(row.clone(), scale, b[0], b_scales[0]))
