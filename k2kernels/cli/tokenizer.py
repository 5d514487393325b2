"""The tokenizer of a checkpoint: Hugging Face tokenizers (tokenizer.json) or Kimi's tiktoken files (tiktoken.model)."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

RESERVED_TOKENS = 256  # ids behind the ranks of tiktoken.model; tokenizer_config.json names some of them
# How Kimi's tokenizers cut text before the merges (tokenization_kimi.py of the K2 checkpoints): runs of Han,
# words with their apostrophe endings, numbers of at most three digits, punctuation, line ends, white space.
_WORD_END = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
KIMI_PATTERN = "|".join(
    [
        r"[\p{Han}]+",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_WORD_END}",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_WORD_END}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)


class Tokenizer(Protocol):
    def encode(self, text: str) -> list[int]: ...

    def decode(self, tokens: Sequence[int]) -> str: ...


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer in a checkpoint's directory.

    Raises:
        ValueError: when there is none, or its file cannot be read.
    """
    if (path / "tokenizer.json").is_file():
        return _HuggingFace(path / "tokenizer.json")
    if (path / "tiktoken.model").is_file():
        return _Tiktoken(path / "tiktoken.model")
    raise ValueError(f"{path}: must hold tokenizer.json or tiktoken.model; neither is there")


class _HuggingFace:
    def __init__(self, path: Path):
        from tokenizers import Tokenizer

        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception for a file that it cannot parse
            raise ValueError(f"{path}: cannot be read: {error}") from None

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(list(tokens), skip_special_tokens=False)


class _Tiktoken:
    def __init__(self, path: Path):
        import tiktoken

        try:  # not by tiktoken's own reader, which in some versions needs the package blobfile for local paths
            lines = path.read_bytes().splitlines()
            ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines if line)}
        except (ValueError, binascii.Error) as error:
            raise ValueError(f"{path}: must hold lines of base64 token and rank: {error}") from None
        first = len(ranks)
        special = {i: f"<|reserved_token_{i}|>" for i in range(first, first + RESERVED_TOKENS)}
        config = path.with_name("tokenizer_config.json")
        if config.is_file():
            added = json.loads(config.read_text()).get("added_tokens_decoder", {})
            special.update({int(i): entry["content"] for i, entry in added.items()})
        self._encoding = tiktoken.Encoding(
            name=path.parent.name,
            pat_str=KIMI_PATTERN,
            mergeable_ranks=ranks,
            special_tokens={token: i for i, token in special.items()},
        )

    def encode(self, text: str) -> list[int]:
        return self._encoding.encode(text, allowed_special="all")  # a prompt may hold <|im_user|> and the like

    def decode(self, tokens: Sequence[int]) -> str:
        return self._encoding.decode(list(tokens))
