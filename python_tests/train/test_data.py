"""Text, tokenizer, held-out part, batches."""

import pytest
import torch

from k2kernels.train.data import BLOCK_BYTES, Corpus, hold_out, read_text, train_tokenizer, xz_bits_per_byte


@pytest.fixture(scope="module")
def text():
    return read_text([])


@pytest.fixture(scope="module")
def tokenizer(text):
    return train_tokenizer(text, 512)


def test_the_default_text_is_the_language_reference(text):
    assert len(text.encode()) > 300_000 and 'The "with" statement' in text


def test_held_out_text_is_a_tenth_and_not_trained_on(text):
    train, valid = hold_out(text)
    assert len(train) + len(valid) == len(text)
    assert 0.08 < len(valid) / len(text) < 0.12
    seen = set(train.split("\n\n"))
    assert not [p for p in valid.split("\n\n") if len(p) > 80 and p in seen]


def test_short_text_is_held_out_too():
    train, valid = hold_out("word " * 1000)
    assert len(valid) == 500 and train + valid == "word " * 1000


def test_tokens_decode_to_the_same_bytes(tokenizer):
    sample = "naïve 你好 \t\r\n\u2028 🙂 def f(x): return x**2"
    assert tokenizer.decode(tokenizer.encode(sample).ids) == sample


def test_a_batch_is_a_function_of_seed_and_step(text, tokenizer):
    corpus = Corpus.encode(text[: 40 * BLOCK_BYTES], tokenizer)
    inputs, targets = corpus.batch(3, size=4, length=16, seed=1)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    again, _ = corpus.batch(3, size=4, length=16, seed=1)
    other, _ = corpus.batch(4, size=4, length=16, seed=1)
    assert torch.equal(inputs, again) and not torch.equal(inputs, other)


def test_validation_windows_cover_the_held_out_part_once(text, tokenizer):
    corpus = Corpus.encode(text, tokenizer)
    inputs, targets = corpus.validation_windows(64)
    assert torch.equal(inputs.flatten()[1:], targets.flatten()[:-1])
    assert len(corpus.valid) - inputs.numel() <= 64


def test_bits_per_byte_of_xz(text):
    assert 1.7 < xz_bits_per_byte(text) < 2.3
