"""Bytes that a rank sends in a training step over many GPUs: exchange of experts, shards, pipeline, sharded Muon.

Ranks are numbered with ep innermost, then edp, then pp: an ep group is consecutive ranks, on ep / gpus_per_node nodes.
Bytes of one row, one gather or one activation are counted from the code; how many rows go where is an estimate, for
which every choice of experts is equally likely. Letters: T tokens of a micro-batch, K experts per token.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from k2kernels.model.config import K2Config
from k2kernels.parallel.footprint import Weight, weights
from k2kernels.parallel.planner import RankGrid, Workload, hold, stage_layers, stage_weights
from k2kernels.reference.exchange import to_16


class Step(NamedTuple):
    """One optimizer step.

    Args:
        tokens: of a rank in a micro-batch.
        batch: tokens of all ranks in the step.
        checkpointed: layers run twice, with their exchanges.
        itemsize: of weights and activations.
        gradient_itemsize: of gradients that are reduced.
        gpus_per_node: GPUs with NVLink between them.
    """

    tokens: int = 4096
    batch: int = 2**26
    checkpointed: bool = True
    itemsize: int = 2
    gradient_itemsize: int = 4
    gpus_per_node: int = 8

    def micro_batches(self, layout: RankGrid) -> float:
        return self.batch / (self.tokens * layout.stage_ranks)


class Sent(NamedTuple):
    """What a rank sends in a step; `network` is the part of it that leaves the node."""

    name: str
    bytes: float
    network: float


def expected_parts(experts: int, top_k: int, parts: int) -> float:
    """Of `parts` equal parts of the experts, how many a token needs on average."""
    missed = math.comb(experts - experts // parts, top_k) / math.comb(experts, top_k)
    return parts * (1 - missed)


def hop_bytes(
    config: K2Config, rows: float, pairs: float, *, forward: bool, second: bool, itemsize: int = 2
) -> tuple[float, float]:
    """What one hop of transport "torch" sends: for dispatch or its backward, and for combine or its backward.

    Args:
        rows: how many rows of tokens are sent to other ranks.
        pairs: how many of their pairs are there.
        forward: a forward pass sends rows with their experts, and returns the row of each pair. The backward of combine
            sends gradients with K weights, and one number for each pair is returned; that of dispatch returns rows.
        second: the hop inside a node, after one between nodes: the source of each row is sent too.
    """
    row, beside = config.hidden_size * itemsize, to_16(4 * config.num_experts_per_tok)
    sent = rows * (to_16(row) + beside)
    if forward:
        return sent + (rows * to_16(4) if second else 0), pairs * row
    return pairs * row, sent + pairs * 4


def exchange(config: K2Config, layout: RankGrid, step: Step, layers: int) -> list[Sent]:
    """Dispatch and combine of `layers` MoE layers, forward and backward, for all micro-batches.

    Over several nodes a row goes to each node once and is forwarded there. The numbers of rows, which each exchange
    sends first, are left out: 40 bytes for each rank.
    """
    experts, top_k, ep = config.n_routed_experts, config.num_experts_per_tok, layout.ep
    nodes = max(ep // step.gpus_per_node, 1)
    on_node = ep // nodes
    passes = [True] * (2 if step.checkpointed else 1) + [False]
    tokens = step.tokens * step.micro_batches(layout) * layers

    def all_passes(parts: int, to: float, second: bool) -> list[float]:
        # By symmetry a share of 1 / n of what goes to n ranks or nodes stays.
        rows, pairs = to * (1 - 1 / parts), top_k * (1 - 1 / parts)
        options = dict(second=second, itemsize=step.itemsize)
        sent = [hop_bytes(config, rows, pairs, forward=forward, **options) for forward in passes]
        return [tokens * sum(ways) for ways in zip(*sent)]

    network = all_passes(nodes, expected_parts(experts, top_k, nodes), False)
    inside = all_passes(on_node, expected_parts(experts, top_k, ep), nodes > 1)
    return [Sent(name, n + i, n) for name, n, i in zip(("dispatch", "combine"), network, inside)]


def served_bytes(config: K2Config, ep: int, fp8: bool = False) -> tuple[float, float]:
    """The rows that dispatch and combine of a served token send to other ranks in a layer, of experts over `ep` ranks.

    Those of dispatch are bfloat16, for experts in 4 bits too; or e4m3 with a scale for 128 numbers (`fp8`). An
    estimate: every choice of experts is equally likely.
    """
    row = config.hidden_size + 4 * -(-config.hidden_size // 128) if fp8 else 2 * config.hidden_size
    top_k = config.num_experts_per_tok
    to = expected_parts(config.n_routed_experts, top_k, ep) * (1 - 1 / ep)
    return to * row, top_k * (1 - 1 / ep) * 2 * config.hidden_size


def collective(size: float, ranks: int, on_node: int) -> Sent:
    """A ring all-gather or reduce-scatter of `size` bytes in all. NCCL has as many rings as a node has GPUs in the
    group, each with a part of the bytes, so that each GPU sends one ring's part to the network."""
    sent = size * (ranks - 1) / ranks
    return Sent("", sent, sent / on_node if ranks > on_node else 0.0)


def weights_traffic(config: K2Config, layout: RankGrid, step: Step, stage: int, every: list[Weight]) -> list[Sent]:
    """Gathers of weights and reductions of gradients, by the layout's sharding; experts over edp, the rest over the
    stage. An all-reduce is a reduce-scatter and an all-gather."""
    whole = [w for w in stage_weights(config, layout._replace(sharding="replicated"), stage, every) if w.method]
    found = []
    for name, expert in (("dense", False), ("experts", True)):
        elements = sum(w.numel for w in whole if w.expert == expert)
        ranks = layout.edp if expert else layout.stage_ranks
        # Ranks of one edp group are ep apart.
        on_node = max(step.gpus_per_node // layout.ep, 1) if expert else step.gpus_per_node
        on_node = min(on_node, ranks)
        fsdp = layout.sharding == "fsdp" or (layout.sharding == "dense-fsdp" and not expert)
        weight = collective(elements * step.itemsize, ranks, on_node)
        gradient = collective(elements * step.gradient_itemsize, ranks, on_node)
        if fsdp:  # weights forward and backward, gradients in each micro-batch: none are kept whole
            gathers, reductions = 2 * step.micro_batches(layout), step.micro_batches(layout)
        elif layout.sharding == "optimizer":  # once in a step
            gathers, reductions = 1, 1
        else:
            weight, gathers, reductions = gradient, 1, 1
        found.append(Sent(f"{name}: weights", gathers * weight.bytes, gathers * weight.network))
        found.append(Sent(f"{name}: gradients", reductions * gradient.bytes, reductions * gradient.network))
    return found


def pipeline(config: K2Config, layout: RankGrid, step: Step) -> Sent:
    """Activations to the next stage and their gradients to the previous one, of a stage between two others."""
    each = step.tokens * config.hidden_size * step.itemsize
    sent = 2 * each * step.micro_batches(layout) if layout.pp > 1 else 0.0
    return Sent("pipeline", sent, sent if layout.stage_ranks >= step.gpus_per_node else 0.0)


def muon(config: K2Config, layout: RankGrid, step: Step, stage: int, every: list[Weight]) -> Sent:
    """Matrices that FSDP has cut: 16-bit shards to the owner of each matrix, and its update back. An estimate: owners
    have equally much. Matrices that are whole on their rank, or with their owner (ZeRO-1), need nothing more than the
    gathers of weights."""
    sent = network = 0.0
    whole = stage_weights(config, layout._replace(sharding="replicated"), stage, every)
    for expert in (False, True):
        if layout.sharding != "fsdp" and (layout.sharding != "dense-fsdp" or expert):
            continue
        ranks = layout.edp if expert else layout.stage_ranks
        elements = sum(w.numel for w in whole if w.method == "muon" and w.expert == expert)
        each = 2 * 2 * elements / ranks * (ranks - 1) / ranks
        on_node = min(ranks, max(step.gpus_per_node // layout.ep, 1) if expert else step.gpus_per_node)
        sent += each
        network += each * (ranks - on_node) / max(ranks - 1, 1)
    return Sent("sharded Muon", sent, network)


def clipping(config: K2Config, layout: RankGrid, stage: int) -> Sent:
    """One all-reduce of the largest logits, one of the experts' counts."""
    layers = stage_layers(config, layout.pp, stage)
    moe = sum(config.is_moe_layer(layer) for layer in layers)
    size = 4 * len(layers) * config.num_attention_heads + 8 * moe * config.n_routed_experts
    sent = collective(2 * size, layout.stage_ranks, 1)
    return Sent("maxima and counts", sent.bytes, sent.network)


def traffic(config: K2Config, layout: RankGrid, step: Step, every: list[Weight] | None = None) -> list[Sent]:
    """Everything that a rank in the middle of the pipeline sends in a step."""
    every = weights(config) if every is None else every
    stage = layout.pp // 2
    moe = sum(config.is_moe_layer(i) for i in stage_layers(config, layout.pp, stage) if i < config.num_hidden_layers)
    return [
        *exchange(config, layout, step, moe),
        *weights_traffic(config, layout, step, stage, every),
        muon(config, layout, step, stage, every),
        pipeline(config, layout, step),
        clipping(config, layout, stage),
    ]


def product_flops(config: K2Config, step: Step) -> float:
    """Of all ranks in a step, attention's scores and Newton-Schulz left out: 2 for each parameter that a token uses in
    a forward pass, 4 in a backward pass. An estimate."""
    return step.batch * (8 if step.checkpointed else 6) * config.parameter_counts()[1]


def markdown(config: K2Config, layouts: dict[str, RankGrid], step: Step, network_gb: float, tflops: float) -> str:
    """The table of docs/scale.md: a column for each layout; GB in all, and those of the network in parentheses."""
    every = weights(config)
    columns = []
    for name, layout in layouts.items():
        sent = traffic(config, layout, step, every)
        total = Sent("all", sum(s.bytes for s in sent), sum(s.network for s in sent))
        workload = Workload(tokens=step.tokens, gpus_per_node=step.gpus_per_node)
        held = hold(config, layout, workload, every).total
        column = {
            "layout": name,
            "pp, edp, ep": f"{layout.pp}, {layout.edp}, {layout.ep}",
            "sharding": layout.sharding,
            "memory, fullest rank": _gb(held),
            "micro-batches": f"{step.micro_batches(layout):,.0f}",
        }
        column |= {s.name: f"{_gb(s.bytes)} ({_gb(s.network)})" for s in [*sent, total]}
        column[f"s, at {network_gb:g} GB/s of network"] = f"{total.network / network_gb / 1e9:.1f}"
        flops = product_flops(config, step) / layout.pp / layout.stage_ranks
        column[f"s, at {tflops:g} TFLOP/s"] = f"{flops / tflops / 1e12:.1f}"
        columns.append(column)
    rows = [[name, *(column[name] for column in columns)] for name in columns[0]]
    rows.insert(1, ["---", *["---:"] * len(columns)])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def _gb(size: float) -> str:
    if size == 0:
        return "0"
    return f"{size / 1e9:,.{0 if size >= 1e11 else 1}f}" if size >= 5e7 else "< 0.1"
