"""Two micro-batches in flight: values over ranks, the order of what is sent, and streams."""

import contextlib
import copy
import re
from unittest import mock

import pytest
import tiny
import torch
from ranks import run

from k2kernels.model import micro_batch
from k2kernels.parallel import expert_parallel

MESSAGES = {
    "none": "ValueError: expert_parallel: micro_batches must be an int >= 1, got 0",
    "layer": "ValueError: expert_parallel: micro_batches must be 1 for a module without a K2Model, got 2",
    "fsdp": "UnsupportedError: parallelize: micro_batches must be 1 with fsdp",
}


@pytest.fixture(scope="module")
def found():
    names = "values", "losses", "faults", "refused"
    results = run([(f"micro_batch_scenarios.{name}", 2) for name in names])
    return {name: results[f"micro_batch_scenarios.{name}/2"] for name in names}


def test_two_micro_batches_are_two_passes(found):
    """To the bit, but for sums over the tokens of both: each weight of a layer has one gradient of each micro-batch,
    and their sum does not depend on the order."""
    for rank, seen in enumerate(found["values"]):
        assert isinstance(seen, dict) and len(seen) == 3, f"rank {rank}: {seen}"
        for case, different in seen.items():
            assert set(different) <= {"model.norm.weight", "model.embed_tokens.weight"}, f"rank {rank}, {case}"


def test_losses_are_means_over_both(found):
    assert found["losses"] == ["the same"] * 2


def test_planted_faults_are_seen(found):
    for rank, seen in enumerate(found["faults"]):
        assert isinstance(seen, dict) and len(seen) == 4, f"rank {rank}: {seen}"
        for fault, noticed in seen.items():
            assert noticed == (fault != "nothing"), f"rank {rank}: {fault}"


def test_messages(found):
    for rank, seen in enumerate(found["refused"]):
        assert isinstance(seen, dict) and seen.keys() == MESSAGES.keys(), f"rank {rank}: {seen}"
        for case, message in seen.items():
            assert re.match(MESSAGES[case], message), f"rank {rank}, {case}: {message}"


# ---- without ranks


def pair(**changes):
    torch.manual_seed(0)
    one = tiny.model("kimi", **changes).train()
    two = copy.deepcopy(one)
    expert_parallel(two, None, max_tokens=64, micro_batches=2)
    return one, two


def test_sequences_are_divided():
    parts = micro_batch.divide(5, 2)
    assert [(size, part.number, part.share) for size, part in parts] == [(3, 0, 0.6), (2, 1, 0.4)]
    assert [size for size, _ in micro_batch.divide(2, 3)] == [1, 1]


def test_streams_wait_for_one_another(monkeypatch):
    """Which stream each layer is called on, and who waits for whom, with streams that only write down."""
    seen, current = [], ["main"]

    class Stream:
        def __init__(self, name):
            self.name = name

        def wait_stream(self, other):
            seen.append(f"{self.name} waits for {other.name}")

    @contextlib.contextmanager
    def on(stream):
        current.append(stream.name)
        yield
        current.pop()

    streams = [Stream("main"), Stream("side")]
    monkeypatch.setattr(micro_batch, "_streams", lambda x, count: streams[:count])
    monkeypatch.setattr(torch.cuda, "stream", on)
    kept = []
    with mock.patch.object(torch.Tensor, "record_stream", lambda t, stream: kept.append((t.shape, stream.name))):
        _, two = pair(num_hidden_layers=2)
        for number, layer in enumerate(two.model.layers):
            layer.register_forward_hook(
                lambda _m, given, _out, number=number: seen.append(
                    f"layer {number} of {given[-1].micro_batch.number} on {current[-1]}"
                )
            )
        two.model.layers[1].mlp._record = lambda *_: seen.append(f"counts on {current[-1]}")
        two(torch.arange(12).view(2, 6))
    order = [f"layer {n} of {i} on {where}" for n in (0, 1) for i, where in ((0, "main"), (1, "side"))]
    after = ["main waits for side", "counts on main", "counts on main"]
    assert seen == ["side waits for main", *order, *after]
    hidden = two.config.hidden_size
    half = two.config.qk_rope_head_dim // 2
    assert kept == [
        *((shape, "side") for shape in ((2, 6, hidden), (6, half), (6, half), (2,))),
        ((1, 6, hidden), "main"),
    ]
