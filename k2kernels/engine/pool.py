"""Pages of latent rows that sequences share: references, keys of what full pages hold, and which to reuse first."""

from __future__ import annotations

import hashlib
import struct
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence

import torch

from k2kernels.engine.cache import PAGE_SIZE, new_pages, pages_for
from k2kernels.model.config import K2Config

Key = bytes


def root_key(salt: str = "") -> Key:
    """The parent of a text's first page. Texts of different salts share no pages."""
    return hashlib.sha256(salt.encode()).digest()


def extend_keys(keys: list[Key], root: Key, ids: Sequence[int]) -> None:
    """Appends to `keys`, those of the first full pages of `ids`, the keys of the other full pages.

    A page's key is SHA-256 of its parent's key and of its 64 ids as int32: it names all ids up to the page's end.
    """
    for page in range(len(keys), len(ids) // PAGE_SIZE):
        some = ids[page * PAGE_SIZE : (page + 1) * PAGE_SIZE]
        parent = keys[-1] if keys else root
        keys.append(hashlib.sha256(parent + struct.pack(f"<{PAGE_SIZE}i", *some)).digest())


class Pool:
    """Pages of 64 tokens in three states: held (by one or more sequences), idle (by none, but found by key), free.

    Args:
        config, layers, dtype, device, cache_dtype: as in `LatentCache`.
        num_pages: of the pool.
        rows: of `block_table`, for as many sequences at a time.
        max_tokens: the most tokens of a sequence.

    `pages` [layers, num_pages, 64, row] and `block_table` int32 [rows, pages for max_tokens] are what attention takes.

    With MTP layers, their row of a token depends on the next one, too: the last row of a found page may belong to
    another next token. As drafts are verified, this can only reduce their acceptance.
    """

    def __init__(
        self,
        config: K2Config,
        *,
        layers: int,
        num_pages: int,
        rows: int,
        max_tokens: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        cache_dtype: str = "auto",
    ):
        self.num_pages = num_pages
        self.pages = new_pages(config, layers, num_pages, dtype, device, cache_dtype)
        self.block_table = torch.full((rows, pages_for(max_tokens)), -1, dtype=torch.int32, device=device)
        self._references = [0] * num_pages
        self._free = list(range(num_pages - 1, -1, -1))  # a stack
        self._idle: OrderedDict[int, None] = OrderedDict()  # the longest unused first
        self._by_key: dict[Key, int] = {}
        self._key_of: dict[int, Key] = {}

    @property
    def available(self) -> int:
        """Pages that can be taken: free and idle ones."""
        return len(self._free) + len(self._idle)

    @property
    def held(self) -> int:
        """Pages that sequences hold."""
        return self.num_pages - self.available

    @property
    def idle(self) -> int:
        """Pages that are kept for later sequences with the same beginning."""
        return len(self._idle)

    def find(self, keys: Sequence[Key]) -> list[int]:
        """The pages of the first of `keys`, up to one that is not there."""
        found = []
        for key in keys:
            if key not in self._by_key:
                break
            found.append(self._by_key[key])
        return found

    def unheld(self, pages: Sequence[int]) -> int:
        """How many of `pages` no sequence holds: sharing these makes as many fewer available."""
        return sum(not self._references[page] for page in pages)

    def take(self, count: int) -> list[int]:
        """New pages for one holder, free ones first, then those of the longest unused keys; at most `available`."""
        taken = []
        for _ in range(count):
            if self._free:
                page = self._free.pop()
            else:
                page, _ = self._idle.popitem(last=False)
                del self._by_key[self._key_of.pop(page)]
            self._references[page] = 1
            taken.append(page)
        return taken

    def share(self, pages: Sequence[int]) -> None:
        """One more holder of each page."""
        for page in pages:
            self._idle.pop(page, None)
            self._references[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """One holder less. Of a text that nobody holds, the end is reused before the beginning."""
        for page in reversed(pages):
            self._references[page] -= 1
            if self._references[page] == 0:
                if page in self._key_of:
                    self._idle[page] = None
                else:
                    self._free.append(page)

    def publish(self, page: int, key: Key) -> None:
        """Lets a full page be found. Of several with the same contents the first is."""
        if key not in self._by_key:
            self._by_key[key], self._key_of[page] = page, key

    def forget(self, pages: Iterable[int] | None = None) -> None:
        """Lets these pages, by default all, be found no more."""
        for page in list(self._key_of) if pages is None else pages:
            if page in self._key_of:
                del self._by_key[self._key_of.pop(page)]
            if page in self._idle:
                del self._idle[page]
                self._free.append(page)

    def copy(self, source: int, target: int) -> None:
        """Copies the rows of a page, in all layers."""
        self.pages[:, target] = self.pages[:, source]

    def check(self, holders: Iterable[Sequence[int]]) -> None:
        """Raises AssertionError unless each page is in one state, and held as often as it is in `holders`."""
        references = Counter(page for pages in holders for page in pages)
        assert self._references == [references[page] for page in range(self.num_pages)], "references"
        held = set(references)
        states = [*held, *self._idle, *self._free]
        assert sorted(states) == list(range(self.num_pages)), "a page in no state, or in two"
        assert self._by_key == {key: page for page, key in self._key_of.items()}, "keys"
        assert set(self._idle) == set(self._key_of) - held, "an idle page without key, or a free one with one"
