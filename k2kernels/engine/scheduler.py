"""Which samples run, and what the next pass computes of each: admission, chunks, preemption."""

from __future__ import annotations

import bisect
from typing import NamedTuple

from k2kernels.engine.cache import PAGE_SIZE, pages_for
from k2kernels.engine.pool import Pool
from k2kernels.engine.request import Sample


class Work(NamedTuple):
    """The part of a sample in a pass."""

    sample: Sample
    tokens: list[int]  # the ids from `sample.computed` on, then drafts
    drafts: int

    @property
    def chooses(self) -> bool:
        """Whether the pass reaches the end of the sample's ids."""
        return self.sample.computed + len(self.tokens) - self.drafts == len(self.sample.ids)


class Scheduler:
    """The waiting and the running samples, both by age, which is the order of submission.

    A running sample holds pages for all its ids, and takes another one when it needs it. A sample is admitted if,
    beside its own pages, one page remains for each running one that may still grow, itself included: without that,
    samples would be admitted and preempted in turns. If no page remains nevertheless, the youngest running sample
    returns to the queue; its full pages stay as cache. The oldest one is never preempted, so that it ends.

    Args:
        pool: with a row of its block table for each running sample.
        max_batch_tokens: the most tokens of a pass.
        width: the most tokens of a running sample without a chunk.
    """

    def __init__(self, pool: Pool, max_batch_tokens: int, width: int):
        self.pool, self.max_batch_tokens = pool, max_batch_tokens
        self.waiting: list[Sample] = []
        self.running: list[Sample] = []
        self.max_running = max_batch_tokens // width
        self._rows = list(range(self.max_running))
        self.preemptions = self.found_tokens = self.prompts_found = 0

    def add(self, sample: Sample) -> None:
        bisect.insort(self.waiting, sample, key=lambda other: other.age)

    def admit(self) -> None:
        """Lets waiting samples run, in order. A sample whose next page a running one is about to fill is passed over
        until that is there; one that there are no pages for lets none pass."""
        coming = {key for sample in self.running for key in self._coming(sample)} if self.waiting else set()
        for sample in list(self.waiting):
            if len(self.running) == self.max_running:
                break
            leader = self._leader(sample)
            full = (len(sample.ids) - 1) // PAGE_SIZE  # the last id is computed in any case, for its logits
            if leader is None:
                shared = self.pool.find(sample.keys[:full])
                held_back = len(shared) < full and sample.keys[len(shared)] in coming
            else:
                shared, held_back = leader.pages[:full], leader.computed < len(sample.ids) - 1
            if held_back:
                continue
            own = pages_for(len(sample.ids)) - len(shared)
            growing = sum(len(other.pages) < _most_pages(other) for other in self.running)
            growing += len(shared) + own < _most_pages(sample)
            if self.pool.available - self.pool.unheld(shared) - own < growing:
                break
            self._start(sample, shared, own, leader)
            coming |= set(self._coming(sample))

    def _leader(self, sample: Sample) -> Sample | None:
        """A running sample with the same prompt, to share its pages with one that begins."""
        if sample.tokens:
            return None
        return next((other for other in sample.request.samples if other.row >= 0), None)

    @staticmethod
    def _coming(sample: Sample) -> list[bytes]:
        """The keys of the pages that a running sample's chunks will fill."""
        return sample.keys[sample.computed // PAGE_SIZE :] if sample.pending > 1 else []

    def _start(self, sample: Sample, shared: list[int], own: int, leader: Sample | None) -> None:
        self.pool.share(shared)
        sample.pages = shared + self.pool.take(own)
        sample.computed, sample.published = len(shared) * PAGE_SIZE, len(shared)
        if leader is not None and sample.pending > 1:  # the rest of the prompt is in a page that the leader writes to
            self.pool.copy(leader.pages[len(shared)], sample.pages[len(shared)])
            sample.computed = len(sample.ids) - 1
        if sample.index == 0 and not sample.tokens:
            sample.request.cached_tokens = sample.computed
        self.found_tokens += sample.computed
        self.prompts_found += sample.computed > 0
        sample.row = self._rows.pop()
        self._write(sample, 0)
        self.waiting.remove(sample)
        bisect.insort(self.running, sample, key=lambda other: other.age)

    def _write(self, sample: Sample, first: int) -> None:
        table = self.pool.block_table
        table[sample.row, first : len(sample.pages)] = table.new_tensor(sample.pages[first:])

    def plan(self) -> list[Work]:
        """The next pass: a token, and drafts, of each sample that has no chunk; then chunks, as many tokens as fit."""
        works, left = [], self.max_batch_tokens
        for sample in list(self.running):
            if sample.row >= 0 and sample.pending == 1 and self._grow(sample):
                works.append(Work(sample, [sample.ids[-1], *sample.drafts], len(sample.drafts)))
                left -= len(works[-1].tokens)
        for sample in self.running:
            if left and sample.pending > 1:
                works.append(Work(sample, sample.ids[sample.computed : sample.computed + left], 0))
                left -= len(works[-1].tokens)
        return works

    def _grow(self, sample: Sample) -> bool:
        """Gives a sample the pages for its next token and its drafts; fewer drafts, if there is no page for them.
        False: there is none for the token, and the sample is preempted."""
        sample.drafts = sample.drafts[: sample.request.limit - 1 - len(sample.ids)]
        while True:
            missing = pages_for(len(sample.ids) + len(sample.drafts)) - len(sample.pages)
            if missing <= self.pool.available:
                break
            if sample.drafts:
                sample.drafts = []
                continue
            youngest = self.running[-1]
            self.preempt(youngest)
            if youngest is sample:
                return False
        if missing > 0:
            sample.pages += self.pool.take(missing)
            self._write(sample, len(sample.pages) - missing)
        return True

    def advance(self, sample: Sample, tokens: int) -> None:
        """Counts rows that a pass has computed, and lets full pages be found."""
        sample.computed += tokens
        sample.update_keys()
        while sample.published < sample.computed // PAGE_SIZE:
            self.pool.publish(sample.pages[sample.published], sample.keys[sample.published])
            sample.published += 1

    def preempt(self, sample: Sample) -> None:
        """Returns a running sample to the queue, in the order of its age."""
        self.stop(sample)
        self.preemptions += 1
        self.add(sample)

    def stop(self, sample: Sample, forget: bool = False) -> None:
        """Takes a sample out, running or waiting, and releases its pages; with `forget` they are not found again."""
        if sample.row < 0:
            self.waiting.remove(sample)
            return
        self.running.remove(sample)
        self._rows.append(sample.row)
        if forget:
            self.pool.forget(sample.pages)
        self.pool.release(sample.pages)
        sample.pages, sample.drafts, sample.row, sample.computed = [], [], -1, 0


def _most_pages(sample: Sample) -> int:
    """Of a sample at its greatest length; the last token has no row."""
    return pages_for(sample.request.limit - 1)
