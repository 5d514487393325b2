"""The GPU cases of the benchmarks, as far as a CPU can check them, and plots of made-up results."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from k2kernels.ops.mla_decode import mla_decode
from k2kernels.testing import bench

BENCH = Path(__file__).parents[2] / "bench"


def load(name):
    spec = importlib.util.spec_from_file_location(name, BENCH / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


decode = load("bench_mla_decode")


def flops(batch, length, s_q, heads):
    """Counted multiplication by multiplication."""
    pairs = sum(1 for query in range(s_q) for key in range(length) if key < length - s_q + query + 1)
    return batch * heads * pairs * 2 * (576 + 512)


@pytest.mark.parametrize("batch, length, s_q, heads, cache", [(2, 128, 1, 64, "bf16"), (3, 64, 2, 16, "656")])
def test_decode_bytes_and_flops(batch, length, s_q, heads, cache):
    case = decode.case(batch, length, s_q, heads, cache)
    inputs = case.make(torch.device("cpu"))
    out, lse, _ = mla_decode(*inputs, softmax_scale=0.1)
    assert case.bytes == sum(t.numel() * t.element_size() for t in (*inputs, out, lse))
    assert case.flops == flops(batch, length, s_q, heads)
    assert not torch.isnan(out).any()


@pytest.mark.parametrize("s_q", [1, 2])
def test_decode_bodies_agree(s_q):
    """On rows in the order of their pages, where PyTorch's peers read the same sequences."""
    case = decode.case(2, 128, s_q, 64, "bf16")
    q, cache, _, lengths = case.make(torch.device("cpu"))
    inputs = (q, cache, torch.arange(4, dtype=torch.int32).view(2, 2), lengths)
    want = case.bodies["k2kernels"](*inputs)[0].float()
    got = {"sdpa": case.bodies["torch sdpa"](*inputs).view(want.shape)}
    if s_q == 1:
        got["formula"] = decode.formula(q, cache.view(2, 128, 576))[0].view(want.shape)
        got["split"] = case.bodies["split 512"](*inputs)[0]
    for name, out in got.items():
        torch.testing.assert_close(out.float(), want, atol=0.05, rtol=0.02, msg=lambda m, name=name: f"{name}: {m}")


def test_decode_shapes():
    cases = decode.gpu_cases()
    shapes = [case.shape for case in cases]
    assert len(set(shapes)) == len(shapes) and {"1x1k q1 h64 bf16", "128x32k q2 h64 656", "32x8k q1 h128 bf16"} <= {
        *shapes
    }
    assert all("k2kernels" in case.bodies for case in cases)
    # Kimi-K2, 128 sequences of 4096 tokens: 73 GFLOP over 622 MB.
    case = next(case for case in cases if case.shape == "128x4k q1 h64 bf16")
    assert case.flops == 128 * 4096 * 139264 and round(case.bytes / 1e6) == 622


def test_newton_schulz_flops():
    """Counted from the products that a call starts, the triangles by half."""
    newton_schulz = load("bench_newton_schulz")
    for m, n in ((20, 24), (24, 20), (20, 50), (50, 20)):
        short, long = sorted((m, n))
        if long < 1.5 * short:
            want = 5 * (short * short * long + short**3 + 2 * short * short * long)
        else:  # R, Z, R Z, Z R Z, Z, Q; X, R, Z, R Z, Z R Z, Z, Q, R Z, Z R Z, Z, Q, X
            want = 2 * (short * short * long + 2 * short * short * long) + 14 * short**3
        assert newton_schulz.flops(m, n) == want
    # 0.301 TFLOP for an expert, and 8.16 for o_proj.
    assert newton_schulz.flops(2048, 7168) == pytest.approx(0.301e12, rel=2e-3)
    assert newton_schulz.flops(7168, 8192) == pytest.approx(8.16e12, rel=2e-3)


def test_newton_schulz_bodies_agree():
    newton_schulz = load("bench_newton_schulz")
    case = newton_schulz.case("small", [(2, 20, 50), (1, 24, 20)])
    inputs = case.make(torch.device("cpu"))
    want = [x.float() for x in case.bodies["k2kernels"](*inputs)]
    assert case.bytes == sum(2 * 2 * x.numel() for x in inputs)
    got = {name: body(*inputs) for name, body in case.bodies.items()}
    got["torch.optim"] = [torch.stack(got["torch.optim"][:2]), got["torch.optim"][2][None]]
    for name, results in got.items():
        for g, w in zip(results, want):
            torch.testing.assert_close(g.float(), w, atol=0.06, rtol=0, msg=lambda m, name=name: f"{name}: {m}")
    shapes = [case.shape for case in newton_schulz.gpu_cases()]
    assert len(set(shapes)) == len(shapes) and len(newton_schulz.GPU_LISTS["126 small"]) == 126


gemm = load("bench_fp8_gemm")


def sizes(*tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


def small_linears(monkeypatch):
    monkeypatch.setitem(gemm.LINEARS, "gate_up", (256, 384))
    monkeypatch.setitem(gemm.LINEARS, "down", (384, 128))
    monkeypatch.setattr(gemm, "EXPERT_ROWS", 8)


def test_fp8_gemm_cases(monkeypatch):
    """Bytes are those of the operands and the result; bodies compute the same."""
    small_linears(monkeypatch)
    product, both, plain = gemm.linear_cases("gate_up", 5)
    for case, who in ((product, "k2kernels"), (both, "quantize + k2kernels"), (plain, "torch bf16")):
        torch.manual_seed(0)
        inputs = case.make(torch.device("cpu"))
        out = case.bodies[who](*inputs)
        assert case.bytes == sizes(*inputs, out) and case.flops == 2 * 5 * 256 * 384 and out.shape == (5, 256)
    torch.manual_seed(0)
    x, *w = both.make(torch.device("cpu"))
    torch.manual_seed(0)
    codes = product.make(torch.device("cpu"))
    assert torch.equal(both.bodies["quantize + k2kernels"](x, *w), product.bodies["k2kernels"](*codes))
    case = gemm.quantize_case(5, 384)
    inputs = case.make(torch.device("cpu"))
    assert case.bytes == sizes(*inputs, *case.bodies["k2kernels"](*inputs))


@pytest.mark.parametrize("name", ["gate_up", "down"])
def test_grouped_fp8_gemm_cases(name, monkeypatch):
    small_linears(monkeypatch)
    monkeypatch.setattr(gemm, "expert_rows", lambda ranks, tokens: [3, 0, 9])
    n, k = gemm.LINEARS[name]
    contiguous, masked = gemm.expert_cases(8, 128, name)
    torch.manual_seed(0)
    a, a_scales, b, b_scales, offsets, counts, group_of = inputs = contiguous.make(torch.device("cpu"))
    assert offsets.tolist() == [0, 8, 8, 24] and group_of.tolist() == [0] * 3 + [-1] * 5 + [2] * 9 + [-1] * 7
    out = contiguous.bodies["k2kernels"](*inputs)
    used = 12 * (k + 4 * (k // 128) + 2 * n) + 2 * sizes(b[0], b_scales[0])
    assert contiguous.bytes == masked.bytes == used and contiguous.flops == 2 * 12 * n * k
    a3, scales3 = torch.zeros(3, 9, k).to(a.dtype), torch.zeros(3, 9, k // 128)
    for group, (start, count) in enumerate(zip(offsets, counts)):
        a3[group, :count], scales3[group, :count] = (t[start : start + count] for t in (a, a_scales))
    got = masked.bodies["k2kernels"](a3, scales3, b, b_scales, counts)
    assert torch.equal(got[2], out[8:17]) and torch.equal(got[0, :3], out[:3])
    assert [t.shape for t in masked.make(torch.device("cpu"))] == [t.shape for t in (a3, scales3, b, b_scales, counts)]


def test_wgrad_cases(monkeypatch):
    small_linears(monkeypatch)
    product, plain = gemm.wgrad_cases("gate_up", groups=2, rows=256)
    inputs = product.make(torch.device("cpu"))
    out = product.bodies["k2kernels"](*inputs)
    assert product.bytes == sizes(*inputs[:4], out) and out.shape == (2, 256, 384)
    inputs = plain.make(torch.device("cpu"))
    out = plain.bodies["torch bf16"](*inputs)
    assert plain.bytes == sizes(*inputs, out) and plain.flops == product.flops == 2 * 512 * 256 * 384


def test_fp8_gemm_shapes():
    cases = gemm.gpu_cases()
    keys = [(case.op, case.shape, who) for case in cases for who in case.bodies]
    assert len(set(keys)) == len(keys)
    bytes_of = {(case.shape, who): case.bytes for case in cases for who in case.bodies}
    # 15.1 MB of weight; 29.4 and 14.7 MB for an expert; at 8192 tokens every expert is hit, at 128 nearly.
    assert round(bytes_of["q_a + kv_a M=1", "k2kernels"] / 1e5) == 152
    assert bytes_of["EP32 gate_up T=8192", "k2kernels"] > 12 * 29.3e6
    assert sum(gemm.expert_rows(1, 128)) == 128 * 8 and len(gemm.expert_rows(32, 128)) == 12
    assert {case.dtype for case in cases if case.flops} == {"fp8", "bf16"}
    assert {(2112, 7168), (12288, 1536), (16384, 512), (7168, 8192), (4096, 7168), (7168, 2048)} <= {
        *gemm.LINEARS.values()
    }


def test_a_wrong_peer_is_found():
    def right(x):
        return x

    assert gemm.checked(right, right)(torch.ones(3)).eq(1).all()
    with pytest.raises(RuntimeError, match="its result differs from ours by"):
        gemm.checked(lambda x: x * torch.tensor([1, 1, 1.1]), right)(torch.ones(3))
    padded = gemm.checked(lambda x: x * torch.tensor([1, 1, torch.nan]), right, lambda d: d[:2])
    assert padded(torch.ones(3))[2].isnan()


@pytest.mark.parametrize("k", [200, 512])
def test_scales_for_cublas(k):
    scales = gemm.quantize_128x128(torch.randn(300, k))[1]
    got = gemm.by_columns(scales).T
    assert got.stride() == (1, 4) and torch.equal(got[: scales.shape[1]].T, scales)


def test_a_gpu_without_fp8_cores_is_held_against_its_bf16():
    case = bench.Case("op", "shape", 0, lambda device: (), {}, flops=10**9, dtype="fp8")
    assert bench.Ceilings(copy=1e12, matmul={"bf16": 1e12}).floor_us(case) == 1000
    assert bench.Ceilings(copy=1e12, matmul={"bf16": 1e12, "fp8": 2e12}).floor_us(case) == 500


SMALL = dict(experts=6, top_k=2, hidden=256, intermediate=128)


def test_moe_bytes_and_flops():
    moe = load("bench_moe")
    rank, weights = moe.Rank(), 3 * 7168 * 2048
    assert (rank.experts, rank.hit(1), rank.hit(8192)) == (48, 8, 48)
    assert rank.hit(4) == round(48 * (1 - (5 / 6) ** 4))
    case = moe.layer_case(1, "bf16")
    assert case.bytes == 8 * 2 * weights + 2 * 2 * 7168 + 4 * 48 and case.flops == 2 * 8 * weights
    stages = {stage.shape.split()[-1]: stage for stage in moe.stage_cases(128, "fp8")}
    assert tuple(stages) == moe.STAGES["fp8"]
    whole = moe.layer_case(128, "fp8")
    assert sum(stage.flops for stage in stages.values()) == whole.flops and whole.dtype == "fp8"
    # Weights are read once, here as there; what else the steps move goes from one to the next.
    rows = 128 * 8 * (7168 * 2 + 2048 * 2 + 7168 * 3)
    assert whole.bytes < sum(stage.bytes for stage in stages.values()) < whole.bytes + 2 * rows
    shapes = [(case.op, case.shape) for case in moe.gpu_cases()]
    assert len(set(shapes)) == len(shapes) and ("moe_layer", "8192 tokens fp8") in shapes


@pytest.mark.parametrize("kind", ["bf16", "fp8"])
def test_moe_bodies_agree(kind):
    moe = load("bench_moe")
    rank, device = moe.Rank(**SMALL), torch.device("cpu")
    case = moe.layer_case(20, kind, rank)
    inputs = case.make(device)
    want = case.bodies["k2kernels"](*inputs).float()
    for name, body in case.bodies.items():
        torch.testing.assert_close(
            body(*inputs).float(), want, atol=0.1, rtol=0.05, msg=lambda m, name=name: f"{name}: {m}"
        )
    stages = moe.stage_cases(20, kind, rank)
    for stage in stages:
        inputs = stage.make(device)
        results = {name: body(*inputs) for name, body in stage.bodies.items()}
        if "torch" in results:
            torch.testing.assert_close(results["torch"], results["k2kernels"], atol=0.03, rtol=0.02)
    assert kind == "fp8" or sum("torch" in stage.bodies for stage in stages) == 2


def test_w4_cases(monkeypatch):
    w4, device = load("bench_w4_gemm"), torch.device("cpu")
    cases = w4.gpu_cases()
    shapes = [(case.op, case.shape) for case in cases]
    assert len(set(shapes)) == len(shapes) and ("w4_gemm", "K2 EP8 gate_up T=64 int4") in shapes
    of = {case.shape: case for case in cases}
    # An expert of Kimi-K2: 24.8 MB; one of eight ranks: 48 of 384, of which 64 tokens hit 35.5, and 64 rows.
    rows = 64 * 2 * (7168 + 2 * 2048 + 2048 + 7168) - 64 * 2 * 2048  # SwiGLU: half the columns
    both = sum(of[f"K2 EP8 {name} T=64 int4"].bytes for name in ("gate_up", "down"))
    assert both == pytest.approx(48 * (1 - (1 - 8 / 384) ** 64) * 24.77e6 + rows, rel=1e-3)
    assert of["K2 EP8 down T=64 fp8"].dtype == "fp8" and of["K2 EP8 down T=64 fp8"].flops == 2 * 64 * 2048 * 7168

    small = w4.Experts(6, 2, 256, 128, 2)
    monkeypatch.setattr(w4, "MODELS", {"small": (small, ()), "whole": (small._replace(ranks=1), ())})
    for kind in ("int4", "mxfp4", "bf16", "fp8"):
        for name in ("gate_up", "down"):
            case = w4.product_case("small", name, 9, kind)
            *a, weights, offsets, counts = inputs = case.make(device)
            d = case.bodies["k2kernels"](*inputs)
            n, k = small.shape(name)
            assert d.shape == (int(offsets[-1]), 128 if name == "gate_up" and "4" in kind else n)
            parts = weights[0].data[0:1] if kind in w4.BITS else [x[0] for x in weights]
            assert w4.weight_bytes(kind, n, k) == sizes(*parts) and len(counts) == 3
            assert case.make(device)[len(a)] is weights and not torch.equal(case.make(device)[0], a[0])
    case = w4.layer_case("whole", 9)
    assert case.bodies["k2kernels"](*case.make(device)).shape == (9, 256)
    with pytest.raises(RuntimeError, match="must take offsets as in the version that this benchmark knows"):
        w4.takes(w4.routed, "tokens", "offsets")


def test_optimizer_steps_go_the_same_way(monkeypatch):
    """On a sixteenth of the layer's sides: every body updates the parameters in place, in each call."""
    monkeypatch.syspath_prepend(str(BENCH))
    optim = load("bench_optim")
    small = {}
    for name, (shape, cut) in optim.MOONLIGHT.items():
        sides = [size // 16 for size in shape[-2:]]
        small[name] = ((*[2] * (len(shape) == 3), *sides), (32, 4) if isinstance(cut, tuple) else cut)
    monkeypatch.setattr(optim, "MOONLIGHT", small)
    (case,) = optim.gpu_cases()
    inputs = case.make(torch.device("cpu"))
    half = len(inputs) // 2
    assert case.bytes == 5 * 4 * sum(t.numel() for t in inputs[:half])
    for name, body in case.bodies.items():
        tensors = [t.clone() for t in inputs]
        body(*tensors)
        once = [t.clone() for t in tensors]
        body(*tensors)
        for i, (start, first, second) in enumerate(zip(inputs, once, tensors)):
            moved = (first != start).any() and (second != first).any()
            assert moved == (i < half), (name, i)
            if i < half:  # by learning rate times about 0.2 (Muon) or 1 (AdamW's first steps)
                assert 5e-5 < (first - start).square().mean().sqrt() < 3e-3, (name, i)


def test_a_failing_peer_is_left_out(monkeypatch):
    def broken(*inputs):
        raise RuntimeError("no such kernel")

    def time_us(body, sets, repeats):
        body(*sets[0])
        return 10.0, True

    monkeypatch.setattr(bench, "time_us", time_us)
    monkeypatch.setattr(bench, "input_sets", lambda case, device: [case.make(device)])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a device")
    case = bench.Case("op", "shape", 1000, lambda device: (), {"peer": broken, bench.OURS: lambda: None})
    with pytest.warns(UserWarning, match="op, shape: peer is left out: no such kernel"):
        lines = list(bench.measure([case], bench.Ceilings(copy=1e12), torch.device("cpu")))
    assert [line.who for line in lines] == [bench.OURS]
    case = bench.Case("op", "shape", 1000, lambda device: (), {bench.OURS: broken})
    with pytest.raises(RuntimeError, match="no such kernel"):
        list(bench.measure([case], bench.Ceilings(copy=1e12), torch.device("cpu")))


def made_up_lines(device="Made-up GPU"):
    ceilings = bench.Ceilings(copy=3e12, matmul={"bf16": 660e12})
    for case in decode.gpu_cases():
        for factor, who in ((1.5, "k2kernels"), (1.9, "FlashMLA"), (4.0, "torch sdpa")):
            if who != "k2kernels" and " bf16" not in case.shape:
                continue
            us = 6 + factor * ceilings.floor_us(case)
            yield dict(
                op=case.op, shape=case.shape, who=who, us=us, gb_per_s=case.bytes / us / 1e3,
                tflop_per_s=case.flops / us / 1e6, roofline=ceilings.floor_us(case) / us, graph=True, device=device,
                clock_mhz=None, date="2000-01-01", commit="0000000", torch="0",
            )  # fmt: skip


def test_pictures(tmp_path):
    pytest.importorskip("matplotlib")
    pictures = load("pictures")
    results = tmp_path / "gpu.jsonl"
    assert pictures.draw(results, tmp_path / "docs") == []
    lines = [*made_up_lines("another GPU"), *made_up_lines()]
    results.write_text("\n".join(map(json.dumps, lines)))
    drawn = pictures.draw(results, tmp_path / "docs")
    assert [path.name for path in drawn] == [f"mla_decode_{heads}_heads.png" for heads in (16, 64, 128)]
    assert all(path.stat().st_size > 20_000 for path in drawn)
    assert sorted(p.name for p in (tmp_path / "docs").iterdir()) == sorted(path.name for path in drawn)

    points = pictures._points(lines)
    assert {point.line["device"] for point in points} == {"Made-up GPU"}
    roofs = {p[:5]: pictures._roof(p.line) for p in points}
    assert roofs[128, 32, 1, 64, "bf16"] == pytest.approx(3000)  # bound by memory: the copy's rate
    assert roofs[128, 32, 2, 64, "656"] < 2000  # bound by arithmetic


def test_picture_of_fp8_gemm(tmp_path):
    pytest.importorskip("matplotlib")
    pictures = load("pictures")
    ceilings = bench.Ceilings(copy=3e12, matmul={"bf16": 660e12, "fp8": 1300e12})
    lines = []
    for case in gemm.gpu_cases():
        for who in case.bodies:
            floor = ceilings.floor_us(case)
            us = 3 + floor * (1.3 if who == "k2kernels" else 1.6)
            lines.append(
                dict(
                    op=case.op,
                    shape=case.shape,
                    who=who,
                    us=us,
                    gb_per_s=1,
                    tflop_per_s=1,
                    roofline=floor / us,
                    graph=True,
                    device="Made-up GPU",
                    clock_mhz=None,
                    date="2000-01-01",
                    commit="0000000",
                    torch="0",
                )
            )
    layers = pictures._layers(lines)
    assert list(layers) == list(gemm.LINEARS) and set(layers["q_b"]["torch bf16"]) == set(gemm.ROWS)
    results = tmp_path / "gpu.jsonl"
    results.write_text("\n".join(map(json.dumps, lines)))
    assert [path.name for path in pictures.draw(results, tmp_path / "docs")] == ["fp8_gemm.png"]
    assert (tmp_path / "docs" / "fp8_gemm.png").stat().st_size > 50_000


def test_picture_of_a_moe_layer(tmp_path):
    pytest.importorskip("matplotlib")
    pictures, moe = load("pictures"), load("bench_moe")
    ceilings = bench.Ceilings(copy=3e12, matmul={"bf16": 660e12, "fp8": 1300e12})
    lines = [
        dict(
            op=case.op, shape=case.shape, who=who, us=3 + 1.5 * ceilings.floor_us(case), gb_per_s=0, tflop_per_s=0,
            roofline=ceilings.floor_us(case) / (3 + 1.5 * ceilings.floor_us(case)), device="Made-up GPU",
            date="2000-01-01", commit="0000000",
        )
        for kind in ("bf16", "fp8") for tokens in moe.LAYER_TOKENS for case in moe.stage_cases(tokens, kind)
        for who in case.bodies
    ]  # fmt: skip
    results = tmp_path / "gpu.jsonl"
    results.write_text("\n".join(map(json.dumps, lines)))
    (drawn,) = pictures.draw(results, tmp_path / "docs")
    assert drawn.name == "moe_layer.png" and drawn.stat().st_size > 20_000
    assert len(pictures._stages(lines)) == len(moe.LAYER_TOKENS) * sum(map(len, moe.STAGES.values()))


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("lengths", [([5, 9], [5, 9]), ([4], [11])], ids=str)
def test_prefill_bytes_and_flops(lengths, backward, monkeypatch):
    prefill = load("bench_mla_prefill")
    monkeypatch.setitem(prefill.BATCHES, "small", lengths)
    case = prefill.case("small", 3, backward)
    inputs = case.make(torch.device("cpu"))
    out, lse, peaks = prefill.forward(*inputs)
    read = [*inputs[:3], out, lse]
    if backward:
        grads = case.bodies["k2kernels"](*inputs)
        read += [out, *grads]  # dO is as large as out
    # The gradient of lse is as large as the largest logits.
    assert case.bytes == sum(x.numel() * x.element_size() for x in (*read, peaks))
    seen = sum(1 for n, m in zip(*lengths) for i in range(n) for j in range(m) if j <= m - n + i)
    per_pair = 2 * (3 * 192 + 2 * 128) if backward else 2 * (192 + 128)  # multiplication by multiplication
    assert case.flops == 3 * seen * per_pair


def test_prefill_peers_agree(monkeypatch):
    prefill = load("bench_mla_prefill")
    monkeypatch.setitem(prefill.BATCHES, "small", ([9, 9], [9, 9]))
    case = prefill.case("small", 3, backward=False)
    inputs = case.make(torch.device("cpu"))
    want = case.bodies["k2kernels"](*inputs).out.float()
    torch.testing.assert_close(case.bodies["torch sdpa"](*inputs).float(), want, atol=0.03, rtol=0.02)
    case = prefill.case("small", 3, backward=True)
    inputs = case.make(torch.device("cpu"))
    case.bodies["k2kernels"](*inputs)
    peer = case.bodies["torch sdpa"](*inputs)
    out, leaves, grad = prefill.KEPT["torch sdpa", id(inputs[0])]
    assert [x.shape for x in peer] == [x.shape for x in leaves] and grad.shape == out.shape
    shapes = [(case.op, case.shape) for case in prefill.gpu_cases()]
    assert len(set(shapes)) == len(shapes) and ("mla_prefill_backward", "1x8k h128") in shapes
    # Kimi-K2, 8,192 tokens: 1.37 TFLOP forward, 3.57 backward.
    flops = {case.op: case.flops for case in prefill.gpu_cases() if case.shape == "1x8k h64"}
    assert flops["mla_prefill"] == pytest.approx(1.374e12, rel=1e-3)
    assert flops["mla_prefill_backward"] == pytest.approx(3.574e12, rel=1e-3)
