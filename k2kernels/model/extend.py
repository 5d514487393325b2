"""The next tokens of sequences whose past is in the paged cache: which keys attention reads, and in which form.

Letters of shapes: B sequences, N new tokens of all of them, C latent, R rope.
"""

from __future__ import annotations

from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from k2kernels.model.config import K2Config
from k2kernels.model.rope import Rope

# The most tokens whose keys and values are expanded at a time. For Kimi-K2 in bfloat16 one takes 32 KB, all 268 MB.
# A multiple of 128: pieces begin where the kernels' blocks of keys do.
EXPANDED_TOKENS = 8192


class Absorbed(NamedTuple):
    """Some sequences of a pass, attended to in latent space."""

    tokens: slice  # of the pass, the new ones of these sequences
    block_table: Tensor
    seq_lens: Tensor
    cu_seqlens: Tensor  # int32 [sequences + 1], of the new tokens


class Expanded(NamedTuple):
    """Some sequences of a pass, attended to with expanded keys and values: all in one piece, or one in several."""

    tokens: slice
    cu_seqlens: Tensor
    pieces: list[Piece]


class Piece(NamedTuple):
    """Keys that are expanded together."""

    block_table: Tensor  # where their rows are, as `mla_gather` takes it
    positions: Tensor
    cu_seqlens: Tensor  # int32 [sequences + 1]
    diagonal: Tensor  # int32 [sequences], as `mla_prefill_piece` takes it


class Extend:
    """A pass over the next tokens of B sequences, packed: `new[b]` of the one that has `before[b]` in the cache.

    The lengths are numbers of the host: the pass is launched, not replayed. Its memory is that of the new tokens, of
    EXPANDED_TOKENS keys and values, and 8 bytes for each token of the past.

    Args:
        rope: of the model.
        pages: of the cache, for all layers: [layers, P, page size, row].
        block_table: int32 [B, pages per row], with pages for all tokens; sequences may share pages of their past.
        absorbed: what `LatentAttention.absorbed` gave, by layer.

    Attributes:
        block_table, positions: where the new rows go, as `mla_append` takes it.
        parts: the new tokens in order, each part as its attention is computed.
        last: int64 [B], the place of each sequence's last new token among the N.
    """

    def __init__(
        self,
        rope: Rope,
        pages: Tensor,
        block_table: Tensor,
        absorbed: list[tuple[Tensor, Tensor]],
        before: list[int],
        new: list[int],
    ):
        self.pages, self.absorbed = pages, absorbed
        page_size, device = pages.shape[2], pages.device
        ends = [0, *accumulate(new)]
        seq_lens = [past + count for past, count in zip(before, new)]
        self.last = _on(device, ends[1:]) - 1
        self.block_table, self.positions, position = _places(block_table, page_size, before, new)
        self.rope = rope(position)
        self.parts: list[Absorbed | Expanded] = []
        for group in _groups(rope.config, seq_lens, new):
            some = slice(group[0], group[-1] + 1)
            tokens = slice(ends[some.start], ends[some.stop])
            cu_seqlens = _cumulative(device, new[some])
            if not _expands(rope.config, new[group[0]]):
                lengths = _on(device, seq_lens[some], torch.int32)
                self.parts.append(Absorbed(tokens, block_table[some], lengths, cu_seqlens))
                continue
            pieces = []
            for first in range(0, max(seq_lens[some]), EXPANDED_TOKENS):
                counts = [min(length - first, EXPANDED_TOKENS) for length in seq_lens[some]]
                table, positions, _ = _places(block_table[some], page_size, [first] * len(group), counts)
                diagonal = _on(device, [past - first for past in before[some]], torch.int32)
                pieces.append(Piece(table, positions, _cumulative(device, counts), diagonal))
            self.parts.append(Expanded(tokens, cu_seqlens, pieces))


def _expands(config: K2Config, new: int) -> bool:
    """Whether expanded keys and values take fewer FLOPs than the absorbed form for so many new tokens of a sequence.

    Per head and layer, n new tokens after L others: 2 n L (2 C + R) FLOPs absorbed; 2 n L (nope + R + V) expanded, and
    2 L C (nope + V) to expand. Either spends 2 n C (nope + V) on the new tokens. L cancels: Kimi-K2 expands from 171.
    """
    latent, expanded = config.kv_lora_rank, config.qk_nope_head_dim + config.v_head_dim
    return new * (2 * latent - expanded) > latent * expanded


def _groups(config: K2Config, seq_lens: list[int], new: list[int]) -> list[list[int]]:
    """Neighbouring sequences that are absorbed, or whose keys are expanded in one piece; longer ones are alone."""
    groups: list[list[int]] = []
    for b, count in enumerate(new):
        expands = _expands(config, count)
        if groups and expands == _expands(config, new[b - 1]):
            keys = sum(seq_lens[other] for other in groups[-1]) + seq_lens[b]
            if not expands or keys <= EXPANDED_TOKENS:
                groups[-1].append(b)
                continue
        groups.append([b])
    return groups


def _places(block_table: Tensor, page_size: int, first: list[int], count: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """The places of `count[b]` tokens from `first[b]` on of each sequence: pages int32 [N, 1] and slots in them int32
    [N], as `mla_append` and `mla_gather` take them, and the positions in the sequences [N]."""
    sequence = torch.arange(len(count)).repeat_interleave(torch.tensor(count))
    position = torch.cat([torch.arange(start, start + length) for start, length in zip(first, count)])
    sequence, position = _on(block_table.device, torch.stack([sequence, position]))
    return block_table[sequence, position // page_size, None], (position % page_size).int(), position


def _cumulative(device: torch.device, lengths: list[int]) -> Tensor:
    return _on(device, [0, *accumulate(lengths)], torch.int32)


def _on(device: torch.device, numbers: Tensor | list[int], dtype: torch.dtype = torch.int64) -> Tensor:
    """Numbers of the host on the device; the host does not wait."""
    numbers = torch.as_tensor(numbers, dtype=dtype)
    return numbers.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else numbers.to(device)
