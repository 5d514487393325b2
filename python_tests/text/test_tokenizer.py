import pytest

from k2kernels.text.tokenizer import RESERVED_TOKENS, load_tokenizer
from k2kernels.train.data import train_tokenizer

SAMPLE = "Hello world's 12345 items, 你好世界abc\r\n\r\n  x = 1\t🙂 naïve"


def test_kimi_files_encode_and_decode(kimi):
    path, ranks = kimi
    tokenizer = load_tokenizer(path)
    assert tokenizer.decode(tokenizer.encode(SAMPLE)) == SAMPLE
    assert tokenizer.encode("123456") == [259, ord("4"), ord("5"), ord("6")]  # digits in threes
    assert tokenizer.encode("<|im_user|>he") == [ranks + 1, 256]
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
