"""CUDA cores compute while tensor cores multiply: what the source puts between the start of products and the wait for
them stays there. ptxas moves a wait up as far as the next branch or wait, over arithmetic that does not need it."""

import re

import pytest
from sass import Code
from test_machine_code import listing
from test_sass import KERNELS, needs_kernels, short

# Exponentials of an iteration of the main loop that run while products are in flight: 64 scores and 2 factors of the
# forward; 64 of dK/dV; of dQ about two thirds of 48, as the compiler leaves a third for later (the other warpgroup
# multiplies then: they take turns).
EXPONENTIALS = {
    "mla_prefill_forward_sm90_kernel": 66,
    "mla_prefill_dkv_sm90_kernel": 64,
    "mla_prefill_dq_sm90_kernel": 30,
}


def exponentials_in_flight(code: Code) -> int:
    """In the smallest loop with GMMAs and exponentials, after a GMMA and before the wait for all of them."""

    def exponentials(loop):
        return [i for i in loop if code[i].is_a("MUFU", "EX2")]

    main = min((loop for loop in code.gmma_loops if exponentials(loop)), key=len)
    count, in_flight = 0, False
    for one in (code[i] for i in sorted(main)):
        if one.is_gmma:
            in_flight = True
        elif one.is_a("WARPGROUP.DEPBAR") and re.search(r"gsb0, 0x0\b", one.operands):
            in_flight = False
        else:
            count += in_flight and one.is_a("MUFU", "EX2")
    return count


@needs_kernels
@pytest.mark.parametrize("name", EXPONENTIALS)
def test_exponentials_run_during_products(name, listings):
    kernels = [kernel for kernel in KERNELS if short(kernel).startswith(name)]
    assert kernels, "no kernel has this name"
    for kernel in kernels:
        code = Code(listings[kernel["arch"], kernel["symbol"]])
        assert exponentials_in_flight(code) >= EXPONENTIALS[name], short(kernel)


def test_a_wait_that_moved_up():
    products = (
        "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24",
        "HGMMA.64x128x16.F32.BF16 R88, R8, gdesc[UR4], R88, gsb0",
    )
    scores, all_done = "WARPGROUP.DEPBAR.LE gsb0, 0x1", "WARPGROUP.DEPBAR.LE gsb0, 0x0"
    exponentials = ("MUFU.EX2 R24, R24", "MUFU.EX2 R25, R25")
    in_order = listing(*products, scores, *exponentials, all_done, "@P0 BRA 0x0", "EXIT")
    moved = listing(*products, scores, all_done, *exponentials, "@P0 BRA 0x0", "EXIT")
    assert exponentials_in_flight(Code(in_order)) == 2
    assert exponentials_in_flight(Code(moved)) == 0
