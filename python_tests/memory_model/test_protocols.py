"""Every protocol is safe as written, has no unlisted redundancy, and agrees with the kernels."""

import itertools
import re
from pathlib import Path

import kernel_source as source
import pytest
from litmus import instructions, possible, replaced, spare, weaker
from protocols import DISPATCH, EXCHANGE, MLA, NOT_MODELLED, PROTOCOLS, SMALL_GEMM

each_protocol = pytest.mark.parametrize("protocol", PROTOCOLS, ids=lambda p: p.name)


@each_protocol
def test_safe_as_written(protocol):
    assert possible(protocol.program, "True"), "the program does not come to its end"
    assert not possible(protocol.program, protocol.unsafe)


@each_protocol
def test_what_is_spare_is_named_and_nothing_else_is(protocol):
    found = spare(protocol.program, protocol.unsafe)
    assert found == {instruction: forms for instruction, (forms, _) in protocol.spare.items()}


@each_protocol
def test_two_spare_instructions_of_which_one_is_needed(protocol):
    both = []
    for one, other in itertools.combinations(protocol.spare, 2):
        program = replaced(protocol.program, one, protocol.spare[one][0][0])
        if possible(replaced(program, other, protocol.spare[other][0][0]), protocol.unsafe):
            both.append((one, other))
    assert both == protocol.one_of


@pytest.mark.parametrize(
    "protocol, mistake", [pytest.param(p, m, id=f"{p.name}: {m}") for p in PROTOCOLS for m in p.mistakes]
)
def test_mistake_is_caught(protocol, mistake):
    assert possible(protocol.with_mistake(mistake), protocol.unsafe)


@each_protocol
def test_what_ptx_does_not_guarantee_is_named(protocol):
    for instruction, (forms, _) in protocol.beyond_ptx.items():
        for form in forms:
            assert form in weaker(instruction)
            assert possible(replaced(protocol.program, instruction, form), protocol.unsafe), (
                "spare: no reason is needed"
            )


# ---- the kernels do what is modelled


def expected(order):
    """A pattern for each line of `Source.order`."""
    for line in map(str.strip, order.strip().splitlines()):
        pattern = re.escape(line)
        yield pattern if line[0] == ":" else re.sub(r"\\{(.*?)\\}", lambda m: f"({m[1].replace(',', '|')})", pattern)


def differs(of):
    """None, or the function's text at the first difference."""
    snippets = [line.strip()[2:] for line in of.order.splitlines() if line.strip().startswith(":")]
    lines, patterns = source.ordering(of.file, of.function, of.only, dict.fromkeys(snippets)), list(expected(of.order))
    same = len(lines) == len(patterns) and all(map(re.fullmatch, patterns, lines))
    return None if same else "\n".join([f"{of.file}: {of.function} now has", *lines])


SOURCES = {(s.file, s.function, s.order): s for p in PROTOCOLS for s in p.sources}


@pytest.mark.parametrize("of", [pytest.param(s, id=f"{Path(s.file).name}-{s.function}") for s in SOURCES.values()])
def test_source_is_as_modelled(of):
    """If this fails, a protocol of the kernel has changed: change its program in protocols.py too."""
    assert differs(of) is None, differs(of)


@each_protocol
def test_the_order_a_program_needs_stands_in_its_sources(protocol):
    """Programs assume only the order of the kernels: grids by streams, all else by instructions of the sources."""
    patterns = [p for s in protocol.sources for p in expected(s.order) if p[0] != ":"]
    device = protocol.program.split("thread host")[0]
    for line in instructions(device):
        instruction = re.sub(r"^\w+ = ", "", line)
        if line in protocol.spare or instruction.startswith("grid."):
            continue
        forms = instruction, instruction.split(" ")[0]  # with the object's name or without
        objects = instruction.startswith(("ld", "mbarrier"))
        assert any(re.fullmatch(p, forms[0] if objects else forms[1]) for p in patterns), line


FILES = [
    path.relative_to(source.ROOT).as_posix()
    for path in sorted(source.CSRC.rglob("*.cu*"))
    if path.relative_to(source.CSRC).parts[0] not in ("arch", "conformance", "emulator")
]


@pytest.mark.parametrize("file", FILES)
def test_nothing_else_reaches_beyond_its_block(file):
    """Every scope, cluster barrier and remote arrival of the kernels is modelled, or named with a reason why not."""
    modelled = [s.function for s in SOURCES.values() if s.file == file]
    names = {n for f in modelled for n in ([f] if isinstance(f, str) else f)} | {
        n for f, n in NOT_MODELLED if f == file
    }
    assert list(source.crossing_calls(file, names)) == []


def test_what_is_not_modelled_still_exists():
    for file, function in NOT_MODELLED:
        assert list(source.bodies(source.text_of(file), function)), (file, function)


def test_one_kernel_is_launched_ahead_of_the_one_before():
    """Any other needs its griddepcontrol.wait, and a protocol here."""
    ahead = [file for file in FILES for _ in re.findall(r"overlap_previous = ", source.text_of(file))]
    assert ahead == ["csrc/mla_decode/launch_sm90.cu"]


EDITS = {
    "fence of the GPU only": (EXCHANGE, "fence_acq_rel<arch::Scope::kSystem>", "fence_acq_rel<arch::Scope::kGpu>"),
    "flag for the GPU only": (
        EXCHANGE,
        "store_release<arch::Scope::kSystem>(flag_of",
        "store_release<arch::Scope::kGpu>(flag_of",
    ),
    "no meeting of lanes": (EXCHANGE, "arch::sync_warp();\n    if (!arch::any(last)", "if (!arch::any(last)"),
    "no meeting before the count": (
        EXCHANGE,
        "arch::sync_block();\n    if (arch::warp_id()",
        "if (arch::warp_id()",
    ),
    "a relaxed count": (EXCHANGE, "atomic_add_acq_rel", "atomic_add"),
    "numbers before the wait": (
        EXCHANGE,
        "    arch::sync_block();\n    // Copy the local experts",
        "    // Copy the local experts",
    ),
    "parts not published": (SMALL_GEMM, "mbarrier_arrive_cluster(smem.parts_ready", "mbarrier_arrive(smem.parts_ready"),
    "parts not acquired": (SMALL_GEMM, "mbarrier_wait_cluster(smem.parts_ready", "mbarrier_wait(smem.parts_ready"),
    "the combine kernel does not wait": (MLA, "arch::grid_dependency_wait();", ""),
    "a plan used at once": (DISPATCH, "arch::sync_block();\n    if (blockIdx.x", "if (blockIdx.x"),
    "a wrapper that releases less": ("csrc/arch/mbarrier.cuh", "mbarrier.arrive.release.cluster.", "mbarrier.arrive."),
}


@pytest.mark.parametrize("edit", EDITS)
def test_edit_of_a_kernel_is_noticed(edit, monkeypatch):
    file, right, wrong = EDITS[edit]
    plain, before = source.read, source.read(file)
    assert right in before
    monkeypatch.setattr(source, "read", lambda name: before.replace(right, wrong) if name == file else plain(name))
    source.arch.cache_clear()
    source.wrapper.cache_clear()
    try:
        assert any(map(differs, SOURCES.values()))
    finally:
        source.arch.cache_clear()
        source.wrapper.cache_clear()
