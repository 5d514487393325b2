"""Reads the kernels' sources: the PTX instructions with memory ordering that a function issues, through its wrappers.

`ordering(file, function)` reads the calls of `csrc/arch` wrappers in a function's body and replaces each by the
instructions in the wrapper's own body, in the spelling of `litmus.py`: a changed fence, scope or wrapper shows; a
renamed variable or wrapper does not.
"""

import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
# What makes order between threads. Loads and stores count if they are strong.
_INSTRUCTION = re.compile(r"(?<![\w.])(?:ld|st|atom|red|fence|mbarrier|barrier|bar|griddepcontrol)\.[\w.:]+")
_SEMANTICS = ("relaxed", "acquire", "release", "acq_rel", "sc")
_SCOPES = ("cta", "cluster", "gpu", "sys")
# Reach beyond the block: a function that issues one of these takes part in a protocol.
CROSSES = re.compile(
    r"(ld|st|atom|red)\.\w+\.(gpu|sys|cluster)|fence\.(acquire|release|acq_rel|sc)\.(gpu|sys|cluster)"
    r"|mbarrier\.\w+\.\w+\.cluster|mbarrier\.arrive\S*::cluster|barrier\.cluster\.|griddepcontrol\.|mapa|st\.async"
)


def read(file):
    return (ROOT / file).read_text()


def text_of(file):
    return re.sub(r"//.*", lambda m: " " * len(m[0]), read(file))  # comments out, offsets kept


def closing(text, at):
    """The place behind the bracket that closes the one at `at`."""
    pairs = {"(": ")", "{": "}"}
    depth = 0
    for i in range(at, len(text)):
        depth += (text[i] == text[at]) - (text[i] == pairs[text[at]])
        if depth == 0:
            return i + 1
    raise ValueError(f"no {pairs[text[at]]} closes what begins with {text[at : at + 40]!r}")


def bodies(text, function):
    """Begin and end of the body of each definition (not call) of this name."""
    for match in re.finditer(rf"(?<![\w:.]){function}\s*\(", text):
        end = closing(text, match.end() - 1)
        opening = re.match(r"\s*\{", text[end:])
        if opening and not re.search(r"\b(if|while|switch)\s*$", text[: match.start()]):
            begin = end + opening.end() - 1
            yield begin, closing(text, begin)


def canonical(instruction):
    """`mbarrier.try_wait.parity.shared::cta.b64` -> `mbarrier.test_wait.acquire.cta`, as litmus.py spells it."""
    parts = instruction.rstrip(".").split(".")
    sem = next((p for p in parts if p in _SEMANTICS), None)
    scope = next((p for p in parts[1:] if p in _SCOPES), None)
    if parts[0] in ("ld", "st"):
        if "async" in parts:
            return "st.async"
        return f"{parts[0]}.{sem}.{scope}" if sem else None
    if parts[0] in ("atom", "red"):
        op = next(p for p in parts if p in ("add", "cas", "exch", "max"))
        return f"{parts[0]}.{sem or 'relaxed'}.{scope or 'gpu'}.{op}"
    if parts[0] == "fence":
        if "proxy" in parts:
            return None
        if "mbarrier_init" in parts:
            return "fence.mbarrier_init.release.cluster"
        return f"fence.{sem or 'acq_rel'}.{scope}"
    if parts[0] == "mbarrier":
        if "expect_tx" in parts or parts[1] not in ("arrive", "test_wait", "try_wait"):
            return None
        arrive = parts[1] == "arrive"
        remote = "::remote" if arrive and scope != "cluster" and "shared::cluster" in parts else ""
        name, default = ("arrive", "release") if arrive else ("test_wait", "acquire")
        return f"mbarrier.{name}.{sem or default}.{scope or 'cta'}{remote}"
    if parts[0] in ("bar", "barrier"):
        if "cluster" in parts:
            arrive = "arrive" in parts
            return f"barrier.cluster.{'arrive' if arrive else 'wait'}.{sem or ('release' if arrive else 'acquire')}"
        return "bar.warp.sync" if "warp" in parts else "bar.arrive" if "arrive" in parts else "bar.sync"
    return ".".join(parts[:2])  # griddepcontrol


@cache
def arch():
    """All of csrc/arch."""
    return "\n".join(text_of(path.relative_to(ROOT).as_posix()) for path in sorted((CSRC / "arch").glob("*.cuh")))


@cache
def wrapper(name, scope):
    """What a wrapper of csrc/arch issues, for kScope = kGpu or kSystem where it has one."""
    wide = {"kGpu": "gpu", "kSystem": "sys"}.get(scope)
    found = []
    for begin, end in bodies(arch(), name):
        body = re.sub(r"K2K_EMULATE\(.*\);", "", arch()[begin:end])
        literals = re.sub(r'"\s*"', "", body)  # neighbouring literals are one
        literals = literals.replace("atomicAdd_system", '"atom.relaxed.sys.add"').replace(
            "atomicAdd(", '"atom.relaxed.gpu.add"('
        )
        literals = literals.replace("atomicMax(", '"atom.relaxed.gpu.max"(')
        issued = []
        for literal in re.findall(r'"([^"]*)"', literals):
            issued += [i for i in map(canonical, _INSTRUCTION.findall(literal)) if i and i not in issued]
            issued += ["mapa"] if "mapa.u64" in literal else []
        if wide:
            issued = [i for i in issued if wide in i.split(".")]
        for called, of in re.findall(r"\b(\w+)(?:<(\w+)>)?\(", body):
            if called != name and re.fullmatch(r"cluster_\w+|mbarrier_\w+|atomic_\w+", called):
                issued += wrapper(called, scope if of == "kScope" else None)
        found += [i for i in issued if i not in found]
    return found


_CALL = re.compile(r"\barch::(\w+)\s*(?:<([^;()]*?)>)?\s*\(")


def issued(text):
    """(place, instruction, name of the object) of each ordering instruction in the text of a kernel."""
    for match in _CALL.finditer(text):
        scope = re.search(r"Scope::(\w+)|\bkScope\b", match[2] or "")
        for instruction in wrapper(match[1], scope and (scope[1] or "kGpu")):
            arguments = text[match.end() : closing(text, match.end() - 1) - 1]
            yield match.start(), instruction, operand(arguments)


def operand(arguments):
    """The last name of the first argument: `smem.empty[stage.slot]` -> empty."""
    first = re.sub(r"K2K_PASS_WHERE\w*", "", arguments)
    while (shorter := re.sub(r"\[[^\[\]]*\]|\([^()]*\)", "", first)) != first:
        first = shorter
    names = re.findall(r"\w+", first.split(",")[0])
    return names[-1] if names else ""


def ordering(file, function, only=".*", snippets=()):
    """Lines of `instruction` (with the object's name for mbarriers and polls), and of the snippets of source between
    them, as they stand in the function. `function` may be several names: the first that is defined counts."""
    text = text_of(file)
    names = [function] if isinstance(function, str) else function
    found = next((list(bodies(text, name)) for name in names if any(bodies(text, name))), None)
    assert found, f"{file} does not define {' or '.join(names)}: the memory model's protocols must follow"
    lines = []
    for begin, end in found:
        body = text[begin:end]
        for place, instruction, name in issued(body):
            named = f"{instruction} {name}" if re.match(r"mbarrier|ld", instruction) else instruction
            if re.fullmatch(only, named):
                lines.append((place, named))
        for snippet in snippets:
            at = body.find(snippet)
            while at >= 0:
                lines.append((at, f": {snippet}"))
                at = body.find(snippet, at + 1)
    return [line for _, line in sorted(lines, key=lambda line: line[0])]


def crossing_calls(file, functions):
    """Instructions of a file with a scope beyond the CTA, outside of these functions."""
    text = text_of(file)
    inside = [span for function in functions for span in bodies(text, function)]
    for place, instruction, name in issued(text):
        if CROSSES.match(instruction) or "::remote" in instruction:
            if not any(begin <= place < end for begin, end in inside):
                yield f"{instruction} {name} (line {text.count(chr(10), 0, place) + 1})"
