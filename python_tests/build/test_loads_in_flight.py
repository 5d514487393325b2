"""How many 16-byte loads a thread has in flight before it waits for the first of them: what the plans of the
memory-bound kernels promise, held to the machine code.

An instruction says in its control bits which of six scoreboards it waits for, and which one a load signals. From each
load the paths of the code are followed to the first wait for its scoreboard, loops not closed; the longest one counts,
since on it rows exist and begin on 16 bytes.
"""

import re
import subprocess
from functools import cache
from pathlib import Path

import pytest
from test_sass import KERNELS, _C, needs_kernels, short, tool

VECTORS = {"bf16": 2, "fp16": 2, "float": 4}  # 16-byte loads of a lane's 16 neighbours
# By kernel: 16-byte loads in flight, and other loads that may be on their way beside the first of them.
PROMISED = {}
for x, vectors in VECTORS.items():
    rows = 2 if x == "float" else 4
    PROMISED[f"moe_combine_kernel<{x}>"] = (rows * vectors, 0)  # rows_in_flight of csrc/moe/config.h
    PROMISED[f"moe_combine_backward_kernel<{x}>"] = (rows // 2 * vectors + 2, 0)  # and the gradient's own row
    for quantize in ("true", "false") if x != "fp16" else ("true",):
        # x is loaded first; the token's expert, rank and the tile's count come meanwhile
        PROMISED[f"moe_move_kernel<{x}, {quantize}, false>"] = (vectors, 3)
        PROMISED[f"moe_move_kernel<{x}, {quantize}, true>"] = (vectors, 0)
    PROMISED[f"swiglu_kernel<{x}>"] = (2 * vectors, 0)  # gate and up
    PROMISED[f"swiglu_backward_kernel<{x}>"] = (3 * vectors, 0)
    PROMISED[f"quantize_rows_kernel<{x}, false>"] = (vectors, 0)
    PROMISED[f"quantize_rows_kernel<{x}, true>"] = (2 * vectors, 0)
    PROMISED[f"quantize_128x128_kernel<{x}>"] = (2 * vectors, 0)
for kernel in ("moe_scatter_kernel", "moe_gather_kernel"):
    PROMISED[kernel] = (4, 0)  # kExchangeVectors


@cache
def listing():
    """{(arch, symbol): [(address, text, control bits)]} of every kernel."""
    cuobjdump, nvdisasm = tool("cuobjdump"), tool("nvdisasm")
    path = f"{Path(nvdisasm).parent}:/usr/bin:/bin"
    text = subprocess.run(
        [cuobjdump, "-sass", _C.__file__], check=True, capture_output=True, text=True, env={"PATH": path}
    ).stdout
    instruction = re.compile(
        r"/\*([0-9a-f]{4,5})\*/ +([^;]*?) *;? +/\* 0x[0-9a-f]{16} \*/\s+/\* 0x([0-9a-f]{16}) \*/"
    )
    code = {}
    for part in re.split(r"\n\s+code for (?=sm_)", text)[1:]:
        arch = part.split(None, 1)[0]
        for function in part.split("Function : ")[1:]:
            symbol, body = function.split("\n", 1)
            code[arch, symbol.strip()] = [(int(a, 16), t, int(h, 16)) for a, t, h in instruction.findall(body)]
    return code


def following(code, places, i):
    """Where control may go from instruction i, forwards."""
    text = code[i][1]
    predicated, body = text.startswith("@"), re.sub(r"^@!?U?P\w+ +", "", text)
    opcode, _, operands = body.partition(" ")
    if opcode in ("EXIT", "RET.REL.NODEC"):
        return [i + 1] if predicated else []
    if opcode == "BRA" and (target := re.search(r"0x([0-9a-f]+)", operands)):
        there = places.get(int(target[1], 16), 0)
        on = [i + 1] if predicated or "," in operands else []
        return on + ([there] if there > i else [])
    return [i + 1]


def in_flight(code, opcode):
    """Of each 16-byte load: how many loads like `opcode` are issued before its result is waited for, itself one."""
    places = {address: i for i, (address, _, _) in enumerate(code)}
    for first, (_, text, control) in enumerate(code):
        if not re.search(r"LDG\S*\.128", text):
            continue
        scoreboard, issued = control >> 46 & 7, [0] * (len(code) + 1)
        for i in range(len(code) - 1, first, -1):
            _, text, control = code[i]
            if not control >> 52 & 1 << scoreboard:
                issued[i] = max((issued[j] for j in following(code, places, i)), default=0)
                issued[i] += bool(re.search(opcode, text))
        yield 1 + issued[first + 1]


@needs_kernels
@pytest.mark.parametrize("kernel", PROMISED)
def test_rows_are_in_flight(kernel):
    compiled = [k for k in KERNELS if short(k) == kernel]
    assert compiled
    vectors, others = PROMISED[kernel]
    for k in compiled:
        code = listing()[k["arch"], k["symbol"]]
        found = max(in_flight(code, r"LDG\S*\.128"))
        assert found >= vectors, f"{k['arch']}: {found} of {vectors} loads before the first is waited for"
        if others:
            assert max(in_flight(code, r"LDG")) >= vectors + others, k["arch"]
