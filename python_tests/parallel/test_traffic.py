"""Bytes between ranks: counted in exchanges that run, and the table of docs/scale.md."""

import threading
from collections import Counter
from pathlib import Path

import pytest
import torch
from test_footprint import config

from k2kernels.model import K2Config
from k2kernels.parallel import exchange, footprint, traffic
from k2kernels.parallel.exchange import DispatchOptions
from k2kernels.parallel.planner import RankGrid, Workload, plan, stage_weights
from k2kernels.parallel.planner_table import serving_markdown
from k2kernels.parallel.split import Split
from k2kernels.parallel.torch_transport import Hop, TorchTransport
from k2kernels.parallel.traffic import Step

K2 = K2Config.preset("kimi-k2")
PAGE = Path(__file__).parents[2] / "docs" / "scale.md"
LAYOUTS = {
    "256 GPUs, FSDP": RankGrid(1, 4, 64, "fsdp"),
    "256, as K2": RankGrid(16, 1, 16, "optimizer"),
    "2,048, FSDP": RankGrid(1, 32, 64, "fsdp"),
    "2,048, as K2": RankGrid(16, 8, 16, "optimizer"),
    "2,048, as V3": RankGrid(16, 2, 64, "optimizer"),
}


class Threads:
    """Ranks as threads of this process: stands for their process groups, and counts what they send to others."""

    def __init__(self, world, ranks_per_node):
        self.world, self.ranks_per_node = world, ranks_per_node
        self.barrier, self.box, self.sent = threading.Barrier(world, timeout=30), {}, Counter()

    def peers(self, rank):
        outer = self

        class Peers:
            live, masked, epoch = list(range(outer.world)), (), 0
            group = tuple(live)

            def subgroup(self, ranks):
                return tuple(ranks)

            def compare(self, lines):
                pass

        peers = Peers()
        peers.rank = rank
        return peers

    def all_to_all(self, hop, rows, sent, arrived, phase):
        me, header = hop.peers.rank, hop.is_planning
        hop.is_planning = False
        for there, part in zip(hop.group, rows.contiguous().split(sent)):
            self.box[me, there] = part
            if there != me and not header:
                way = "network" if me // self.ranks_per_node != there // self.ranks_per_node else "inside"
                self.sent[phase.split(",")[0], way] += part.numel()
        self.barrier.wait()
        got = [self.box[there, me] for there in hop.group]
        self.barrier.wait()
        assert [len(part) for part in got] == list(arrived)
        return torch.cat(got)


@pytest.mark.parametrize("world, ranks_per_node", [(2, 2), (4, 4), (4, 2)])
def test_bytes_of_an_exchange(world, ranks_per_node, monkeypatch):
    """Forward and backward of dispatch and combine, in one hop and in two."""
    c, tokens = config(dict(num_experts_per_tok=3)), 9
    threads, plan = Threads(world, ranks_per_node), Hop.plan

    def planned(self, *args):
        self.is_planning = True
        return plan(self, *args)

    monkeypatch.setattr(Hop, "is_planning", False, raising=False)
    monkeypatch.setattr(Hop, "plan", planned)
    monkeypatch.setattr(Hop, "_all_to_all", lambda hop, *args: threads.all_to_all(hop, *args))
    generator = torch.Generator().manual_seed(0)
    indices = torch.stack([torch.randperm(8, generator=generator)[:3] for _ in range(world * tokens)])
    errors = []

    def rank(number):
        try:
            split = Split(8, world, number)
            two_hops = ranks_per_node if ranks_per_node < world else 0
            transport = TorchTransport(split, threads.peers(number), two_hops)
            x = torch.randn(tokens, c.hidden_size).bfloat16().requires_grad_()
            weights = torch.rand(tokens, 3).requires_grad_()
            mine = indices[number * tokens : (number + 1) * tokens].int()
            options = DispatchOptions()
            sent = exchange.dispatch(transport, x, mine, weights, split.num_local_experts, options)
            out = exchange.combine(transport, sent.data, sent.handle, None, None, torch.bfloat16)
            out.float().sum().backward()
        except BaseException as error:
            errors.append(error)
            threads.barrier.abort()

    running = [threading.Thread(target=rank, args=(number,)) for number in range(world)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join(60)
    assert not errors, errors

    # What each token needs, without what is here already.
    want = Counter()
    owner = indices // (8 // world)
    for token, places in enumerate(owner.tolist()):
        home = token // tokens
        node = home // ranks_per_node
        nodes = {place // ranks_per_node for place in places}
        far = [place for place in places if place // ranks_per_node != node]
        # On each node the row is first at the rank of the source's number there.
        forwarded = {place for place in places if place % ranks_per_node != home % ranks_per_node}
        moved = [place for place in places if place % ranks_per_node != home % ranks_per_node]
        for way, rows, pairs in (
            ("network", len(nodes - {node}), len(far)),
            ("inside", len(forwarded), len(moved)),
        ):
            second = way == "inside" and ranks_per_node < world
            for forward, names in ((True, ("dispatch", "combine")), (False, ("dispatch backward", "combine backward"))):
                sizes = traffic.hop_bytes(c, rows, pairs, forward=forward, second=second)
                for name, size in zip(names, sizes):
                    want[name, way] += size
    assert +threads.sent == +want


def test_expected_parts():
    """Against every choice of 3 of 8 experts."""
    choices = torch.combinations(torch.arange(8), 3)
    for parts in (1, 2, 4, 8):
        needed = [len(set((choice // (8 // parts)).tolist())) for choice in choices]
        assert traffic.expected_parts(8, 3, parts) == pytest.approx(sum(needed) / len(needed))
    assert traffic.expected_parts(384, 8, 8) == pytest.approx(5.28, abs=0.01)


def test_one_rank_sends_nothing():
    for sharding in ("replicated", "fsdp"):
        sent = traffic.traffic(config(), RankGrid(1, 1, 1, sharding), Step(tokens=8, batch=8))
        assert all(s.bytes == s.network == 0 for s in sent)


def test_bytes_of_weights():
    """By hand, for Kimi-K2 on 16 ranks."""
    every, step = footprint.weights(K2), Step(tokens=4096, batch=2 * 16 * 4096)
    whole = stage_weights(K2, RankGrid(1, 1, 16), 0, every)
    dense = sum(w.numel for w in whole if w.method and not w.expert)
    experts = sum(w.numel for w in whole if w.expert)
    assert experts == 60 * 24 * 3 * 7168 * 2048
    sizes = {s.name: s for s in traffic.traffic(K2, RankGrid(1, 1, 16, "dense-fsdp"), step, every)}
    assert sizes["dense: weights"].bytes == 2 * 2 * 2 * dense * 15 / 16  # two micro-batches, forward and backward
    assert sizes["dense: gradients"].bytes == 2 * 4 * dense * 15 / 16
    assert sizes["dense: gradients"].network == sizes["dense: gradients"].bytes / 8
    assert sizes["experts: weights"].bytes == sizes["experts: gradients"].bytes == 0
    matrices = sum(w.numel for w in whole if w.method == "muon" and not w.expert)
    assert sizes["sharded Muon"].bytes == 4 * matrices / 16 * 15 / 16
    sizes = {s.name: s for s in traffic.traffic(K2, RankGrid(1, 2, 8, "optimizer"), step, every)}
    assert sizes["experts: weights"].bytes == 2 * 2 * experts / 2
    assert sizes["experts: weights"].network == sizes["experts: weights"].bytes  # of the two nodes
    assert sizes["sharded Muon"].bytes == 0
    sizes = {s.name: s for s in traffic.traffic(K2, RankGrid(1, 1, 16), step, every)}
    assert sizes["dense: weights"].bytes + sizes["dense: gradients"].bytes == 2 * 4 * dense * 15 / 16
    pipeline = traffic.traffic(K2, RankGrid(2, 1, 8), step, every)
    assert next(s for s in pipeline if s.name == "pipeline").bytes == 4 * 2 * 4096 * 7168 * 2


def test_the_page_has_what_serving_takes():
    thinking = K2Config.preset("kimi-k2-thinking")
    kinds = {"bfloat16": {}, "FP8": dict(fp8=True), "INT4": dict(w4="int4"), "MXFP4": dict(w4="mxfp4")}
    workloads = {name: Workload("serve", tokens=512, **kind) for name, kind in kinds.items()}
    node = {name: plan(thinking, 8, "h200", workload) for name, workload in workloads.items()}
    two = {name: plan(thinking, 16, "h100", workload) for name, workload in workloads.items()}
    table = serving_markdown([*node.items(), *two.items()])
    assert table in PAGE.read_text(encoding="utf-8"), f"docs/scale.md must have\n{table}"
    sent = [traffic.served_bytes(thinking, 8, fp8) for fp8 in (False, True)]
    assert [[round(size / 1000) for size in both] for both in sent] == [[66, 100], [34, 100]]
    assert sent[0][1] == 100_352  # as below, where heads are divided


def test_the_page_has_these_tables():
    v3 = K2Config.preset("deepseek-v3")
    tables = [
        traffic.markdown(K2, LAYOUTS, Step(), network_gb=50, tflops=400),
        traffic.markdown(v3, {"2,048 GPUs": RankGrid(16, 2, 64, "optimizer")}, Step(batch=15360 * 4096), 50, 400),
    ]
    page = PAGE.read_text(encoding="utf-8")
    for table in tables:
        assert table in page, f"docs/scale.md must have\n{table}"
    p = footprint.Pass(4096, slots=8 * 4096)
    sizes = [footprint.layer_bytes(K2, 60, each) for each in (p, p._replace(fp8=True))]
    rows = [8 * 4096 * footprint.slot_bytes(K2, each) for each in (p, p._replace(fp8=True))]
    sizes += [*rows, footprint.checkpoint_bytes(K2, p), footprint.head_bytes(K2, p)]
    assert [round(size / 4096 / 1000) for size in sizes] == [513, 439, 328, 256, 14, 684]
    remote = [traffic.expected_parts(c.n_routed_experts, 8, 8) * 7 / 8 for c in (K2, v3)]
    assert [round(nodes, 2) for nodes in remote] == [4.62, 4.63]
    assert (
        round((2 * K2.parameter_counts()[0]) / 1e12, 2) == 2.05
        and round(4 * K2.parameter_counts()[0] / 1e12, 2) == 4.11
    )
