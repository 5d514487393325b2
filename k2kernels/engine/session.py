"""The sequences of one call of `generate`, and the passes over them."""

from __future__ import annotations

import torch
from torch import Tensor

from k2kernels.engine.cache import LatentCache, pages_for
from k2kernels.engine.decode_pass import DecodePass
from k2kernels.engine.replay import CudaRecorder
from k2kernels.model.attention import Prefill, Step
from k2kernels.model.extend import Extend
from k2kernels.model.moe import check_exchanges, exchanges
from k2kernels.model.trunk import Trunk


class Session:
    """The sequences of one call: their cache, the number of tokens of each in it, and the passes over them.

    Args:
        lengths: of the prompts; `prefill` takes them whole, `extend` in any steps.
        max_new_tokens: the most that may follow each prompt.
        drafts: MTP layers that take part.
    """

    def __init__(
        self,
        model: Trunk,
        lengths: list[int],
        max_new_tokens: int,
        drafts: int,
        cache_dtype: str,
        cuda_graphs: bool = True,
    ):
        weight = model.lm_head.weight
        self.model, self.device, self.drafts = model, weight.device, drafts
        self.prompt_lengths, self.lengths = list(lengths), [0] * len(lengths)
        layers = model.model.layers[: model.config.num_hidden_layers + drafts]
        # The last pass may write drafts beyond the longest text.
        most = [length + max_new_tokens + drafts for length in lengths]
        self.cache = LatentCache(
            model.config,
            layers=len(layers),
            rows=len(lengths),
            max_tokens=max(most),
            num_pages=sum(map(pages_for, most)),
            dtype=weight.dtype,
            device=self.device,
            cache_dtype=cache_dtype,
        )
        self.absorbed = [layer.self_attn.absorbed(weight.dtype) for layer in layers]
        self.recorder = CudaRecorder(self.device) if cuda_graphs and self.device.type == "cuda" else None
        self.passes: dict[tuple[int, int], DecodePass] = {}  # by slots and width
        self.exchanges = exchanges(model)

    def prefill(self, width: int) -> Prefill:
        """The pass over the prompts, padded on the right to `width` tokens: padding is computed, but not cached."""
        self.lengths = list(self.prompt_lengths)
        for row, length in enumerate(self.lengths):
            self.cache.reserve(row, length)
        column = torch.arange(width, device=self.device).expand(len(self.lengths), -1)
        real = column < torch.tensor(self.lengths, device=self.device)[:, None]
        cu_seqlens = torch.arange(0, column.numel() + 1, width, dtype=torch.int32, device=self.device)
        return Prefill(
            rope=self.model.rope(column.flatten()),
            cu_seqlens=cu_seqlens,
            pages=self.cache.pages,
            block_table=self.cache.block_table,
            positions=torch.where(real, column, -1).flatten(),
        )

    def extend(self, rows: list[int], tokens: list[Tensor]) -> tuple[Tensor, Extend]:
        """Runs and keeps the pass over the next tokens of some rows, int64 [1 or more] each, whatever they hold so far.

        Returns:
            The hidden states [1, N, hidden] after the final norm, packed in the order of `rows`, and the pass: its
            `last` are the places of the rows' last tokens.

        Raises:
            PeerTimeout, ValueError: faults of earlier passes; see `check`.
            ValueError: the cache has no room for the tokens.
        """
        self.check()
        before, new = [self.lengths[row] for row in rows], [len(some) for some in tokens]
        for row, past, count in zip(rows, before, new):
            self.cache.reserve(row, past + count)
        table = self.cache.block_table[rows]
        step = Extend(self.model.rope, self.cache.pages, table, self.absorbed, before, new)
        hidden = self.model.model(torch.cat(tokens)[None], step)
        self.advance(rows, new)
        return hidden, step

    def decode(self, rows: list[int], tokens: Tensor) -> DecodePass:
        """Runs the pass over `tokens` [at least n, width], the next ones of n rows; its results last until the next.

        Passes have 1, 2, 4 ... or all slots of the session; the smallest that fits is used.
        """
        width = tokens.shape[1]
        for row in rows:
            self.cache.reserve(row, self.lengths[row] + width)
        slots = min(len(self.lengths), 1 << (len(rows) - 1).bit_length())
        if (slots, width) not in self.passes:
            self.passes[slots, width] = DecodePass(self.model, self.cache, self.absorbed, slots, width, self.recorder)
        decode = self.passes[slots, width]
        decode(tokens, rows, [self.lengths[row] for row in rows])
        return decode

    def check(self) -> None:
        """Raises the faults that exchanges between ranks have reported, of all passes that the host has waited for."""
        check_exchanges(self.exchanges)

    def advance(self, rows: list[int], tokens: list[int]) -> None:
        """Keeps the first `tokens[i]` tokens of `rows[i]` of the last pass."""
        for row, count in zip(rows, tokens):
            self.lengths[row] += count


def draft(model: Trunk, hidden: Tensor, following: Tensor, last: Tensor, step: Step) -> Tensor:
    """Drafts one token per MTP layer for each row, continuing a pass of the main model.

    Args:
        hidden: [B, T, hidden], the result of the main model for its pass `step`.
        following: [B, T], the token after each position.
        last: the last valid position of each row, counted through all B T. Later positions of a row do not affect it,
            nor the next pass, which overwrites their rows of the cache.

    Returns:
        int64 [rows, MTP layers]: the tokens after `following` at `last`.

    The caches of layers beyond the first also hold drafts of earlier passes, right or wrong. As drafts are verified,
    this can only reduce their acceptance.
    """
    drafts = []
    for layer in model.mtp_layers:
        hidden = layer(hidden, model.model.embed_tokens(following), step)
        drafts.append(model.lm_head(hidden.flatten(0, 1)[last]).argmax(dim=-1))
        following = following.roll(-1, dims=1)
        following.view(-1)[last] = drafts[-1]
    return torch.stack(drafts, dim=1)
