"""The machine code against the kernels' plans: registers, no spills, 16-byte accesses, intended instructions."""

from collections import Counter

import pytest
import sass

import k2kernels
from k2kernels import _C

KERNELS = k2kernels.info()["kernels"]
ARCHS = ["sm_" + arch.split("-")[0] for arch in _C.build_info()["cuda_archs"]]

needs_kernels = pytest.mark.skipif(
    not _C.build_info()["cuda_archs"], reason="built without nvcc: there is no machine code"
)

# The plan of each kernel: the most registers a thread may take (48: 1,280 threads an SM; 64: 1,024; 80:
# 768); the 16-byte loads and stores of the fast path, of which 16 elements are as many as an element has bytes (SwiGLU
# loads gate and up, its gradient a third operand); and what else must be there, by architecture.
PORTABLE = ("sm_80", "sm_90a", "sm_120")
# Registers on sm_120, whose code takes some more: a step more, which its SMs of 1,536 threads have; K2K_RESIDENT.
SM_120 = {32: 40, 48: 64, 64: 80, 80: 128, 96: 104, 152: 160, 170: 208, 196: 208, 234: 240}
ENCODE = {arch: {"F2FP.SATFINITE.E4M3": 8} for arch in ("sm_90a", "sm_120")}
PLANS = {
    "quantize_rows_kernel<bf16, false>": (48, 2, 1, ENCODE),
    "quantize_rows_kernel<fp16, false>": (48, 2, 1, ENCODE),
    "quantize_rows_kernel<float, false>": (48, 4, 1, ENCODE),
    "quantize_rows_kernel<bf16, true>": (64, 4, 1, ENCODE),
    "quantize_rows_kernel<fp16, true>": (64, 4, 1, ENCODE),
    "quantize_rows_kernel<float, true>": (64, 8, 1, ENCODE),
    "quantize_128x128_kernel<bf16>": (64, 4, 2, ENCODE),
    "quantize_128x128_kernel<fp16>": (64, 4, 2, ENCODE),
    "quantize_128x128_kernel<float>": (64, 8, 2, ENCODE),
    "quantize_transposed_kernel<bf16>": (64, 4, 2, ENCODE),
    "quantize_transposed_kernel<fp16>": (64, 4, 2, ENCODE),
    "quantize_transposed_kernel<float>": (64, 4, 1, ENCODE),
    "dequantize_kernel<bf16>": (48, 1, 2, {}),
    "dequantize_kernel<fp16>": (48, 1, 2, {}),
    "dequantize_kernel<float>": (48, 1, 4, {}),
    "swiglu_kernel<bf16>": (64, 4, 2, {}),
    "swiglu_kernel<fp16>": (64, 4, 2, {}),
    "swiglu_kernel<float>": (64, 8, 4, {}),
    "swiglu_backward_kernel<bf16>": (80, 6, 4, {}),
    "swiglu_backward_kernel<fp16>": (80, 6, 4, {}),
    "swiglu_backward_kernel<float>": (80, 12, 8, {}),
}
BYTES = {"float": 4, "bf16": 2, "fp16": 2}
for x, x_bytes in BYTES.items():
    # The weight is loaded, x by cp.async (LDGSTS, an LDG too); the loop over a lane's sixteens is not unrolled.
    copy = {arch: {"LDGSTS.E.BYPASS.128": x_bytes} for arch in PORTABLE}
    copy["sm_90a"] |= ENCODE["sm_90a"]
    PLANS[f"rms_norm_quantize_kernel<{x}, 1>"] = (64 if x == "float" else 48, 2 * x_bytes, 1, copy)
    PLANS[f"rms_norm_quantize_kernel<{x}, 2>"] = (80 if x == "float" else 64, 2 * x_bytes, 1, copy)
for row, row_bytes in BYTES.items():
    for cache, cache_bytes in BYTES.items():
        PLANS[f"mla_append_kernel<{row}, {cache}>"] = (48, row_bytes, cache_bytes, {})
        PLANS[f"mla_gather_kernel<{row}, {cache}>"] = (48, cache_bytes, 2 * row_bytes, {})  # or zeros
    PLANS[f"mla_append_kernel<{row}, unsigned char>"] = (48, 2 * row_bytes, 3, ENCODE)  # latent and rope
    PLANS[f"mla_gather_kernel<{row}, unsigned char>"] = (48, 3, 3 * row_bytes, {})
    PLANS[f"merge_attention_states_kernel<{row}>"] = (64, 2 * row_bytes, row_bytes, {})
PLANS["mla_schedule_kernel"] = (48, 0, 0, {})
# A round of the portable mla_decode: 36 steps of 16 dims over 4 x 8 keys, of which a warp has its share;
# 2 x 16 keys over its share of 512 columns. Copies stand twice, before the rounds and in them, and count as loads.
for row in ("bf16", "fp16"):
    PLANS[f"mla_combine_kernel<{row}>"] = (32, 7, 0, {})  # four parts at a time, then two, then one
    for row_warps, registers in ((1, 152), (2, 196), (4, 255)):
        steps, columns = (36 * row_warps + 7) // 8, 8 * row_warps
        products = {
            "HMMA.16816.F32" + (".BF16" if row == "bf16" else ""): 4 * steps + 2 * columns,
            "LDSM.16.M88.4": 2 * steps,
            "LDSM.16.MT88.4": columns,
        }
        for quantized, copies in ((False, 9), (True, 6)):
            if row == "fp16" and quantized:
                continue
            others = products | {"LDGSTS.E.BYPASS.128": 2 * copies}
            PLANS[f"mla_decode_sm80_kernel<{row}, {row_warps}, {str(quantized).lower()}>"] = (
                registers, 2 * copies, 0, dict.fromkeys(PORTABLE, others),
            )  # fmt: skip
    # 64 rows, 64 keys: 36 steps of 16 dims; 4 x 16 keys by each half of the columns. Boxes of up to four pages.
    bf16 = ".BF16" if row == "bf16" else ""
    for pair, load in (("false", "UTMALDG.3D"), ("true", "UTMALDG.3D.MULTICAST")):
        instructions = {
            f"HGMMA.64x64x16.F32{bf16}": 36, f"HGMMA.64x256x16.F32{bf16}": 8, load: 4, "UTMALDG.2D": 1,
            "STSM.16.M88.4": 4, "USETMAXREG": 3, "PREEXIT": 1,
        }  # fmt: skip
        PLANS[f"mla_decode_sm90_kernel<{row}, {pair}>"] = (168, 0, 32, {"sm_90a": instructions})
    PLANS[f"mla_combine_sm90_kernel<{row}>"] = (32, 7, 0, {"sm_90a": {"ACQBULK": 1}})
# mla_prefill. The portable kernels' copies stand twice, before the loop and in it, and count as loads; of sm_90a, the
# first block's scores and the last one's sums stand alone. Fragments of q (dQ: of nothing, dK/dV: of K or V) are loaded
# by words.
for row in ("bf16", "fp16"):
    bf16 = ".BF16" if row == "bf16" else ""
    for name, registers, copies, stores, products, rows, columns in (
        ("forward", 234, 32, 8, 160, 48, 32),  # 12 steps of 16 dims over 64 keys; 4 x 16 keys by 128 columns
        ("dq", 255, 20, 12, 128, 40, 24),  # 12 and 8 steps over 32 keys; 2 x 16 keys by 192 columns
        ("dkv", 255, 10, 20, 160, 40, 40),  # the same over 32 queries; 2 x 16 queries by 128 and 192 columns
    ):
        others = {f"HMMA.16816.F32{bf16}": products, "LDSM.16.M88.4": rows, "LDSM.16.MT88.4": columns}
        others["LDGSTS.E.BYPASS.128"] = copies
        plan = (registers, copies, stores, dict.fromkeys(PORTABLE, others))
        PLANS[f"mla_prefill_{name}_sm80_kernel<{row}>"] = plan
    for name, stores, roles, loads, exponentials, products in (
        ("forward", 8, 2, 11, 132, {"64x128x16": 2 * 12 + 2 * 8}),
        ("dq", 12, 2, 10, 48, {"64x96x16": 12 + 8, "64x192x16": 6}),
        ("dkv", 20, 3, 13, 128, {"64x128x16": 2 * 12 + 8 + 2 * 8, "64x192x16": 8}),
    ):
        others = {f"HGMMA.{shape}.F32{bf16}": n for shape, n in products.items()}
        others |= {"UTMALDG.3D": loads, "MUFU.EX2": exponentials, "USETMAXREG": roles}
        PLANS[f"mla_prefill_{name}_sm90_kernel<{row}>"] = (168, 0, stores, {"sm_90a": others})
    PLANS[f"mla_prefill_preprocess_kernel<{row}>"] = (48, 8, 0, {})
    PLANS[f"mla_prefill_rope_sum_kernel<{row}>"] = (48, 5, 0, {})
for tiles in ("false, 64", "false, 128", "true, 64"):
    PLANS[f"mla_prefill_schedule_kernel<{tiles}>"] = (48, 0, 0, {})
# Tiles of 128x128, 64x128 and 16x128: registers, cp.async of 16 bytes (a stage at a time, in two places), 16-byte
# stores, and a block's products: of 16x8x16, of decoded values; from sm_89 on of e4m3, which sm_90a makes into two such
# products and conversions.
for tile, (registers, copies, stores, products) in {
    "128, 128, 64, 32, 4, 1": (255, 16, 16, 128),
    "64, 128, 32, 32, 3, 1": (255, 12, 8, 64),
    "16, 128, 16, 16, 4, 2": (128, 10, 0, 16),
}.items():
    others = {"HMMA.16816.F32": products, "LDSM.16.M88.4": products // 8}
    decoded = {"F2FP.F16.E4M3.UNPACK_B": products}
    e4m3 = {"QMMA.16832.F32.E4M3.E4M3": products // 2, "LDSM.16.M88.4": products // 8}
    PLANS[f"fp8_gemm_portable_kernel<PortableTile<{tile}> >"] = (
        registers,
        copies,
        stores,
        {"sm_80": others, "sm_89": e4m3, "sm_90a": {**others, **decoded}},
    )
# For sm_90a alone: rows of columns, and a scale of B for 128 columns or (fine) for each. 168 registers are what 384
# threads share before they change hands. A block's products, and the FFMA that add it; of panels, those of two types,
# for one wave of rows: the other takes its place. By rows, four floats of bias and of C are loaded, four of D stored.
for tile, (panels, products, added) in {
    "128, 128, 5, 2, false": (16, "64x128x32", 64),
    "128, 128, 5, 2, true": (16, "64x128x32", 64),
    "128, 192, 4, 3, false": (24, "64x192x32", 2 * 80),  # with the boundary after 64 and after 128 columns
    "256, 128, 4, 1, false": (16, "64x128x32", 2 * 64),
    "64, 256, 4, 2, false": (16, "64x128x32", 64),
}.items():
    others = {
        f"QGMMA.{products}.F32.E4M3.E4M3": 8 if tile.startswith("256") else 4,
        "FFMA": added,
        "UTMALDG.3D.MULTICAST": 2,
        "UTMASTG.3D": panels // 4,
        "STSM.16.M88.4": panels,
        "LDGSTS": 2,
        "USETMAXREG": 2,
    }
    PLANS[f"fp8_gemm_sm90_kernel<HopperTile<{tile}> >"] = (168, 2, 1, {"sm_90a": others})
# Two pipelines: barriers of both, and those by which they take turns. SwiGLU: copies of A, gate and up; exps and
# reciprocals of 64 elements; the sums given and fetched, two rows of codes.
turns = {"QGMMA.64x128x32.F32.E4M3.E4M3": 8, "FFMA": 128, "UTMALDG.3D.MULTICAST": 2, "UTMASTG.3D": 4, "SYNCS": 51}
PLANS["fp8_gemm_sm90_kernel<PingPongTile<128, 128, 3, 1> >"] = (168, 2, 1, {"sm_90a": {**turns, "STSM.16.M88.4": 16}})
swiglu = {"QGMMA.64x128x32.F32.E4M3.E4M3": 8, "FFMA": 128, "UTMALDG.3D.MULTICAST": 3, "MUFU.EX2": 64, "MUFU.RCP": 64}
swiglu |= {"STS.128": 16, "LDS.128": 16, "F2FP.SATFINITE.E4M3.F32.PACK_AB_MERGE_C": 32, "USETMAXREG": 2}
PLANS["fp8_gemm_sm90_kernel<SwigluTile<4> >"] = (168, 0, 4, {"sm_90a": swiglu})
# Few rows: two CTAs of 192 threads an SM. The least of its products, and both ways to store a pair.
for tokens, stages in ((8, 10), (16, 10), (32, 8), (64, 5)):
    others = {f"QGMMA.64x{tokens}x32.F32.E4M3.E4M3": 4, "FFMA": tokens // 2, "UTMALDG.3D": 2, "LDGSTS": 3}
    PLANS[f"fp8_gemm_sm90_small_kernel<SmallTile<{tokens}, {stages}> >"] = (168, 0, 0, {"sm_90a": others})
# newton_schulz: its loops stand twice, for panels by rows and by columns, each with 2 x 16 of the summed axis over
# 4 x 4 products; transposing loads besides for two mirrored stores, two of their eight rounds at a time. Copies: two
# stages before the loop and one in it, four chunks each, twice; four of C. Stores: tile and mirror, twice, and three
# dtypes of results.
# In a step of the optimizer the prologue loads momenta by plain accesses, which for the compiler are those of 16 bytes,
# too, and stores them in two dtypes; the last product stores weights and copies in three.
PLANS["newton_schulz_table_kernel<NsTensor>"] = (32, 0, 0, {})
PLANS["newton_schulz_table_kernel<NsUpdate>"] = (64, 0, 0, {})
for updates, registers, stores in (("false", 48, 0), ("true", 64, 6)):
    PLANS[f"newton_schulz_norm_kernel<{updates}>"] = (registers, 8, stores, {})  # of x in three dtypes
    for iterate in ("bf16", "fp16"):
        PLANS[f"newton_schulz_cast_kernel<{iterate}, {updates}>"] = (registers, 8, 2, {})
for iterate in ("bf16", "fp16"):
    mma = "HMMA.16816.F32" + (".BF16" if iterate == "bf16" else "")
    products = {mma: 64, "LDSM.16.M88.4": 12, "LDSM.16.MT88.4": 12 + 4, "LDGSTS.E.BYPASS.128": 28}
    PLANS[f"newton_schulz_sm80_kernel<{iterate}>"] = (128, 28, 20, dict.fromkeys(PORTABLE, products))
    # By wgmma: a stage's 4 x 16 of the summed axis, by rows and by columns; as often, 2 x 16 copies, and a proxy fence
    # (and that of the barriers); C and stores as above.
    hopper = {"HGMMA.64x128x16.F32" + (".BF16" if iterate == "bf16" else ""): 8, "LDGSTS.E.BYPASS.128": 2 * 32 + 4}
    hopper |= {"ARRIVES.LDGSTSBAR": 2, "FENCE.VIEW.ASYNC": 3, "WARPGROUP.DEPBAR": 4, "LDSM.16.MT88.4": 4}
    PLANS[f"newton_schulz_sm90_kernel<{iterate}>"] = (96, 68, 20, {"sm_90a": hopper})
    # Everything twice, wide and tall: R, squares, and products with panels, 16 each; what a panel or square may have to
    # transpose; copies of four chunks for each of two walks over X, the first and the next; stores of a panel, and
    # 12 of results.
    products = {mma: 2 * 3 * 16, "LDSM.16.M88.4": 28, "LDSM.16.MT88.4": 28, "LDGSTS.E.BYPASS.128": 2 * 2 * 2 * 4}
    for blocks, registers in ((1, 168), (2, 128), (3, 168)):
        PLANS[f"newton_schulz_small_kernel<{iterate}, {blocks}>"] = (
            registers,
            32,
            2 * 13,
            dict.fromkeys(PORTABLE, products),
        )
for x, x_bytes in BYTES.items():
    for plans in (False, True):
        registers, match = (64, {arch: {"MATCH.ANY": 8} for arch in PORTABLE}) if plans else (48, {})
        codes = {arch: ENCODE.get(arch, {}) | match.get(arch, {}) for arch in PORTABLE}
        PLANS[f"moe_move_kernel<{x}, true, {str(plans).lower()}>"] = (registers, x_bytes, 1, codes)
        if x != "fp16":  # is copied as bf16
            PLANS[f"moe_move_kernel<{x}, false, {str(plans).lower()}>"] = (registers, x_bytes, x_bytes, match)
    # So many rows are on their way; shared and residual in one loop, the gradient of the result, and the result itself
    # may be of any of the three types. The gradient zeroes pad rows in another place.
    rows = 2 if x == "float" else 4
    PLANS[f"moe_combine_kernel<{x}>"] = (80, rows * x_bytes + 8, 8, {})
    PLANS[f"moe_combine_backward_kernel<{x}>"] = (80, rows // 2 * x_bytes + 8, (rows // 2 + 1) * x_bytes, {})
for vectors in (1, 2, 3, 4, 8):
    registers, redux = 64 if vectors <= 3 else 128, {arch: {"REDUX": 2} for arch in PORTABLE}
    PLANS[f"moe_route_kernel<{vectors}>"] = (registers, 2 * vectors, 0, redux)  # logits and bias
    PLANS[f"moe_route_backward_kernel<{vectors}>"] = (registers, vectors, vectors, {})
# Products of experts: a stage's copies stand in three places (before the first tile, before the next, in the loop); a
# stage's 16 x 8 x 16 products of a warp; ldmatrix transposes what lies by columns, in A or B. 16-byte stores: 2 for 16
# rows of a warp.
for dtype, bf16 in (("bf16", ".BF16"), ("fp16", "")):
    for tile, by_columns, registers, copies, stores, products, a_loads, b_loads in (
        ("128, 128, 32, 64, 4, 2", ("false, false", "false, true", "true, true"), 128, 12, 8, 32, 8, 4),
        ("16, 128, 64, 16, 4, 2", ("false, false", "false, true"), 96, 27, 2, 16, 4, 8),
    ):
        for columns in by_columns:
            transposed = [flag == "true" for flag in columns.split(", ")]
            loads = {f"LDSM.16.M{'T' if t else ''}88.4": 0 for t in transposed}
            for t, number in zip(transposed, (a_loads, b_loads)):
                loads[f"LDSM.16.M{'T' if t else ''}88.4"] += number
            others = {f"HMMA.16816.F32{bf16}": products, "LDGSTS.E.BYPASS.128": copies, **loads}
            PLANS[f"grouped_gemm_kernel<{dtype}, GroupedGemmTile<{tile}>, {columns}>"] = (
                registers, copies, stores, dict.fromkeys(PORTABLE, others),
            )  # fmt: skip
# With 4-bit weights: copies stand in the same three places; the codes of 64 of K are two loads of 16 bytes, the 16
# products for 16 tokens take four ldmatrix; a stage is 128 or 64 of K. Four CTAs of 128 threads an SM (128 registers),
# or three (170).
for kind, scales in (("Int4", "LDS.64"), ("Int4Wide", "LDS.64"), ("Mxfp4", "LDS")):
    for tile, registers, copies, tokens, steps in (("16, 2, 3, 4", 128, 8, 16, 2), ("64, 1, 3, 3", 170, 7, 64, 1)):
        others = {"HMMA.16816.F32.BF16": tokens * steps, "LDSM.16.M88.4": tokens // 4 * steps}
        others |= {"LDGSTS.E.BYPASS.128": 3 * copies, "LDS.128": 2 * steps, scales: 2 * steps}
        for swiglu in ("false", "true"):  # whose results are stored by 4 bytes
            PLANS[f"w4_gemm_kernel<{kind}, {swiglu}, W4Tile<{tile}> >"] = (
                registers, 3 * copies, 0 if swiglu == "true" else tokens // 8, dict.fromkeys(PORTABLE, others),
            )  # fmt: skip
# For sm_90a and few rows, K in stages of 4 or 2 chunks and the chunks that are left over: products and loads of codes
# stand in both places. Copies: a box of tokens, a copy for each warpgroup's weights. Three, two CTAs or one on an SM.
for kind, scales in (("Int4", "LDS.64"), ("Mxfp4", "LDS")):
    for tokens, warpgroups, chunks, stages, ctas, registers in (
        (8, 1, 4, 5, 3, 128), (32, 2, 2, 5, 2, 96), (64, 4, 4, 3, 1, 96),
    ):  # fmt: skip
        others = {f"HGMMA.64x{tokens}x16.F32.BF16": 4 * (chunks + 1), "LDS.128": chunks + 1, scales: chunks + 1}
        others |= {"UTMALDG.3D": 1, "UBLKCP": warpgroups, "WARPGROUP.DEPBAR": chunks + 2}
        tile = f"{tokens}, {warpgroups}, {chunks}, {stages}, {ctas}"
        PLANS[f"w4_gemm_sm90_few_kernel<{kind}, FewTile<{tile}> >"] = (registers, 0, 0, {"sm_90a": others})
# For sm_90a and many rows: a loop over two stages for each number of tokens, and one epilogue, 64 tokens at a time.
for kind, scales in (("Int4", "LDS.64"), ("Mxfp4", "LDS")):
    for swiglu, stores in (("false", 4), ("true", 2)):
        others = {f"HGMMA.64x{tokens}x16.F32.BF16": 2 * 4 for tokens in (64, 128, 192, 256)}
        others |= {"LDS.128": 4 * 2 + stores, scales: 4 * 2, "WARPGROUP.DEPBAR": 4 * 3, "STSM.16.MT88.4": stores}
        others |= {"UTMALDG.2D": 1, "UBLKCP": 2, "USETMAXREG": 2}
        PLANS[f"w4_gemm_sm90_many_kernel<{kind}, {swiglu}>"] = (168, 0, stores, {"sm_90a": others})
PLANS["moe_count_kernel"] = (48, 0, 0, {arch: {"MATCH.ANY": 8} for arch in PORTABLE})
PLANS["moe_scan_kernel"] = (64, 0, 0, {})
# Between ranks: 2 KiB a warp. A wait looks at a flag and the abort word, and each acquire invalidates L1 (CCTL.IVALL):
# the emulator, which knows no weak memory, would not miss one.
PLANS["scatter_kernel"] = (80, 4, 4, {arch: {"MATCH.ANY": 1} for arch in PORTABLE})
PLANS["gather_kernel"] = (80, 4, 4, {arch: {"ST.E.64.STRONG.SYS": 1} for arch in PORTABLE})
acquires = {"LD.E.64.STRONG.SYS": 2, "CCTL.IVALL": 5}
for wait in ("scatter", "gather"):
    PLANS[f"{wait}_wait_kernel"] = (32, 0, 0, dict.fromkeys(PORTABLE, acquires))
# Balance: a row alone for its largest logit; a row and hits, two rounds in flight and one left over; both once more.
PLANS["moe_hits_kernel"] = (32, 0, 0, {})
PLANS["moe_sequence_loss_kernel"] = (64, 1 + 3 * 2, 0, {})
PLANS["moe_sequence_loss_backward_kernel"] = (64, 1 + 3 * 2 + 2, 1, {})
PLANS["moe_loss_total_kernel"] = PLANS["moe_update_bias_kernel"] = (32, 0, 0, {})


def few_rows_bytes(chunk, tokens, warpgroups, chunks, stages):
    """Of w4_gemm_sm90_few_kernel: tokens are 128 bytes for 64 of K, a stage has two barriers."""
    stage = chunks * (128 * tokens + warpgroups * chunk)
    parts = warpgroups * 64 * tokens * 4 if tokens < 64 else 16
    queue = 4 * (40 + 2 * 8)  # tiles, and barriers of each
    return -(-(stages * (stage + 2 * 8) + parts + queue + 2 * 8) // 1024) * 1024


# The shared memory of a CTA, in bytes; an SM has 164 KiB (sm_80) or 228 KiB (sm_90a). Kernels that are not
# named have none. The norm keeps x and the weight, n times 16 of each of 256 threads, and sums of squares.
PREFILL_SM80 = {"forward": 41088, "dq": 41088, "dkv": 91264}
PREFILL_SM90 = {"forward": 215040, "dq": 206848, "dkv": 226304}
SHARED = {
    **{f"quantize_rows_kernel<{t}, {swiglu}>": 36 for t in BYTES for swiglu in ("false", "true")},
    **{f"quantize_128x128_kernel<{t}>": 64 for t in BYTES},
    "quantize_transposed_kernel<bf16>": 11408,
    "quantize_transposed_kernel<fp16>": 11408,
    "quantize_transposed_kernel<float>": 5776,
    # Keys of four rounds; where they are quantised, in rows of 656 bytes, beside those of the round in bfloat16.
    **{f"mla_decode_sm80_kernel<{t}, {w}, false>": 163968 for t in ("bf16", "fp16") for w in (1, 2, 4)},
    **{f"mla_decode_sm80_kernel<bf16, {w}, true>": 137344 for w in (1, 2, 4)},
    **{f"mla_combine{chip}_kernel<{t}>": 4 * 512 * 4 for chip in ("", "_sm90") for t in ("bf16", "fp16")},
    "mla_schedule_kernel": 13 * 4,  # a task
    # q, two stages of keys and probabilities in boxes of 8 KB, and what roles tell each other: 227 KiB are allowed.
    **{f"mla_decode_sm90_kernel<{t}, {pair}>": 230400 for t in ("bf16", "fp16") for pair in ("false", "true")},
    # K and V of 64 keys; of 32 keys, q and dO in registers; four stages of q, dO, lse2, delta of 32 queries, P twice.
    **{f"mla_prefill_{name}_sm80_kernel<{t}>": n for name, n in PREFILL_SM80.items() for t in ("bf16", "fp16")},
    # Q, dO or K, V of the tile; two stages of 128 (dQ: 96) keys or of 128 queries; of dK/dV P^T.
    **{f"mla_prefill_{name}_sm90_kernel<{t}>": n for name, n in PREFILL_SM90.items() for t in ("bf16", "fp16")},
    **{f"mla_prefill_schedule_kernel<{tiles}>": 9 * 4 for tiles in ("false, 64", "false, 128", "true, 64")},  # a task
    # Stages of 132 bytes a row; those of sm_90a fill 227 KiB, or, in the small tiles, half of it.
    "fp8_gemm_portable_kernel<PortableTile<128, 128, 64, 32, 4, 1> >": 136448,
    "fp8_gemm_portable_kernel<PortableTile<64, 128, 32, 32, 3, 1> >": 77056,
    "fp8_gemm_portable_kernel<PortableTile<16, 128, 16, 16, 4, 2> >": 77312,
    "fp8_gemm_sm90_kernel<HopperTile<128, 128, 5, 2, false> >": 199680,
    "fp8_gemm_sm90_kernel<HopperTile<128, 128, 5, 2, true> >": 202752,
    "fp8_gemm_sm90_kernel<HopperTile<128, 192, 4, 3, false> >": 216064,
    "fp8_gemm_sm90_kernel<HopperTile<256, 128, 4, 1, false> >": 218112,
    "fp8_gemm_sm90_kernel<HopperTile<64, 256, 4, 2, false> >": 198656,
    "fp8_gemm_sm90_kernel<PingPongTile<128, 128, 3, 1> >": 217088,
    "fp8_gemm_sm90_kernel<SwigluTile<4> >": 232448,
    "fp8_gemm_sm90_small_kernel<SmallTile<8, 10> >": 98304,
    "fp8_gemm_sm90_small_kernel<SmallTile<16, 10> >": 110592,
    "fp8_gemm_sm90_small_kernel<SmallTile<32, 8> >": 110592,
    "fp8_gemm_sm90_small_kernel<SmallTile<64, 5> >": 102400,
    # moe: 8 warps' counts of 1,024 experts and their totals; with them sums of warps, offsets, counts and 2,048 slots.
    "moe_count_kernel": 20480,
    "scatter_wait_kernel": 8,
    "gather_wait_kernel": 8,
    "moe_scan_kernel": 32 * 12,
    **{f"moe_move_kernel<{t}, {q}, true>": 36976 for t in BYTES for q in ("false", "true")},
    **{f"moe_combine_backward_kernel<{t}>": 2048 for t in BYTES},
    **{f"moe_route_kernel<{n}>": 4096 for n in (1, 2, 3, 4, 8)},
    # Sums of eight warps, numbers of sequences of eight warps; a counter for each of 1,024 experts, sums of 32 warps.
    "moe_sequence_loss_kernel": 8 * 4,
    "moe_sequence_loss_backward_kernel": 8 * 8,
    "moe_loss_total_kernel": 8 * (4 + 8),
    "moe_update_bias_kernel": (1024 + 32) * 8,
    # Four stages of 32 of two panels of 128, of 64 of panels of 16 and 128.
    **{
        f"grouped_gemm_kernel<{t}, GroupedGemmTile<{tile}>, {columns}>": size
        for t in ("bf16", "fp16")
        for columns in ("false, false", "false, true", "true, true")
        for tile, size in (("128, 128, 32, 64, 4, 2", 4 * 32 * 256 * 2), ("16, 128, 64, 16, 4, 2", 4 * 64 * 144 * 2))
    },
    # Three stages: once or twice 16 or 64 tokens, 128 bytes each, and two chunks of packed weights.
    **{
        f"w4_gemm_kernel<{kind}, {swiglu}, W4Tile<{tokens}, {steps}, 3, {ctas}> >": 3 * steps * (128 * tokens + chunks)
        for kind, chunks in (("Int4", 2 * 2304), ("Int4Wide", 2 * 2304), ("Mxfp4", 2 * 2176))
        for swiglu in ("false", "true")
        for tokens, steps, ctas in ((16, 2, 4), (64, 1, 3))
    },
    # Stages of tokens and packed weights, sums of a part of K, tiles and barriers.
    **{
        f"w4_gemm_sm90_few_kernel<{kind}, FewTile<{tokens}, {warpgroups}, {chunks}, {stages}, {ctas}> >": size
        for kind, chunk in (("Int4", 2304), ("Mxfp4", 2176))
        for tokens, warpgroups, chunks, stages, ctas in ((8, 1, 4, 5, 3), (32, 2, 2, 5, 2), (64, 4, 4, 3, 1))
        for size in [few_rows_bytes(chunk, tokens, warpgroups, chunks, stages)]
    },
    # Five stages of 256 tokens and two chunks of packed weights, four panels of 8 KB; the rest fits in the last KiB.
    **{
        f"w4_gemm_sm90_many_kernel<{kind}, {swiglu}>": (-(-5 * 2 * chunk // 1024) + 192) * 1024
        for kind, chunk in (("Int4", 2304), ("Mxfp4", 2176))
        for swiglu in ("false", "true")
    },
    **{f"rms_norm_quantize_kernel<{t}, {n}>": 2 * n * 16 * 256 * b + 64 for t, b in BYTES.items() for n in (1, 2)},
    # Sums of eight warps; three stages of two panels of 128 x 32.
    **{f"newton_schulz_norm_kernel<{updates}>": 64 for updates in ("false", "true")},
    **{f"newton_schulz_cast_kernel<{t}, {u}>": 64 for t in ("bf16", "fp16") for u in ("false", "true")},
    **{f"newton_schulz_sm80_kernel<{t}>": 3 * 2 * 128 * 32 * 2 for t in ("bf16", "fp16")},
    # Three stages of two panels of 128 x 64, and barriers, in a multiple of the swizzle's 1,024 bytes.
    **{f"newton_schulz_sm90_kernel<{t}>": 3 * 2 * 128 * 64 * 2 + 1024 for t in ("bf16", "fp16")},
    # A triangle of blocks of 8 KB, and two panels of 16 KB for each 64 rows, or two more triangles.
    **{
        f"newton_schulz_small_kernel<{t}, {n}>": n * (n + 1) // 2 * 8192 + max(n * (n + 1) * 8192, 2 * n * 16384)
        for t in ("bf16", "fp16")
        for n in (1, 2, 3)
    },
}

# What the wrappers of csrc/arch become in the kernels of csrc/conformance, on every chip and on sm_90a.
INSTRUCTIONS = ["MATCH.ANY", "LDSM", "LDGSTS", "HMMA", "REDUX", "BPT.TRAP"]
HOPPER = ["HGMMA", "QGMMA", "STSM", "STAS.128", "SYNCS.ARRIVE", "USETMAXREG", "UBLKCP", "UBLKPF", "UBLKRED", "UCGABAR"]
HOPPER += ["UTMALDG.3D.MULTICAST", "UTMAPF.L2.3D", "UTMASTG.3D", "UTMAREDG.3D", "UTMACCTL.PF"]


def count(opcodes, *parts):
    """How many opcodes begin with the first of `parts` and hold the others."""
    return sum(n for op, n in opcodes.items() if op.startswith(parts[0]) and all(part in op for part in parts[1:]))


def short(kernel):
    return kernel["kernel"].replace("k2k::", "")


def check(kernel, plan, opcodes):
    registers, loads, stores, others = plan
    opcodes = opcodes[kernel["arch"], kernel["symbol"]]
    if kernel["arch"] == "sm_120":
        registers = SM_120.get(registers, registers)
    assert kernel["registers"] <= registers
    assert kernel["stack_bytes"] == kernel["spill_bytes"] == 0
    assert count(opcodes, "LDL") == count(opcodes, "STL") == 0
    assert count(opcodes, "LDG", ".128") == loads
    assert count(opcodes, "STG", ".128") == stores
    for name, least in others.get(kernel["arch"], {}).items():
        assert count(opcodes, name) >= least, sorted(opcodes)


@pytest.fixture(scope="session")
def opcodes(listings):
    return sass.counts(listings)


@needs_kernels
def test_every_kernel_has_a_plan_and_is_compiled_for_every_architecture():
    compiled = {(short(kernel), kernel["arch"]) for kernel in KERNELS}
    own = {"fp8_gemm_portable_kernel": {*ARCHS, "sm_89"}}  # ADA_KERNELS of CMakeLists.txt
    assert compiled == {
        (name, arch)
        for name in PLANS
        for arch in (["sm_90a"] if "_sm90_" in name else own.get(name.partition("<")[0], ARCHS))
    }


@needs_kernels
@pytest.mark.parametrize("arch", ARCHS)
def test_wrappers_become_the_meant_instructions(arch, opcodes):
    found = sum((ops for (of, symbol), ops in opcodes.items() if of == arch and "11conformance" in symbol), Counter())
    wanted = INSTRUCTIONS + (HOPPER if arch == "sm_90a" else [])
    assert [name for name in wanted if not count(found, name)] == []


@needs_kernels
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: f"{short(kernel)}-{kernel['arch']}")
def test_kernel_meets_its_plan(kernel, opcodes):
    check(kernel, PLANS[short(kernel)], opcodes)
    assert kernel["dynamic_shared_bytes"] is not None, "launch it as launch<kernel, Storage>(shape, ...)"
    assert kernel["shared_bytes"] + kernel["dynamic_shared_bytes"] == SHARED.get(short(kernel), 0)


@needs_kernels
@pytest.mark.skipif("sm_90a" not in ARCHS, reason="not built for sm_90a")
def test_copies_of_mla_decode_start_without_a_loop_over_lanes(opcodes):
    """The compiler emits such a loop where it cannot prove that a single lane is active."""
    kernels = [k for k in KERNELS if "mla_decode_sm90_kernel" in k["kernel"]]
    assert len(kernels) == 4 and all(count(opcodes["sm_90a", k["symbol"]], "BRA.U.ANY") == 0 for k in kernels)


@needs_kernels
@pytest.mark.parametrize("arch", ARCHS)
def test_combine_rounds_products_before_it_adds_them(arch, opcodes):
    """As the definition does: otherwise the bits on a GPU would differ from the reference's."""
    kernels = [k for k in KERNELS if "moe_combine_kernel" in k["kernel"] and k["arch"] == arch]
    assert len(kernels) == 3 and all(count(opcodes[arch, k["symbol"]], "FFMA") == 0 for k in kernels)
