"""Text that grows token by token, up to a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from k2kernels.text.tokenizer import Tokenizer

LONGEST_CHARACTER = 4  # bytes of UTF-8, and so the most tokens of a character
UNFINISHED = "\ufffd"  # how decoders write bytes that are no character, or not yet


class TextStream:
    """The text of an answer's tokens, given out as soon as it is final.

    A character may need several tokens, and a text that may be the beginning of a stop string is held back until that
    is decided. The parts, one behind the other, are the whole text, whatever their sizes. Each token costs the decoding
    of a few tokens, however long the answer is. The text begins with the first token given, never with a prompt.

    Args:
        tokenizer: of the model.
        stops: strings that end the text, none of them empty. They are not part of it.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()):
        self.tokenizer, self.stops = tokenizer, stops
        self.stopped: str | None = None  # the stop string that was found
        self._context: list[int] = []  # tokens whose text is known; how the next ones decode may depend on them
        self._new: list[int] = []  # tokens whose text is not known yet
        self._held = ""

    def add(self, token: int) -> str:
        """The text that is final after one more token; nothing after a stop string."""
        if self.stopped is not None:
            return ""
        self._new.append(token)
        text = self._decode_new()
        if text.endswith(UNFINISHED) and len(self._new) < LONGEST_CHARACTER:
            return ""
        return self._give(text)

    def finish(self) -> str:
        """The rest, when no token follows: also what looked like the beginning of a stop string or of a character."""
        if self.stopped is not None:
            return ""
        text = self._give(self._decode_new()) if self._new else ""
        if self.stopped is None:
            text, self._held = text + self._held, ""
        return text

    def _decode_new(self) -> str:
        known = self.tokenizer.decode(self._context) if self._context else ""
        text = self.tokenizer.decode(self._context + self._new)
        return text[len(known) :] if text.startswith(known) else self.tokenizer.decode(self._new)

    def _give(self, text: str) -> str:
        self._context, self._new = self._new, []
        text = self._held + text
        found = min(((text.find(stop), stop) for stop in self.stops if stop in text), default=None)
        if found is not None:
            end, self.stopped = found
            self._held = ""
            return text[:end]
        keep = max((overlap(text, stop) for stop in self.stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def overlap(text: str, stop: str) -> int:
    """Characters at the end of `text` that are the beginning of `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
