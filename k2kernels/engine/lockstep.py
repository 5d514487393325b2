"""Passes of ranks that share experts: every rank takes part in each pass of any rank, with its tokens or without."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator
from typing import Any

from k2kernels._backend import UnsupportedError
from k2kernels.model.moe import Moe, exchanges
from k2kernels.model.trunk import Trunk


class Lockstep:
    """The ranks that share the experts of a model: those of its exchange. Without one, this process alone.

    A pass is a run through all layers, and through the MTP layers if these draft, whatever its tokens are: a prompt,
    a chunk of one, or the next tokens of some rows. So all passes have the same exchanges, and a rank may take in a
    prompt while another decodes.
    """

    def __init__(self, model: Trunk):
        self.model = model
        self.exchanges = exchanges(model)
        self._shared = next((e for e in self.exchanges if getattr(e, "world_size", 1) > 1), None)

    @property
    def several(self) -> bool:
        return self._shared is not None

    @contextlib.contextmanager
    def together(self, caller: str, **same: Any) -> Iterator[None]:
        """A block without passes: an error that one rank raises in it is raised on every rank.

        Args:
            same: arguments that must be the same on all ranks, by name.

        Raises:
            RuntimeError: says what another rank raised.
            ValueError: an argument is not the same on all ranks.
        """
        error = None
        try:
            yield
        except Exception as caught:
            error = caught
        if self._shared is not None:
            self._shared.agree(caller, error, **same)
        elif error is not None:
            raise error

    def check(self, caller: str, most: int) -> None:
        """Raises unless this rank can run passes of up to `most` tokens: ValueError for their number, UnsupportedError
        for weights that are in parts."""
        limit = min((e.max_tokens for e in self.exchanges if hasattr(e, "max_tokens")), default=most)
        if most > limit:
            raise ValueError(
                f"{caller}: a pass must have at most max_tokens={limit} tokens, with which the experts were "
                f"distributed, got {most}; use prefill_chunk, or fewer rows"
            )
        here = getattr(self._shared, "num_local_experts", 0)
        for name, p in self.model.named_parameters():
            if hasattr(p, "to_local") and not (".mlp.experts." in name and len(p.to_local()) == here):
                raise UnsupportedError(
                    f"{caller}: every weight, and every expert of a rank, must be whole, got {name} in parts; load the "
                    "model with from_pretrained(mesh=) and call k2kernels.parallel.expert_parallel"
                )

    def run(self, passes: Generator[None, None, Exception | None], drafts: int) -> None:
        """Runs `passes`, a generator that yields before each of its passes, until those of all ranks have ended.

        Args:
            drafts: MTP layers in a pass.

        Raises:
            PeerTimeout: a rank did not take part in time.
            Exception: what the generator has raised, or, at the end, returned.
        """
        goes_on, error = _next(passes)
        while goes_on if self._shared is None else self._shared.any_rank(goes_on):
            if goes_on:
                goes_on, error = _next(passes)
            else:
                self._without_tokens(drafts)
        if error is not None:
            raise error

    def _without_tokens(self, drafts: int) -> None:
        """A pass of other ranks: this one has no tokens in it, only experts."""
        model = self.model
        nothing = model.model.embed_tokens.weight.new_empty(0, 1, model.config.hidden_size)
        for layer in model.model.layers[: model.model.depth + drafts]:
            if isinstance(layer.mlp, Moe):
                layer.mlp(nothing)


def _next(passes: Generator[None, None, Exception | None]) -> tuple[bool, Exception | None]:
    """Runs up to the next pass: whether there is one, and the error that the generator has returned."""
    try:
        next(passes)
    except StopIteration as end:
        return False, end.value
    return True, None
