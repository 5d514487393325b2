"""The axioms of the PTX memory consistency model, decided by enumeration.

A program is a list of events without loops (`litmus.py` makes them from text). `executions` enumerates what each read
may read from, the orders of `fence.sc` and the coherence orders, and keeps what the axioms allow. Section numbers are
those of the PTX ISA 9.0, chapter 8 "Memory Consistency Model". README.md lists what is not modelled.

Relations are lists of bit masks: bit j of relation[i] says that event i precedes event j.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

SCOPES = ("cta", "cluster", "gpu", "sys")


@dataclass(frozen=True)
class Place:
    """Where a thread runs. CTAs and clusters are numbered inside what contains them."""

    gpu: int | str
    cluster: int = 0
    cta: int = 0

    def domain(self, scope):
        """Names the set of threads that an operation of this scope includes (8.5)."""
        return (self.gpu, self.cluster, self.cta)[: {"cta": 3, "cluster": 2, "gpu": 1, "sys": 0}[scope]]


@dataclass(eq=False)
class Event:
    index: int
    thread: int | None  # None: the initial write of a location (8.2.6)
    kind: str  # read, write, fence, barrier
    location: str | None = None
    scope: str | None = None  # None: weak, or not a memory operation
    acquire: bool = False
    release: bool = False
    sc: bool = False
    value: Callable | None = None  # of a write: (value of a read by its index) -> number, or None: not performed
    reads: frozenset = frozenset()  # reads that the write depends on, by data or control
    read_part: int | None = None  # of a write: the read of the same atomic operation
    observes: bool = True  # of a read: False in reductions, which form no acquire pattern (8.11.1)
    arrives: tuple | None = None  # barriers: the phase of the barrier that this event is an arrival at
    waits: tuple | None = None  # ... or whose completion it waits for
    only_inits: bool = False  # fence.mbarrier_init: orders mbarrier.init only
    is_init: bool = False  # mbarrier.init

    @property
    def strong(self):
        return self.scope is not None


@dataclass
class Program:
    events: list[Event]  # initial writes first, then thread by thread in program order
    places: list[Place]
    registers: dict[tuple[str, str], Callable]  # (thread, register) -> (value of a read by its index) -> number
    expected: dict[int, int] = field(default_factory=dict)  # reads whose value `assume` fixes


def closure(relation):
    """The transitive closure; changes and returns the relation."""
    for k, row in enumerate(relation):
        if row:
            bit = 1 << k
            for i, other in enumerate(relation):
                if other & bit:
                    relation[i] = other | relation[k]
    return relation


def acyclic(relation):
    return not any(row >> i & 1 for i, row in enumerate(closure(list(relation))))


def bits(mask):
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low


class Model:
    """What is the same in all executions of a program."""

    def __init__(self, program):
        self.program, self.events = program, program.events
        self.size = len(self.events)
        self.reads = [e for e in self.events if e.kind == "read"]
        self.writes = [e for e in self.events if e.kind == "write"]
        self.po = self.relation(lambda a, b: a.thread is not None and a.thread == b.thread and a.index < b.index)
        self.same_location = self.relation(lambda a, b: a is not b and a.location and a.location == b.location)
        self.strong_pairs = self.relation(self.morally_strong)
        self.releases = [(first.index, w.index) for w in self.writes for first in self.release_patterns(w)]
        self.acquires = [(r.index, last.index) for r in self.reads for last in self.acquire_patterns(r)]
        self.static, self.init_orders = self.barrier_order()
        self.candidates = {r.index: [w.index for w in self.writes if self.may_read(r, w)] for r in self.reads}
        self.dependencies = [0] * self.size
        for w in self.writes:
            for r in w.reads:
                self.dependencies[r] |= 1 << w.index

    def relation(self, holds):
        return [sum(1 << b.index for b in self.events if holds(a, b)) for a in self.events]

    def morally_strong(self, a, b):
        """8.7, for one proxy and accesses that overlap completely or not at all."""
        if a is b or (a.location and b.location and a.location != b.location):
            return False
        if self.po[a.index] >> b.index & 1 or self.po[b.index] >> a.index & 1:
            return True
        if not (a.strong and b.strong):
            return False
        places = self.program.places[a.thread], self.program.places[b.thread]
        return all(places[0].domain(s) == places[1].domain(s) for s in (a.scope, b.scope))

    def release_patterns(self, write):
        """First operations of the release patterns that end with this strong write (8.8)."""
        for e in self.events if write.strong else ():
            if e.release and not e.only_inits:
                before = self.po[e.index] >> write.index & 1
                if e is write or (before and (e.kind == "fence" or e.location == write.location)):
                    yield e

    def acquire_patterns(self, read):
        """Last operations of the acquire patterns that begin with this strong read (8.8)."""
        for e in self.events if read.strong and read.observes else ():
            if e.acquire:
                after = self.po[read.index] >> e.index & 1
                if e is read or (after and (e.kind == "fence" or e.location == read.location)):
                    yield e

    def barrier_order(self):
        """Program order, initial writes and barriers (8.9.4, 2 and 3, and API synchronization): base causality that
        holds in every execution. And what fence.mbarrier_init before a relaxed arrival orders: inits only."""
        order, inits = list(self.po), []
        for e in self.events:
            if e.thread is None:
                order[e.index] |= sum(1 << other.index for other in self.events if other.thread is not None)
        for a, b in itertools.permutations([e for e in self.events if e.kind == "barrier"], 2):
            if a.arrives is None or a.arrives != b.waits or a.thread == b.thread:
                continue
            if a.release:
                order[a.index] |= 1 << b.index
                continue
            for fence in self.events:  # "use memory fence prior to arrive for relaxed barrier" (9.7.13.3)
                if fence.kind == "fence" and fence.release and self.po[fence.index] >> a.index & 1:
                    if fence.only_inits:
                        inits += [(i.index, b.index) for i in self.events_before(fence) if i.is_init]
                    elif SCOPES.index(fence.scope) >= SCOPES.index("cluster"):
                        order[fence.index] |= 1 << b.index
        return closure(order), inits

    def events_before(self, event):
        return [e for e in self.events if self.po[e.index] >> event.index & 1]

    def may_read(self, read, write):
        """False where base causality forbids it in every execution."""
        r, w = read.index, write.index
        if write.location != read.location or self.static[r] >> w & 1 or write.read_part == r:
            return False
        return not any(
            self.static[w] >> o.index & 1 and self.static[o.index] >> r & 1
            for o in self.writes
            if o.location == read.location and o.read_part is None
        )

    # ---- executions

    def sources(self, chosen=()):
        """What each read may read from, depth first; reads with an expected value are checked as soon as possible."""
        if len(chosen) == len(self.reads):
            yield dict(chosen)
            return
        read = self.reads[len(chosen)].index
        expected = self.program.expected.get(read)
        for write in self.candidates[read]:
            if expected is not None:
                value = Values(self, dict([*chosen, (read, write)])).peek(read)
                if value is not None and value != expected:
                    continue
            yield from self.sources((*chosen, (read, write)))

    def executions(self, wanted=lambda registers: True):
        """Registers and, by location, the last values in coherence order, of all executions the axioms allow and
        whose registers are wanted."""
        for source in self.sources():
            flow = list(self.dependencies)
            for r, w in source.items():
                flow[w] |= 1 << r
            if not acyclic(flow):  # No Thin Air (8.10.4)
                continue
            values = Values(self, source)
            dead = {w.index for w in self.writes if values.of_write(w.index) is None}  # compare-and-swaps that fail
            if any(w in dead for w in source.values()):
                continue
            if any(values(r) != expected for r, expected in self.program.expected.items()):
                continue
            registers = {name: value(values) for name, value in self.program.registers.items()}
            if not wanted(registers):
                continue
            for coherence in self.consistent(source, dead):
                last = {}
                for w in self.writes:
                    if w.index not in dead and not coherence[w.index]:
                        last.setdefault(w.location, set()).add(values.of_write(w.index))
                yield registers, last

    def consistent(self, source, dead):
        """The coherence orders with which these sources satisfy the axioms."""
        rf = [0] * self.size
        for r, w in source.items():
            rf[w] |= 1 << r
        atomics = {w.read_part: w.index for w in self.writes if w.read_part is not None and w.index not in dead}
        observation = self.observation_order(rf, atomics)
        synchronizes = [
            (first, last)
            for first, w in self.releases
            for r, last in self.acquires
            if w not in dead and observation[w] >> r & 1 and self.strong_pairs[first] >> last & 1
        ]
        sc_fences = [e.index for e in self.events if e.sc]
        seen = set()
        for order in itertools.permutations(sc_fences):
            fence_sc = [  # 8.9.3
                (a, b) for a, b in itertools.combinations(order, 2) if self.strong_pairs[a] >> b & 1
            ]
            if frozenset(fence_sc) in seen:
                continue
            seen.add(frozenset(fence_sc))
            base = self.base_causality(synchronizes + fence_sc)
            if any(base[b] >> a & 1 for a, b in fence_sc):  # Fence-SC (8.10.2)
                continue
            cause = self.causality(base, observation)
            yield from self.coherence_orders(rf, source, atomics, dead, cause)

    def observation_order(self, rf, atomics):
        """Writes before reads, through atomic operations (8.9.2)."""
        order = [row & self.strong_pairs[i] for i, row in enumerate(rf)]
        for read, write in atomics.items():
            order[read] |= 1 << write
        closure(order)
        reads = sum(1 << r.index for r in self.reads)
        return [row & reads if self.events[i].kind == "write" else 0 for i, row in enumerate(order)]

    def base_causality(self, edges):
        """8.9.5; barriers and program order are in `static`."""
        base = list(self.static)
        for a, b in edges:
            base[a] |= 1 << b
        closure(base)
        for init, wait in self.init_orders:  # not transitive: of what comes before, only the init itself is ordered
            base[init] |= base[wait]
        return base

    def causality(self, base, observation):
        """8.9.5; all accesses are of the generic proxy."""
        preserved = [row & self.same_location[i] for i, row in enumerate(base)]
        cause = list(preserved)
        for w, row in enumerate(observation):
            for r in bits(row):
                cause[w] |= preserved[r]
        return cause

    def coherence_orders(self, rf, source, atomics, dead, cause):
        live = [w for w in self.writes if w.index not in dead]
        fixed, free = [0] * self.size, []
        for a, b in itertools.permutations(live, 2):
            if a.location == b.location and (a.thread is None or cause[a.index] >> b.index & 1):
                fixed[a.index] |= 1 << b.index  # Coherence (8.10.1)
        for a, b in itertools.combinations([w.index for w in live], 2):
            related = fixed[a] >> b & 1 or fixed[b] >> a & 1
            if not related and self.events[a].location == self.events[b].location and self.strong_pairs[a] >> b & 1:
                free.append((a, b))  # related, one way or the other (8.9.6)
        for flips in itertools.product((False, True), repeat=len(free)):
            order = list(fixed)
            for (a, b), flip in zip(free, flips):
                order[b if flip else a] |= 1 << (a if flip else b)
            closure(order)
            if not any(row >> i & 1 for i, row in enumerate(order)) and self.allowed(rf, source, atomics, cause, order):
                yield order

    def allowed(self, rf, source, atomics, cause, coherence):
        from_reads = [0] * self.size  # 8.9.7, 3
        for r, w in source.items():
            from_reads[r] = coherence[w]
        # Causality (8.10.6)
        for i in range(self.size):
            if any(cause[j] >> i & 1 for j in bits(rf[i] | from_reads[i])):
                return False
        # Atomicity of read-modify-write operations (8.10.3)
        for read, write in atomics.items():
            between = from_reads[read] & self.strong_pairs[read]
            if any(coherence[w] & self.strong_pairs[w] & 1 << write for w in bits(between)):
                return False
        # Sequential consistency per location (8.10.5)
        return acyclic(
            self.same_location[i] & self.po[i] | (rf[i] | coherence[i] | from_reads[i]) & self.strong_pairs[i]
            for i in range(self.size)
        )


class Values:
    """Values of reads and writes in an execution, by the index of the event."""

    def __init__(self, model, source):
        self.events, self.source, self.known, self.begun = model.events, source, {}, set()

    def __call__(self, read):
        return self.of_write(self.source[read])

    def of_write(self, write):
        if write not in self.known:
            if write in self.begun:
                raise KeyError(f"the value of event {write} hangs on itself")
            self.begun.add(write)
            self.known[write] = self.events[write].value(self)
        return self.known[write]

    def peek(self, read):
        """The value, or None if it depends on reads without a source yet, or on itself."""
        try:
            return self(read)
        except KeyError:
            return None
