"""The pass of the main model over the next tokens of a batch, in a form that CUDA graphs can replay."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from k2kernels.engine.cache import LatentCache
from k2kernels.engine.pool import Pool
from k2kernels.engine.replay import CudaRecorder, Replay
from k2kernels.model.attention import Decode
from k2kernels.model.layer import DecoderLayer
from k2kernels.model.moe import check_exchanges, exchanges
from k2kernels.model.trunk import Trunk


class DecodePass:
    """From the next `width` tokens of up to `slots` sequences to the logits after each of them.

    All inputs that change from call to call, lengths and pages included, are read from tensors of fixed addresses, and
    the host reads none of them. A slot without a sequence is idle: its length is 0, it neither reads nor writes the
    cache, and its results are undefined.

    On a GPU the pass is replayed from one CUDA graph. Parts that wait for the device stay outside: experts in float32,
    for which there is no kernel and PyTorch needs the sizes of the groups on the host, and other ops that the reference
    computes. Sampling and drafting follow the pass and are launched one by one.

    Attributes, of the last call:
        tokens: int64 [slots, width], its argument.
        hidden: [slots, width, hidden], after the final norm.
        logits: [slots, width, vocab], in the model's dtype.
        step: the arguments of attention in this pass; `draft` uses them too.
    """

    def __init__(
        self,
        model: Trunk,
        cache: LatentCache | Pool,
        absorbed: list[tuple[Tensor, Tensor]],
        slots: int,
        width: int,
        recorder: CudaRecorder | None,
    ):
        self.model, self.cache = model, cache
        weight = model.lm_head.weight
        self.device = weight.device
        integers = dict(dtype=torch.int64, device=self.device)
        self.tokens = torch.zeros(slots, width, **integers)
        self.sequences = torch.zeros(2, slots, **integers)  # rows of the cache and their numbers of tokens; -1: idle
        self.hidden = weight.new_empty(slots, width, weight.shape[1])
        self.logits = weight.new_empty(slots, width, weight.shape[0])
        positions = torch.zeros(slots * width, **integers)
        self.step = Decode(
            rope=model.rope(positions),
            pages=cache.pages,
            block_table=cache.block_table.new_empty(slots, cache.block_table.shape[1]),
            positions=positions,
            seq_lens=torch.zeros(slots, dtype=torch.int32, device=self.device),
            absorbed=absorbed,
        )
        parts = [("embed_tokens", self._begin)]
        for index, layer in enumerate(model.model.layers[: model.model.depth]):
            parts.append((f"layers.{index}.self_attn", lambda layer=layer: self._attend(layer)))
            parts.append((f"layers.{index}.mlp", lambda layer=layer: self._feed_forward(layer)))
        self.replay = Replay([*parts, ("lm_head", self._end)], recorder)
        self.exchanges = exchanges(model)

    def __call__(self, tokens: Tensor, rows: Sequence[int], lengths: Sequence[int]) -> None:
        """Runs the pass.

        Args:
            tokens: int64 [at least n, width]; the first n go to the n sequences.
            rows: n rows of the cache, with room for the tokens; lengths: the number of tokens in each.

        Raises:
            PeerTimeout, ValueError: faults of earlier passes; see `check`.
        """
        self.check()
        count, idle = len(rows), self.tokens.shape[0] - len(rows)
        self.tokens[:count].copy_(tokens[:count])
        sequences = torch.tensor([[*rows, *[0] * idle], [*lengths, *[-1] * idle]])
        if self.device.type == "cuda":
            sequences = sequences.pin_memory()  # otherwise the copy would wait
        self.sequences.copy_(sequences, non_blocking=True)
        self.replay()

    def check(self) -> None:
        """Raises the faults that exchanges between ranks have reported, such as PeerTimeout: a replayed pass runs no
        Python that would. Faults of a pass are visible once the host has waited for it; its results are undefined."""
        check_exchanges(self.exchanges)

    def _begin(self) -> None:
        step, (rows, lengths) = self.step, self.sequences
        busy = lengths >= 0
        width = self.tokens.shape[1]
        positions = lengths[:, None] + torch.arange(width, device=self.device)
        step.positions.copy_(torch.where(busy[:, None], positions, -1).flatten())
        step.seq_lens.copy_(torch.where(busy, lengths + width, 0))
        step.block_table.copy_(self.cache.block_table[rows])
        for buffer, angle in zip(step.rope, self.model.rope(step.positions)):
            buffer.copy_(angle)
        self.hidden.copy_(self.model.model.embed_tokens(self.tokens))

    def _attend(self, layer: DecoderLayer) -> None:
        self.hidden.copy_(layer.attend(self.hidden, self.step))

    def _feed_forward(self, layer: DecoderLayer) -> None:
        self.hidden.copy_(layer.feed_forward(self.hidden))

    def _end(self) -> None:
        self.hidden.copy_(self.model.model.norm(self.hidden))
        self.logits.copy_(self.model.lm_head(self.hidden))
