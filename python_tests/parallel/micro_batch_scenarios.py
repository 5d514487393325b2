"""Two micro-batches in flight, on ranks that share experts. Each function runs on every rank of `ranks.py`."""

from __future__ import annotations

import contextlib
import copy
from unittest import mock

import tiny
import torch
import torch.distributed as dist
import torch.nn.functional as F
from pipeline_scenarios import close, full
from rank_scenarios import join
from torch import nn

from k2kernels.model.moe import Moe, exchanges
from k2kernels.parallel import Layout, exchange, expert_parallel, make_mesh, parallelize

LENGTH = 7
ALPHA = 0.1


def models(layout, checkpoint_activations=False, **changes):
    """The same model twice: its passes undivided, and in two micro-batches."""
    torch.manual_seed(0)
    one = tiny.model("kimi", **changes).double().train()
    two = copy.deepcopy(one)
    options = dict(max_tokens=2 * LENGTH, step_timeout=20.0)
    expert_parallel(one, layout, gradients="mean", **options)
    more = dict(checkpoint_activations=checkpoint_activations, micro_batches=2)
    parallelize(two, layout, fsdp=False, **more, **options)
    return one, two


def tokens(rank, sequences):
    return torch.randint(0, 256, (sequences, LENGTH + 1), generator=torch.Generator().manual_seed(rank))


@contextlib.contextmanager
def calls(model):
    """What is sent meanwhile: (phase, which of the model's exchanges)."""
    seen = []

    def watch(transport, number):
        def plan(*args):
            seen.append(("dispatch", number))
            return real_plan(*args)

        def sent(real):
            def call(*args):
                if args[-1] in ("combine", "combine backward", "dispatch backward"):
                    seen.append((args[-1], number))
                return real(*args)

            return call

        real_plan = transport.plan
        return mock.patch.multiple(
            transport, plan=plan, scatter=sent(transport.scatter), gather=sent(transport.gather), create=True
        )

    with contextlib.ExitStack() as stack:
        for number, each in enumerate(exchanges(model)):
            stack.enter_context(watch(each._torch, number))
        yield seen


def order(layers, checkpointed=False):
    """What `calls` must see of two micro-batches in `layers` MoE layers: alternately forward, and the same reversed."""
    forward = [(phase, number) for _ in range(layers) for number in (0, 1) for phase in ("dispatch", "combine")]
    backward = []
    for _ in range(layers):
        for number in (1, 0):
            again = ("dispatch", "combine") if checkpointed else ()
            backward += [(phase, number) for phase in (*again, "combine backward", "dispatch backward")]
    return forward, backward


# ---- scenarios: (rank, number of ranks, folder)


def values(rank, world, folder):
    """One pass of two micro-batches is two passes, one after the other."""
    join(rank, world, folder)
    layout = Layout(make_mesh(ep=world, device_type="cpu"))
    found = {}
    for case, sequences, checkpointed in (("even", 4, False), ("uneven", 3, False), ("checkpointed", 4, True)):
        one, two = models(layout, checkpointed)
        ids, first = tokens(rank, sequences)[:, :-1], -(-sequences // 2)
        parts = [ids[:first], ids[first:]]
        torch.manual_seed(rank)
        factors = torch.randn(sequences, LENGTH, one.config.hidden_size, dtype=torch.float64)
        wanted = []
        for part, factor in zip(parts, factors.split([first, sequences - first])):
            _, hidden = one(part, return_hidden=True)
            (hidden * factor).sum().backward()
            wanted.append(hidden.detach())
        with calls(two) as seen:
            logits, hidden = two(ids, return_hidden=True)
            forward = list(seen)
            (hidden * factors).sum().backward()
        layers = sum(isinstance(module, Moe) for module in two.modules())
        assert (forward, seen[len(forward) :]) == order(layers, checkpointed), f"{case}: {seen}"
        assert torch.equal(hidden, torch.cat(wanted)) and torch.equal(logits, one._logits(torch.cat(wanted))), case
        different = []
        for (name, got), want in zip(two.named_parameters(), one.parameters()):
            assert (got.grad is None) == (want.grad is None), name
            if got.grad is not None and not torch.equal(full(got.grad), full(want.grad)):
                close(full(got.grad), full(want.grad), name)
                different.append(name)
        assert all(torch.equal(a, b) for a, b in zip(two.max_logits().values(), one.max_logits().values())), case
        assert all(torch.equal(a, b) for a, b in zip(two.expert_load().values(), one.expert_load().values())), case
        assert sum(int(load.sum()) for load in two.expert_load().values()) == layers * sequences * LENGTH * 2, case
        found[case] = different
    return found


def losses(rank, world, folder):
    """The loss of all tokens with MTP layers and the balance loss; then a pass of one sequence, and one without
    gradients."""
    join(rank, world, folder)
    layout = Layout(make_mesh(ep=world, device_type="cpu"))
    one, two = models(layout, num_nextn_predict_layers=1)
    one.use_sequence_loss(ALPHA, 0.5), two.use_sequence_loss(ALPHA)
    ids = tokens(rank, 4)

    def loss(model, ids):
        logits, hidden = model(ids[:, :-1], return_hidden=True)
        (more,) = model.mtp_logits(ids[:, :-1], hidden)
        return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()) + 0.3 * F.cross_entropy(
            more.flatten(0, 1), ids[:, 2:].flatten()
        )

    def balance(model):
        with torch.no_grad():
            return model.sequence_loss(ALPHA)

    wanted, balances = [], []
    for part in ids.split(2):
        wanted.append(loss(one, part))
        balances.append(balance(one))
        (wanted[-1] / 2).backward()
    got = loss(two, ids)
    close(got, sum(wanted) / 2, "loss")
    close(balance(two), sum(balances) / 2, "balance loss")
    got.backward()
    for (name, got), want in zip(two.named_parameters(), one.parameters()):
        close(full(got.grad), full(want.grad), name)
    assert all(torch.equal(a, b) for a, b in zip(two.expert_load().values(), one.expert_load().values()))
    with torch.no_grad(), calls(two) as seen:
        assert torch.equal(two(ids[:1]), one(ids[:1]))
        assert {number for _, number in seen} == {0}
        two(ids[:2])
        assert {number for _, number in seen} == {0, 1}
    return "the same"


def faults(rank, world, folder):
    """Whether the order of calls shows that micro-batches share an exchange, or that a backward takes the other one."""
    join(rank, world, folder)
    layout = Layout(make_mesh(ep=world, device_type="cpu"))
    found = {}
    for case in ("nothing", "shared", "other in dispatch backward", "other in combine backward"):
        _, two = models(layout, num_hidden_layers=3)
        transports = [each._torch for each in exchanges(two)]
        with contextlib.ExitStack() as stack:
            seen = stack.enter_context(calls(two))
            if case == "shared":
                for layer in two.model.layers[1:]:
                    layer.mlp.more_exchanges = (layer.mlp.exchange,)
            for function, name in ((exchange._TransportDispatch, "dispatch"), (exchange._TransportCombine, "combine")):
                if case == f"other in {name} backward":
                    stack.enter_context(_swapped(function, transports))
            two(tokens(rank, 4)[:, :-1]).square().mean().backward()
        forward, backward = order(2)
        found[case] = seen != forward + backward
    return found


def _swapped(function, transports):
    real = function.__dict__["backward"].__func__

    def backward(ctx, *grads):
        ctx.transport = transports[1 - transports.index(ctx.transport)]
        return real(ctx, *grads)

    return mock.patch.object(function, "backward", staticmethod(backward))


def refused(rank, world, folder):
    join(rank, world, folder)
    layout, found = Layout(make_mesh(ep=world, device_type="cpu")), {}

    def note(case, call):
        try:
            call()
            found[case] = "nothing raised"
        except Exception as error:
            found[case] = f"{type(error).__name__}: {error}"

    def make():
        return tiny.model("kimi")

    note("none", lambda: expert_parallel(make(), layout, max_tokens=8, micro_batches=0))
    note("layer", lambda: expert_parallel(nn.Sequential(make().model.layers[1]), layout, max_tokens=8, micro_batches=2))
    note("fsdp", lambda: parallelize(make(), layout, max_tokens=8, micro_batches=2))
    dist.barrier()
    return found
