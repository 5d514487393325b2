"""The protocols of csrc by which threads of different CTAs, clusters or GPUs pass data to each other.

Each is a litmus test in the PTX that its wrappers issue, with a thread for each role. `unsafe` must be impossible as
written. Every instruction is then weakened, step by step: what stays safe must be listed under `spare` with its reason,
and nothing else may. `sources` are the functions that the program models, with their ordering instructions in order.
"""

from dataclasses import dataclass, field


@dataclass
class Source:
    file: str
    function: str | tuple[str, ...]  # or several names: the first that exists counts
    order: str  # instructions, and `: snippet` for code between them; `{release,relaxed}`: either
    only: str = ".*"  # instructions that are looked at


@dataclass
class Protocol:
    name: str
    program: str
    unsafe: str
    sources: list[Source]
    # instruction -> (weakest forms that are still safe, why)
    spare: dict[str, tuple[list[str], str]] = field(default_factory=dict)
    # pairs of spare instructions of which one is needed
    one_of: list[tuple[str, str]] = field(default_factory=list)
    # instruction -> (weaker forms that kernels may have although PTX does not guarantee them, what does)
    beyond_ptx: dict[str, tuple[list[str], str]] = field(default_factory=dict)
    # mistakes in the order of things: name -> (lines of the program, lines in their place)
    mistakes: dict[str, tuple[str, str]] = field(default_factory=dict)

    def __post_init__(self):
        self.program = stripped(self.program)

    def with_mistake(self, name):
        right, wrong = map(stripped, self.mistakes[name])
        assert right in self.program, f"{self.name}: the program has no lines\n{right}"
        return self.program.replace(right, wrong)


def stripped(text):
    return "\n".join(line.strip() for line in text.strip().splitlines())


NOTHING = "nothing"
EXCHANGE = "csrc/exchange/kernel.cuh"
SMALL_GEMM = "csrc/fp8_gemm/kernel_sm90_small.cuh"
W4_FEW = "csrc/w4_gemm/kernel_sm90_few.cuh"
LARGE_GEMM = "csrc/fp8_gemm/kernel_sm90.cuh"
DISPATCH = "csrc/moe/kernel_dispatch.cuh"
MLA = "csrc/mla_decode/kernel_sm90.cuh"

# ---- between GPUs: csrc/exchange/kernel.cuh

# GPU 0 sends: blocks 0 and 1, of which block 1 counts last; its lane 1 sets the flag of GPU 1. There a block of the
# wait kernel polls, and the next kernel of the stream reads the rows.
ROWS_AND_FLAG = Protocol(
    name="exchange: rows, then the flag",
    program="""
        thread mover_0 @ 0.0
            st.weak rows_0, 1
            bar.sync sent
        thread mover_1 @ 0.1
            st.weak rows_1, 1
            st.weak numbers, 1
            bar.sync sent
        thread lane_0_of_block_0 @ 0.0
            bar.sync sent
            fence.acq_rel.sys
            before = atom.acq_rel.gpu.add done, 1
        thread lane_0_of_block_1 @ 0.1
            bar.sync sent
            fence.acq_rel.sys
            before = atom.acq_rel.gpu.add done, 1
            assume before == 1
            bar.warp.sync warp
        thread lane_1_of_block_1 @ 0.1
            bar.warp.sync warp
            st.release.sys flag, 7
        thread poller @ 1.0
            seen = ld.acquire.sys flag
            assume seen == 7
            bar.sync came
            grid.ends wait
        thread copier @ 1.0
            bar.sync came
            got = ld.weak numbers
            grid.ends wait
        thread user @ 1.1
            grid.begins wait
            got_0 = ld.weak rows_0
            got_1 = ld.weak rows_1
    """,
    unsafe="copier.got == 0 or user.got_0 == 0 or user.got_1 == 0",
    sources=[
        Source(
            EXCHANGE,
            "finish_sending",
            """
            bar.sync
            fence.acq_rel.sys
            atom.acq_rel.gpu.add
            bar.warp.sync
            st.release.sys
            """,
        ),
        Source(EXCHANGE, "await_flag", "ld.acquire.sys flag", only=r"ld\S+ flag"),
        Source(EXCHANGE, "scatter_kernel", ": store_piece(\n: finish_sending("),
        Source(EXCHANGE, "scatter_wait_kernel", ": await_flag(\nbar.sync\n: numbers[i]"),
        Source(EXCHANGE, "gather_kernel", ": store_piece(\n: finish_sending("),
        Source(EXCHANGE, "gather_wait_kernel", ": await_flag(\nbar.sync\n: numbers[pair]"),
    ],
    spare={
        "fence.acq_rel.sys": (
            [NOTHING],
            "the count releases what the barrier has collected, and the flag hands that on at system scope: causality "
            "is transitive across scopes; without the fence a relaxed count would not do",
        ),
        "before = atom.acq_rel.gpu.add done, 1": (
            ["before = atom.acquire.gpu.add done, 1"],
            "after the fence a relaxed count is a release pattern too",
        ),
    },
    one_of=[("fence.acq_rel.sys", "before = atom.acq_rel.gpu.add done, 1")],
    mistakes={
        "the flag before the count": (
            "bar.warp.sync warp\nst.release.sys flag, 7",
            "st.release.sys flag, 7\nbar.warp.sync warp",
        ),
        "a row after the count": ("st.weak rows_0, 1\nbar.sync sent", "bar.sync sent\nst.weak rows_0, 1"),
        "numbers before the poller has seen the flag": (
            "bar.sync came\ngot = ld.weak numbers",
            "got = ld.weak numbers",
        ),
        "rows used without a wait kernel": ("grid.begins wait", ""),
    },
)

# Rank 1 uses the rows of epoch e and then sends epoch e + 1; rank 0 has seen that flag when it sends e + 2.
HALVES = Protocol(
    name="exchange: a half is overwritten two epochs later",
    program="""
        thread user_of_e @ 1.0
            got = ld.weak rows
            grid.ends use
        thread sender_of_e_1 @ 1.0
            grid.begins use
            st.release.sys flag, 1
        thread poller_of_e_1 @ 0.0
            seen = ld.acquire.sys flag
            assume seen == 1
            grid.ends wait
        thread sender_of_e_2 @ 0.1
            grid.begins wait
            st.weak rows, 2
    """,
    unsafe="user_of_e.got == 2",
    sources=[
        Source(EXCHANGE, "finish_sending", "st.release.sys", only=r"st\..*"),
        Source(EXCHANGE, "await_flag", "ld.acquire.sys flag", only=r"ld\S+ flag"),
    ],
    mistakes={
        "one half: epoch e + 1 overwrites the rows of e": ("grid.begins wait", ""),
        "the flag of e + 1 while the rows of e are used": ("grid.begins use", ""),
    },
)

# The count of blocks is back at 0, and the epoch one more, when the next launch on the stream begins.
COUNTER_RESET = Protocol(
    name="exchange: the count of blocks from launch to launch",
    program="""
        thread block_0 @ 0.0
            before = atom.acq_rel.gpu.add done, 1
            grid.ends send
        thread block_1 @ 0.1
            before = atom.acq_rel.gpu.add done, 1
            assume before == 1
            st.weak done, 0
            st.weak epoch, 1
            grid.ends send
        thread next_block @ 0.0
            grid.begins send
            epoch = ld.weak epoch
            before = atom.acq_rel.gpu.add done, 1
    """,
    unsafe="next_block.epoch != 1 or next_block.before != 0",
    sources=[
        Source(
            EXCHANGE,
            "finish_sending",
            """
            atom.acq_rel.gpu.add
            : done[kind] = 0
            : epoch[kind] = epoch
            """,
            only="atom.*",
        ),
    ],
    spare={
        "before = atom.acq_rel.gpu.add done, 1": (
            ["before = atom.relaxed.gpu.add done, 1"],
            "for the count alone its scope is enough; its semantics are for the rows",
        ),
    },
    mistakes={"the count is not put back": ("st.weak done, 0", "")},
)

# What went wrong first, for the host, which reads the fault and then, where there is one, the rest.
ERROR_RECORD = Protocol(
    name="exchange: the record of the first fault",
    program="""
        thread first @ 0.0
            before = atom.acq_rel.sys.cas claimed, 0, 1
            assume before == 0
            st.weak who, 1
            st.release.sys fault, 1
        thread second @ 0.1
            before = atom.acq_rel.sys.cas claimed, 0, 1
        thread host @ host
            fault = ld.acquire.sys fault
            assume fault == 1
            who = ld.weak who
    """,
    unsafe="second.before == 0 or host.who != 1",
    sources=[
        Source(
            EXCHANGE,
            "record",
            """
            atom.acq_rel.sys.cas
            : error->who =
            : error->number =
            st.release.sys
            """,
        ),
    ],
    spare={
        "before = atom.acq_rel.sys.cas claimed, 0, 1": (
            ["before = atom.relaxed.gpu.cas claimed, 0, 1"],
            "it only picks one of this GPU's threads; nothing is read after it",
        ),
    },
    mistakes={
        "the fault before what belongs to it": (
            "st.weak who, 1\nst.release.sys fault, 1",
            "st.release.sys fault, 1\nst.weak who, 1",
        ),
        "the host reads the fault last": (
            "fault = ld.acquire.sys fault\nassume fault == 1\nwho = ld.weak who",
            "who = ld.weak who\nfault = ld.acquire.sys fault\nassume fault == 1",
        ),
    },
)

# The abort word carries all that its reader needs.
ABORT = Protocol(
    name="exchange: the abort word",
    program="""
        thread late @ 0.0
            st.release.sys abort, 3
        thread poller @ 1.0
            seen = ld.acquire.sys abort
            again = ld.acquire.sys abort
    """,
    unsafe="poller.seen == 3 and poller.again == 0",
    sources=[
        Source(EXCHANGE, ("abort_all", "await_flag"), "st.release.sys", only=r"st\.\w+\.sys"),
        Source(EXCHANGE, "await_flag", "ld.acquire.sys abort", only=r"ld\S+ abort"),
    ],
    spare={
        "st.release.sys abort, 3": (["st.relaxed.sys abort, 3"], "no other data belong to the word"),
        "seen = ld.acquire.sys abort": (["seen = ld.relaxed.sys abort"], "no other data belong to the word"),
        "again = ld.acquire.sys abort": (["again = ld.weak abort"], "causality orders reads of one thread and place"),
    },
)

# ---- in a cluster: split-K parts of csrc/fp8_gemm/kernel_sm90_small.cuh and csrc/w4_gemm/kernel_sm90_few.cuh, through
# distributed shared memory

_PARTS = [
    Source(
        SMALL_GEMM,
        "multiply_small_tiles",
        """
        mbarrier.test_wait.acquire.{cluster,cta} parts_read
        : smem.part[
        bar.sync
        mbarrier.arrive.release.cluster parts_ready
        mbarrier.test_wait.acquire.cluster parts_ready
        : finish_token(
        bar.sync
        mbarrier.arrive.release.{cluster,cta::remote} parts_read
        mbarrier.test_wait.acquire.{cluster,cta} parts_read
        """,
        only=r"mbarrier.* parts_\w+|bar\.sync",
    ),
    Source(SMALL_GEMM, "finish_token", "mapa\n: reinterpret_cast<const float2*>(part)"),
    Source(
        W4_FEW,
        "add_parts",
        """
        mbarrier.test_wait.acquire.{cluster,cta} parts_read
        : smem.part[j][thread] =
        bar.sync
        mbarrier.arrive.release.cluster parts_ready
        mbarrier.test_wait.acquire.cluster parts_ready
        mapa
        : four = parts[
        bar.sync
        mbarrier.arrive.release.{cluster,cta::remote} parts_read
        """,
    ),
    Source(W4_FEW, "multiply_few", "mbarrier.test_wait.acquire.{cluster,cta} parts_read", only=r"mbarrier.* parts_\w+"),
]
_CONSUMED = (
    "the sums of the parts are stored before the arrival: a warp issues its instructions in order and an addition "
    "waits for the value it adds, so that the reads have been performed. PTX itself orders them at cluster scope only."
)

# Block 0 and block 1 leave their parts; block 1 adds them.
PARTS_READY = Protocol(
    name="split-K: parts are read when all blocks have written them",
    program="""
        parts_ready = 0
        thread writer_0 @ 0.0.0
            st.weak part_0, 1
            bar.sync written
        thread arriver_0 @ 0.0.0
            bar.sync written
            mbarrier.arrive.release.cluster parts_ready
        thread writer_1 @ 0.0.1
            st.weak part_1, 1
            bar.sync written
        thread arriver_1 @ 0.0.1
            bar.sync written
            mbarrier.arrive.release.cluster parts_ready
        thread adder @ 0.0.1
            arrived = mbarrier.test_wait.acquire.cluster parts_ready
            assume arrived == 2
            got_0 = ld.weak part_0
            got_1 = ld.weak part_1
    """,
    unsafe="adder.got_0 == 0 or adder.got_1 == 0",
    sources=_PARTS,
    mistakes={"waits for its own block only": ("assume arrived == 2", "assume arrived == 1")},
)

# Block 0 overwrites its part for the next tile when both blocks have added it.
PARTS_READ = Protocol(
    name="split-K: a part is overwritten when all blocks have read it",
    program="""
        parts_read = 0
        thread adder_0 @ 0.0.0
            got = ld.weak part
            bar.sync added
        thread arriver_0 @ 0.0.0
            bar.sync added
            mbarrier.arrive.release.cluster parts_read
        thread adder_1 @ 0.0.1
            got = ld.weak part
            bar.sync added
        thread arriver_1 @ 0.0.1
            bar.sync added
            mbarrier.arrive.release.cluster parts_read
        thread writer @ 0.0.0
            arrived = mbarrier.test_wait.acquire.cluster parts_read
            assume arrived == 2
            st.weak part, 2
    """,
    unsafe="adder_0.got == 2 or adder_1.got == 2",
    sources=_PARTS,
    beyond_ptx={
        "mbarrier.arrive.release.cluster parts_read": (["mbarrier.arrive.release.cta parts_read"], _CONSUMED),
        "arrived = mbarrier.test_wait.acquire.cluster parts_read": (
            ["arrived = mbarrier.test_wait.acquire.cta parts_read"],
            _CONSUMED,
        ),
    },
    mistakes={"waits for its own block only": ("assume arrived == 2", "assume arrived == 1")},
)


def barriers_made(arrive, spare, one_of):
    """The barriers of a CTA are initialised before another CTA arrives at them, with both forms of arrival."""
    return Protocol(
        name=f"clusters: mbarriers are made before others arrive at them ({arrive} arrival)",
        program=f"""
            thread maker @ 0.0.0
                mbarrier.init made
                fence.mbarrier_init.release.cluster
                bar.sync block
                barrier.cluster.arrive.{arrive} begin
                barrier.cluster.wait.acquire begin
            thread waiter @ 0.0.0
                bar.sync block
                barrier.cluster.arrive.{arrive} begin
                barrier.cluster.wait.acquire begin
                arrived = mbarrier.test_wait.acquire.cluster made
            thread arriver @ 0.0.1
                barrier.cluster.arrive.{arrive} begin
                barrier.cluster.wait.acquire begin
                before = mbarrier.arrive.release.cluster made
        """,
        unsafe="arriver.before < 0 or waiter.arrived < 0",
        sources=[
            Source(
                LARGE_GEMM,
                "fp8_gemm_sm90_kernel",
                """
                fence.mbarrier_init.release.cluster
                bar.sync
                barrier.cluster.arrive.{release,relaxed}
                barrier.cluster.wait.acquire
                : load_factors(
                bar.warp.sync
                barrier.cluster.arrive.{release,relaxed}
                barrier.cluster.wait.acquire
                """,
            ),
            Source(
                MLA,
                "mla_decode_sm90_kernel",
                """
                : make_barriers<Ctas>
                barrier.cluster.arrive.{release,relaxed}
                barrier.cluster.wait.acquire
                bar.sync
                : attend_left
                barrier.cluster.arrive.{release,relaxed}
                barrier.cluster.wait.acquire
                """,
                only=r"barrier\.cluster.*|bar\.sync",
            ),
            Source(MLA, "make_barriers", "fence.mbarrier_init.release.cluster"),
        ],
        spare={
            "bar.sync block": ([NOTHING], "the cluster's barrier follows; without a cluster it is needed"),
            "arrived = mbarrier.test_wait.acquire.cluster made": (
                ["arrived = mbarrier.test_wait.relaxed.cta made"],
                "only what the object holds is looked at here",
            ),
            "before = mbarrier.arrive.release.cluster made": (
                ["before = mbarrier.arrive.relaxed.cta made"],
                "only what the object holds is looked at here",
            ),
            **spare,
        },
        one_of=one_of,
    )


MADE_RELEASED = barriers_made(
    "release",
    {
        "fence.mbarrier_init.release.cluster": (
            [NOTHING],
            "a releasing arrival publishes the barriers too; the fence makes a relaxed one enough",
        ),
        "barrier.cluster.arrive.release begin": (["barrier.cluster.arrive.relaxed begin"], "after the fence"),
    },
    [("fence.mbarrier_init.release.cluster", "barrier.cluster.arrive.release begin")],
)
MADE_RELAXED = barriers_made("relaxed", {}, [])

# A block may end, and its shared memory go to the next one, when no other block reads it any more. That the others'
# arrivals at its mbarriers have landed, too, is what its last wait at parts_read is for; an mbarrier whose block has
# ended is not modelled.
LAST_READ = Protocol(
    name="split-K: a block ends when the others have read its part",
    program="""
        thread adder @ 0.0.1
            got = ld.weak part
            barrier.cluster.arrive.release end
            barrier.cluster.wait.acquire end
        thread of_the_block_that_ends @ 0.0.0
            barrier.cluster.arrive.release end
            barrier.cluster.wait.acquire end
            st.weak part, 9     # the next block's
    """,
    unsafe="adder.got == 9",
    sources=[
        Source(
            SMALL_GEMM,
            "fp8_gemm_sm90_small_kernel",
            """
            fence.mbarrier_init.release.cluster
            bar.sync
            barrier.cluster.arrive.{release,relaxed}
            barrier.cluster.wait.acquire
            : multiply_small_tiles(
            bar.warp.sync
            barrier.cluster.arrive.{release,relaxed}
            barrier.cluster.wait.acquire
            """,
        ),
        Source(
            W4_FEW,
            "w4_gemm_sm90_few_kernel",
            """
            fence.mbarrier_init.release.cluster
            bar.sync
            barrier.cluster.arrive.{release,relaxed}
            barrier.cluster.wait.acquire
            : multiply_few(
            bar.warp.sync
            barrier.cluster.arrive.{release,relaxed}
            barrier.cluster.wait.acquire
            """,
        ),
    ],
    beyond_ptx={
        "barrier.cluster.arrive.release end": (["barrier.cluster.arrive.relaxed end"], _CONSUMED),
    },
)

# ---- between blocks of a GPU, and from kernel to kernel

# Each block plans for itself in shared memory and moves its rows; block 0 writes down what the next kernel needs.
ONE_LAUNCH_DISPATCH = Protocol(
    name="dispatch in one launch: blocks share nothing",
    program="""
        thread planner_0 @ 0.0
            st.weak plan_0, 1
            bar.sync planned
        thread mover_0 @ 0.0
            bar.sync planned
            slot = ld.weak plan_0
            st.weak row_0, slot
            st.weak offsets, 1
            grid.ends move
        thread planner_1 @ 0.1
            st.weak plan_1, 1
            bar.sync planned
        thread mover_1 @ 0.1
            bar.sync planned
            slot = ld.weak plan_1
            st.weak row_1, slot
            grid.ends move
        thread user @ 0.2
            grid.begins move
            at = ld.weak offsets
            got_0 = ld.weak row_0
            got_1 = ld.weak row_1
    """,
    unsafe="user.at == 0 or user.got_0 == 0 or user.got_1 == 0",
    sources=[
        Source(
            DISPATCH,
            "plan_block",
            """
            : place_experts(
            bar.sync
            : smem.slots[pair] =
            bar.sync
            : p.offsets[e] =
            """,
        ),
        Source(DISPATCH, "moe_move_kernel", ": plan_block(\n: plan->slots[pair]\n: plan->offsets"),
    ],
    mistakes={
        "a block reads the offsets that block 0 writes": ("slot = ld.weak plan_1", "slot = ld.weak offsets"),
        "the plan is not waited for": ("bar.sync planned\nslot = ld.weak plan_1", "slot = ld.weak plan_1"),
    },
)

# Counts of tiles, their sums, places: three kernels of one stream, none launched ahead of the one before.
THREE_LAUNCH_DISPATCH = Protocol(
    name="dispatch in three launches: one kernel after the other",
    program="""
        thread counter @ 0.1
            st.weak count, 1
            grid.ends count
        thread scanner @ 0.0
            grid.begins count
            total = ld.weak count
            st.weak before, total
            grid.ends scan
        thread mover @ 0.1
            grid.begins scan
            start = ld.weak before
            own = ld.weak count
    """,
    unsafe="mover.start == 0 or mover.own == 0",
    sources=[
        Source(DISPATCH, "moe_count_kernel", ": totals[e] ="),
        Source(DISPATCH, "moe_scan_kernel", ": cell[i * p.experts] = total"),
        Source(
            "csrc/moe/launch.cu", "launch_moe_dispatch", ": moe_count_kernel\n: moe_scan_kernel\n: launch_move<false>"
        ),
    ],
)

# Tokens per expert, added up by all blocks; the next kernel reads the sums.
COUNTS = Protocol(
    name="router and balance: counts added by all blocks",
    program="""
        thread block_0 @ 0.0
            before = atom.relaxed.gpu.add counts, 1
            grid.ends route
        thread block_1 @ 0.1
            before = atom.relaxed.gpu.add counts, 1
            grid.ends route
        thread user @ 0.0
            grid.begins route
            count = ld.weak counts
    """,
    unsafe="user.count != 2",
    sources=[
        Source(
            "csrc/moe/kernel_route.cuh", "moe_route_kernel", "atom.relaxed.gpu.add\natom.relaxed.gpu.add", only="atom.*"
        ),
        Source("csrc/moe/kernel_balance.cuh", "moe_hits_kernel", "atom.relaxed.gpu.add"),
    ],
)

# Parts of split sequences. The combine kernel is launched while mla_decode runs and waits for it by itself; the next
# mla_decode, which overwrites the workspace, is launched in the order of the stream.
MERGE = Protocol(
    name="mla_decode: parts are merged by a kernel that is launched ahead",
    program="""
        thread decode_0 @ 0.0
            st.weak part_0, 1
            grid.ends decode
        thread decode_1 @ 0.1
            st.weak part_1, 1
            grid.ends decode
        thread combine @ 0.2
            griddepcontrol.wait decode
            got_0 = ld.weak part_0
            got_1 = ld.weak part_1
            grid.ends combine
        thread next_decode @ 0.0
            grid.begins combine
            st.weak part_0, 2
    """,
    unsafe="combine.got_0 != 1 or combine.got_1 != 1",
    sources=[
        Source(MLA, "mla_combine_sm90_kernel", "griddepcontrol.wait\n: combine_rows"),
        Source(MLA, "mla_decode_sm90_kernel", "griddepcontrol.launch_dependents", only="griddepcontrol.*"),
        Source(
            "csrc/mla_decode/launch_sm90.cu",
            "start",
            """
            : launch<mla_decode_sm90_kernel
            : launch<mla_decode_sm90_kernel
            : overlap_previous = true
            : launch<mla_combine_sm90_kernel
            """,
        ),
    ],
    mistakes={
        "parts are read before the wait": (
            "griddepcontrol.wait decode\ngot_0 = ld.weak part_0",
            "got_0 = ld.weak part_0\ngriddepcontrol.wait decode",
        )
    },
)

# Without that: the combine kernel after mla_decode, as streams order it.
MERGE_IN_ORDER = Protocol(
    name="mla_decode: parts are merged by the next kernel",
    program="""
        thread decode @ 0.0
            st.weak part, 1
            grid.ends decode
        thread combine @ 0.1
            grid.begins decode
            got = ld.weak part
    """,
    unsafe="combine.got != 1",
    sources=[
        Source(
            "csrc/mla_decode/launch.cu",
            "launch_mla_decode",
            ": by_tile_rows<bf16, /*kQuantized=*/true>\n: launch_combine(p, stream)",
        )
    ],
)

# The block that comes last does the rest: as the emulator's test kernel split_sum does it, for kernels to come.
TICKETS = Protocol(
    name="tickets: the last block adds the parts of all",
    program="""
        thread writer_0 @ 0.0
            st.weak part_0, 1
            bar.sync written
        thread leader_0 @ 0.0
            bar.sync written
            fence.acq_rel.gpu
            ticket = atom.acq_rel.gpu.add tickets, 1
        thread writer_1 @ 0.1
            st.weak part_1, 1
            bar.sync written
        thread leader_1 @ 0.1
            bar.sync written
            fence.acq_rel.gpu
            ticket = atom.acq_rel.gpu.add tickets, 1
            assume ticket == 1
            st.weak tickets, 0
            bar.sync told
            grid.ends sum
        thread adder_1 @ 0.1
            bar.sync told
            got_0 = ld.weak part_0
            got_1 = ld.weak part_1
            grid.ends sum
        thread next_launch @ 0.0
            grid.begins sum
            ticket = atom.acq_rel.gpu.add tickets, 1
    """,
    unsafe="adder_1.got_0 == 0 or adder_1.got_1 == 0 or next_launch.ticket != 0",
    sources=[
        Source(
            "python_tests/emulator/kernels/small.cu",
            "split_sum_kernel",
            """
            bar.sync
            fence.acq_rel.gpu
            atom.acq_rel.gpu.add
            : tickets[row] = 0
            bar.sync
            : sum += row_parts
            """,
        ),
    ],
    spare={
        "fence.acq_rel.gpu": ([NOTHING], "the ticket releases by itself"),
        "ticket = atom.acq_rel.gpu.add tickets, 1": (
            ["ticket = atom.acquire.gpu.add tickets, 1"],
            "after the fence a relaxed ticket is a release pattern too",
        ),
    },
    one_of=[("fence.acq_rel.gpu", "ticket = atom.acq_rel.gpu.add tickets, 1")],
    mistakes={
        "a part after the ticket": (
            "st.weak part_0, 1\nbar.sync written",
            "bar.sync written\nst.weak part_0, 1",
        ),
        "the counter is not put back": ("st.weak tickets, 0", ""),
        "parts added by threads that have not met the leader": ("bar.sync told\ngot_0", "got_0"),
    },
)

# Functions that reach beyond their block and are not modelled.
_ASYNC_PROXY = (
    "stages are written by TMA and read by wgmma, both of the async proxy: wgmma_wait has ended the reads before the "
    "arrival, and TMA is started after the wait. The loading warp waits for all arrivals of the other block before its "
    "own ends"
)
NOT_MODELLED = {
    (LARGE_GEMM, "load_factors"): _ASYNC_PROXY,
    (LARGE_GEMM, "load_scales"): "scales are read by the block that copies them; the barrier is that of the stage",
    (LARGE_GEMM, "multiply_tiles"): _ASYNC_PROXY,
    (MLA, "release"): _ASYNC_PROXY,
    (MLA, "load_tasks"): _ASYNC_PROXY,
    (
        "csrc/mla_prefill/schedule.cuh",
        "take_ticket",
    ): "a counter: its number says which inputs to read, and nothing else",
}

PROTOCOLS = [value for value in globals().values() if isinstance(value, Protocol)]
