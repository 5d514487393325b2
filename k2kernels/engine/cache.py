"""The paged cache of latent attention: one row per token and layer, [normed latent | rotated key], for all heads."""

from __future__ import annotations

import torch

from k2kernels.model.config import K2Config
from k2kernels.reference.mla_cache import LATENT, ROPE, ROW_BYTES

PAGE_SIZE = 64  # tokens


class LatentCache:
    """Pages of 64 tokens for `rows` sequences of different lengths; a page is allocated when a row needs it.

    Args:
        config: sizes of a token's row.
        layers: number of attention layers. All use the same pages of a row.
        rows: sequences.
        max_tokens: the most tokens of one row.
        num_pages: size of the pool; by default as many as all rows need at full length.
        dtype: dtype of the rows, when `cache_dtype` is "auto".
        cache_dtype: "auto", or "fp8" for rows of 656 bytes (512 + 64 dimensions only).

    `pages[layer]` [num_pages, 64, kv_lora_rank + qk_rope_head_dim] (uint8 [num_pages, 64, 656] for "fp8") and
    `block_table` int32 [rows, pages per row] are what `mla_decode` takes. Table entries without a page are -1.

    Raises:
        ValueError: "fp8" with other dimensions, or another cache_dtype.
    """

    def __init__(
        self,
        config: K2Config,
        *,
        layers: int,
        rows: int,
        max_tokens: int,
        num_pages: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        cache_dtype: str = "auto",
    ):
        self.max_tokens = max_tokens
        per_row = pages_for(max_tokens)
        self.num_pages = rows * per_row if num_pages is None else num_pages
        self.pages = new_pages(config, layers, self.num_pages, dtype, device, cache_dtype)
        self.block_table = torch.full((rows, per_row), -1, dtype=torch.int32, device=device)
        self._free = list(range(self.num_pages - 1, -1, -1))  # a stack
        self._owned: list[list[int]] = [[] for _ in range(rows)]

    @property
    def free_pages(self) -> int:
        """Pages in the pool that no row has."""
        return len(self._free)

    @property
    def bytes_per_token(self) -> int:
        """Bytes of all layers together."""
        return self.pages.shape[0] * self.pages.shape[-1] * self.pages.element_size()

    def reserve(self, row: int, tokens: int) -> None:
        """Allocates pages so that `row` can hold `tokens` tokens in all; pages that it has stay.

        Raises:
            ValueError: more than `max_tokens`, or too few free pages. Nothing is changed then.
        """
        if tokens > self.max_tokens:
            raise ValueError(
                f"LatentCache: tokens of row {row} must be at most max_tokens={self.max_tokens}, got {tokens}"
            )
        owned = self._owned[row]
        missing = pages_for(tokens) - len(owned)
        if missing <= 0:
            return
        if missing > len(self._free):
            raise ValueError(
                f"LatentCache: row {row} needs {missing} more pages, {len(self._free)} of {self.num_pages} are free; "
                "free a finished row or give the cache more num_pages"
            )
        taken = [self._free.pop() for _ in range(missing)]
        table = torch.tensor(taken, dtype=torch.int32, device=self.block_table.device)
        self.block_table[row, len(owned) : len(owned) + missing] = table
        owned.extend(taken)

    def free(self, row: int) -> None:
        """Returns the pages of `row` to the pool."""
        self._free.extend(reversed(self._owned[row]))
        self._owned[row] = []
        self.block_table[row] = -1


def new_pages(
    config: K2Config, layers: int, num_pages: int, dtype: torch.dtype, device: torch.device | str, cache_dtype: str
) -> torch.Tensor:
    """Zeros [layers, num_pages, 64, row], as `LatentCache` describes them and with its errors."""
    if cache_dtype not in ("auto", "fp8"):
        raise ValueError(f"LatentCache: cache_dtype must be 'auto' or 'fp8', got {cache_dtype!r}")
    width = config.latent_dim
    if cache_dtype == "fp8":
        if (config.kv_lora_rank, config.qk_rope_head_dim) != (LATENT, ROPE):
            raise ValueError(
                f"LatentCache: cache_dtype 'fp8' needs kv_lora_rank {LATENT} and qk_rope_head_dim {ROPE}, "
                f"got {config.kv_lora_rank} and {config.qk_rope_head_dim}; use 'auto'"
            )
        width, dtype = ROW_BYTES, torch.uint8
    return torch.zeros(layers, num_pages, PAGE_SIZE, width, dtype=dtype, device=device)


def pages_for(tokens: int) -> int:
    """Pages that hold `tokens` tokens."""
    return -(-tokens // PAGE_SIZE)
