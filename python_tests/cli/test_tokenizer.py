import base64
import json

import pytest

from k2kernels.cli.tokenizer import RESERVED_TOKENS, load_tokenizer
from k2kernels.train.data import train_tokenizer

SAMPLE = "Hello world's 12345 items, 你好世界abc\r\n\r\n  x = 1\t🙂 naïve"


@pytest.fixture
def kimi(tmp_path):
    """A tiktoken.model of the 256 bytes and a few merges, with named special tokens behind it."""
    tokens = [bytes([i]) for i in range(256)] + [b"he", b"ll", b"12", b"123", "你".encode()[:2], "你".encode()]
    lines = [base64.b64encode(token) + f" {rank}".encode() for rank, token in enumerate(tokens)]
    (tmp_path / "tiktoken.model").write_bytes(b"\n".join(lines) + b"\n")
    added = {str(len(tokens) + 3): {"content": "<|im_user|>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    return tmp_path, len(tokens)


def test_kimi_files_encode_and_decode(kimi):
    path, ranks = kimi
    tokenizer = load_tokenizer(path)
    assert tokenizer.decode(tokenizer.encode(SAMPLE)) == SAMPLE
    assert tokenizer.encode("123456") == [259, ord("4"), ord("5"), ord("6")]  # digits in threes
    assert tokenizer.encode("<|im_user|>he") == [ranks + 3, 256]
    assert tokenizer.encode("你he") == [261, 256]  # Han and Latin letters never share a piece
    assert tokenizer.decode([ranks + RESERVED_TOKENS - 1]) == f"<|reserved_token_{ranks + RESERVED_TOKENS - 1}|>"


def test_tokenizer_json(tmp_path):
    train_tokenizer(SAMPLE * 50, 300).save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.decode(tokenizer.encode(SAMPLE)) == SAMPLE


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("tokenizer.json", b"{", "tokenizer.json: cannot be read"),
        ("tiktoken.model", b"no base64 here\n", "must hold lines of base64 token and rank"),
        ("other", b"", "must hold tokenizer.json or tiktoken.model"),
    ],
)
def test_damaged_or_missing_files_are_named(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_tokenizer(tmp_path)
