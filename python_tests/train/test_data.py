"""Text, tokenizer, held-out part, batches."""

import pytest
import torch

from k2kernels.train.data import (
    BLOCK_BYTES,
    FIM_TOKENS,
    Corpus,
    fill_in_the_middle,
    hold_out,
    read_text,
    train_tokenizer,
    xz_bits_per_byte,
)


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


def pieces(row):
    """(prefix, middle, suffix, whether suffix came first) of a transformed row with sentinels 100, 101, 102."""
    begin, after, between = (row.index(sentinel) for sentinel in (100, 101, 102))
    assert begin == 0 and after < between and sum(token >= 100 for token in row) == 3
    prefix, suffix, rest = row[1:after], row[after + 1 : between], row[between + 1 :]
    return prefix, suffix, rest


def test_fill_in_the_middle():
    texts = torch.arange(20) + torch.arange(400)[:, None] % 70

    def transform(seed=0, **rates):
        return fill_in_the_middle(texts, (100, 101, 102), generator=torch.Generator().manual_seed(seed), **rates)

    assert torch.equal(transform(rate=0.0), texts)
    empty = 0
    for text, row in zip(texts.tolist(), transform(rate=1.0, spm_rate=0.0).tolist()):
        prefix, suffix, middle = pieces(row)
        assert prefix + middle + suffix == text[:17]
        empty += not middle
    assert 5 < empty < 50  # of 400: 1 in 18
    for text, row in zip(texts.tolist(), transform(rate=1.0, spm_rate=1.0).tolist()):
        nothing, suffix, rest = pieces(row)
        assert nothing == [] and rest + suffix == text[:17]
    half = transform(rate=0.5)
    changed = (half[:, 0] == 100).sum()
    assert 150 < changed < 250 and 50 < ((half[:, 0] == 100) & (half[:, 1] == 101)).sum() < 150
    assert torch.equal(half, transform(rate=0.5)) and not torch.equal(half, transform(rate=0.5, seed=1))


def test_batches_with_gaps(text):
    part = text[: 12 * BLOCK_BYTES] + "a <|fim_middle|> in a text"
    tokenizer = train_tokenizer(part, 512, FIM_TOKENS)
    corpus = Corpus.encode(part, tokenizer, fim_rate=0.5)
    sentinels = [tokenizer.token_to_id(token) for token in FIM_TOKENS]
    assert not torch.isin(torch.cat([corpus.train, corpus.valid]), torch.tensor(sentinels)).any()
    inputs, targets = corpus.batch(3, size=64, length=16, seed=1)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    again, _ = corpus.batch(3, size=64, length=16, seed=1)
    assert torch.equal(inputs, again)
    plain, _ = Corpus.encode(part, tokenizer).batch(3, size=64, length=16, seed=1)
    moved = inputs[:, 0] == sentinels[0]
    assert 20 < moved.sum() < 44 and torch.equal(inputs[~moved], plain[~moved])
    assert tokenizer.encode("x<|fim_middle|>").ids[-1] == sentinels[2]  # in a prompt it is one
