"""Checks of the machine code: errors and slow paths on a GPU that the emulator cannot detect.

Loops around tensor-core instructions hold no fence beyond the CTA and invalidate no L1; accumulators are not accessed
before the wait for them; code is small enough for the instruction caches; memory-bound kernels have enough loads in
flight. Each check is also run on a listing with the fault. test_sass.py counts the instructions that must be there.
"""

from collections import Counter

import pytest
from sass import Code, fences, fences_in_gmma_loops, is_fence, loads_in_flight, loop_of_all, touched_early
from test_sass import KERNELS, needs_kernels, short

PREFILL = ("mla_prefill_forward_sm90", "mla_prefill_dq_sm90", "mla_prefill_dkv_sm90")
TENSOR = (
    "fp8_gemm_sm90",
    "mla_decode_sm90",
    "newton_schulz_sm90",
    "w4_gemm_sm90",
    *PREFILL,
)  # what these names begin holds GMMAs

# The fences beyond a block and invalidations of L1 that a kernel may have, none of them in a loop around GMMAs.
CLUSTER_MEETS = Counter({"CCTL.IVALL": 2})  # cluster_wait, once at the start and once at the end of the kernel
STORES_END = Counter({"CCTL.IVALL": 1})  # bulk_wait<0>, once at the end, for the last TMA stores
# A part of K, once a tile: mbarrier_arrive_cluster publishes it (the first two), mbarrier_wait_cluster reads others'.
PARTS_CHANGE_HANDS = Counter({"MEMBAR.ALL.GPU": 1, "ERRBAR": 1, "CGAERRBAR": 1, "CCTL.IVALL": 1})
FENCES = {
    "fp8_gemm_sm90_kernel": CLUSTER_MEETS + STORES_END,
    "fp8_gemm_sm90_small_kernel": CLUSTER_MEETS + PARTS_CHANGE_HANDS,
    "w4_gemm_sm90_few_kernel<": CLUSTER_MEETS + PARTS_CHANGE_HANDS,
    **{f"w4_gemm_sm90_few_kernel<{kind}, FewTile<64": CLUSTER_MEETS for kind in ("Int4", "Mxfp4")},  # K is whole
    "mla_decode_sm90_kernel<bf16, true>": CLUSTER_MEETS,
    "mla_decode_sm90_kernel<fp16, true>": CLUSTER_MEETS,
}

# The most bytes of code. An SM has about 128 KB of instruction cache (L1.5), shared by all that runs on it; what a tile
# executes should fit with room to spare. Half as much again as today, where nothing else is said.
SIZES = {
    "fp8_gemm_sm90_kernel<SwigluTile": 96,  # 64 exps, quotients and codes of a thread, unrolled
    "fp8_gemm_sm90_kernel": 56,
    "fp8_gemm_sm90_small_kernel": 48,
    "mla_decode_sm90_kernel": 112,
    "mla_prefill_forward_sm90_kernel": 92,
    "mla_prefill_dq_sm90_kernel": 74,
    "mla_prefill_dkv_sm90_kernel": 114,
    "newton_schulz_sm90_kernel": 80,
    "w4_gemm_sm90_few_kernel": 60,
    "w4_gemm_sm90_many_kernel": 64,
}

# Loads of 16 bytes that are in flight together: what hides the latency of memory in kernels that only move data; and
# other loads that may be on their way beside the first of them. Add a row for each kernel whose header says "so many
# loads in flight".
VECTORS = {"bf16": 2, "fp16": 2, "float": 4}  # of a lane's 16 neighbours
IN_FLIGHT = {
    "scatter_kernel": (4, 0),  # kExchangeVectors
    "gather_kernel": (4, 0),
    "mla_append_kernel<bf16, bf16>": (2, 0),
    "mla_gather_kernel<bf16, bf16>": (2, 0),
    "mla_combine_sm90_kernel<bf16>": (2, 0),  # of four: the compiler waits for the second before the third
    "mla_prefill_preprocess_kernel<bf16>": (8, 0),  # four rows of dO and of O
    "mla_prefill_rope_sum_kernel<bf16>": (4, 0),
    "newton_schulz_norm_kernel<false>": (4, 0),
    "newton_schulz_cast_kernel<bf16, false>": (4, 0),
}
for x, vectors in VECTORS.items():
    rows = 2 if x == "float" else 4
    IN_FLIGHT[f"moe_combine_kernel<{x}>"] = (rows * vectors, 0)  # rows_in_flight of csrc/moe/config.h
    IN_FLIGHT[f"moe_combine_backward_kernel<{x}>"] = (rows // 2 * vectors + 2, 0)  # and the gradient's own row
    for quantize in ("true", "false") if x != "fp16" else ("true",):
        # x is loaded first; the token's expert, rank and the tile's count come meanwhile.
        IN_FLIGHT[f"moe_move_kernel<{x}, {quantize}, false>"] = (vectors, 3)
        IN_FLIGHT[f"moe_move_kernel<{x}, {quantize}, true>"] = (vectors, 0)
    IN_FLIGHT[f"swiglu_kernel<{x}>"] = (2 * vectors, 0)  # gate and up
    IN_FLIGHT[f"swiglu_backward_kernel<{x}>"] = (3 * vectors, 0)
    IN_FLIGHT[f"quantize_rows_kernel<{x}, false>"] = (vectors, 0)
    IN_FLIGHT[f"quantize_rows_kernel<{x}, true>"] = (2 * vectors, 0)
    IN_FLIGHT[f"quantize_128x128_kernel<{x}>"] = (2 * vectors, 0)
# Where the compiler for sm_120 waits earlier, whatever registers it may take.
ON_SM_120 = {f"moe_combine_backward_kernel<{x}>": (4, 0) for x in VECTORS}
ON_SM_120["moe_move_kernel<float, true, false>"] = (4, 0)
ON_SM_120["mla_prefill_preprocess_kernel<bf16>"] = (5, 0)
ON_SM_120["mla_prefill_rope_sum_kernel<bf16>"] = (2, 0)

# The most issue slots of a warp for 64 of K of a tile, 8,192 weights of four warps, where decoding is bound by them:
# the instructions of the loop around the products, and how many times 64 of K it takes. An H200's HBM brings so many
# weights in 223 clocks (int4; mxfp4: 211). With 64 tokens the products alone take 512.
SLOTS = {
    f"w4_gemm_kernel<{kind}, {swiglu}, W4Tile<{tile}>": (most, steps)
    for swiglu in ("false", "true")
    for kind, tile, most, steps in (
        ("Int4", "16, 2, 3, 4", 144, 2),
        ("Mxfp4", "16, 2, 3, 4", 164, 2),
        ("Int4", "64, 1, 3, 3", 240, 1),
        ("Int4Wide", "16, 2, 3, 4", 180, 2),
        ("Int4Wide", "64, 1, 3, 3", 280, 1),
        ("Mxfp4", "64, 1, 3, 3", 260, 1),
    )
}
# The same on sm_90a, where an H200's HBM brings so many weights in 223 clocks (int4; mxfp4: 211).
HOPPER_SLOTS = {
    f"w4_gemm_sm90_few_kernel<{kind}, FewTile<{tile}>": (most, chunks)
    for tile, chunks, int4, mxfp4 in (
        ("8, 1, 4, 5, 3", 4, 146, 165),
        ("32, 2, 2, 5, 2", 2, 172, 192),
        ("64, 4, 4, 3, 1", 4, 148, 168),
    )
    for kind, most in (("Int4", int4), ("Mxfp4", mxfp4))
}


def row(table, name):
    """Of the longest key that the name begins with."""
    fitting = [key for key in table if name.startswith(key)]
    return table[max(fitting, key=len)] if fitting else None


def with_tensor_cores():
    return [kernel for kernel in KERNELS if short(kernel).startswith(TENSOR)]


def named(kernel):
    return f"{short(kernel)}-{kernel['arch']}"


@pytest.fixture(scope="session")
def codes(listings):
    """{(arch, symbol): Code} of the kernels with GMMAs."""
    of_package = {kernel: text for kernel, text in listings.items() if "conformance" not in kernel[1]}
    return {kernel: Code(text) for kernel, text in of_package.items() if "GMMA" in text}


@needs_kernels
def test_the_names_are_those_of_the_kernels_with_tensor_cores(codes):
    assert {(k["arch"], k["symbol"]) for k in with_tensor_cores()} == set(codes)
    for table in (FENCES, SIZES):
        assert [key for key in table if not any(short(k).startswith(key) for k in KERNELS)] == []


@needs_kernels
@pytest.mark.parametrize("kernel", with_tensor_cores(), ids=named)
def test_tensor_cores_are_not_kept_waiting(kernel, codes):
    code = codes[kernel["arch"], kernel["symbol"]]
    assert code.gmma_loops, "GMMAs stand in loops"
    assert [f"{one.opcode} at {one.address:#x}" for one in fences_in_gmma_loops(code)] == []
    # Neither more, nor fewer: without its release another block would read a part that is not there yet.
    assert Counter(one.opcode for one in fences(code)) == (row(FENCES, short(kernel)) or Counter())


@needs_kernels
@pytest.mark.parametrize("kernel", with_tensor_cores(), ids=named)
def test_accumulators_are_read_after_the_wait(kernel, codes):
    early = touched_early(codes[kernel["arch"], kernel["symbol"]])
    assert [f"{one.opcode} {one.operands} at {one.address:#x}" for _, one in early] == []


@needs_kernels
@pytest.mark.parametrize("kernel", with_tensor_cores(), ids=named)
def test_code_is_small(kernel, codes):
    assert codes[kernel["arch"], kernel["symbol"]].size <= row(SIZES, short(kernel)) * 1024


@needs_kernels
@pytest.mark.parametrize("name", IN_FLIGHT)
def test_loads_are_in_flight_together(name, listings):
    kernels = [kernel for kernel in KERNELS if short(kernel) == name]
    assert kernels, "no kernel has this name"
    for kernel in kernels:
        vectors, others = IN_FLIGHT[name] if kernel["arch"] != "sm_120" else ON_SM_120.get(name, IN_FLIGHT[name])
        code = Code(listings[kernel["arch"], kernel["symbol"]])
        assert loads_in_flight(code, "LDG", ".128") >= vectors, kernel["arch"]
        assert loads_in_flight(code, "LDG") >= vectors + others, kernel["arch"]


def too_slow(code, most, steps=1):
    """What is wrong with the loop around a kernel's HMMAs, as words."""
    loop = loop_of_all(code, "HMMA")
    wrong = [one.opcode for one in loop if is_fence(one) or one.is_a("LDL") or one.is_a("STL")]
    if not 0 < len(loop) <= most * steps:
        wrong.append(f"{len(loop)} issue slots")
    if sum(one.is_a("LDS.128") for one in loop) != 2 * steps:  # the codes of 2 x 16 rows
        wrong.append("codes are not loaded by 16 bytes")
    return wrong


@needs_kernels
@pytest.mark.parametrize("name", SLOTS)
def test_a_stage_takes_few_issue_slots(name, listings):
    kernels = [kernel for kernel in KERNELS if short(kernel).startswith(name)]
    assert kernels, "no kernel has this name"
    for kernel in kernels:
        code = Code(listings[kernel["arch"], kernel["symbol"]])
        assert too_slow(code, *SLOTS[name]) == [], kernel["arch"]


def too_slow_with_gmma(code, most, chunks):
    """The same of the loop that takes `chunks` times 64 of K by wgmma, decoding two chunks while it waits for none."""
    loop = max(([code[i] for i in sorted(loop)] for loop in code.gmma_loops), key=len, default=[])
    return wrong_beside_gmma(loop, most, chunks)


def wrong_beside_gmma(loop, most, chunks):
    wrong = [one.opcode for one in loop if is_fence(one) or one.is_a("LDL") or one.is_a("STL")]
    slots = sum(one.opcode != "NOP" for one in loop)
    if not 0 < slots <= most * chunks / 2:
        wrong.append(f"{slots} issue slots")
    if sum(one.is_gmma for one in loop) != 4 * chunks:
        wrong.append("products are missing")
    if sum(one.is_a("LDS.128") for one in loop) != chunks:
        wrong.append("codes are not loaded by 16 bytes")
    waits = [one.operands for one in loop if one.is_a("WARPGROUP.DEPBAR")]
    if waits != ["gsb0, 0x1"] * chunks:
        wrong.append("products do not overlap with decoding")
    return wrong


@needs_kernels
@pytest.mark.parametrize("name", HOPPER_SLOTS)
def test_a_stage_takes_few_issue_slots_beside_wgmma(name, listings):
    kernels = [kernel for kernel in KERNELS if short(kernel).startswith(name)]
    assert len(kernels) == 1
    code = Code(listings["sm_90a", kernels[0]["symbol"]])
    assert too_slow_with_gmma(code, *HOPPER_SLOTS[name]) == []


@needs_kernels
@pytest.mark.parametrize("kind, most", [("Int4", 176), ("Mxfp4", 196)])
@pytest.mark.parametrize("swiglu", ["false", "true"])
def test_each_number_of_tokens_takes_few_issue_slots(kind, most, swiglu, listings):
    """Of 2,048 tensor clocks for 256 tokens, in which two warps issue them; 512 for 64."""
    name = f"w4_gemm_sm90_many_kernel<{kind}, {swiglu}>"
    code = Code(listings["sm_90a", next(k["symbol"] for k in KERNELS if short(k) == name)])
    assert len(code.gmma_loops) == 4
    for loop in code.gmma_loops:
        assert wrong_beside_gmma([code[i] for i in sorted(loop)], most, 2) == []


# ---- the checks themselves, on short listings


def listing(*lines):
    """As cuobjdump prints it, from address 0 on."""
    return "\n".join(f"        /*{16 * i:04x}*/                   {line} ;   /* 0x0 */" for i, line in enumerate(lines))


# A pipeline's loop: wait for a stage, multiply, wait for the products, add them, hand the stage back.
LOOP = [
    "MOV R1, R2",
    "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R142+URZ+0x30a98], R25",  # 10
    "@!P0 BRA 0xd0",
    "WARPGROUP.ARRIVE",
    "QGMMA.64x16x32.F32.E4M3.E4M3 R24, gdesc[UR8], RZ, !UPT",
    "QGMMA.64x16x32.F32.E4M3.E4M3 R24, gdesc[UR8], R24, gsb0",
    "WARPGROUP.DEPBAR.LE gsb0, 0x0",  # 60
    "FFMA R4, R24, R153, R4",
    "SYNCS.ARRIVE.TRANS64.RED.A1T0 RZ, [R133+URZ], RZ",  # 80
    "ISETP.GE.AND P0, PT, R134, R135, PT",
    "@!P0 BRA 0x10",  # a0
    "MOV R3, R2",
    "EXIT",
    "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R142+URZ+0x30a98], R25",  # d0: out of line
    "@!P0 BRA 0xd0",
    "BRA 0x30",
]


def changed(place, line):
    """LOOP with another line at a place."""
    return [*LOOP[:place], line, *LOOP[place + 1 :]]


def test_a_clean_loop_passes():
    code = Code(listing(*LOOP))
    assert [sorted(code[i].address for i in loop) for loop in code.gmma_loops] == [
        [*range(0x10, 0xB0, 16), *range(0xD0, 0x100, 16)]
    ]
    assert fences(code) == fences_in_gmma_loops(code) == touched_early(code) == []
    assert code.size == len(LOOP) * 16


@pytest.mark.parametrize("fence", ["MEMBAR.ALL.GPU", "MEMBAR.SC.SYS", "ERRBAR", "CGAERRBAR", "CCTL.IVALL"])
@pytest.mark.parametrize("place", [7, 13], ids=["in line", "out of line"])
def test_a_fence_in_a_loop_is_found(fence, place):
    code = Code(listing(*changed(place, fence)))
    assert [one.opcode for one in fences_in_gmma_loops(code)] == [fence]


@pytest.mark.parametrize("place", [0, 11], ids=["before", "behind"])
def test_a_fence_around_a_loop_is_told_from_one_in_it(place):
    code = Code(listing(*changed(place, "MEMBAR.ALL.GPU")))
    assert fences_in_gmma_loops(code) == [] and len(fences(code)) == 1
    assert fences(Code(listing(*changed(7, "MEMBAR.ALL.CTA")))) == []


def test_an_outer_loop_may_have_fences_where_an_inner_one_may_not():
    outer = changed(11, "@P1 BRA 0x0")
    for place, found in ((0, 0), (7, 1)):
        code = Code(listing(*outer[:place], "CCTL.IVALL", *outer[place + 1 :]))
        assert len(code.gmma_loops) == 1 and len(code.loops) == 3  # the third waits, out of line
        assert len(fences_in_gmma_loops(code)) == found and len(fences(code)) == 1


@pytest.mark.parametrize(
    "reads",
    [
        "FFMA R4, R31, R153, R4",  # the last of eight accumulators
        "MOV R24, RZ",
        "STSM.16.M88.4 [R2], R28",
        "STG.E.128 desc[UR4][R2.64], R24",
        "@P3 F2FP.BF16.F32.PACK_AB R5, R25, R26",
    ],
)
def test_an_accumulator_touched_before_the_wait_is_found(reads):
    early = touched_early(Code(listing(*changed(6, reads))))
    assert {one.operands for _, one in early} == {Code(listing(reads))[0].operands}
    assert touched_early(Code(listing(*changed(7, reads)))) == []


def test_a_missing_or_weaker_wait_is_found():
    assert touched_early(Code(listing(*changed(6, "NOP"))))
    assert touched_early(Code(listing(*changed(6, "WARPGROUP.DEPBAR.LE gsb0, 0x1"))))
    # One group may stay in flight: of two with accumulators of their own, the first is ready.
    two = [
        "HGMMA.64x8x16.F32 R24, gdesc[UR8], RZ, !UPT, gsb0",
        "HGMMA.64x8x16.F32 R32, gdesc[UR8], RZ, !UPT, gsb0",
        "WARPGROUP.DEPBAR.LE gsb0, 0x1",
    ]
    assert touched_early(Code(listing(*two, "FADD R4, R27, R4", "WARPGROUP.DEPBAR.LE gsb0, 0x0", "EXIT"))) == []
    assert touched_early(Code(listing(*two, "FADD R4, R32, R4", "WARPGROUP.DEPBAR.LE gsb0, 0x0", "EXIT")))


def test_a_written_operand_of_a_product_in_flight_is_found():
    product = "HGMMA.64x8x16.F32.BF16 R24, R152, gdesc[UR16].tnspB, R24, gsb0"
    wait = "WARPGROUP.DEPBAR.LE gsb0, 0x0"
    assert touched_early(Code(listing(product, "FADD R4, R155, R155", wait, "EXIT"))) == []
    assert touched_early(Code(listing(product, "FADD R155, R4, R4", wait, "EXIT")))


def test_a_longer_or_slower_stage_is_found():
    stage = ["LDS.128 R4, [R2]", "LDS.128 R8, [R2+0x200]", "HMMA.16816.F32.BF16 R12, R16, R4, R12", "NOP"]
    outer = ["MOV R1, R2", *stage, "@P0 BRA 0x10", "STG.E R3, R12", "@P1 BRA 0x0", "EXIT"]
    assert len(loop_of_all(Code(listing(*outer)), "HMMA")) == 4
    assert too_slow(Code(listing(*outer)), 4) == []
    assert too_slow(Code(listing(*outer)), 3) == ["4 issue slots"]
    for place, line, found in (
        (1, "LDS.64 R4, [R2]", "codes are not loaded by 16 bytes"),
        (4, "MEMBAR.ALL.GPU", "MEMBAR.ALL.GPU"),
        (4, "STL [R1], R4", "STL"),
    ):
        code = Code(listing(*outer[:place], line, *outer[place + 1 :]))
        assert too_slow(code, 5) == [found]
    assert too_slow(Code(listing(*outer)), 2, 2) == ["codes are not loaded by 16 bytes"]
    assert too_slow(Code(listing(*stage, "EXIT")), 4)[0] == "0 issue slots"


def test_a_slow_stage_with_wgmma_is_found():
    products = ["HGMMA.64x8x16.F32.BF16 R24, R60, gdesc[UR4], R24"] * 3
    chunk = ["LDS.128 R4, [R2]", *products, "HGMMA.64x8x16.F32.BF16 R24, R60, gdesc[UR4], R24, gsb0"]
    chunk.append("WARPGROUP.DEPBAR.LE gsb0, 0x1")
    loop = ["MOV R1, R2", *chunk, *chunk, "@P0 BRA 0x10", "EXIT"]
    assert too_slow_with_gmma(Code(listing(*loop)), 13, 2) == []
    assert too_slow_with_gmma(Code(listing(*loop)), 12, 2) == ["13 issue slots"]
    for place, line, found in (
        (1, "LDS.64 R4, [R2]", "codes are not loaded by 16 bytes"),
        (2, "CCTL.IVALL", "CCTL.IVALL"),
        (6, "WARPGROUP.DEPBAR.LE gsb0, 0x0", "products do not overlap with decoding"),
    ):
        code = Code(listing(*loop[:place], line, *loop[place + 1 :]))
        assert found in too_slow_with_gmma(code, 13, 2)


def test_loads_that_wait_for_one_another_are_not_in_flight_together():
    def code(*lines):
        """Of loads, numbers of scoreboards that are waited for, and other lines."""
        texts, words = [], []
        for line in lines:
            use = isinstance(line, int)
            load = not use and line.startswith("LDG")
            texts.append("FADD R60, R7, R61" if use else line)
            words.append((1 << 52 + line) if use else (2 if load else 7) << 46)
        text = listing(*texts)
        for word in words:
            text = text.replace("/* 0x0 */", f"/* 0x00 */\n   /* 0x{word:016x} */", 1)
        return Code(text)

    loads = [f"LDG.E.128 R{4 * i}, desc[UR4][R{40 + 2 * i}.64]" for i in range(1, 5)]
    assert loads_in_flight(code(*loads, 2, "EXIT"), "LDG", ".128") == 4
    assert loads_in_flight(code(*loads, 3, "LDG.E R2, desc[UR4][R6.64]", 2, "EXIT"), "LDG") == 5
    assert loads_in_flight(code(*loads[:3], 2, loads[3], 2, "EXIT"), "LDG", ".128") == 3
    one_by_one = [line for load in loads for line in (load, 2)]
    assert loads_in_flight(code(*one_by_one, "EXIT"), "LDG", ".128") == 1
    # Two ways of which one is taken; a loop is walked once.
    ways = ["@P0 BRA 0x40", *loads[:2], "BRA 0x60", *loads[2:], 2, "@P1 BRA 0x0", "EXIT"]
    assert loads_in_flight(code(*ways), "LDG", ".128") == 2
