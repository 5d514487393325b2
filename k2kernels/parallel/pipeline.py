"""Pipelines: the layers of a model over stages, each for the ranks of one place of the mesh's dimension "pp".

The schedules are torch's (torch.distributed.pipelining). This module makes their stages: which layers, on which rank,
with which shapes; and their loss.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from k2kernels._backend import UnsupportedError
from k2kernels.model.config import K2Config
from k2kernels.model.model import K2Model
from k2kernels.model.stage import K2Stage, K2Stages
from k2kernels.ops._check import Arguments
from k2kernels.parallel.layout import Layout

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class Schedule(NamedTuple):
    """How one of torch's schedules lays stages out."""

    style: str  # "loop" or "v", see `stages_of_rank`
    single: bool = False  # one stage on each rank; else two by default
    two: bool = False  # always two
    delays: bool = False  # gradients of weights are computed apart from those of inputs


SCHEDULES = {
    "GPipe": Schedule("loop", single=True),
    "1F1B": Schedule("loop", single=True),
    "Interleaved1F1B": Schedule("loop"),
    "InterleavedZeroBubble": Schedule("loop", delays=True),
    "ZBVZeroBubble": Schedule("v", two=True, delays=True),
    "DualPipeV": Schedule("v", two=True, delays=True),
}


class Costs(NamedTuple):
    """Multiply-adds of a token's forward pass."""

    layers: list[float]
    last: float  # of what follows the last layer: head, MTP layers, and the head for each of these


def costs(config: K2Config, length: int = 4096) -> Costs:
    """What each layer costs with sequences of `length` tokens. The embedding, a lookup, is free.

    Of a MoE layer the experts that a token uses count, evenly loaded. A backward pass costs twice as much in each.
    """
    hidden, heads = config.hidden_size, config.num_attention_heads
    query = hidden if config.q_lora_rank is None else config.q_lora_rank
    attention = query * heads * config.qk_head_dim + (0 if config.q_lora_rank is None else hidden * query)
    attention += hidden * config.latent_dim
    attention += config.kv_lora_rank * heads * (config.qk_nope_head_dim + config.v_head_dim)
    attention += heads * config.v_head_dim * hidden
    attention += length / 2 * heads * (config.qk_head_dim + config.v_head_dim)
    experts = (config.num_experts_per_tok + config.n_shared_experts) * config.moe_intermediate_size
    moe = config.n_routed_experts * hidden + 3 * hidden * experts
    dense = 3 * hidden * config.intermediate_size

    def layer(index: int) -> float:
        return attention + (moe if config.is_moe_layer(index) else dense)

    count, head = config.num_hidden_layers, config.vocab_size * hidden
    mtp = [layer(count + k) + 2 * hidden * hidden + head for k in range(config.num_nextn_predict_layers)]
    return Costs([layer(i) for i in range(count)], head + sum(mtp))


def split_layers(layers: list[float], stages: int, last: float = 0.0) -> list[range]:
    """The layers of each stage: consecutive, at least one, so that the most expensive stage costs least; of the ways
    that reach this, the one with the smallest sum of squares.

    Args:
        layers: their costs.
        stages: how many.
        last: an additional cost of the last stage.

    Raises:
        ValueError: more stages than layers.
    """
    count = len(layers)
    if not 1 <= stages <= count:
        raise ValueError(f"split_layers: stages must be from 1 to the {count} layers, got {stages}")
    sums = [0.0]
    for cost in layers:
        sums.append(sums[-1] + cost)

    def cost_of(first: int, end: int) -> float:
        return sums[end] - sums[first] + (last if end == count else 0.0)

    def solve(most: float, combine: Any, value: Any) -> tuple[float, list[int]]:
        """Over divisions whose stages cost at most `most`: the least total of `value`, and where the stages end."""
        best: list[tuple[float, list[int]]] = [(0.0, [])] + [(math.inf, [])] * count
        for _ in range(stages):
            new: list[tuple[float, list[int]]] = [(math.inf, [])] * (count + 1)
            for end in range(1, count + 1):
                for first in range(end):
                    cost = cost_of(first, end)
                    if cost <= most and best[first][0] < math.inf:
                        total = combine(best[first][0], value(cost))
                        if total < new[end][0]:
                            new[end] = total, [*best[first][1], end]
            best = new
        return best[count]

    most, _ = solve(math.inf, max, lambda cost: cost)
    _, ends = solve(most * (1 + 1e-9), lambda a, b: a + b, lambda cost: cost * cost)
    return [range(first, end) for first, end in zip([0, *ends], ends)]


def stages_of_rank(rank: int, ranks: int, each: int, style: str) -> list[int]:
    """The stages on the `rank`-th of the ranks of a pipeline: "loop" 0, 1, .., 0, 1, ..; "v" 0, 1, .., 1, 0."""
    if style == "loop":
        return [rank + ranks * turn for turn in range(each)]
    return [ranks * turn + (rank if turn % 2 == 0 else ranks - 1 - rank) for turn in range(each)]


class Pipeline:
    """The stages of a model on this rank, and a training pass through all of them.

        mesh = make_mesh(pp=2, ep=2)
        layout = Layout(mesh)
        pipeline = Pipeline(config, layout, micro_batches=8, micro_batch=(1, 4096), schedule="ZBVZeroBubble")
        expert_parallel(pipeline.model, layout, max_tokens=4096, gradients="mean")
        optimizer = MuonClip(pipeline.model, 1e-3, mesh=layout)
        ...
        loss = pipeline.step(ids[:, :-1], ids[:, 1:])
        layout.reduce_gradients(pipeline.model)
        layout.clip_grad_norm_(pipeline.model.parameters(), 1.0)
        layout.reduce_statistics(pipeline.model)
        optimizer.step()
        optimizer.zero_grad()
        pipeline.model.update_router_bias(1e-3)

    Layers are divided so that the most expensive stage costs least (`costs`, `split_layers`). Each rank has one stage,
    or several (virtual stages), as the schedule wants. Shapes between stages are given, not found by a first pass, so
    that statistics count each token once.

    Gradients are those of the mean over all tokens of the micro-batches, which have equally many. An optimizer without
    a process group, and `k2kernels.parallel.MuonClip` over `layout`, update this rank's part: nothing of a step needs
    the other stages but `clip_grad_norm_`, and whether a step is skipped, on which that MuonClip agrees.

    Args:
        config: of the whole model.
        ranks: a mesh with the dimension "pp", or its `Layout`.
        micro_batches: passes of a step. Interleaved schedules want a multiple of the stages of "pp".
        micro_batch: (sequences, length) of each.
        schedule: one of `SCHEDULES`. "InterleavedZeroBubble", "ZBVZeroBubble" and "DualPipeV" delay the gradients of
            weights to fill idle time. Interleaved, zero-bubble and DualPipeV schedules need two stages or more on a
            rank.
        each: stages on a rank; by default 1, or 2 where the schedule has several.
        mtp_weight: the weight of the mean loss of the MTP layers, beside 1 for the next token.
        dtype: of hidden states between stages; by default that of the parameters. With a mixed precision policy of
            `fully_shard`, its dtype.

    Attributes: model: this rank's part of the model, for everything but the pass itself; stages: the `K2Stage` modules
    on this rank, in the order of the schedule, each to be wrapped by `fully_shard` itself if at all; layers: the range
    of layers of every stage of the pipeline; layout.

    Raises:
        ValueError: for what does not fit together.
        UnsupportedError: in the first step, for checkpointed layers with a schedule that delays gradients of weights.
    """

    def __init__(
        self,
        config: K2Config,
        ranks: Layout | DeviceMesh,
        *,
        micro_batches: int,
        micro_batch: tuple[int, int],
        schedule: str = "1F1B",
        each: int | None = None,
        mtp_weight: float = 0.3,
        dtype: torch.dtype | None = None,
    ):
        args = Arguments("Pipeline")
        args.choice("schedule", schedule, tuple(SCHEDULES))
        kind = SCHEDULES[schedule]
        each = each or (1 if kind.single else 2)
        fits = each == 1 if kind.single else each == 2 if kind.two else each > 1
        args.require(fits, "each", _wanted(kind), each)
        args.integer("micro_batches", micro_batches, 1)
        sequences, length = micro_batch
        args.integer("micro_batch[0]", sequences, 1)
        args.integer("micro_batch[1]", length, 1 + config.num_nextn_predict_layers, config.max_position_embeddings)
        self.layout = Layout.of(ranks)
        if self.layout.pp is None:
            raise ValueError("Pipeline: the mesh must have a dimension 'pp'; see k2kernels.parallel.make_mesh")
        self.config, self.micro_batches, self.micro_batch = config, micro_batches, (sequences, length)
        self.schedule, self.mtp_weight, self.dtype = schedule, mtp_weight, dtype
        pp, place = self.layout.pp.size(), self.layout.pp.get_local_rank()
        of_layers, last = costs(config, length)
        count = pp * each
        wanted = f"such that pp * each is at most the {len(of_layers)} layers"
        args.require(count <= len(of_layers), "each", wanted, f"{each} with pp={pp}")
        self.layers = split_layers(of_layers, count, last)
        self._indices = stages_of_rank(place, pp, each, kind.style)
        self.stages = [K2Stage(config, self.layers[index]).train() for index in self._indices]
        self.model: K2Model = self.stages[0] if each == 1 else K2Stages(self.stages).train()
        self._last_place = next(r for r in range(pp) if count - 1 in stages_of_rank(r, pp, each, kind.style))
        self._schedule: Any = None

    def step(self, input_ids: Tensor, targets: Tensor) -> Tensor:
        """One forward and backward pass of all micro-batches; gradients are added to `grad`, where those of other ranks
        of the stage are still missing (`Layout.reduce_gradients`).

        Every rank calls it, those of one pipeline with the same tokens: the first stage takes input_ids, the last one
        targets.

        Args:
            input_ids: int64 [micro_batches * sequences, length].
            targets: the next token of each position, of the same shape.

        Returns:
            The mean loss of this pipeline's tokens, on all its ranks; detached.

        Raises:
            ValueError: other shapes, or (on a CPU) a target that is not in the vocabulary.
        """
        import torch.distributed as dist

        sequences, length = self.micro_batch
        shape = (self.micro_batches * sequences, length)
        args = Arguments("Pipeline.step")
        for name, ids in (("input_ids", input_ids), ("targets", targets)):
            args.tensor(name, ids, shape, torch.int64)
        self.stages[0].check_ids("Pipeline.step: targets as input_ids", targets)
        if self._schedule is None:
            self._schedule = self._make_schedule()
        ids = (input_ids,) if any(stage.is_first for stage in self.stages) else ()
        losses: list[Tensor] = []
        target = targets if any(stage.is_last for stage in self.stages) else None
        self._schedule.step(*ids, target=target, losses=losses, return_outputs=False)
        device = self.stages[0].device
        loss = torch.zeros((), dtype=torch.float64, device=device)
        if losses:
            loss = torch.stack([one.detach() for one in losses]).mean(dtype=torch.float64)
        dist.broadcast(loss, group=self.layout.pp.get_group(), group_src=self._last_place)
        return loss

    def loss(self, outputs: Tensor | tuple[Tensor, ...], targets: Tensor) -> Tensor:
        """Of a micro-batch: the mean cross entropy of the next token, and `mtp_weight` times the mean over MTP layers
        of theirs, of the tokens after it."""
        logits, *mtp = outputs if isinstance(outputs, tuple) else (outputs,)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        for k, more in enumerate(mtp):
            each = F.cross_entropy(more.flatten(0, 1), targets[:, 1 + k :].flatten())
            loss = loss + self.mtp_weight / len(mtp) * each
        return loss

    def _make_schedule(self) -> Any:
        from torch.distributed.pipelining import PipelineStage
        from torch.distributed.pipelining.schedules import get_schedule_class

        made = []
        for index, stage in zip(self._indices, self.stages):
            if SCHEDULES[self.schedule].delays:
                if any(layer.checkpoints for layer in stage.model.layers):
                    raise UnsupportedError(
                        f"Pipeline: with {self.schedule} no layer may be checkpointed: the gradient of each weight is "
                        "computed apart, and would run its layer's forward pass again; take 1F1B or Interleaved1F1B"
                    )
                _keep_gathered(stage)
            taken, given = self._shapes(stage)
            if not stage.is_last:
                stage.register_forward_hook(_check_given(given))
            made.append(
                PipelineStage(
                    stage,
                    index,
                    len(self.layers),
                    stage.device,
                    input_args=taken,
                    output_args=given,
                    group=self.layout.pp.get_group(),
                )
            )
        stages = made[0] if SCHEDULES[self.schedule].single else made
        return get_schedule_class(self.schedule)(stages, self.micro_batches, loss_fn=self.loss)

    def _shapes(self, stage: K2Stage) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """What a stage takes and gives, on the meta device."""
        config, (sequences, length) = self.config, self.micro_batch
        dtype = self.dtype or next(stage.parameters()).dtype
        hidden = torch.empty(sequences, length, config.hidden_size, dtype=dtype, device="meta", requires_grad=True)
        between = (hidden, hidden) if config.num_nextn_predict_layers else (hidden,)
        ids = torch.empty(sequences, length, dtype=torch.int64, device="meta")
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        logits = tuple(
            torch.empty(sequences, length - k, config.vocab_size, dtype=wide, device="meta", requires_grad=True)
            for k in range(1 + config.num_nextn_predict_layers)
        )
        return (ids,) if stage.is_first else between, logits if stage.is_last else between


def _keep_gathered(stage: K2Stage) -> None:
    """Weights of `fully_shard` stay gathered until their gradients are reduced: a schedule that computes these later
    looks them up by the stage's parameters, and must find those of the forward pass."""
    from torch.distributed.fsdp import FSDPModule

    for module in stage.modules():
        if isinstance(module, FSDPModule):
            module.set_reshard_after_forward(False, recurse=False)


def _check_given(given: tuple[Tensor, ...]) -> Any:
    """A hook that raises where a stage gives something else than the next one has memory for."""

    def check(module: K2Stage, inputs: Any, outputs: Tensor | tuple[Tensor, ...]) -> None:
        found = outputs if isinstance(outputs, tuple) else (outputs,)
        for got, want in zip(found, given, strict=True):
            if got.shape != want.shape or got.dtype != want.dtype:
                raise ValueError(
                    f"Pipeline: a stage must give {want.dtype} {list(want.shape)}, got {got.dtype} {list(got.shape)}; "
                    "pass dtype="
                )

    return check


def _wanted(kind: Schedule) -> str:
    return (
        "1 for this schedule" if kind.single else "2 for this schedule" if kind.two else "2 or more for this schedule"
    )
