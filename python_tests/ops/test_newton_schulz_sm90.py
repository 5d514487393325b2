"""The products of newton_schulz by wgmma in the emulator, against the same as the portable ones: the singular value
decomposition in float64. Small matrices are made to go by tiles, too."""

import itertools

import pytest
import torch
from test_newton_schulz_kernel import (
    HALVES,
    QUINTIC,
    SHAPES,
    TABLE_PIECE,
    check,
    check_places,
    many_shapes,
    poison,  # noqa: F401 (a fixture)
    run,
    stages,
)
from test_newton_schulz_update import check as check_update
from test_newton_schulz_update import clone, step
from test_newton_schulz_update import run as run_update

from k2kernels import _emu
from k2kernels.ops import newton_schulz as module
from k2kernels.ops._launch import Chip
from k2kernels.testing.inputs import guarded

SEEDS = [0, 1, 2, 3]


@pytest.fixture(autouse=True)
def capability(monkeypatch):
    """Sets that of a chip without shared memory to ask for, on which no matrix is small; 90 at first."""

    def set_to(number):
        monkeypatch.setattr(module, "chip", lambda device: Chip(number, 6, 0))

    set_to(90)
    return set_to


@pytest.mark.parametrize("capability_of, by_wgmma", [(80, False), (89, False), (90, True), (100, False), (120, False)])
def test_which_chips_go_by_wgmma(capability_of, by_wgmma, capability):
    """An emulated sm_80 refuses the instructions of later chips."""
    capability(capability_of)
    x = torch.randn(8, 9)
    if by_wgmma:
        with pytest.raises(_emu.EmulatorError, match="needs sm_90"):
            run("sm_80", 0, x)
    else:
        run("sm_80", 0, x)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("algorithm", ["standard", "gram"])
@pytest.mark.parametrize("shape", [*SHAPES, (260, 330), (330, 260)])
def test_shapes(shape, algorithm, seed):
    """Up to three tiles a side; up to ten stages, of a ring of three."""
    x = torch.randn(shape)
    dtype = HALVES[seed % 2]
    launches = 3 + stages(5, algorithm, dtype)
    got = run("sm_90a", seed, guarded(x), algorithm=algorithm, iterate_dtype=dtype, launches=launches)
    assert torch.equal(got, got.to(dtype).float())
    check(got, x, QUINTIC, algorithm, dtype)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("depth", [1, 15, 16, 17, 63, 64, 65, 127, 129, 192, 193, 257])
def test_every_length_of_a_sum(depth, dtype, capability):
    """Rows and columns of the other axis that end anywhere in a chunk, in a warp's rows, in a tile. The emulator
    adds up both kernels' sums in the same order."""
    for shape in ((60 + depth % 9, depth), (depth, 60 + depth % 9), (140, depth), (depth, 140)):
        x = torch.randn(shape)
        for algorithm in ("standard", "gram"):
            options = dict(algorithm=algorithm, iterate_dtype=dtype, steps=2, schedule=QUINTIC[:2])
            capability(80)
            want = run("sm_90a", 0, x, **options)
            capability(90)
            assert torch.equal(run("sm_90a", 2, x, **options), want), shape


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("gram", [False, True])
@pytest.mark.parametrize("m, n", [(40, 61), (61, 40), (133, 150), (261, 20), (8, 20), (260, 270)])
def test_products_are_symmetric_to_the_bit_and_stay_in_their_places(m, n, gram, seed):
    check_places(2 if m < 260 else 1, m, n, gram, 90, seed, by=90)


def test_a_matrix_does_not_depend_on_schedule_batch_or_list():
    xs = [*many_shapes(), torch.randn(2, 130, 260), torch.randn(260, 200)]
    assert len(xs) > TABLE_PIECE
    want = [run("sm_90a", 2, x) for x in xs]
    for seed in SEEDS:
        got = run("sm_90a", seed, xs, launches=2 + 2 + 17)
        assert all(torch.equal(g, w) and g.dtype == x.dtype for g, w, x in zip(got, want, xs))
    for x, w in zip(xs, want):
        for one, w_one in zip(x.flatten(0, -3), w.flatten(0, -3)) if x.ndim > 2 else ():
            assert torch.equal(run("sm_90a", 1, one), w_one)


@pytest.mark.parametrize("seed", SEEDS)
def test_zero_gives_zero_and_nan_stays_in_its_matrix(seed):
    for shape, algorithm in itertools.product([(12, 30), (30, 12)], ["standard", "gram"]):
        x = torch.randn(5, *shape)
        x[1] = 0
        clean = run("sm_90a", seed, x, algorithm=algorithm)
        assert torch.equal(clean[1], torch.zeros(shape))
        x[2, 3, 4] = torch.nan
        x[3, 5, 6] = -torch.inf
        got = run("sm_90a", seed, x, algorithm=algorithm)
        assert got[2:4].isnan().all()
        assert torch.equal(got[[0, 1, 4]], clean[[0, 1, 4]])


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("iterate", HALVES)
def test_a_step_of_the_optimizer(iterate, seed):
    """The last product's tiles go into the weights and their copies."""
    shapes = [(2, 20, 33), (1, 130, 140), (1, 14, 300), (2, 200, 9)]
    lists = tuple([guarded(t) for t in ts] for ts in step(shapes=shapes))
    copies = [guarded(torch.randn(w.shape).to(HALVES[i % 2])) for i, w in enumerate(lists[0])]
    scales = [torch.rand(w.shape[:2]) + 0.5 if i % 2 else torch.empty(0) for i, w in enumerate(lists[0])]
    before = clone(lists)
    run_update("sm_90a", seed, lists, copies=copies, row_scales=scales, iterate_dtype=iterate)
    check_update(lists, before, row_scales=scales, iterate=iterate)
    assert all(torch.equal(c, w.to(c.dtype)) for c, w in zip(copies, lists[0]))


def test_a_skipped_step_changes_nothing():
    lists = step(shapes=[(2, 20, 33)])
    before = clone(lists)
    run_update("sm_90a", 2, lists, skip=torch.tensor(True))
    assert all(torch.equal(a, b) for now, then in zip(lists, before) for a, b in zip(now, then))
