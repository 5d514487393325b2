"""Text to batches of tokens: reading, a byte-level BPE tokenizer or that of a checkpoint, a held-out part."""

from __future__ import annotations

import lzma
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from k2kernels.text.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MIN_BYTES = 20_000  # less cannot fill a vocabulary of 1024 and a held-out part
BLOCK_BYTES = 8_192  # the text is cut into blocks of about this size at line ends ...
HOLD_OUT = 10  # ... and every tenth block is held out
TOKENIZERS = ("tokenizer.json", "tiktoken.model")  # in this order, as `load_tokenizer`
FIM_TOKENS = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")


def read_text(paths: Sequence[Path]) -> str:
    """The files' text, or CPython's own language reference (`pydoc_data.topics`) where no file is named.

    Raises:
        ValueError: for a file that is empty, not UTF-8, or together too short to train on.
        OSError: for a file that cannot be read.
    """
    if not paths:
        from pydoc_data.topics import topics

        # The reference repeats whole sections under several topics. Each paragraph is taken once: otherwise much of
        # the held-out text would be in the training text too.
        paragraphs = "\n\n".join(topics[name].strip() for name in sorted(topics)).split("\n\n")
        return "\n\n".join(dict.fromkeys(paragraphs)) + "\n"
    parts = []
    for path in paths:
        raw = Path(path).read_bytes()
        try:
            text = raw.decode("utf-8-sig")  # without the mark that some editors put in front
        except UnicodeDecodeError as error:
            raise ValueError(
                f"--text {path}: must be UTF-8 text, got byte {raw[error.start]:#04x} at {error.start}"
            ) from None
        if "\0" in text:
            raise ValueError(f"--text {path}: must be text, got a file with NUL bytes")
        if not text.strip():
            raise ValueError(f"--text {path}: must hold text, got an empty file")
        parts.append(text)
    text = "\n\n".join(parts)
    if (size := len(text.encode())) < MIN_BYTES:
        raise ValueError(f"--text: must hold at least {MIN_BYTES} bytes in all, got {size}; add files")
    return text


def hold_out(text: str) -> tuple[str, str]:
    """Cuts `text` at line ends into blocks and takes out every tenth: (for training, for validation)."""
    blocks, block, size = [], [], 0
    for line in text.splitlines(keepends=True):
        block.append(line)
        size += len(line.encode())
        if size >= BLOCK_BYTES:
            blocks.append("".join(block))
            block, size = [], 0
    blocks.append("".join(block))
    if len(blocks) < HOLD_OUT:  # a short text (or one of very long lines): the last tenth of its characters
        cut = len(text) * (HOLD_OUT - 1) // HOLD_OUT
        return text[:cut], text[cut:]
    train = "".join(b for i, b in enumerate(blocks) if i % HOLD_OUT != HOLD_OUT - 1)
    return train, "".join(blocks[HOLD_OUT - 1 :: HOLD_OUT])


def xz_bits_per_byte(text: str) -> float:
    """Bits per byte of the text compressed by `xz -9e`, for comparison."""
    raw = text.encode()
    return 8 * len(lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME)) / len(raw)


def train_tokenizer(text: str, vocab_size: int, special_tokens: Sequence[str] = ()) -> Tokenizer:
    """A byte-level BPE tokenizer: any UTF-8 text can be encoded, and decodes to the same bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        special_tokens=list(special_tokens),
    )
    tokenizer.train_from_iterator([text], trainer)
    return tokenizer


def read_tokenizer(folder: Path, vocab_size: int) -> Tokenizer:
    """The tokenizer of a checkpoint: of its tokenizer.json, or else Kimi's of its tiktoken.model.

    Raises:
        ValueError: there is none, it is damaged, or has tokens that a model of `vocab_size` has not.
    """
    from tokenizers import Tokenizer

    file = next((folder / name for name in TOKENIZERS if (folder / name).is_file()), None)
    if file is None:
        raise ValueError(f"--from {folder}: must hold {' or '.join(TOKENIZERS)}, got neither")
    if file.suffix == ".model":
        tokenizer = load_tokenizer(folder)
        largest = tokenizer.largest_id
    else:
        try:
            tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises no other class
            raise ValueError(f"--from {folder}: tokenizer.json cannot be read: {error}") from None
        tokenizer.no_padding()
        tokenizer.no_truncation()
        largest = max(tokenizer.get_vocab().values(), default=0)
    if largest >= vocab_size:
        raise ValueError(f"--from {folder}: {file.name} must have ids below {vocab_size}, got {largest}")
    return tokenizer


def _ordinary(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of a text in which the names of special tokens are text like any other."""
    if hasattr(tokenizer, "encode_ordinary"):
        return tokenizer.encode_ordinary(text)
    tokenizer.encode_special_tokens = True
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    tokenizer.encode_special_tokens = False
    return ids


def fill_in_the_middle(
    texts: Tensor, sentinels: Sequence[int], *, rate: float, spm_rate: float = 0.5, generator: torch.Generator
) -> Tensor:
    """Moves the middle of some texts to their ends, so that a model learns to fill gaps.

    A chosen text loses its last three tokens and is cut at two places, drawn uniformly, into prefix, middle and suffix;
    it becomes, with the three sentinels,

        PSM    <prefix> prefix <suffix> suffix <middle> middle
        SPM    <prefix> <suffix> suffix <middle> prefix middle

    Args:
        texts: int64 [B, N], N from 3 on.
        sentinels: ids of prefix, suffix and middle.
        rate: the probability of a text to be chosen; spm_rate: of a chosen one to become SPM.
        generator: all draws are its own, as many for any rates.

    Returns:
        int64 [B, N].

    Source: Bavarian et al. (2022), arXiv 2207.14255, section 3; cuts are between tokens, not characters.
    """
    count, length = texts.shape
    chosen, spm = (torch.rand(count, generator=generator) < p for p in (rate, spm_rate))
    cuts = torch.randint(length - 2, (count, 2), generator=generator).sort(dim=1).values.tolist()
    before, after, between = texts.new_tensor(sentinels).split(1)
    result = texts.clone()
    for i in chosen.nonzero()[:, 0].tolist():
        prefix, middle, suffix = texts[i, : length - 3].tensor_split(cuts[i])
        psm = before, prefix, after, suffix, between, middle
        result[i] = torch.cat((before, after, suffix, between, prefix, middle) if spm[i] else psm)
    return result


@dataclass
class Corpus:
    """Token ids [tokens] of the two parts, and the mean number of bytes of text per token.

    Batches for training have their middle at the end with probability `fim_rate`; `sentinels` are the ids for that.
    """

    train: Tensor
    valid: Tensor
    train_bytes_per_token: float
    valid_bytes_per_token: float
    fim_rate: float | None = None
    sentinels: tuple[int, ...] = ()

    @classmethod
    def encode(cls, text: str, tokenizer: Tokenizer, *, fim_rate: float | None = None) -> Corpus:
        """With `fim_rate`, the tokenizer must have FIM_TOKENS. Where the text has their names, these are text."""
        ids, bytes_per_token = [], []
        for part in hold_out(text):
            tokens = torch.tensor(_ordinary(tokenizer, part))
            ids.append(tokens)
            bytes_per_token.append(len(part.encode()) / len(tokens))
        sentinels = () if fim_rate is None else tuple(tokenizer.token_to_id(token) for token in FIM_TOKENS)
        return cls(*ids, *bytes_per_token, fim_rate, sentinels)

    def batch(self, step: int, *, size: int, length: int, seed: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets [size, length] of training step `step`: a pure function of (seed, step), so that a
        resumed run gets the batches of an uninterrupted one."""
        generator = torch.Generator().manual_seed((seed << 32) + step)
        starts = torch.randint(len(self.train) - length, (size, 1), generator=generator)
        window = self.train[starts + torch.arange(length + 1)]
        if self.fim_rate is not None:
            window = fill_in_the_middle(window, self.sentinels, rate=self.fim_rate, generator=generator)
        return window[:, :-1], window[:, 1:]

    def validation_windows(self, length: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets [windows, length]: the held-out part cut into windows side by side."""
        windows = (len(self.valid) - 1) // length
        if windows < 1:
            raise ValueError(f"the held-out text has {len(self.valid)} tokens, fewer than --length {length}; add text")
        end = windows * length
        return self.valid[:end].view(windows, length), self.valid[1 : end + 1].view(windows, length)
