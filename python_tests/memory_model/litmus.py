"""Litmus tests as text: programs for `ptx_model`, and the ways in which one instruction of them can be weakened.

    data = 0                        initial memory (0 by default)

    thread sender @ 0.0.0           on GPU 0, in cluster 0 of it, in CTA 0 of that; `0.1` is CTA 0 of cluster 1
        st.weak data, 1
        st.release.gpu flag, 1
    thread receiver @ 0.1
        r0 = ld.acquire.gpu flag
        assume r0 == 1              other executions are ignored: the thread waits, or takes a branch
        r1 = ld.weak data           # a comment

Instructions are those of PTX, as far as the model has them:

    ld.weak                          ld.{relaxed,acquire}.SCOPE             location
    st.weak                          st.{relaxed,release}.SCOPE             location, value
    atom.{relaxed,acquire,release,acq_rel}.SCOPE.{add,exch,cas}             location, value [, new value]
    red.{relaxed,release}.SCOPE.add                                         location, value
    fence.{acquire,release,acq_rel,sc}.SCOPE
    bar.sync, bar.arrive, bar.warp.sync                                     name
    barrier.cluster.arrive.{release,relaxed}, barrier.cluster.wait.acquire  name
    fence.mbarrier_init.release.cluster
    mbarrier.init                                                           location
    mbarrier.arrive.{release,relaxed}.{cta,cluster}                         location
    mbarrier.test_wait.{acquire,relaxed}.{cta,cluster}                      location

A value is a number or a register. An mbarrier is a counter of arrivals here: it holds their number since mbarrier.init.
Of the host's view of grids there are `grid.ends NAME`, `grid.begins NAME` (in the order of a stream) and
`griddepcontrol.wait NAME`. The same barrier a second time is its next phase.
"""

import re
from types import SimpleNamespace

from ptx_model import SCOPES, Event, Model, Place, Program

NOTHING = "nothing"
UNINITIALISED = -1000  # what an mbarrier holds before mbarrier.init


def parse(text):
    return _Parser(text).program


class _Parser:
    def __init__(self, text):
        lines = [line.split("#")[0].strip() for line in text.splitlines()]
        lines = [line for line in lines if line]
        self.program = Program([], [], {})
        values = dict.fromkeys(self.locations(lines), 0)
        for line in lines:
            if line.startswith("mbarrier.init"):
                values[line.split()[1]] = UNINITIALISED
        for line in lines:
            if match := re.fullmatch(r"(\w+) = (-?\d+)", line):
                values[match[1]] = int(match[2])
        for location, value in values.items():
            self.add("write", location=location, value=lambda _, value=value: value)
        for line in lines:
            if match := re.fullmatch(r"thread (\w+) @ ([\w.]+)", line):
                self.start(match[1], match[2])
            elif match := re.fullmatch(r"assume (\w+) == (-?\d+)", line):
                self.assume(match[1], int(match[2]))
            elif not re.fullmatch(r"\w+ = -?\d+", line):
                match = re.fullmatch(r"(?:(\w+) = )?([\w.]+)\s*(.*)", line)
                self.instruction(match[1], match[2].split("."), [a.strip() for a in match[3].split(",")], line)

    @staticmethod
    def locations(lines):
        for line in lines:
            match = re.match(r"(?:\w+ = )?(?:ld|st|atom|red|mbarrier)\.[\w.]+ (\w+)", line)
            if match:
                yield match[1]

    def add(self, kind, **fields):
        thread = len(self.program.places) - 1 if self.program.places else None
        event = Event(len(self.program.events), thread, kind, **fields)
        if kind == "write" and thread is not None:
            event.reads |= self.control
        self.program.events.append(event)
        return event

    def start(self, name, place):
        self.thread, self.phases = name, {}
        self.values, self.depends = {}, {}  # of registers
        self.control = frozenset()  # reads that decide whether the thread comes here
        parts = [int(p) if p.isdigit() else p for p in place.split(".")]
        self.program.places.append(Place(*parts))

    def assume(self, register, value):
        (read,) = self.depends[register]
        self.program.expected[read] = value
        self.control |= {read}

    def operand(self, text):
        """How to find the value, and the reads it depends on."""
        if re.fullmatch(r"-?\d+", text):
            return (lambda _: int(text)), frozenset()
        return self.values[text], self.depends[text]

    def set_register(self, register, read):
        if register:
            self.values[register] = lambda values: values(read.index)
            self.depends[register] = frozenset([read.index])
            self.program.registers[self.thread, register] = self.values[register]

    def barrier(self, kind, name, domain, arrives, waits, release=True):
        def phase(role):
            key = (kind, name, role)
            self.phases[key] = self.phases.get(key, 0) + 1
            return (kind, name, domain, self.phases[key])

        self.add("barrier", arrives=phase("arrive") if arrives else None, waits=phase("wait") if waits else None)
        self.program.events[-1].release = release

    def instruction(self, register, parts, operands, line):
        place, op = self.program.places[-1], ".".join(parts)
        if op in ("bar.sync", "bar.arrive", "bar.warp.sync"):
            return self.barrier(op.rpartition(".")[0], operands[0], place.domain("cta"), True, op != "bar.arrive")
        if op in ("barrier.cluster.arrive.release", "barrier.cluster.arrive.relaxed", "barrier.cluster.wait.acquire"):
            arrives = parts[2] == "arrive"
            return self.barrier(
                "cluster", operands[0], place.domain("cluster"), arrives, not arrives, parts[3] == "release"
            )
        if op in ("grid.ends", "grid.begins", "griddepcontrol.wait"):
            return self.barrier("grid", operands[0], place.domain("gpu"), op == "grid.ends", op != "grid.ends")
        if op == "fence.mbarrier_init.release.cluster":
            return self.add("fence", scope="cluster", release=True, only_inits=True)
        if op == "mbarrier.init":
            return self.add("write", location=operands[0], value=lambda _: 0, is_init=True)
        sem, scope = parts[1], parts[2] if len(parts) > 2 else None
        if parts[0] == "mbarrier":
            assert parts[1] in ("arrive", "test_wait") and parts[3] in ("cta", "cluster"), line
            sem, scope = parts[2:]
        assert sem in ("weak", "relaxed", "acquire", "release", "acq_rel", "sc"), line
        assert scope in SCOPES or (scope is None and sem == "weak"), line
        acquire, release = sem in ("acquire", "acq_rel", "sc"), sem in ("release", "acq_rel", "sc")
        if parts[0] == "fence":
            return self.add("fence", scope=scope, acquire=acquire, release=release, sc=sem == "sc")
        memory = {"location": operands[0], "scope": scope}
        if parts[0] == "ld" or parts[1] == "test_wait":
            return self.set_register(register, self.add("read", acquire=acquire, **memory))
        if parts[0] == "st":
            value, reads = self.operand(operands[1])
            return self.add("write", release=release, value=value, reads=reads, **memory)
        assert parts[0] in ("atom", "red", "mbarrier"), line
        observes = parts[0] != "red"
        read = self.add("read", acquire=acquire, observes=observes, **memory)
        kind = "add" if parts[0] == "mbarrier" else parts[3]
        found = [self.operand(o) for o in (operands[1:] or ["1"])]
        value = {
            "add": lambda v: v(read.index) + found[0][0](v),
            "exch": lambda v: found[0][0](v),
            "cas": lambda v: found[1][0](v) if v(read.index) == found[0][0](v) else None,
        }[kind]
        reads = frozenset([read.index]).union(*(r for _, r in found))
        self.add("write", release=release, value=value, reads=reads, read_part=read.index, **memory)
        self.set_register(register, read)


def possible(text, condition):
    """Whether the axioms allow an execution with this condition: Python over `thread.register` and `final.location`
    (any of a location's last writes, if several are not ordered)."""
    code = compile(condition, condition, "eval")

    def holds(registers, final):
        threads = {}
        for (thread, register), value in registers.items():
            threads.setdefault(thread, SimpleNamespace()).__dict__[register] = value
        return eval(code, {"final": SimpleNamespace(**final), **threads})

    def finals(last):
        combinations = [{}]
        for location, values in last.items():
            combinations = [{**c, location: v} for c in combinations for v in values]
        return combinations

    early = (lambda registers: True) if "final." in condition else (lambda registers: holds(registers, {}))
    executions = Model(parse(text)).executions(early)
    return any(holds(registers, final) for registers, last in executions for final in finals(last))


# ---- weakening

# What is weaker by one step. Weak accesses stay: that they are there is the program's sense.
_SEMANTICS = {
    "ld": {"acquire": ["relaxed"], "relaxed": []},
    "st": {"release": ["relaxed"], "relaxed": []},
    "red": {"release": ["relaxed"], "relaxed": []},
    "atom": {"acq_rel": ["acquire", "release"], "acquire": ["relaxed"], "release": ["relaxed"], "relaxed": []},
    "fence": {"sc": ["acq_rel"], "acq_rel": ["acquire", "release"], "acquire": [NOTHING], "release": [NOTHING]},
    "mbarrier": {"release": ["relaxed"], "acquire": ["relaxed"], "relaxed": []},
}
_REMOVABLE = ("bar.sync", "bar.warp.sync", "grid.begins", "griddepcontrol.wait", "fence.mbarrier_init.release.cluster")


def weaker(instruction):
    """The instruction with one property less: semantics, scope, or (`nothing`) the whole of it."""
    match = re.fullmatch(r"((?:\w+ = )?)([\w.]+)(.*)", instruction)
    assigned, op, operands = match.groups()
    parts = op.split(".")
    if op in _REMOVABLE:
        return [NOTHING]
    if op == "barrier.cluster.arrive.release":
        return [f"barrier.cluster.arrive.relaxed{operands}"]
    at = 2 if parts[0] == "mbarrier" else 1
    if parts[0] not in _SEMANTICS or len(parts) <= at or parts[at] not in _SEMANTICS[parts[0]]:
        return []
    scope = SCOPES.index(parts[at + 1])

    def variant(sem, scope):
        if sem == NOTHING:
            return NOTHING
        name = ".".join([*parts[:at], sem, SCOPES[scope], *parts[at + 2 :]])
        return f"{assigned}{name}{operands}"

    forms = [variant(sem, scope) for sem in _SEMANTICS[parts[0]][parts[at]]]
    if scope > 0:
        forms.append(variant(parts[at], scope - 1))
    elif parts[at] == "relaxed" and parts[0] in ("ld", "st"):
        forms.append(f"{assigned}{parts[0]}.weak{operands}")
    return forms


def instructions(text):
    """The distinct lines that can be weakened. Equal lines are one instruction of the source."""
    lines = [line.split("#")[0].strip() for line in text.splitlines()]
    return [line for line in dict.fromkeys(lines) if line and weaker(line)]


def replaced(text, instruction, form):
    """The program with all lines of this instruction in another form."""
    lines = text.splitlines()
    return "\n".join(
        ("" if form == NOTHING else form) if line.split("#")[0].strip() == instruction else line for line in lines
    )


def spare(text, unsafe):
    """Per instruction, the weakest forms with which the unsafe condition is still impossible; those that need to be as
    they are do not appear. Every form that is weaker than one of these has been tried."""
    found = {}
    for instruction in instructions(text):
        safe, tried, todo = [], set(), weaker(instruction)
        while todo:
            form = todo.pop()
            if form in tried:
                continue
            tried.add(form)
            if not possible(replaced(text, instruction, form), unsafe):
                safe.append(form)
                todo += weaker(form) if form != NOTHING else []
        weakest = [f for f in safe if f == NOTHING or not set(weaker(f)) & set(safe)]
        if weakest:
            found[instruction] = sorted(weakest)
    return found
