"""Records the bits that the library computes, to compare two commits: `record FILE`, then `compare OLD NEW`.

`record` runs every op with several shapes, dtypes and options, as the reference and as the emulated kernel on each
architecture and schedule; backward passes; the exchange between ranks; training steps; generation; checkpoints. Each
result becomes a line of a JSON file: dtype, shape and the SHA-256 of its bytes. It uses public names only, so that the
same file serves commits with different private ones: set PYTHONPATH to the tree that is to be run.

`record` exits with 1 if a registered op was not called, as the reference and in the emulator. `compare` needs no
PyTorch; it lists what differs or exists in one file only, and exits with 1 if anything does.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import itertools
import json
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Of sm_89 and sm_120, which run the portable kernels with other tiles, one schedule each.
SCHEDULES = [("sm_80", 0), ("sm_80", 3), ("sm_90a", 1), ("sm_90a", 2), ("sm_89", 2), ("sm_120", 3)]
PLAIN = ("reference", 0)


def main(argv: list[str]) -> int:
    if len(argv) == 2 and argv[0] == "record":
        return record(Path(argv[1]))
    if len(argv) == 3 and argv[0] == "compare":
        return compare(*(json.loads(Path(path).read_text()) for path in argv[1:]))
    print(f"usage: {Path(__file__).name} record FILE | compare OLD NEW", file=sys.stderr)
    return 2


def compare(old: dict[str, str], new: dict[str, str]) -> int:
    differences = [f"missing in NEW: {name}" for name in old.keys() - new.keys()]
    differences += [f"only in NEW: {name}" for name in new.keys() - old.keys()]
    for name in old.keys() & new.keys():
        if old[name] != new[name]:
            differences.append(f"differs: {name}: {old[name]} became {new[name]}")
    print(*sorted(differences), f"{len(differences)} differences, {len(old.keys() & new.keys())} compared", sep="\n")
    return 1 if differences else 0


def record(path: Path) -> int:
    import torch

    torch.set_num_threads(1)
    start = time.perf_counter()
    recorder = Recorder()
    for family in (quant, fp8, w4, moe, newton_schulz, mla, exchange, training, generation, checkpoints):
        family(recorder)
        print(f"{family.__name__}: {len(recorder.found)} results, {time.perf_counter() - start:.0f} s", file=sys.stderr)
    path.write_text(json.dumps(recorder.found, indent=0, sort_keys=True) + "\n")
    missing = recorder.not_called()
    print("\n".join(missing) or f"{len(recorder.found)} results in {path}; every op was called")
    return 1 if missing else 0


class Recorder:
    """Collects results by name, and which ops were called in which mode."""

    def __init__(self):
        self.found: dict[str, str] = {}
        self.called: set[tuple[str, bool]] = set()  # op, whether emulated

    def put(self, name: str, *values: Any) -> None:
        """Notes tensors and plain values, and what tuples, lists and dicts hold of them."""
        import torch

        for i, value in enumerate(values):
            at = f"{name}/{i}" if len(values) > 1 else name
            if isinstance(value, (tuple, list)):
                self.put(at, *value, None)  # None: the index is part of the name, also of a single item
                continue
            if isinstance(value, dict):
                for key, item in value.items():
                    self.put(f"{at}/{key}", item)
                continue
            if value is None:
                continue
            assert at not in self.found, f"two results are named {at}"
            if isinstance(value, torch.Tensor):
                value = value.detach()
                raw = value.contiguous().flatten().view(torch.uint8).numpy().tobytes()
                strides = "" if value.is_contiguous() else f" strides {value.stride()}"
                digest = hashlib.sha256(raw).hexdigest()[:32]
                self.found[at] = f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}{strides} {digest}"
            else:
                self.found[at] = repr(value)

    @contextlib.contextmanager
    def case(self, name: str, mode: tuple[str, int]) -> Iterator[str]:
        """Runs one case with inputs that depend on `name` alone; yields the prefix of its results.

        In the emulator every op that is called has a kernel, else it would raise; each case starts at least one.
        """
        import torch
        from torch.utils._python_dispatch import TorchDispatchMode

        import k2kernels

        arch, seed = mode
        called = self.called

        class Log(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                namespace, op = function._schema.name.split("::")
                if namespace == "k2kernels":
                    called.add((op.removesuffix("_autograd"), arch != "reference"))
                return function(*args, **(kwargs or {}))

        torch.manual_seed(zlib.crc32(name.encode()))
        before = k2kernels.launch_count()
        with Log(), running(mode):
            yield f"{name} {arch}:{seed}"
        assert arch == "reference" or k2kernels.launch_count() > before, f"{name}: no kernel was started"

    def not_called(self) -> list[str]:
        import torch

        names = {
            name.split("::")[1].split(".")[0] for name in torch._C._dispatch_get_all_op_names() if "k2kernels" in name
        }
        ops = {name.removesuffix("_autograd") for name in names}
        missing = [f"never called as the reference: {op}" for op in ops if (op, False) not in self.called]
        missing += [f"never called in the emulator: {op}" for op in ops if (op, True) not in self.called]
        return sorted(missing)


def running(mode: tuple[str, int]) -> contextlib.AbstractContextManager[None]:
    import k2kernels

    arch, seed = mode
    return k2kernels.backend("reference") if arch == "reference" else k2kernels.emulated(arch, seed=seed)


def rows_of(data: Any, offsets: Any, counts: Any) -> Any:
    """The rows of data [cap, ...] that groups own: the others are padding, whose content is undefined."""
    import torch

    places = [torch.arange(int(o), int(o) + int(n)) for o, n in zip(offsets, counts)]
    return data[torch.cat(places)] if data is not None else None


def rows_of_matrices(data: Any, counts: Any) -> Any:
    """The same of data [G, maxM, ...]."""
    import torch

    return torch.cat([matrix[: int(n)] for matrix, n in zip(data, counts)])


def quant(recorder: Recorder) -> None:
    import torch

    import k2kernels as k2

    for mode in (PLAIN, *SCHEDULES):
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            with recorder.case(f"quantize {dtype}", mode) as at:
                x = torch.randn(37, 384).to(dtype) * 3
                x[3, 5], x[4, 6], x[7, 128:256] = torch.nan, -torch.inf, 0
                for power_of_two in (False, True):
                    options = dict(power_of_two=power_of_two)
                    for layout in ("row", "column"):
                        options["scale_layout"] = layout
                        recorder.put(f"{at} 1x128 {power_of_two} {layout}", *k2.quantize_1x128(x, **options))
                        recorder.put(f"{at} swiglu_quantize {power_of_two} {layout}", *k2.swiglu_quantize(x, **options))
                        norm = k2.rms_norm_quantize(x, torch.ones(384, dtype=dtype) * 0.7, eps=1e-5, **options)
                        recorder.put(f"{at} rms_norm {power_of_two} {layout}", *norm)
                    recorder.put(f"{at} 128x128 {power_of_two}", *k2.quantize_128x128(x, power_of_two=power_of_two))
                    recorder.put(
                        f"{at} transposed {power_of_two}",
                        *k2.quantize_1x128(x, power_of_two=power_of_two, transpose=True),
                    )
                recorder.put(f"{at} ragged", *k2.quantize_1x128(x[:, :201]), *k2.quantize_128x128(x[:, 3:205]))
                recorder.put(f"{at} strided", *k2.quantize_1x128(x.T), *k2.swiglu_quantize(x[:, ::2]))
            with recorder.case(f"grouped quantize {dtype}", mode) as at:
                x, weights = torch.randn(300, 256).to(dtype), torch.rand(300)
                offsets, counts = torch.tensor([0, 128, 128, 256], dtype=torch.int32), torch.tensor([70, 0, 44]).int()
                groups = dict(offsets=offsets, counts=counts)
                for name, results in dict(
                    rows=k2.quantize_1x128(x, **groups),
                    swiglu=k2.swiglu_quantize(x, weights=weights, **groups),
                ).items():
                    recorder.put(f"{at} {name}", *(rows_of(t, offsets, counts) for t in results))
                recorder.put(f"{at} transposed", *k2.quantize_1x128(x, transpose=True, **groups))
                matrices = k2.quantize_1x128(x.view(3, 100, 256), counts=counts)
                recorder.put(f"{at} matrices", *(rows_of_matrices(t, counts) for t in matrices))
            with recorder.case(f"swiglu {dtype}", mode) as at:
                gate_up = torch.randn(2, 9, 200).to(dtype).requires_grad_()
                y = k2.swiglu(gate_up)
                (y * torch.randn_like(y)).sum().backward()
                recorder.put(at, y, gate_up.grad)
            with recorder.case(f"dequantize {dtype}", mode) as at:
                for rows, quantize in ((1, k2.quantize_1x128), (128, k2.quantize_128x128)):
                    codes, scales = quantize(torch.randn(2, 150, 200))
                    recorder.put(f"{at} {rows}", k2.dequantize(codes, scales, block=(rows, 128), dtype=dtype))


def fp8(recorder: Recorder) -> None:
    import torch

    import k2kernels as k2

    bf16, f16, f32 = torch.bfloat16, torch.float16, torch.float32
    shapes = [(1, 200, 384), (16, 256, 512), (40, 136, 1280), (70, 384, 640), (130, 264, 640), (200, 130, 200)]
    # For which the plan on sm_90a takes: K in 8 and 4 parts, A or B shared by two CTAs, 128x192, 256x128, 64x256,
    # ping-pong.
    plans = [(1, 64, 1280), (16, 128, 2048), (130, 136, 2048), (130, 384, 1280)]
    plans += [(512, 136, 128), (1024, 64, 128), (1, 1024, 128), (130, 1024, 128)]
    for mode in (PLAIN, *SCHEDULES):
        for m, n, k in shapes:
            with recorder.case(f"fp8_gemm {m} {n} {k}", mode) as at:
                a, b = (
                    k2.quantize_1x128(torch.randn(m, k), scale_layout="column"),
                    k2.quantize_128x128(torch.randn(n, k)),
                )
                recorder.put(f"{at} bf16", k2.fp8_gemm(*a, *b))
                recorder.put(f"{at} invariant", k2.fp8_gemm(*a, *b, out_dtype=f16, batch_invariant=True))
                out = torch.full((m, n), 3.0)
                terms = dict(bias=torch.randn(n), accumulate=torch.randn(m, n).to(bf16), row_weights=torch.rand(m))
                recorder.put(f"{at} out", k2.fp8_gemm(*a, *b, out_dtype=f32, out=out, **terms))
                fine = k2.quantize_1x128(torch.randn(n, k))
                recorder.put(f"{at} fine", k2.fp8_gemm(*a, *fine, out_dtype=f32, accumulate=out))
                shard = b[0][n // 3 :], b[1][n // 3 // 128 :]
                recorder.put(f"{at} shard", k2.fp8_gemm(*a, *shard, b_row_offset=n // 3 % 128))
        for m, n, k in plans if mode[0] == "sm_90a" else ():
            with recorder.case(f"fp8_gemm plan {m} {n} {k}", mode) as at:
                a, b = k2.quantize_1x128(torch.randn(m, k)), k2.quantize_128x128(torch.randn(n, k))
                recorder.put(at, k2.fp8_gemm(*a, *b))
        for m in (3, 100):
            with recorder.case(f"fp8_gemm_swiglu {m}", mode) as at:
                a, b = k2.quantize_1x128(torch.randn(m, 384)), k2.quantize_128x128(torch.randn(512, 384))
                recorder.put(at, *k2.fp8_gemm_swiglu(*a, *b))
                options = dict(weights=torch.rand(m), power_of_two=True, scale_layout="column")
                recorder.put(f"{at} options", *k2.fp8_gemm_swiglu(*a, *b, **options))
        with recorder.case("grouped_fp8_gemm", mode) as at:
            a, b = k2.quantize_1x128(torch.randn(200, 384)), k2.quantize_128x128(torch.randn(5, 256, 384))
            offsets, counts = torch.tensor([0, 16, 16, 80, 96, 200]).int(), torch.tensor([9, 0, 64, 16, 100]).int()
            groups = dict(offsets=offsets, counts=counts)
            for name, options in dict(
                plain={}, few=dict(expected_m=2), weighted=dict(row_weights=torch.rand(200), batch_invariant=True)
            ).items():
                recorder.put(f"{at} {name}", rows_of(k2.grouped_fp8_gemm(*a, *b, **groups, **options), offsets, counts))
            out = torch.full((200, 256), 5.0)
            recorder.put(f"{at} out", k2.grouped_fp8_gemm(*a, *b, out_dtype=f32, out=out, **groups))
            pair = k2.grouped_fp8_gemm_swiglu(*a, *b, weights=torch.rand(200), **groups)
            recorder.put(f"{at} swiglu", *(rows_of(t, offsets, counts) for t in pair))
            a, masked = k2.quantize_1x128(torch.randn(5, 40, 384)), torch.tensor([40, 0, 7, 33, 1]).int()
            for expected in (1, 40):
                d = k2.grouped_fp8_gemm(*a, *b, masked_m=masked, expected_m=expected)
                recorder.put(f"{at} masked {expected}", rows_of_matrices(d, masked))
                pair = k2.grouped_fp8_gemm_swiglu(*a, *b, masked_m=masked, expected_m=expected)
                recorder.put(f"{at} masked swiglu {expected}", *(rows_of_matrices(t, masked) for t in pair))
        with recorder.case("grouped_fp8_wgrad", mode) as at:
            a, b = (k2.quantize_1x128(torch.randn(384, n), transpose=True) for n in (136, 256))
            groups = dict(offsets=torch.tensor([0, 128, 128, 384]).int(), counts=torch.tensor([100, 0, 256]).int())
            recorder.put(at, k2.grouped_fp8_wgrad(*a, *b, **groups))
            old = torch.randn(3, 136, 256)
            recorder.put(f"{at} bf16", k2.grouped_fp8_wgrad(*a, *b, out_dtype=bf16, accumulate=old, **groups))
        for dtype in (bf16, f32):
            with recorder.case(f"fp8_linear {dtype}", mode) as at:
                x = torch.randn(3, 30, 200).to(dtype).requires_grad_()
                weight, bias = torch.randn(136, 200, requires_grad=True), torch.randn(136, requires_grad=True)
                main_grad = torch.ones(136, 200)
                for name, options in dict(plain={}, main=dict(main_grad=main_grad, power_of_two=False)).items():
                    y = k2.fp8_linear(x, weight, bias=bias, **options)
                    (y * torch.randn_like(y)).sum().backward()
                    recorder.put(f"{at} {name}", y, x.grad, weight.grad, bias.grad)
                recorder.put(f"{at} main_grad", main_grad)
            for alignment in (1, 128):
                with recorder.case(f"grouped_fp8_linear {dtype} {alignment}", mode) as at:
                    offsets = torch.tensor([0, 128, 128, 256] if alignment == 128 else [0, 50, 50, 100]).int()
                    counts = torch.tensor([40, 0, 47]).int()
                    x = torch.randn(int(offsets[-1]), 136).to(dtype).requires_grad_()
                    weight = torch.randn(3, 144, 136).to(dtype).requires_grad_()
                    y = k2.grouped_fp8_linear(x, weight, offsets=offsets, counts=counts, alignment=alignment)
                    rows = rows_of(y, offsets, counts)
                    (rows * torch.randn_like(rows)).sum().backward()
                    recorder.put(at, rows, x.grad, weight.grad)


def w4(recorder: Recorder) -> None:
    import torch

    import k2kernels as k2

    quantizers = dict(int4=k2.quantize_int4_group32, mxfp4=k2.quantize_mxfp4)
    for dtype in (torch.bfloat16, torch.float32):
        with recorder.case(f"w4 formats {dtype}", PLAIN) as at:
            w = (torch.randn(3, 40, 96) / 8).to(dtype)
            w[1, 2, 32:64] = 0
            codes = dict(
                int4=k2.quantize_int4_group32(w), kimi=k2.quantize_int4_group32(w, q_min=-8), even=k2.quantize_mxfp4(w)
            )
            codes["floor"] = k2.quantize_mxfp4(w, scale_rule="floor")
            for name, pair in codes.items():
                # Not the packed bytes: their order is private. What is unpacked, and all products, is not.
                recorder.put(f"{at} {name}", *pair, k2.dequantize_w4(*pair), *k2.unpack_w4(k2.pack_w4(*pair)))
            for fake in (k2.fake_quantize_int4, k2.fake_quantize_mxfp4):
                leaf = w.clone().requires_grad_()
                out = fake(leaf)
                (out * torch.randn_like(out)).sum().backward()
                recorder.put(f"{at} {fake.__name__}", out, leaf.grad)
    for mode, kind in itertools.product((PLAIN, *SCHEDULES), quantizers):
        for counts, n, k in (([1, 0, 17], 136, 192), ([70, 3, 0], 48, 96), ([9], 64, 512)):
            with recorder.case(f"grouped_w4_gemm {kind} {counts} {n} {k}", mode) as at:
                w = quantizers[kind](torch.randn(len(counts), n, k) / 8)
                ends = torch.tensor([0, *counts]).cumsum(0).int()
                groups = dict(offsets=ends, counts=ends.diff())
                a, plain, gated = torch.randn(sum(counts), k).bfloat16(), k2.pack_w4(*w), k2.pack_w4(*w, gated=True)
                recorder.put(at, k2.grouped_w4_gemm(a, plain, **groups))
                recorder.put(f"{at} invariant", k2.grouped_w4_gemm(a, plain, **groups, batch_invariant=True))
                for expected in (1, 10**6):
                    options = dict(swiglu=True, expected=expected)
                    recorder.put(f"{at} swiglu {expected}", k2.grouped_w4_gemm(a, gated, **groups, **options))
                if mode == PLAIN:
                    leaves = a.requires_grad_(), (torch.randn(len(counts), n, k) / 8).requires_grad_()
                    y = k2.grouped_w4_linear(*leaves, **groups, kind=kind)
                    (y * torch.randn_like(y)).sum().backward()
                    recorder.put(f"{at} linear", y, *(leaf.grad for leaf in leaves))
        with recorder.case(f"w4 layer {kind}", mode) as at:
            x, routing = torch.randn(9, 96).bfloat16(), k2.moe_route(torch.randn(9, 5), top_k=2)
            gate_up = k2.pack_w4(*quantizers[kind](torch.randn(5, 128, 96) / 8), gated=True)
            down = k2.pack_w4(*quantizers[kind](torch.randn(5, 96, 64) / 8))
            recorder.put(
                at,
                k2.moe_mlp(x, routing, gate_up, down),
                k2.w4_gemm(x[:, :64], down._replace(data=down.data[0], shape=down.shape[1:])),
            )


def moe(recorder: Recorder) -> None:
    import torch

    import k2kernels as k2

    T, E, K, H, inner = 33, 16, 4, 128, 64
    for mode in (PLAIN, *SCHEDULES):
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            options = [
                dict(top_k=K, scale=2.5),
                dict(top_k=K, n_group=4, topk_group=2),
                dict(top_k=1, score="softmax", normalize=False),
            ]
            for i, option in enumerate(options):
                with recorder.case(f"moe_route {dtype} {i}", mode) as at:
                    logits = torch.randn(T, E).to(dtype)
                    logits[3, 4], logits[5, 6], logits[7] = torch.nan, -torch.inf, 1
                    logits.requires_grad_()
                    routing = k2.moe_route(logits, torch.randn(E) if i < 2 else None, **option)
                    (routing.weights * torch.randn_like(routing.weights)).sum().backward()
                    recorder.put(at, *routing, logits.grad)
            with recorder.case(f"moe_sequence_loss {dtype}", mode) as at:
                logits = torch.randn(T, E).to(dtype).requires_grad_()
                indices = torch.randint(-1, E, (T, K))
                for score, cu_seqlens in (("sigmoid", None), ("softmax", torch.tensor([0, 5, 5, T]))):
                    loss = k2.moe_sequence_loss(logits, indices, top_k=K, alpha=0.3, score=score, cu_seqlens=cu_seqlens)
                    loss.backward()
                    recorder.put(f"{at} {score}", loss, logits.grad)
            for alignment, capacity, index_type in ((1, None, torch.int32), (8, 96, torch.int64)):
                with recorder.case(f"moe_dispatch {dtype} {alignment}", mode) as at:
                    x = torch.randn(T, H).to(dtype).requires_grad_()
                    weights = torch.rand(T, K, requires_grad=True)
                    shared, residual = (torch.randn(T, H).to(dtype).requires_grad_() for _ in range(2))
                    indices = torch.randint(-1, E, (T, K)).to(index_type)
                    place = dict(num_experts=E, alignment=alignment, capacity=capacity)
                    d = k2.moe_dispatch(x, indices, weights, **place)
                    real = d.handle.token_of_slot >= 0
                    recorder.put(f"{at} plan", d.data[real], d.offsets, d.counts, *d.handle[:2], d.handle.overflow)
                    y = torch.where(real[:, None], d.data.float(), 0).to(dtype) * 2
                    out = k2.moe_combine(y, d.handle, shared=shared, residual=residual, out_dtype=torch.float32)
                    plain = k2.moe_combine(y, d.handle._replace(weights=torch.ones(T, K)))
                    ((out * torch.randn_like(out)).sum() + (plain * torch.randn_like(plain)).sum()).backward()
                    recorder.put(f"{at} combined", out, plain, x.grad, weights.grad, shared.grad, residual.grad)
                    for layout in ("row", "column"):
                        d = k2.moe_dispatch(
                            x.detach(), indices, weights, quantize=True, power_of_two=True, scale_layout=layout, **place
                        )
                        recorder.put(f"{at} quantized {layout}", d.data[real], d.scales[real], d.handle.overflow)
            if dtype != torch.float32 or mode == PLAIN:  # no kernel multiplies float32
                with recorder.case(f"moe_mlp {dtype}", mode) as at:
                    logits, x = torch.randn(T, E, requires_grad=True), torch.randn(T, H).to(dtype).requires_grad_()
                    gate_up = (torch.randn(E, 2 * inner, H) / 8).to(dtype).requires_grad_()
                    down = (torch.randn(E, H, inner) / 8).to(dtype).requires_grad_()
                    y = k2.moe_mlp(x, k2.moe_route(logits, top_k=K), gate_up, down, shared=x * 2)
                    (y * torch.randn_like(y)).sum().backward()
                    recorder.put(at, y, x.grad, gate_up.grad, down.grad, logits.grad)
            with recorder.case(f"moe_mlp fp8 {dtype}", mode) as at:
                x, routing = torch.randn(T, H).to(dtype), k2.moe_route(torch.randn(T, E), top_k=K)
                codes = [k2.quantize_128x128(torch.randn(*shape) / 8) for shape in ((E, 2 * H, H), (E, H, H))]
                recorder.put(f"{at} codes", k2.moe_mlp(x, routing, *codes, power_of_two=True))
                x.requires_grad_()
                gate_up = (torch.randn(4, 2 * inner, H) / 8).requires_grad_()
                down = (torch.randn(4, H, inner) / 8).requires_grad_()
                few = k2.moe_route(torch.randn(T, 4), top_k=2)
                y = k2.moe_mlp(x, few, gate_up, down, fp8=True, power_of_two=True)
                (y * torch.randn_like(y)).sum().backward()
                recorder.put(f"{at} masters", y, x.grad, gate_up.grad, down.grad)
        with recorder.case("moe_update_bias", mode) as at:
            for kind in ("sign", "quantile"):
                counts = torch.randint(0, 9, (E,))
                recorder.put(f"{at} {kind}", k2.moe_update_bias(torch.randn(E), counts, rate=0.01, mode=kind))


def newton_schulz(recorder: Recorder) -> None:
    import torch

    import k2kernels as k2

    for mode in (PLAIN, *SCHEDULES):
        for shape in ((2, 130, 260), (3, 64, 192), (1, 320, 96), (200, 200)):
            with recorder.case(f"newton_schulz {shape}", mode) as at:
                x = torch.randn(shape)
                recorder.put(f"{at} auto", k2.newton_schulz(x))
                options = dict(schedule="polar_express", steps=3, iterate_dtype=torch.bfloat16)
                for algorithm in ("standard", "gram"):
                    recorder.put(f"{at} {algorithm}", k2.newton_schulz(x.bfloat16(), algorithm=algorithm, **options))
        with recorder.case("newton_schulz_grouped", mode) as at:
            xs = [torch.randn(40, 24), torch.randn(2, 130, 200).half(), torch.randn(200, 70)]
            xs[1][1, 0, 0] = torch.nan
            recorder.put(at, k2.newton_schulz_grouped(xs, steps=2))
    # In float32 and float64 the reference serves alone.
    with recorder.case("newton_schulz wide", PLAIN) as at:
        for dtype in (torch.float32, torch.float64):
            recorder.put(f"{at} {dtype}", k2.newton_schulz(torch.randn(2, 30, 50).to(dtype), iterate_dtype=dtype))


def mla(recorder: Recorder) -> None:
    import torch

    import k2kernels as k2

    cases = [  # heads, queries, dtype (uint8: the 656-byte cache), page size, split
        (16, 1, torch.bfloat16, 64, 64),
        (64, 1, torch.bfloat16, 16, 128),
        (64, 2, torch.float16, 64, "auto"),
        (128, 1, torch.bfloat16, 64, "auto"),
        (128, 1, torch.uint8, 64, 64),
        (8, 3, torch.uint8, 32, "auto"),
    ]
    lengths = torch.tensor([200, 77, 0]).int()
    for mode in (PLAIN, *SCHEDULES):
        for heads, queries, kind, page, split in cases:
            with recorder.case(f"mla_decode {heads} {queries} {kind} {page} {split}", mode) as at:
                dtype = torch.bfloat16 if kind == torch.uint8 else kind
                width = 656 if kind == torch.uint8 else 576
                cache = torch.zeros(3 * 256 // page, page, width, dtype=kind)
                table = torch.randperm(len(cache)).int().view(3, -1)
                positions = torch.cat([torch.where(torch.arange(256) < n, torch.arange(256), -1) for n in lengths])
                power_of_two = kind == torch.uint8
                k2.mla_append(torch.randn(768, 576).to(dtype), cache, table, positions, power_of_two=power_of_two)
                for wide in (torch.bfloat16, torch.float32):
                    recorder.put(f"{at} gathered {wide}", k2.mla_gather(cache, table, positions, dtype=wide))
                q = (torch.randn(3, queries, heads, 576) * 0.1).to(dtype)
                options = dict(softmax_scale=0.1, split=split)
                recorder.put(at, *k2.mla_decode(q, cache, table, lengths, return_max_logits=True, **options), cache)
                out = torch.empty(3, queries, heads, 512, dtype=dtype)
                k2.mla_decode(q, cache, table, lengths, out=out, causal=False, **options)
                recorder.put(f"{at} out", out)
                ragged = dict(cu_seqlens_q=torch.tensor([0, 1, 1, 2]).int(), return_max_logits=True)
                recorder.put(f"{at} ragged", *k2.mla_decode(q[:, 0], cache, table, lengths, **ragged, **options))
        with recorder.case("merge_attention_states", mode) as at:
            outs, lses = torch.randn(2, 5, 4, 512).bfloat16(), torch.randn(2, 5, 4)
            lses[0, 1], lses[:, 2] = -torch.inf, -torch.inf
            recorder.put(at, *k2.merge_attention_states(outs[0], lses[0], outs[1], lses[1]))
    for mode, dtype, causal in itertools.product((PLAIN, *SCHEDULES), (torch.bfloat16, torch.float32), (True, False)):
        if mode != PLAIN and dtype == torch.float32:
            continue
        with recorder.case(f"mla_prefill {dtype} {causal}", mode) as at:
            q, k, v = (torch.randn(n, 2, d).to(dtype).requires_grad_() for n, d in ((50, 192), (160, 192), (160, 128)))
            cu_q, cu_k = torch.tensor([0, 20, 20, 48]).int(), torch.tensor([0, 25, 30, 160]).int()
            options = dict(cu_seqlens_q=cu_q, softmax_scale=0.1, return_max_logits=True)
            result = k2.mla_prefill(q, k, v, cu_seqlens_k=cu_k, causal=causal, **options)
            seen = torch.where(result.lse.isfinite(), result.lse, 0)
            ((result.out * torch.randn_like(result.out)).sum() + seen.sum()).backward()
            recorder.put(at, *result, q.grad, k.grad, v.grad)
        with recorder.case(f"mla_prefill shared rope {dtype} {causal}", mode) as at:
            kv, k_rope = (torch.randn(160, *size).to(dtype).requires_grad_() for size in ((2, 256), (64,)))
            result = k2.mla_prefill(q, kv, None, k_rope=k_rope, cu_seqlens_k=cu_k, causal=causal, **options)
            (result.out * torch.randn_like(result.out)).sum().backward()
            recorder.put(at, *result, q.grad, kv.grad, k_rope.grad)
        with recorder.case(f"mla_prefill_piece {dtype}", mode) as at, torch.no_grad():
            state, cu = None, torch.tensor([0, 0, 0, 128]).int()
            for rows, ends, first in ((slice(30, 158), cu, 0), (slice(158, 160), cu.clamp(max=2), 128)):
                state = k2.mla_prefill_piece(
                    state, q, kv[rows], None, k_rope=k_rope[rows], cu_seqlens_k=ends, last=first > 0,
                    diagonal=torch.full((3,), 102 - first).int(), **options,
                )  # fmt: skip
            recorder.put(at, *state)


def exchange(recorder: Recorder) -> None:
    """Rows between ranks of one process, and the transports of one rank."""
    import torch
    import torch.distributed as dist

    from k2kernels.parallel import ExpertParallel, VirtualRanks

    E, K, H = 7, 3, 200
    for mode in (PLAIN, *SCHEDULES):
        for world in (2, 3):
            with recorder.case(f"exchange {world}", mode) as at:
                sizes = dict(num_experts=E, hidden=H, top_k=K, max_tokens=9, row_dtype=torch.float32, blocks=2)
                virtual, tokens = VirtualRanks(world, **sizes), [9, 0, 5][:world]
                for turn in range(2):
                    xs = [torch.randn(n, H).bfloat16().requires_grad_() for n in tokens]
                    weights = [torch.rand(n, K, requires_grad=True) for n in tokens]
                    indices = [torch.randint(-1, E, (n, K)).int() for n in tokens]
                    shared = [torch.randn(n, H).bfloat16().requires_grad_() for n in tokens]
                    sent = virtual.dispatch(xs, indices, weights, alignment=4)
                    ys = []
                    for s in sent:
                        owned = torch.zeros(len(s.data), 1, dtype=torch.bool)
                        for first, count in zip(s.offsets.tolist(), s.counts.tolist()):
                            owned[first : first + count] = True
                        ys.append(torch.where(owned, s.data.float(), 0).bfloat16() * 2)
                    outs = virtual.combine(ys, [s.handle for s in sent], shared=shared, out_dtype=torch.float32)
                    sum((out * torch.randn_like(out)).sum() for out in outs).backward()
                    for r, s in enumerate(sent):
                        recorder.put(f"{at} {turn} sent {r}", s.offsets, s.counts, rows_of(s.data, s.offsets, s.counts))
                        recorder.put(f"{at} {turn} back {r}", outs[r], xs[r].grad, weights[r].grad, shared[r].grad)
                    options = dict(quantize=True, scale_layout="column", power_of_two=bool(turn))
                    sent = virtual.dispatch([x.detach() for x in xs], indices, weights, **options)
                    for r, s in enumerate(sent):
                        parts = (rows_of(t, s.offsets, s.counts) for t in (s.data, s.scales))
                        recorder.put(f"{at} {turn} quantized {r}", *parts)
        for transport in ("local", "virtual", "torch"):
            with recorder.case(f"ExpertParallel {transport}", mode) as at, contextlib.ExitStack() as stack:
                group = None
                if transport == "torch":
                    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
                    stack.callback(dist.destroy_process_group)
                    group = dist.group.WORLD
                parallel = ExpertParallel(group, num_experts=E, hidden=H, top_k=K, max_tokens=16, transport=transport)
                x = torch.randn(11, H).bfloat16().requires_grad_()
                weights = torch.rand(11, K, requires_grad=True)
                d = parallel.dispatch(x, torch.randint(-1, E, (11, K)), weights, capacity=40)
                rows = rows_of(d.data, d.offsets, d.counts)
                y = torch.zeros(len(d.data), H, dtype=x.dtype)
                place = torch.cat([torch.arange(o, o + n) for o, n in zip(d.offsets.tolist(), d.counts.tolist())])
                out = parallel.combine(y.index_copy(0, place, rows * 3), d.handle, residual=x)
                (out * torch.randn_like(out)).sum().backward()
                recorder.put(at, rows, d.offsets, d.counts, out, x.grad, weights.grad, parallel.overflow)
                d = parallel.dispatch(x.detach(), torch.randint(-1, E, (11, K)), weights, quantize=True)
                recorder.put(f"{at} quantized", *(rows_of(t, d.offsets, d.counts) for t in (d.data, d.scales)))


def tiny_config(**changes: Any) -> Any:
    from k2kernels.model import K2Config

    return dataclasses.replace(K2Config.preset("tiny"), **{"num_hidden_layers": 2, "vocab_size": 96, **changes})


def tiny_model(**changes: Any) -> Any:
    """With weights larger than at the beginning of a training, so that every part matters."""
    import torch

    from k2kernels.model import K2Model

    model = K2Model(tiny_config(**changes))
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.mul_(4) if p.dim() > 1 and "embed" not in name else None
        for name, buffer in model.named_buffers():
            buffer.normal_(std=0.2) if name.endswith("e_score_correction_bias") else None
    return model


def training(recorder: Recorder) -> None:
    import torch
    import torch.nn.functional as F

    from k2kernels.optim import Muon, MuonClip, QKClip

    def loss_of(model, ids):
        logits, hidden = model(ids[:, :-1], return_hidden=True)
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        for k, more in enumerate(model.mtp_logits(ids[:, :-1], hidden) if model.mtp_layers else ()):
            loss = loss + F.cross_entropy(more.flatten(0, 1), ids[:, 2 + k :].flatten())
        return loss + model.sequence_loss(0.01)

    half = dict(iterate_dtype=torch.float16)
    runs = {  # model's options, FP8, optimizer, where its steps run
        "clip": ({}, False, dict(qk_clip=QKClip(threshold=0.5)), PLAIN),
        "clip smooth fp8": (
            {},
            True,
            dict(qk_clip=QKClip(threshold=lambda s: 0.5, smoothing=0.9, mode="smooth")),
            PLAIN,
        ),
        "mtp": (dict(num_nextn_predict_layers=1), False, dict(nesterov=False, schedule="polar_express"), PLAIN),
        "bf16": (dict(dtype="bfloat16"), True, dict(momentum_dtype=torch.bfloat16, skip_non_finite=True), PLAIN),
        "kernels": ({}, False, dict(qk_clip=QKClip(threshold=0.5), **half), ("sm_90a", 2)),
        "kernels bf16": (dict(dtype="bfloat16"), False, dict(qk_clip=QKClip(threshold=0.5), **half), ("sm_80", 3)),
    }
    for name, (changes, use_fp8, options, mode) in runs.items():
        with recorder.case(f"training {name}", PLAIN) as at:
            model = tiny_model(**changes)
            model.to(getattr(torch, changes.get("dtype", "float32"))).train().use_fp8(use_fp8)
            optimizer = MuonClip(model, 0.02, adamw=dict(lr=1e-3), **options)
            recorder.put(f"{at} table", [tuple(map(str, row)) for row in optimizer.routing_table()])
            for step in range(2 if use_fp8 or mode != PLAIN else 3):
                loss = loss_of(model, torch.randint(96, (2, 40)))
                loss.backward()
                gradients = {name: p.grad for name, p in model.named_parameters()}
                recorder.put(f"{at} {step}", dict(loss=loss, gradients=gradients, logits=model.max_logits()))
                with running(mode):
                    optimizer.step()
                optimizer.zero_grad()
                recorder.put(f"{at} {step} clip", {k: tuple(v) for k, v in (optimizer.last_clip or {}).items()})
                recorder.put(f"{at} {step} load", model.expert_load())
                model.update_router_bias(0.001)
                recorder.put(f"{at} {step} weights", model.state_dict())
            recorder.put(f"{at} optimizer", optimizer.state_dict())
    for mode in (PLAIN, *SCHEDULES):
        with recorder.case("muon", mode) as at:
            shapes = [(40, 24), (3, 64, 100), (130, 150)]
            parameters = [
                torch.randn(s, dtype=t).requires_grad_()
                for s, t in zip(shapes, (torch.float32,) * 2 + (torch.bfloat16,))
            ]
            optimizer = Muon(parameters, 0.02, momentum_dtype=torch.bfloat16, iterate_dtype=torch.float16)
            for step in range(2):
                for p in parameters:
                    p.grad = torch.randn_like(p)
                optimizer.step()
                recorder.put(f"{at} {step}", parameters)
            recorder.put(f"{at} state", optimizer.state_dict())


def generation(recorder: Recorder) -> None:
    import torch

    with recorder.case("generation", PLAIN) as at:
        model = tiny_model(num_nextn_predict_layers=1).eval()
        prompt = torch.randint(96, (3, 70))
        mask = (torch.arange(70) < torch.tensor([[70], [3], [64]])).long()
        for name, options in dict(
            greedy=dict(eos_token_ids=[]),
            stopped=dict(eos_token_ids=list(range(30))),
            sampled=dict(temperature=0.8, top_k=20, top_p=0.9, seed=5),
            speculative=dict(speculative=True, eos_token_ids=[]),
            masked=dict(attention_mask=mask, eos_token_ids=[]),
            masked_speculative=dict(attention_mask=mask, speculative=True),
        ).items():
            heard = []
            text = model.generate(prompt, max_new_tokens=12, on_token=heard.append, **options)
            recorder.put(f"{at} {name}", text, torch.stack(heard))
    for mode in (PLAIN, ("sm_80", 2), ("sm_90a", 3)):
        with recorder.case("generation by kernels", PLAIN) as at, contextlib.ExitStack() as stack:
            sizes = dict(kv_lora_rank=512, qk_rope_head_dim=64, num_attention_heads=2)
            model = tiny_model(**sizes).bfloat16().eval()
            prompt, logits = torch.randint(96, (3, 20)), []
            hook = model.lm_head.register_forward_hook(lambda module, args, out, kept=logits: kept.append(out.clone()))
            for cache in ("auto", "fp8"):
                with contextlib.ExitStack() as stack:
                    # The prompt passes through mla_prefill, for which there is no kernel; what follows is emulated.
                    def on_token(_, stack=stack, entered=[], mode=mode):  # noqa: B006 (once for each call)
                        if mode != PLAIN and not entered:
                            entered.append(stack.enter_context(running(mode)))

                    text = model.generate(
                        prompt, max_new_tokens=4, eos_token_ids=[], cache_dtype=cache, on_token=on_token
                    )
                recorder.put(f"{at} decoding {mode} {cache}", text, list(logits))
                logits.clear()
            hook.remove()


def checkpoints(recorder: Recorder) -> None:
    """Saved, converted by the command line to FP8 and back, loaded in both ways, saved again."""
    import runpy

    import torch
    from safetensors.torch import load_file

    from k2kernels.model import K2Model

    def put_files(name: str, folder: Path) -> None:
        for file in sorted(folder.iterdir()):
            whole = load_file(file) if file.suffix == ".safetensors" else file.read_text()
            recorder.put(f"{name} {file.name}", whole)

    def convert(*arguments: str) -> None:
        argv, sys.argv = sys.argv, ["k2kernels", "convert", *arguments]
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                runpy.run_module("k2kernels", run_name="__main__")
        except SystemExit as end:
            assert not end.code, f"convert {arguments}: exit code {end.code}"
        finally:
            sys.argv = argv

    with recorder.case("checkpoints", PLAIN) as at, tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        sizes = dict(hidden_size=192, q_lora_rank=136, intermediate_size=256, moe_intermediate_size=128)
        tiny_model(num_nextn_predict_layers=1, **sizes).bfloat16().save_pretrained(root / "made")
        put_files(f"{at} saved", root / "made")
        convert(str(root / "made"), str(root / "fp8"), "--to", "fp8")
        convert(str(root / "made"), str(root / "ue8m0"), "--to", "fp8", "--scale-fmt", "ue8m0")
        convert(str(root / "fp8"), str(root / "back"), "--to", "bf16")
        ids = torch.randint(96, (2, 30))
        for name in ("made", "fp8", "ue8m0", "back"):
            if name != "made":
                put_files(f"{at} converted {name}", root / name)
            for keep in (False, True) if name in ("fp8", "ue8m0") else (False,):
                model = K2Model.from_pretrained(root / name, keep_fp8=keep, dtype=torch.bfloat16, progress=False)
                recorder.put(f"{at} loaded {name} {keep}", model.state_dict())
                with torch.no_grad():
                    recorder.put(f"{at} logits {name} {keep}", model(ids))
                text = model.generate(ids, max_new_tokens=3, eos_token_ids=[], cache_dtype="auto")
                recorder.put(f"{at} text {name} {keep}", text)
                model.save_pretrained(root / f"{name} {keep}")
                put_files(f"{at} again {name} {keep}", root / f"{name} {keep}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
