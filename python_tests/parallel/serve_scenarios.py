"""What ranks check of generation over ranks; `ranks.py` calls each function as (rank, number of ranks, folder)."""

from __future__ import annotations

import contextlib
import sys
import time
import traceback
from pathlib import Path
from unittest import mock

import pytest
import tiny
import torch
from layout_checks import split_model
from rank_scenarios import join
from torch.distributed.fsdp import fully_shard

from k2kernels import PeerTimeout, UnsupportedError
from k2kernels.engine.session import Session
from k2kernels.parallel import ExpertParallel, Layout, make_mesh

sys.path.append(str(Path(__file__).parents[1] / "engine"))  # test_decode_pass.py


def prompts_of(rank, rows, length, seed=0):
    return torch.randint(0, 256, (rows, length), generator=torch.Generator().manual_seed(100 * seed + rank))


def whole_model(**changes):
    torch.manual_seed(0)
    return tiny.model("kimi", **{"num_hidden_layers": 2, **changes})


# What each rank passes to `generate`: rows, length of the prompts, options. Rank r takes entry r modulo their number.
CASES = {
    "other numbers of new tokens": [(2, 9, dict(max_new_tokens=3)), (1, 9, dict(max_new_tokens=8))],
    "other lengths": [(1, 3, dict(max_new_tokens=5)), (3, 20, dict(max_new_tokens=5))],
    "a rank without rows": [(0, 4, dict(max_new_tokens=5)), (2, 7, dict(max_new_tokens=5))],
    "the last rank without rows": [(2, 7, dict(max_new_tokens=5)), (0, 4, dict(max_new_tokens=5))],
    "no rows at all": [(0, 4, dict(max_new_tokens=5))],
    "chunks": [
        (2, 18, dict(max_new_tokens=4, prefill_chunk=4)),
        (1, 18, dict(max_new_tokens=2)),
        (2, 9, dict(max_new_tokens=3, prefill_chunk=8)),
    ],
    "draws": [
        (2, 5, dict(max_new_tokens=6, temperature=1.5, seed=3)),
        (2, 5, dict(max_new_tokens=4, temperature=0.7, top_k=20, seed=4)),
    ],
}


def check_tokens(rank, world, layout, recorded=contextlib.nullcontext, **changes):
    """Those of one process with all experts, for each rank's prompts and options."""
    whole = whole_model(**changes)
    model = split_model(layout, whole)
    speculative = dict(speculative=True) if changes.get("num_nextn_predict_layers") else {}
    for number, (name, cases) in enumerate(CASES.items()):
        rows, length, options = cases[rank % len(cases)]
        if speculative and "temperature" in options:
            continue
        prompts = prompts_of(rank, rows, length, number)
        options = dict(options, eos_token_ids=[], **speculative)
        want = whole.generate(prompts, **options) if rows else prompts
        columns = []
        with recorded():
            got = model.generate(prompts, on_token=columns.append, **options)
        assert torch.equal(got, want), name
        assert len(columns) == (options["max_new_tokens"] if rows else 0), name
    # Rows end at stop ids, after other numbers of tokens on each rank; prompts of a rank differ in length.
    prompts, mask = prompts_of(rank, 3, 12), torch.ones(3, 12, dtype=torch.int64)
    mask[0, : 3 + rank] = 0
    free = whole.generate(prompts, max_new_tokens=9, eos_token_ids=[], attention_mask=mask)[:, 12:]
    options = dict(max_new_tokens=9, attention_mask=mask, eos_token_ids=[int(free[0, 2]), int(free[1, 3 + rank])])
    want = whole.generate(prompts, **options, **speculative)
    with recorded():
        got = model.generate(prompts, **options, **speculative)
    assert torch.equal(got, want), "stop ids"


def check_errors_are_every_ranks(rank, world, layout):
    """What is wrong with one rank's arguments, all ranks raise before any pass; then they go on."""
    model = split_model(layout, whole_model(num_nextn_predict_layers=1))
    first = layout.ep.get_local_rank() == 0
    whole = prompts_of(rank, 2, 6)
    for bad, kind, message in (
        (dict(max_new_tokens=0), ValueError, "max_new_tokens must be"),
        (dict(max_new_tokens=2, top_p=7), ValueError, "top_p must be"),
        (dict(max_new_tokens=2, temperature=None), TypeError, "temperature must be"),
        (dict(max_new_tokens=10**6), ValueError, "at most 512 tokens together"),
        (dict(max_new_tokens=2, input_ids=prompts_of(rank, 5, 13)), ValueError, "at most max_tokens=64 tokens"),
        (dict(max_new_tokens=2, input_ids=whole.float()), TypeError, "input_ids must be an int64"),
        (dict(max_new_tokens=2, input_ids=whole[:, :0]), ValueError, "input_ids must be"),
        (dict(max_new_tokens=2, cache_dtype="fp8"), ValueError, "cache_dtype must be 'auto' for 48 latent"),
    ):
        options = {"input_ids": whole, **(bad if first else dict(max_new_tokens=2))}
        begun = time.monotonic()
        with pytest.raises(kind if first else RuntimeError, match=message) as error:
            model.generate(**options)
        assert time.monotonic() - begun < 5
        assert first or str(error.value).startswith(f"generate: rank 0 raised {kind.__name__}: "), str(error.value)
    with pytest.raises(ValueError, match=r"speculative must be the same on all ranks, got \{0: 'True', 1: 'False'"):
        model.generate(whole, max_new_tokens=2, speculative=layout.ep.get_local_rank() == 0)
    # In chunks there are never more than 64 tokens in a pass.
    long = prompts_of(rank, 5, 13)
    assert model.generate(long, max_new_tokens=2, eos_token_ids=[], prefill_chunk=12).shape == (5, 15)


def check_an_error_of_on_token_is_its_ranks_alone(rank, world, layout):
    whole = whole_model()
    model, seen = split_model(layout, whole), []

    def fail(column):
        seen.append(column)
        if len(seen) == 2:
            raise KeyError("enough")

    prompts = prompts_of(rank, 2, 6)
    if layout.ep.get_local_rank() == 0:
        with pytest.raises(KeyError, match="enough"):
            model.generate(prompts, max_new_tokens=6, eos_token_ids=[], on_token=fail)
        assert len(seen) == 2
    else:
        want = whole.generate(prompts, max_new_tokens=6, eos_token_ids=[])
        assert torch.equal(model.generate(prompts, max_new_tokens=6, eos_token_ids=[]), want)


def check_parts_are_refused(rank, world, layout):
    """FSDP: `generate` reads weights where they are."""
    for experts_too in (False, True):
        model = whole_model() if experts_too else split_model(layout, whole_model())
        experts = {p for name, p in model.named_parameters() if ".mlp.experts." in name}
        some = model.model.layers[1].mlp.experts if experts_too else model
        fully_shard(some, mesh=layout.flat, ignored_params=set() if experts_too else experts)
        with pytest.raises(UnsupportedError, match=r"must be whole, got model\..* in parts"):
            model.generate(prompts_of(rank, 1, 5), max_new_tokens=2)


def lockstep(rank, world, folder):
    """All of the above, of four ranks a few: check -> None, or what went wrong."""
    from test_decode_pass import recorded

    join(rank, world, folder)
    every = {
        "tokens": check_tokens,
        "speculative": lambda *a: check_tokens(*a, num_nextn_predict_layers=2),
        "replayed": lambda *a: check_tokens(*a, recorded=recorded),
        "errors": check_errors_are_every_ranks,
        "on_token": check_an_error_of_on_token_is_its_ranks_alone,
        "parts": check_parts_are_refused,
    }
    meshes = {"ep 2": every} if world == 2 else {"ep 4": ("tokens",), "dp 2, ep 2": ("speculative", "errors")}
    found = {}
    for mesh, names in meshes.items():
        layout = Layout(make_mesh(ep=int(mesh[-1]), device_type="cpu"))
        for name in names:
            begun = time.monotonic()
            try:
                every[name](rank, world, layout)
                found[f"{mesh}: {name}"] = None
            except BaseException:  # pytest's "did not raise" is no Exception
                found[f"{mesh}: {name}"] = traceback.format_exc()
                return found
            if rank == 0:
                print(f"{mesh}: {name}: {time.monotonic() - begun:.1f} s", file=sys.stderr)
    return found


def fails_between_passes(rank, world, folder):
    """Rank 0 raises where it would say whether it goes on: the others name it in time."""
    ask, asked = ExpertParallel.any_rank, []

    def broken(self, flag):
        asked.append(flag)
        if rank == 0 and len(asked) == 3:
            raise MemoryError("no memory left")
        return ask(self, flag)

    with mock.patch.object(ExpertParallel, "any_rank", broken):
        return _seen(rank, world, folder)


def fails_in_a_pass(rank, world, folder):
    """The same where the others are in a pass."""
    decode, passes = Session.decode, []

    def broken(session, *args):
        passes.append(args)
        if rank == 0 and len(passes) == 3:
            raise MemoryError("no memory left")
        return decode(session, *args)

    with mock.patch.object(Session, "decode", broken):
        return _seen(rank, world, folder)


def does_not_come(rank, world, folder):
    """Rank 0 does not call `generate` at all."""
    return _seen(rank, world, folder, comes=rank > 0)


def _seen(rank, world, folder, comes=True):
    join(rank, world, folder)
    model = split_model(
        Layout(make_mesh(ep=world, device_type="cpu")), whole_model(), step_timeout=1.5, init_timeout=2.5
    )
    begun, seen = time.monotonic(), "no error"
    try:
        if comes:
            model.generate(prompts_of(rank, 1, 5), max_new_tokens=6, eos_token_ids=[])
    except (PeerTimeout, MemoryError) as error:
        seen = f"{type(error).__name__}: {error}"
    took = time.monotonic() - begun
    time.sleep(max(0.0, 8 - took))  # alive: late, not gone
    return dict(seen=seen, seconds=took)
