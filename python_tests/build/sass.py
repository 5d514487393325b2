"""A reader of SASS, the output of cuobjdump: instructions, loops, and registers read before they are ready.

It parses what the checks of test_machine_code.py need: branch targets, the registers of an instruction, and those
it writes.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

import pytest


def tool(name: str) -> str:
    """A program of NVIDIA's, from the PATH or from its package (extra "sass")."""
    if found := shutil.which(name):
        return found
    try:
        return next(str(f.locate().resolve()) for f in files(f"nvidia-cuda-{name}") or [] if f.name == name)
    except (PackageNotFoundError, StopIteration):
        pytest.skip(f"{name} is not installed: pip install k2kernels[sass]")


def dump(file: str | Path) -> dict[tuple[str, str], str]:
    """{(arch, symbol): its listing} of every kernel in an extension or an object file."""
    cuobjdump, nvdisasm = tool("cuobjdump"), tool("nvdisasm")
    path = f"{Path(nvdisasm).parent}:/usr/bin:/bin"  # cuobjdump runs nvdisasm
    command = [cuobjdump, "-sass", str(file)]
    text = subprocess.run(command, check=True, capture_output=True, text=True, env={"PATH": path}).stdout
    return split(text)


def split(text: str) -> dict[tuple[str, str], str]:
    """Splits the output of cuobjdump into listings."""
    listings = {}
    for part in re.split(r"\n\s+code for (?=sm_)", text)[1:]:
        arch = part.split(None, 1)[0]
        for function in part.split("Function : ")[1:]:
            symbol, body = function.split("\n", 1)
            listings[arch, symbol.strip()] = body
    return listings


_LINE = re.compile(
    r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9_.x]*)([^;]*);"
    r"(?:\s*/\* 0x[0-9a-f]+ \*/\s+/\* 0x([0-9a-f]+) \*/)?"  # the instruction's two words
)


def counts(listings: dict[tuple[str, str], str]) -> dict[tuple[str, str], Counter[str]]:
    """The number of occurrences of each opcode in each kernel."""
    return {kernel: Counter(found[2] for found in _LINE.findall(text)) for kernel, text in listings.items()}


# What never goes on to the next instruction, unless a predicate says whether it is executed at all.
_ENDS = ("EXIT", "BRA", "JMP", "BRX", "RET", "KILL", "BPT.TRAP")
# The register that these name first is read, not written.
_STORES = ("ST", "RED", "LDGSTS", "BAR", "R2UR", "WARPSYNC", "SYNCS", "ARRIVES", "UTMA", "CCTL", "BRA", "CALL", "RET")


@dataclass(frozen=True)
class Instruction:
    """One line: `@P0 LDG.E.128 R4, desc[UR4][R2.64] ;` at `address`."""

    address: int
    predicate: str
    opcode: str
    operands: str
    word: int = 0  # the upper half of it, whose upper bits are the scheduler's

    @property
    def signals(self) -> int:
        """The scoreboard that says when its result is there: 0 .. 5, or 7 for none."""
        return self.word >> 46 & 7

    def waits_for(self, scoreboard: int) -> bool:
        return bool(self.word >> 52 & 1 << scoreboard)

    def is_a(self, *parts: str) -> bool:
        """Whether the opcode begins with the first part and holds the others."""
        return self.opcode.startswith(parts[0]) and all(part in self.opcode for part in parts[1:])

    @property
    def is_gmma(self) -> bool:
        return self.opcode.startswith(("HGMMA", "QGMMA", "IGMMA"))

    @cached_property
    def registers(self) -> set[int]:
        """All that it names; of one that stands for several, all of those."""
        names = re.findall(r"\bR(\d+)(\.64)?", self.operands)
        found = {int(number) + i for number, wide in names for i in range(2 if wide else 1)}
        if self.is_gmma:
            for first in re.findall(r"\bR(\d+)", self.operands):
                found.update(range(int(first), int(first) + (4 if f"R{first}, gdesc" in self.operands else 1)))
            found |= self.accumulators
        elif width := self._words:
            # The value of a load or store: its first register that is no address.
            values = re.findall(r"\bR(\d+)", re.sub(r"\[[^\]]*\]", "", self.operands))
            found.update(int(values[0]) + i for i in range(width) if values)
        return found

    @cached_property
    def written(self) -> set[int]:
        """The registers that it writes, of those that it names."""
        first = re.match(r"\s*(?:U?P\w+, )*R(\d+)\b", self.operands)
        if first is None or self.opcode.startswith(_STORES):
            return set()
        if self.is_gmma:
            return self.accumulators
        wide = self._words or (2 if ".WIDE" in self.opcode or self.opcode.endswith(".64") else 1)
        return set(range(int(first[1]), int(first[1]) + wide))

    @cached_property
    def accumulators(self) -> set[int]:
        """Of a GMMA: those of 64 rows and its N columns, a thread's share of them."""
        columns = int(re.search(r"\.64x(\d+)x", self.opcode)[1])
        first = int(re.match(r"\s*R(\d+)", self.operands)[1])
        return set(range(first, first + columns // 2))

    @cached_property
    def operand_registers(self) -> set[int]:
        """Of a GMMA: the four registers that hold its A, if any do."""
        found = re.search(r"\bR(\d+)(?:\.\w+)?, gdesc", self.operands)
        return set(range(int(found[1]), int(found[1]) + 4)) if found else set()

    @property
    def _words(self) -> int:
        if self.opcode.startswith(("LD", "ST")) and not self.opcode.startswith("LDGSTS"):
            for suffix, words in ((".128", 4), (".64", 2), ("M88.4", 4), ("MT88.4", 4), ("M88.2", 2), ("MT88.2", 2)):
                if suffix in self.opcode:
                    return words
        return 0


class Code:
    """The instructions of a kernel and the ways through them."""

    def __init__(self, listing: str):
        self.instructions = [
            Instruction(int(address, 16), predicate.strip(), opcode, operands.strip(), int(word or "0", 16))
            for address, predicate, opcode, operands, word in _LINE.findall(listing)
        ]
        self.at = {instruction.address: i for i, instruction in enumerate(self.instructions)}

    @property
    def size(self) -> int:
        """In bytes, without the padding behind the last instruction."""
        used = [i.address for i in self.instructions if i.opcode != "NOP"]
        return max(used, default=-16) + 16

    def __getitem__(self, place: int) -> Instruction:
        return self.instructions[place]

    def __len__(self) -> int:
        return len(self.instructions)

    @cached_property
    def next(self) -> list[list[int]]:
        """By instruction, the places of those that may come after it."""
        after = []
        for i, one in enumerate(self.instructions):
            places, goes_on = [], True
            base = one.opcode.split(".")[0]
            if base in ("BRA", "JMP", "CALL"):
                target = re.findall(r"0x([0-9a-f]+)", one.operands)
                # What is called comes back: the call goes on, and so is the callee reached.
                tests = re.search(r"\bU?P\d|\.DIV|\.ANY", one.opcode + " " + one.operands)
                goes_on = bool(one.predicate or base == "CALL" or tests)
                if target and int(target[-1], 16) in self.at:
                    places.append(self.at[int(target[-1], 16)])
            elif one.opcode.startswith(_ENDS):
                goes_on = bool(one.predicate)
            elif one.opcode.startswith("WARPSYNC.COLLECTIVE"):
                target = re.search(r"0x([0-9a-f]+)", one.operands)
                if target and int(target[1], 16) in self.at:
                    places.append(self.at[int(target[1], 16)])
            if goes_on and i + 1 < len(self.instructions):
                places.append(i + 1)
            after.append(places)
        return after

    @cached_property
    def loops(self) -> list[set[int]]:
        """Every loop, as the places of its instructions, a loop in a loop behind it.

        A strongly connected part of the ways through the code is a loop; without the instruction by which it is
        entered, it falls apart into the loops within.
        """
        found, work = [], [set(range(len(self)))]
        before: list[list[int]] = [[] for _ in self.instructions]
        for i, places in enumerate(self.next):
            for place in places:
                before[place].append(i)
        while work:
            part = work.pop()
            for loop in _components(part, self.next):
                found.append(loop)
                entries = [i for i in loop if any(b not in loop for b in before[i])]
                work.append(loop - {min(entries or loop)})
        return found

    @cached_property
    def gmma_loops(self) -> list[set[int]]:
        """The innermost loop around each GMMA."""
        innermost = []
        for i, one in enumerate(self.instructions):
            if one.is_gmma:
                around = [loop for loop in self.loops if i in loop]
                if around and (loop := min(around, key=len)) not in innermost:
                    innermost.append(loop)
        return innermost


def _components(part: set[int], after: list[list[int]]) -> Iterator[set[int]]:
    """The strongly connected components of more than one instruction (or of one that comes after itself): Tarjan's."""
    order: dict[int, int] = {}
    low: dict[int, int] = {}
    stack: list[int] = []
    on_stack: set[int] = set()
    for root in part:
        if root in order:
            continue
        order[root] = low[root] = len(order)
        stack.append(root)
        on_stack.add(root)
        walk = [(root, iter(after[root]))]
        while walk:
            node, places = walk[-1]
            for place in places:
                if place not in part:
                    continue
                if place not in order:
                    order[place] = low[place] = len(order)
                    stack.append(place)
                    on_stack.add(place)
                    walk.append((place, iter(after[place])))
                    break
                if place in on_stack:
                    low[node] = min(low[node], order[place])
            else:
                walk.pop()
                if walk:
                    low[walk[-1][0]] = min(low[walk[-1][0]], low[node])
                if low[node] == order[node]:
                    component = set()
                    while node not in component:
                        component.add(last := stack.pop())
                        on_stack.discard(last)
                    if len(component) > 1 or node in after[node]:
                        yield component


# ---- what the checks ask


def fences(code: Code) -> list[Instruction]:
    """Fences beyond the CTA, and invalidations of L1."""
    return [one for one in code.instructions if is_fence(one)]


def is_fence(one: Instruction) -> bool:
    wide = one.is_a("MEMBAR") and not one.opcode.endswith(".CTA")
    return wide or one.is_a("ERRBAR") or one.is_a("CGAERRBAR") or one.is_a("CCTL", "IVALL")


def fences_in_gmma_loops(code: Code) -> list[Instruction]:
    """Those of them that a loop around GMMAs executes in each iteration."""
    return [code[i] for loop in code.gmma_loops for i in sorted(loop) if is_fence(code[i])]


def loop_of_all(code: Code, opcode: str) -> list[Instruction]:
    """The innermost loop that holds every instruction whose opcode begins so: what a pipeline stage issues."""
    all_of_them = {i for i, one in enumerate(code.instructions) if one.opcode.startswith(opcode)}
    around = [loop for loop in code.loops if all_of_them and all_of_them <= loop]
    return [code[i] for i in sorted(min(around, key=len, default=())) if code[i].opcode != "NOP"]


def touched_early(code: Code) -> list[tuple[Instruction, Instruction]]:
    """(GMMA, instruction): instructions that access the accumulators of a GMMA in flight, or write its A in registers.

    On every way from the GMMA to the WARPGROUP.DEPBAR that covers it: one that leaves n groups in flight does where
    at least n groups were committed after the GMMA's. Other GMMAs may name them.
    """
    found = []
    for i, gmma in enumerate(code.instructions):
        if not gmma.is_gmma:
            continue
        work = [(place, 0 if "gsb0" in gmma.operands else -1) for place in code.next[i]]
        seen = set(work)
        while work:
            place, later = work.pop()
            one = code[place]
            if one.is_a("WARPGROUP.DEPBAR") and later >= 0:
                left = int(re.search(r"gsb0, 0x([0-9a-f]+)", one.operands)[1], 16)
                if left <= later:
                    continue
            if one.is_gmma:
                later += "gsb0" in one.operands
            elif one.registers & gmma.accumulators or one.written & gmma.operand_registers:
                found.append((gmma, one))
                continue
            for after in code.next[place]:
                if (state := (after, min(later, 8))) not in seen:
                    seen.add(state)
                    work.append(state)
    return found


def loads_in_flight(code: Code, *parts: str) -> int:
    """The most loads (`parts` of the opcode) on their way when the first of them, one of 16 bytes, is waited for.

    From each load the ways through the code are followed to the first instruction that waits for its scoreboard, loops
    not closed. The longest way counts: on it rows exist and begin on 16 bytes.
    """
    most = 0
    for first, load in enumerate(code.instructions):
        if not load.is_a("LDG", ".128"):
            continue
        issued = [0] * (len(code) + 1)
        for i in reversed(range(first + 1, len(code))):
            one = code[i]
            if not one.waits_for(load.signals):
                issued[i] = max((issued[j] for j in code.next[i] if j > i), default=0) + one.is_a(*parts)
        most = max(most, 1 + issued[first + 1])
    return most
