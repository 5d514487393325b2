"""What the benchmarks will measure on a GPU, as far as a CPU can tell; and pictures of made-up lines."""

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


def test_optimizer_steps_go_the_same_way(monkeypatch):
    """On a sixteenth of the layer's sides: every body updates the parameters in place, and again in its next call."""
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
