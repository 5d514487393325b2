"""What each GPU holds when a model is trained or served over many of them, and which layouts fit.

A layout cuts the ranks into pp pipeline stages, and the ranks of a stage into edp groups of ep: a group's ranks divide
the routed experts among them, and ranks of equal place in the groups have the same experts. Each rank has its own
tokens (data-parallel attention); everything but the routed experts is on all ranks of the stage, whole or sharded.

Arithmetic on `footprint`, nothing is allocated. A plan says of each number whether it is counted or an estimate.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from k2kernels.model.capacity import KINDS, USABLE
from k2kernels.model.config import K2Config
from k2kernels.ops._check import Arguments
from k2kernels.ops._constants import constants
from k2kernels.parallel import footprint
from k2kernels.parallel.footprint import EMBEDDING, HEAD, Pass, Weight
from k2kernels.parallel.pipeline import costs, split_layers
from k2kernels.reference.w4_gemm import SCALE_BYTES

# Memory in units of 10^9 bytes as NVIDIA's data sheets name it. (Some GPUs have that many GiB; a plan stays below.)
GPUS = {
    "a100-40": 40,  # A100 data sheet: 40 GB HBM2
    "a100-80": 80,  # A100 data sheet: 80 GB HBM2e
    "h100": 80,  # H100 data sheet, SXM: 80 GB
    "h100-nvl": 94,  # H100 data sheet, NVL: 94 GB
    "h800": 80,  # as H100
    "h200": 141,  # H200 data sheet: 141 GB HBM3e
    "b200": 180,  # HGX B200: 1.44 TB on 8 GPUs
    "l40s": 48,  # L40S data sheet
    "4090": 24,  # GeForce RTX 4090 specifications
    "5090": 32,  # GeForce RTX 5090 specifications
    "rtx-pro-6000": 96,  # RTX PRO 6000 Blackwell data sheet
}
# How the copies of a weight are kept on the ranks that share it.
SHARDINGS = {
    "replicated": "weights, gradients and optimizer state whole on every rank",
    "optimizer": "optimizer state divided over the ranks that share a weight (ZeRO-1)",
    "dense-fsdp": "all but the experts by FSDP over the stage; experts whole",
    "fsdp": "all by FSDP, the experts over edp",
}
MODES = ("train", "serve")


class RankGrid(NamedTuple):
    """`pp * edp * ep` ranks."""

    pp: int
    edp: int
    ep: int
    sharding: str = "replicated"

    @property
    def stage_ranks(self) -> int:
        """The ranks of a pipeline stage: all that share its dense part."""
        return self.edp * self.ep


class Item(NamedTuple):
    """A part of a rank's memory."""

    name: str
    bytes: int
    counted: bool  # else an estimate
    note: str = ""


@dataclass(frozen=True)
class Workload:
    """What the ranks do.

    Args:
        mode: "train" or "serve".
        tokens: of a rank in one pass: a micro-batch of training, or the most that a serving rank takes at once.
        fp8: products in FP8 (train), or weights kept in FP8 (serve).
        cache_tokens: (serve) of a rank, in full pages.
        fp8_cache: (serve) 656-byte rows.
        load: rows of the fullest rank's experts, in multiples of the mean. An assumption.
        momentum_itemsize: 4, or 2 for a momentum in bfloat16.
        gpus_per_node: GPUs that reach each other's memory; experts over more go through all-to-all of a process group.
        w4: (serve) "int4" or "mxfp4": routed experts kept in 4 bits, all else in bfloat16.
    """

    mode: str = "train"
    tokens: int = 4096
    fp8: bool = False
    cache_tokens: int = 0
    fp8_cache: bool = False
    load: float = 1.25
    momentum_itemsize: int = 4
    gpus_per_node: int = 8
    w4: str | None = None


class Holding(NamedTuple):
    """What a rank of the fullest stage holds in one layout."""

    layout: RankGrid
    stage: int
    items: list[Item]  # with checkpointing by layer, where the workload is training
    without: list[Item]  # without, of the stage that is the fullest then

    @property
    def total(self) -> int:
        return _total(self.items)

    @property
    def total_without(self) -> int:
        return _total(self.without)


@dataclass(frozen=True)
class Plan:
    """Every layout of some GPUs, and the one to read in detail."""

    config: K2Config
    workload: Workload
    gpus: int
    gpu: str
    gpu_bytes: int
    holdings: list[Holding]
    chosen: Holding

    @property
    def usable(self) -> int:
        """Bytes that a plan may fill: the rest is left to the CUDA context, NCCL, fragmentation and workspaces."""
        return math.floor(self.gpu_bytes * USABLE)

    def fits(self, holding: Holding) -> bool:
        """With checkpointing, in training."""
        return holding.total <= self.usable

    @property
    def fitting(self) -> list[RankGrid]:
        return [holding.layout for holding in self.holdings if self.fits(holding)]

    def cache_room(self, holding: Holding) -> int:
        """Tokens of cache that a rank has room for, those of the workload included; 0 if the rest does not fit."""
        row = footprint.cache_row_bytes(self.config, 2, self.workload.fp8_cache) * self.config.num_hidden_layers
        rest = sum(item.bytes for item in holding.items if item.name != CACHE)
        return max(self.usable - rest, 0) // row


CACHE = "latent cache"


def plan(
    config: K2Config,
    gpus: int,
    gpu: str,
    workload: Workload | None = None,
    *,
    pp: int = 1,
    ep: int | None = None,
    sharding: str | None = None,
) -> Plan:
    """The layouts of `gpus` GPUs and what a rank holds in each.

    Args:
        config: of the model.
        gpus: how many.
        gpu: a name of `GPUS`, or a memory size in GB such as "141".
        workload: training by default.
        pp: pipeline stages. Layers are divided by cost, as `Pipeline` does; embedding and head are in the first and
            the last stage.
        ep, sharding: the layout to show; by default the fitting one that shards least, and of those the one with the
            most room. If none fits, the one that is nearest.

    Raises:
        ValueError: an unknown GPU, sizes that do not divide, or a layout that is not served.
    """
    workload = Workload() if workload is None else workload
    args = Arguments("plan")
    memory = gpu_bytes(gpu)
    args.integer("gpus", gpus, 1)
    args.integer("pp", pp, 1)
    _check(args, config, workload)
    serve = workload.mode == "serve"
    args.require(not serve or pp == 1, "pp", "1 where a model is served", pp, "generation has no pipeline")
    args.require(pp <= config.num_hidden_layers, "pp", f"at most {config.num_hidden_layers}, the layers", pp)
    args.require(gpus % pp == 0, "gpus", f"a multiple of pp={pp}", gpus, "add or take away GPUs, or change pp")
    tied = config.tie_word_embeddings and pp > 1
    args.require(not tied, "pp", "1 where head and embedding are one matrix", pp, "they would be in two stages")
    ranks = gpus // pp
    experts = _experts(config)
    if ep is not None:
        args.integer("ep", ep, 1)
        args.require(ranks % ep == 0, "ep", f"a divisor of the {ranks} ranks of a stage", ep, "change ep, gpus or pp")
        wanted = f"a divisor of the {experts} experts"
        args.require(experts % ep == 0, "ep", wanted, ep, "one of " + ", ".join(map(str, _divisors(ranks, experts))))
    if sharding is not None:
        args.choice("sharding", sharding, ("replicated",) if serve else tuple(SHARDINGS))
    every = footprint.weights(config)
    holdings = [hold(config, layout, workload, every) for layout in _layouts(ranks, pp, experts, serve)]
    made = Plan(config, workload, gpus, gpu, memory, holdings, holdings[0])
    asked = [h for h in holdings if ep in (None, h.layout.ep) and sharding in (None, h.layout.sharding)]
    return replace(made, chosen=_choose(made, asked))


def fewest_gpus(made: Plan, most: int = 2**14) -> int | None:
    """The smallest power of two times `pp` that some layout fits on; None above `most`."""
    config, workload, pp = made.config, made.workload, made.chosen.layout.pp
    every, ranks, serve = footprint.weights(config), 1, workload.mode == "serve"
    while ranks * pp <= most:
        layouts = _layouts(ranks, pp, _experts(config), serve)
        if any(made.fits(hold(config, layout, workload, every)) for layout in layouts):
            return ranks * pp
        ranks *= 2
    return None


def hold(config: K2Config, layout: RankGrid, workload: Workload, every: Sequence[Weight]) -> Holding:
    """What a rank of the fullest stage holds; `every`: `footprint.weights(config)`."""
    if workload.mode == "serve":
        items = _served(config, layout, workload, every)
        return Holding(layout, 0, items, items)
    stages = [
        [_trained(config, layout, stage, workload, every, checkpointed) for checkpointed in (True, False)]
        for stage in range(layout.pp)
    ]
    fullest = [max(range(layout.pp), key=lambda stage: _total(stages[stage][way])) for way in (0, 1)]
    return Holding(layout, fullest[0], stages[fullest[0]][0], stages[fullest[1]][1])


def _total(items: Sequence[Item]) -> int:
    return sum(item.bytes for item in items)


def stage_layers(config: K2Config, pp: int, stage: int) -> range:
    """The layers of a stage, as `Pipeline` divides them with one stage on each rank; MTP layers are in the last."""
    layers, last = costs(config)
    part = _divided(tuple(layers), pp, last)[stage]
    return range(part.start, part.stop + config.num_nextn_predict_layers) if stage == pp - 1 else part


@functools.cache
def _divided(layers: tuple[float, ...], pp: int, last: float) -> list[range]:
    return split_layers(list(layers), pp, last)


def local_shape(weight: Weight, layout: RankGrid) -> tuple[int, ...]:
    """The largest part of a parameter on any rank, with its gradient.

    FSDP cuts the first axis; experts that are fewer than the groups along their rows instead.
    """
    shape = weight.shape
    if not weight.method:
        return shape
    if weight.expert:
        shape = (shape[0] // layout.ep, *shape[1:])
        if layout.sharding != "fsdp":
            return shape
        axis = 0 if layout.edp <= shape[0] else 1
        return (*shape[:axis], -(-shape[axis] // layout.edp), *shape[axis + 1 :])
    if layout.sharding in ("dense-fsdp", "fsdp"):
        return (-(-shape[0] // layout.stage_ranks), *shape[1:])
    return shape


def stage_weights(config: K2Config, layout: RankGrid, stage: int, every: Sequence[Weight]) -> list[Weight]:
    """The weights of a stage as a rank holds them: with the shapes of `local_shape`."""
    layers, last = stage_layers(config, layout.pp, stage), layout.pp - 1
    here = [w for w in every if w.place in layers or (w.place, stage) in ((EMBEDDING, 0), (HEAD, last))]
    return [w._replace(shape=local_shape(w, layout)) for w in here]


def slots_of(config: K2Config, layout: RankGrid, workload: Workload) -> int:
    """Rows of a layer's experts on the fullest rank: what `capacity` of `expert_parallel` should be."""
    pairs = workload.tokens * config.num_experts_per_tok
    fp8 = workload.fp8 and workload.mode == "train"
    pairs = pairs if layout.ep == 1 else math.ceil(pairs * workload.load)
    return footprint.expert_slots(pairs, config.n_routed_experts // layout.ep, fp8)


def exchange_of(layout: RankGrid, workload: Workload) -> str:
    """The transport of `ExpertParallel`: "symmetric" within a node, else "torch", whose buffers last for a call."""
    if layout.ep == 1:
        return "local"
    inside = layout.ep <= min(workload.gpus_per_node, constants.EXCHANGE_MOST_RANKS)
    return "symmetric" if inside else "torch"


def _trained(
    config: K2Config, layout: RankGrid, stage: int, workload: Workload, every: Sequence[Weight], checkpointed: bool
) -> list[Item]:
    here = stage_weights(config, layout, stage, every)
    parameters = [w for w in here if w.method]
    state = 0
    for w in parameters:
        size = footprint.state_bytes(w.method, w.numel, 2, workload.momentum_itemsize)
        divided = layout.sharding == "optimizer"
        state += -(-size // (layout.edp if w.expert else layout.stage_ranks)) if divided else size
    # Otherwise each matrix is with its owner, and owners have about equally much.
    whole_state = layout.sharding == "replicated" or layout.stage_ranks == 1
    p = _pass(config, layout, workload)
    layers = [i for i in stage_layers(config, layout.pp, stage) if i < config.num_hidden_layers]
    kept = [footprint.layer_bytes(config, layer, p) for layer in layers]
    in_flight = layout.pp - stage  # micro-batches of a stage in 1F1B, at most
    each = len(layers) * footprint.checkpoint_bytes(config, p) if checkpointed else sum(kept)
    each += footprint.stem_bytes(config, p)
    largest = max(kept)
    items = [
        Item("weights", sum(w.bytes(2) for w in here), True, "bfloat16, and buffers"),
        Item("gradients", sum(w.bytes(2) for w in parameters), True, "bfloat16"),
        Item("optimizer state", state, whole_state, "MuonClip: masters, momentum, moments"),
        Item("activations", in_flight * each, checkpointed or layout.ep == 1, f"{len(layers)} layers x {in_flight}"),
    ]
    working = largest
    if checkpointed:
        logits = footprint.logits_bytes(config, p) * sum(map(config.is_moe_layer, layers))
        items.append(Item("routers' logits", logits, True, "for sequence_loss, of the last micro-batch"))
        items.append(Item("a layer, recomputed", largest, False, "what one layer keeps"))
    if stage == layout.pp - 1:
        items.append(Item("head", footprint.head_bytes(config, p), True, "log-probabilities in float32"))
        working = max(working, workload.tokens * config.vocab_size * 14)
    if layout.sharding in ("dense-fsdp", "fsdp"):
        items.append(Item("gathered weights", _gathered(layout, layers, every), False, "2 layers, gradients of 1"))
    items.append(_buffers(config, layout, workload))
    items.append(Item("working memory", working, False, "gradients of activations, or logits and theirs"))
    return [item for item in items if item.bytes]


def _gathered(layout: RankGrid, layers: Sequence[int], every: Sequence[Weight]) -> int:
    """Whole weights of the layer that runs and of the next, and the gradients of one, in bfloat16."""
    sizes = dict.fromkeys(layers, 0)
    for w in every:
        if w.place in sizes and w.method:
            whole = local_shape(w, layout._replace(sharding="replicated"))
            sizes[w.place] += 2 * math.prod(whole) if whole != local_shape(w, layout) else 0
    return 3 * max(sizes.values())


def _served(config: K2Config, layout: RankGrid, workload: Workload, every: Sequence[Weight]) -> list[Item]:
    here = stage_weights(config, layout, 0, every)
    fp8, w4 = workload.fp8, workload.w4
    kept = "FP8 where quantised" if fp8 else f"experts in {KINDS[w4]}, the rest bfloat16" if w4 else "bfloat16"
    p = _pass(config, layout, workload)._replace(fp8=False)
    working = max(footprint.layer_bytes(config, layer, p) for layer in range(config.num_hidden_layers))
    items = [
        Item("weights", sum(w.bytes(2, fp8, w4) for w in here), True, kept),
        Item("decoded kv_b_proj", footprint.absorbed_bytes(config) if fp8 else 0, True, "for decoding, bfloat16"),
        Item(
            CACHE,
            footprint.cache_bytes(config, 1, workload.cache_tokens, 2, workload.fp8_cache),
            True,
            f"{workload.cache_tokens:,} tokens" + (", FP8" if workload.fp8_cache else ""),
        ),
        _buffers(config, layout, workload),
        Item("working memory", working, False, "what a layer would keep"),
    ]
    return [item for item in items if item.bytes]


def _buffers(config: K2Config, layout: RankGrid, workload: Workload) -> Item:
    by_stores = exchange_of(layout, workload) == "symmetric"
    size = footprint.buffer_bytes(config, layout.ep, workload.tokens) if by_stores else 0
    return Item("exchange buffers", size, True, f"{layout.ep} ranks, {workload.tokens:,} tokens")


def _pass(config: K2Config, layout: RankGrid, workload: Workload) -> Pass:
    slots = slots_of(config, layout, workload)
    return Pass(workload.tokens, 2, workload.fp8, slots, config.n_routed_experts // layout.ep)


def _layouts(ranks: int, pp: int, experts: int, serve: bool) -> Iterator[RankGrid]:
    for ep in _divisors(ranks, experts):
        for sharding in ["replicated"] if serve else SHARDINGS:
            yield RankGrid(pp, ranks // ep, ep, sharding)


def _experts(config: K2Config) -> int:
    """The experts of a layer; 1 in a model without any, which ep cannot divide."""
    return config.n_routed_experts if any(map(config.is_moe_layer, range(config.num_hidden_layers))) else 1


def _divisors(ranks: int, experts: int) -> list[int]:
    common = math.gcd(ranks, experts)
    return [n for n in range(1, common + 1) if common % n == 0]


def _choose(made: Plan, asked: list[Holding]) -> Holding:
    fitting = [h for h in asked if made.fits(h)]
    if not fitting:
        return min(asked, key=lambda h: h.total)
    order = list(SHARDINGS)
    return min(fitting, key=lambda h: (order.index(h.layout.sharding), h.total))


def gpu_bytes(gpu: str, op: str = "plan") -> int:
    """The memory of a GPU of a name of `GPUS`, or of a size in GB such as "141"; `op` is named in errors."""
    text = str(gpu).lower()
    if text in GPUS:
        return GPUS[text] * 10**9
    try:
        size = float(text.removesuffix("gb"))
    except ValueError:
        size = math.nan
    wanted = f"one of {', '.join(GPUS)}, or a size in GB"
    Arguments(op).require(0 < size < math.inf, "gpu", wanted, repr(gpu), "a GPU that is not listed: its memory, as 141")
    return math.floor(size * 10**9)


def _check(args: Arguments, config: K2Config, workload: Workload) -> None:
    args.choice("mode", workload.mode, MODES)
    args.integer("tokens", workload.tokens, 1)
    args.integer("cache_tokens", workload.cache_tokens, 0)
    args.integer("gpus_per_node", workload.gpus_per_node, 1)
    args.choice("momentum_itemsize", workload.momentum_itemsize, (2, 4))
    if workload.w4 is not None:
        args.choice("w4", workload.w4, tuple(SCALE_BYTES))
        serves = workload.mode == "serve" and not workload.fp8
        args.require(serves, "w4", "None but where a model is served with fp8=False", workload.w4)
    args.require(1 <= workload.load < math.inf, "load", "at least 1, the mean", workload.load)
    serves = footprint.serves_fp8_cache(config) or not workload.fp8_cache
    args.require(serves, "fp8_cache", "False for a latent of other sizes than 512 and 64", True)
