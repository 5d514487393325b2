"""The model against verdicts that are known: the litmus tests of the PTX manual and the classical shapes."""

import pytest
from litmus import NOTHING, instructions, possible, replaced, spare, weaker

# Threads a, b, c, d of the shapes: in one CTA, in a cluster's CTAs, in CTAs of a GPU, on GPUs of their own.
PLACES = {
    "cta": ("0.0.0", "0.0.0", "0.0.0", "0.0.0"),
    "cluster": ("0.0.0", "0.0.1", "0.0.2", "0.0.3"),
    "gpu": ("0.0.0", "0.1.0", "0.2.0", "0.3.0"),
    "sys": ("0", "1", "2", "3"),
}
SCOPES = list(PLACES)


def shape(threads, places=PLACES["gpu"]):
    """Text of a program with a column for each thread, lines separated by `;`."""
    return "\n".join(
        f"thread {name} @ {place}\n" + "\n".join(line.strip() for line in code.split(";"))
        for name, place, code in zip("abcd", places, threads)
    )


def mp(write, read, places=PLACES["gpu"]):
    return shape([f"st.weak x, 1; {write}", f"{read}; r1 = ld.weak x"], places)


MP_STALE = "b.r0 == 1 and b.r1 == 0"


class TestMessagePassing:
    @pytest.mark.parametrize("where", SCOPES)
    @pytest.mark.parametrize("scope", SCOPES)
    def test_scopes_must_include_the_other_thread(self, where, scope):
        program = mp(f"st.release.{scope} f, 1", f"r0 = ld.acquire.{scope} f", PLACES[where])
        wide_enough = SCOPES.index(scope) >= SCOPES.index(where)
        assert possible(program, MP_STALE) != wide_enough
        assert possible(program, "b.r0 == 1 and b.r1 == 1")
        assert possible(program, "b.r0 == 0 and b.r1 == 1"), "data may come before the flag"

    @pytest.mark.parametrize("scopes", [("cta", "gpu"), ("gpu", "cta")])
    def test_both_scopes_count(self, scopes):
        assert possible(mp(f"st.release.{scopes[0]} f, 1", f"r0 = ld.acquire.{scopes[1]} f"), MP_STALE)

    @pytest.mark.parametrize(
        "write, read, stale",
        [
            ("st.weak f, 1", "r0 = ld.weak f", True),
            ("st.relaxed.gpu f, 1", "r0 = ld.relaxed.gpu f", True),
            ("st.relaxed.gpu f, 1", "r0 = ld.acquire.gpu f", True),
            ("st.release.gpu f, 1", "r0 = ld.relaxed.gpu f", True),
            ("fence.acq_rel.gpu; st.relaxed.gpu f, 1", "r0 = ld.relaxed.gpu f; fence.acq_rel.gpu", False),
            ("fence.release.gpu; st.relaxed.gpu f, 1", "r0 = ld.relaxed.gpu f; fence.acquire.gpu", False),
            ("fence.acquire.gpu; st.relaxed.gpu f, 1", "r0 = ld.relaxed.gpu f; fence.acquire.gpu", True),
            ("fence.release.gpu; st.relaxed.gpu f, 1", "r0 = ld.relaxed.gpu f; fence.release.gpu", True),
            ("fence.sc.gpu; st.relaxed.gpu f, 1", "r0 = ld.relaxed.gpu f; fence.acq_rel.gpu", False),
            ("fence.acq_rel.cta; st.relaxed.gpu f, 1", "r0 = ld.relaxed.gpu f; fence.acq_rel.gpu", True),
            ("fence.acq_rel.gpu; st.weak f, 1", "r0 = ld.relaxed.gpu f; fence.acq_rel.gpu", True),
            ("fence.acq_rel.gpu; st.relaxed.gpu f, 1", "r0 = ld.weak f; fence.acq_rel.gpu", True),
            ("fence.acq_rel.gpu; st.relaxed.gpu f, 1", "r0 = ld.acquire.gpu f", False),
            ("st.release.gpu f, 1", "r0 = ld.relaxed.gpu f; fence.acq_rel.gpu", False),
            # patterns of two operations on one location (8.8): release then strong write, strong read then acquire
            ("st.release.gpu f, 2; st.relaxed.gpu f, 1", "r0 = ld.acquire.gpu f", False),
            ("st.release.gpu g, 2; st.relaxed.gpu f, 1", "r0 = ld.acquire.gpu f", True),
            ("st.release.gpu f, 1", "r0 = ld.relaxed.gpu f; r2 = ld.acquire.gpu f", False),
            ("st.release.gpu f, 1", "r0 = ld.relaxed.gpu f; r2 = ld.acquire.gpu g", True),
            ("atom.release.gpu.exch f, 1", "r0 = atom.acquire.gpu.add f, 0", False),
            ("atom.acquire.gpu.exch f, 1", "r0 = atom.acquire.gpu.add f, 0", True),
        ],
    )
    def test_patterns(self, write, read, stale):
        assert possible(mp(write, read), MP_STALE) == stale

    @pytest.mark.parametrize("kind, stale", [("red", True), ("r0 = atom", False)])
    def test_reductions_form_no_acquire_pattern(self, kind, stale):
        """PTX 8.11.1."""
        program = shape(
            ["st.weak x, 42; st.release.gpu f, 1", f"{kind}.relaxed.sys.add f, 1; fence.acquire.gpu; r1 = ld.weak x"]
        )
        assert possible(program, "b.r1 == 0 and final.f == 2") == stale

    @pytest.mark.parametrize("middle, stale", [("atom.relaxed.gpu.add f, 1", False), ("st.relaxed.gpu f, 2", True)])
    def test_atomics_pass_a_release_on(self, middle, stale):
        """Observation order goes through atomic operations of others, and not through their stores (8.9.2)."""
        program = shape(
            ["st.weak x, 1; st.release.gpu f, 1", middle, "r0 = ld.acquire.gpu f; r1 = ld.weak x"],
        )
        assert possible(program, "c.r0 == 2 and c.r1 == 0 and final.f == 2") == stale

    @pytest.mark.parametrize("places, stale", [(("0.0.0", "0.0.0"), False), (("0.0.0", "0.0.1"), True)])
    def test_barrier(self, places, stale):
        program = shape(["st.weak x, 1; bar.sync A", "bar.sync A; r1 = ld.weak x"], places)
        assert possible(program, "b.r1 == 0") == stale

    def test_arrival_alone_waits_for_nobody(self):
        program = shape(
            ["st.weak x, 1; bar.sync A; r0 = ld.weak y", "st.weak y, 1; bar.arrive A; r0 = ld.weak x"], "00"
        )
        assert not possible(program, "a.r0 == 0")
        assert possible(program, "b.r0 == 0")

    def test_phases_of_a_barrier(self):
        """A write after the first phase is ordered by the second one only."""
        program = shape(
            ["bar.sync A; st.weak x, 1; bar.sync A", "bar.sync A; r0 = ld.weak x; bar.sync A; r1 = ld.weak x"], "00"
        )
        assert possible(program, "b.r0 == 0") and possible(program, "b.r0 == 1")
        assert not possible(program, "b.r1 == 0")

    @pytest.mark.parametrize(
        "arrive, stale",
        [
            ("barrier.cluster.arrive.release C", False),
            ("barrier.cluster.arrive.relaxed C", True),
            ("fence.acq_rel.cluster; barrier.cluster.arrive.relaxed C", False),  # the manual's example, 9.7.13.3
            ("fence.acq_rel.cta; barrier.cluster.arrive.relaxed C", True),
            ("fence.mbarrier_init.release.cluster; barrier.cluster.arrive.relaxed C", True),  # not for plain stores
        ],
    )
    def test_cluster_barrier(self, arrive, stale):
        program = shape(
            [
                f"st.weak x, 1; {arrive}; barrier.cluster.wait.acquire C",
                f"{arrive}; barrier.cluster.wait.acquire C; r1 = ld.weak x",
            ],
            PLACES["cluster"],
        )
        assert possible(program, "b.r1 == 0") == stale

    def test_program_order_between_arrival_and_wait_is_not_ordered(self):
        program = shape(
            [
                "barrier.cluster.arrive.release C; st.weak x, 1; barrier.cluster.wait.acquire C",
                "barrier.cluster.arrive.release C; barrier.cluster.wait.acquire C; r1 = ld.weak x",
            ],
            PLACES["cluster"],
        )
        assert possible(program, "b.r1 == 0")

    @pytest.mark.parametrize("begin, stale", [("grid.begins G", False), ("griddepcontrol.wait G", False), ("", True)])
    def test_grids(self, begin, stale):
        program = shape(["st.weak x, 1; grid.ends G", f"{begin or 'r9 = ld.weak y'}; r1 = ld.weak x"])
        assert possible(program, "b.r1 == 0") == stale


def sb(fence, places=PLACES["gpu"]):
    return shape(
        [
            f"st.relaxed.sys x, 1; {fence}; r0 = ld.relaxed.sys y",
            f"st.relaxed.sys y, 1; {fence}; r0 = ld.relaxed.sys x",
        ],
        places,
    )


class TestOtherShapes:
    @pytest.mark.parametrize(
        "fence, both_old",
        [("fence.sc.gpu", False), ("fence.sc.cta", True), ("fence.acq_rel.sys", True), ("r9 = ld.weak z", True)],
    )
    def test_store_buffering(self, fence, both_old):
        assert possible(sb(fence), "a.r0 == 0 and b.r0 == 0") == both_old

    def test_store_buffering_in_one_cta(self):
        assert not possible(sb("fence.sc.cta", PLACES["cta"]), "a.r0 == 0 and b.r0 == 0")

    @pytest.mark.parametrize("ordered", [False, True])
    def test_load_buffering(self, ordered):
        """Allowed among relaxed accesses, forbidden between release and acquire."""
        ld, st = ("ld.acquire.gpu", "st.release.gpu") if ordered else ("ld.relaxed.gpu", "st.relaxed.gpu")
        program = shape([f"r0 = {ld} x; {st} y, 1", f"r0 = {ld} y; {st} x, 1"])
        assert possible(program, "a.r0 == 1 and b.r0 == 1") != ordered

    @pytest.mark.parametrize("copy", ["st.weak {0}, r0", "assume r0 == 1; st.weak {0}, 1"])
    def test_no_thin_air(self, copy):
        """PTX 8.10.4: values that depend on one another, by data or by control, do not appear from nowhere."""
        program = shape([f"r0 = ld.weak x; {copy.format('y')}", f"r0 = ld.weak y; {copy.format('x')}"])
        assert not possible(program, "a.r0 == 1 and b.r0 == 1")

    @pytest.mark.parametrize(
        "order, disagree",
        [
            ("r0 = ld.relaxed.gpu {0}; r1 = ld.relaxed.gpu {1}", True),
            ("r0 = ld.acquire.gpu {0}; r1 = ld.acquire.gpu {1}", True),
            ("r0 = ld.relaxed.gpu {0}; fence.acq_rel.gpu; r1 = ld.relaxed.gpu {1}", True),
            ("r0 = ld.relaxed.gpu {0}; fence.sc.gpu; r1 = ld.relaxed.gpu {1}", False),
            ("r0 = ld.relaxed.gpu {0}; fence.sc.cta; r1 = ld.relaxed.gpu {1}", True),
        ],
    )
    def test_iriw(self, order, disagree):
        """Two readers see two independent writes in different orders, unless fence.sc stands between their reads."""
        program = shape(["st.relaxed.gpu x, 1", "st.relaxed.gpu y, 1", order.format("x", "y"), order.format("y", "x")])
        assert possible(program, "c.r0 == 1 and c.r1 == 0 and d.r0 == 1 and d.r1 == 0") == disagree

    @pytest.mark.parametrize("places, stale", [(PLACES["gpu"], False), (("0.0", "0.0", "0.1"), False), ("001", True)])
    def test_wrc(self, places, stale):
        """Write to read causality: the second thread passes on what it has seen; scopes need not be equal, but gpu
        does not reach another GPU."""
        program = shape(
            [
                "st.weak x, 1; st.release.gpu f, 1",
                "r0 = ld.acquire.gpu f; st.release.gpu g, 1",
                "r1 = ld.acquire.gpu g; r2 = ld.weak x",
            ],
            places,
        )
        assert possible(program, "b.r0 == 1 and c.r1 == 1 and c.r2 == 0") == stale

    @pytest.mark.parametrize(
        "first, second, stale",
        [("cta", "sys", False), ("sys", "sys", False), ("cta", "gpu", True), ("cta", "cta", True)],
    )
    def test_wrc_with_scopes_of_their_own(self, first, second, stale):
        """Base causality is transitive: a narrow step inside the CTA, then a wide one to another GPU."""
        program = shape(
            [
                f"st.weak x, 1; st.release.{first} f, 1",
                f"r0 = ld.acquire.{first} f; st.release.{second} g, 1",
                f"r1 = ld.acquire.{second} g; r2 = ld.weak x",
            ],
            ("0", "0", "1"),
        )
        assert possible(program, "b.r0 == 1 and c.r1 == 1 and c.r2 == 0") == stale

    def test_isa2_needs_the_middle(self):
        program = shape(
            [
                "st.weak x, 1; st.release.gpu f, 1",
                "r0 = ld.relaxed.gpu f; st.release.gpu g, 1",
                "r1 = ld.acquire.gpu g; r2 = ld.weak x",
            ]
        )
        assert possible(program, "b.r0 == 1 and c.r1 == 1 and c.r2 == 0")

    @pytest.mark.parametrize("kind, backwards", [("relaxed.sys", False), ("weak", True)])
    def test_corr(self, kind, backwards):
        """PTX 8.10.5; races of weak accesses may go backwards."""
        program = shape([f"st.{kind} x, 1", f"r0 = ld.{kind} x; r1 = ld.{kind} x"])
        assert possible(program, "b.r0 == 1 and b.r1 == 0") == backwards

    def test_coherence_inside_a_thread(self):
        assert not possible(shape(["st.weak x, 1; st.weak x, 2"]), "final.x == 1")  # CoWW
        assert not possible(shape(["st.weak x, 1; r0 = ld.weak x"]), "a.r0 == 0")  # CoWR
        assert not possible(shape(["r0 = ld.weak x; st.weak x, 1"]), "a.r0 == 1")  # CoRW1

    def test_corw_and_cowr_between_threads(self):
        program = shape(["r0 = ld.relaxed.gpu x; st.relaxed.gpu x, 1", "st.relaxed.gpu x, 2"])
        assert not possible(program, "a.r0 == 2 and final.x == 2")
        program = shape(["st.relaxed.gpu x, 1; r0 = ld.relaxed.gpu x", "st.relaxed.gpu x, 2"])
        assert not possible(program, "a.r0 == 2 and final.x == 1")

    def test_writes_that_race_have_no_order(self):
        program = shape(["st.weak x, 1", "st.weak x, 2"])
        assert possible(program, "final.x == 1") and possible(program, "final.x == 2")
        assert not possible(program, "final.x == 0")

    @pytest.mark.parametrize(
        "scopes, lost",
        [(("sys", "sys"), False), (("gpu", "gpu"), False), (("cta", "gpu"), True), (("cta", "cta"), True)],
    )
    def test_atomicity(self, scopes, lost):
        """PTX 8.10.3, litmus tests 1 and 2."""
        program = shape([f"r0 = atom.relaxed.{scope}.add x, 1" for scope in scopes])
        assert possible(program, "final.x == 1") == lost
        assert possible(program, "final.x == 2")

    def test_one_of_two_swaps_succeeds(self):
        program = shape([f"r0 = atom.relaxed.gpu.cas x, 0, {new}" for new in (1, 2)])
        assert not possible(program, "a.r0 == 0 and b.r0 == 0")
        assert possible(program, "a.r0 == 0 and b.r0 == 1 and final.x == 1")
        assert possible(program, "a.r0 == 2 and b.r0 == 0 and final.x == 2")

    @pytest.mark.parametrize("arrive, wait, stale", [("cluster", "cluster", False), ("cta", "cta", True)])
    def test_mbarrier(self, arrive, wait, stale):
        program = shape(
            [
                f"st.weak x, 1; mbarrier.arrive.release.{arrive} m",
                f"r0 = mbarrier.test_wait.acquire.{wait} m; assume r0 == 1; r1 = ld.weak x",
            ],
            PLACES["cluster"],
        )
        assert possible("m = 0\n" + program, "b.r1 == 0") == stale

    @pytest.mark.parametrize(
        "made, too_early",
        [
            ("fence.mbarrier_init.release.cluster; barrier.cluster.arrive.relaxed C", False),  # the manual's, 9.7.13.4
            ("barrier.cluster.arrive.release C", False),
            ("barrier.cluster.arrive.relaxed C", True),
        ],
    )
    def test_mbarrier_init(self, made, too_early):
        program = shape(
            [
                f"mbarrier.init m; {made}; barrier.cluster.wait.acquire C",
                f"{made}; barrier.cluster.wait.acquire C; r0 = mbarrier.arrive.release.cluster m",
            ],
            PLACES["cluster"],
        )
        assert possible(program, "b.r0 < 0") == too_early


class TestWeakening:
    def test_steps(self):
        assert weaker("r0 = ld.acquire.gpu f") == ["r0 = ld.relaxed.gpu f", "r0 = ld.acquire.cluster f"]
        assert weaker("ld.relaxed.cta f") == ["ld.weak f"]
        assert weaker("fence.sc.cta") == ["fence.acq_rel.cta"]
        assert weaker("fence.release.cta") == [NOTHING]
        assert weaker("atom.acq_rel.sys.add n, 1") == [
            "atom.acquire.sys.add n, 1",
            "atom.release.sys.add n, 1",
            "atom.acq_rel.gpu.add n, 1",
        ]
        assert weaker("mbarrier.arrive.release.cluster m") == [
            "mbarrier.arrive.relaxed.cluster m",
            "mbarrier.arrive.release.cta m",
        ]
        assert weaker("st.weak x, 1") == weaker("assume r0 == 1") == weaker("grid.ends G") == []

    def test_lines_that_are_equal_are_one_instruction(self):
        program = sb("fence.sc.gpu")
        assert instructions(program).count("fence.sc.gpu") == 1
        assert "fence" not in replaced(program, "fence.sc.gpu", NOTHING)

    def test_what_is_spare_is_found(self):
        needed = mp("st.release.gpu f, 1", "r0 = ld.acquire.gpu f")
        assert spare(needed, MP_STALE) == {}
        twice = mp("fence.acq_rel.sys; st.release.gpu f, 1", "r0 = ld.acquire.sys f")
        assert spare(twice, MP_STALE) == {
            "fence.acq_rel.sys": [NOTHING],
            "st.release.gpu f, 1": ["st.relaxed.gpu f, 1"],
            "r0 = ld.acquire.sys f": ["r0 = ld.acquire.gpu f"],
        }
