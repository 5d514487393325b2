"""The tokenizer of a checkpoint: Hugging Face tokenizers (tokenizer.json) or Kimi's tiktoken files (tiktoken.model)."""

from __future__ import annotations

import base64
import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

RESERVED_TOKENS = 256  # ids behind the ranks of tiktoken.model; tokenizer_config.json names some of them
LARGEST_ID = 2**31
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
    added_tokens: Mapping[str, int]  # the ids of texts, such as <|im_end|>, that are a token wherever they occur
    bos: list[int]  # what a text begins with: the id of the BOS token, or nothing; `encode` does not add it

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


def special_token(path: Path, key: str) -> str | None:
    """A special token ("bos_token" ...) of tokenizer_config.json in a checkpoint's directory; None if it names none.

    Raises:
        ValueError: the file is no JSON object.
    """
    value = _settings(path).get(key)
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) and value else None


def _settings(path: Path) -> dict[str, Any]:
    """tokenizer_config.json of a checkpoint's directory; empty where there is none."""
    file = path / "tokenizer_config.json"
    if not file.is_file():
        return {}
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{file}: must hold a JSON object, got {type(values).__name__}")
    return values


class _HuggingFace:
    def __init__(self, path: Path):
        from tokenizers import Tokenizer

        self.path = path
        with _naming(path, "read"):
            self._tokenizer = Tokenizer.from_file(str(path))
            self._tokenizer.no_padding()  # to a length that the file chooses
            self._tokenizer.no_truncation()
            added = self._tokenizer.get_added_tokens_decoder().items()
        # Single letters, of which DeepSeek's first tokenizers have some (ö, ÷ ...), are text.
        self.added_tokens = {t.content: i for i, t in added if t.special or len(t.content) > 1}
        self.bos = self._bos()

    def _bos(self) -> list[int]:
        """As tokenizer_config.json says (add_bos_token, of the DeepSeek and Llama classes), or tokenizer.json."""
        wanted, name = _settings(self.path.parent).get("add_bos_token"), special_token(self.path.parent, "bos_token")
        if wanted and name in self.added_tokens:
            return [self.added_tokens[name]]
        if wanted is False:
            return []
        with contextlib.suppress(Exception):  # of a vocabulary without the letter
            full, bare = self._tokenizer.encode("a").ids, self.encode("a")
            return next(full[:i] for i in range(len(full)) if bare and full[i : i + len(bare)] == bare)
        return []

    def encode(self, text: str) -> list[int]:
        with _naming(self.path):
            return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, tokens: Sequence[int]) -> str:
        with _naming(self.path):
            return self._tokenizer.decode(list(tokens), skip_special_tokens=False)


class _Tiktoken:
    def __init__(self, path: Path):
        import tiktoken

        self.path, self.bos = path, []  # Kimi's texts begin without
        ranks = _ranks(path)
        first = len(ranks)
        special = {i: f"<|reserved_token_{i}|>" for i in range(first, first + RESERVED_TOKENS)}
        config = path.with_name("tokenizer_config.json")
        named = _added_tokens(config, first) if config.is_file() else {}
        special.update(named)
        self.added_tokens = {token: i for i, token in special.items()}
        self.largest_id = max([first - 1, *named])  # of the files' tokens; reserved ones may follow
        with _naming(path):
            self._encoding = tiktoken.Encoding(
                name=path.parent.name,
                pat_str=KIMI_PATTERN,
                mergeable_ranks=ranks,
                special_tokens=self.added_tokens,
            )

    def encode(self, text: str) -> list[int]:
        with _naming(self.path):
            return self._encoding.encode(text, allowed_special="all")  # a prompt may hold <|im_user|> and the like

    def encode_ordinary(self, text: str) -> list[int]:
        """Ids of a text in which the names of special tokens are text like any other."""
        with _naming(self.path):
            return self._encoding.encode_ordinary(text)

    def token_to_id(self, token: str) -> int | None:
        """The id of a special token; None if there is none of that name."""
        return self._encoding.encode(token, allowed_special="all")[0] if token in self.added_tokens else None

    def decode(self, tokens: Sequence[int]) -> str:
        try:
            return self._encoding.decode(list(tokens))
        except KeyError:  # an id of the model that is no token
            return "".join(self._decoded(token) for token in tokens)

    def _decoded(self, token: int) -> str:
        try:
            return self._encoding.decode([token])
        except KeyError:
            return "\ufffd"


@contextlib.contextmanager
def _naming(path: Path, done: str = "used") -> Iterator[None]:
    """Turns what a tokenizer's library raises into ValueError with the name of its file.

    The libraries raise plain Exception, KeyError, OverflowError ..., and for what their Rust code does not expect
    PanicException, which is no Exception.
    """
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"{path}: cannot be {done}: {error or type(error).__name__}") from None


def _ranks(path: Path) -> dict[bytes, int]:
    """The tokens of a tiktoken.model."""
    try:  # not by tiktoken's own reader, which in some versions needs the package blobfile for local paths
        lines = [line for line in path.read_bytes().splitlines() if line]
        ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines)}
    except ValueError as error:
        raise ValueError(f"{path}: must hold lines of base64 token and rank: {error}") from None
    if len(ranks) != len(lines) or set(ranks.values()) != set(range(len(ranks))):
        raise ValueError(f"{path}: must hold each token once, with the ranks from 0 to {len(lines) - 1}")
    if b"" in ranks or any(bytes([byte]) not in ranks for byte in range(256)):
        raise ValueError(f"{path}: must hold every single byte as a token, and no empty one")
    return ranks


def _added_tokens(path: Path, first: int) -> dict[int, str]:
    """Special tokens by id, of tokenizer_config.json; the first may be `first`."""
    try:
        added = json.loads(path.read_text(encoding="utf-8")).get("added_tokens_decoder", {})
        tokens = {int(i): entry["content"] for i, entry in added.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: added_tokens_decoder must be an object of id: {{content}}: {error!r}") from None
    for i, token in tokens.items():
        if not first <= i < LARGEST_ID or not isinstance(token, str) or not token:
            wanted = f"a text for ids from {first} to {LARGEST_ID - 1}"
            raise ValueError(f"{path}: added_tokens_decoder must hold {wanted}, got {token!r} for {i}")
    return tokens
