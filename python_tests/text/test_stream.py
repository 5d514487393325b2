import random

import pytest

from k2kernels.text.stream import TextStream
from k2kernels.text.tokenizer import load_tokenizer
from k2kernels.train.data import train_tokenizer

SAMPLE = "Hello 你好🙂 naïve 12345\n<|im_end|> the end. STOP here"


def parts(tokenizer, ids, stops=()):
    stream = TextStream(tokenizer, stops)
    return [*(stream.add(token) for token in ids), stream.finish()], stream.stopped


@pytest.fixture(params=["tiktoken", "tokenizer.json"])
def any_tokenizer(request, tokenizer, tmp_path):
    if request.param == "tokenizer.json":
        train_tokenizer("Hello naïve the end " * 50, 300).save(str(tmp_path / "tokenizer.json"))
        return load_tokenizer(tmp_path)
    return tokenizer


def test_parts_are_the_text_and_hold_whole_characters(any_tokenizer):
    ids = any_tokenizer.encode(SAMPLE)
    got, _ = parts(any_tokenizer, ids)
    assert "".join(got) == SAMPLE and "\ufffd" not in "".join(got)
    assert got[0] and sum(map(bool, got)) > len(SAMPLE) / 4  # as it grows


@pytest.mark.parametrize("stops", [["STOP"], ["\n<"], ["end. S", "end."], ["🙂 n"], ["Hello"], ["never", "heree"]])
def test_stop_strings_cut_wherever_tokens_end(any_tokenizer, stops):
    got, stopped = parts(any_tokenizer, any_tokenizer.encode(SAMPLE), stops)
    ends = [(SAMPLE.find(stop), stop) for stop in stops if stop in SAMPLE]
    assert "".join(got) == (SAMPLE[: min(ends)[0]] if ends else SAMPLE)
    assert stopped == (min(ends)[1] if ends else None)


def test_an_unfinished_character_is_given_at_the_end(tokenizer):
    got, _ = parts(tokenizer, [*b"ok ", 0xF0, 0x9F])
    assert "".join(got) == "ok \ufffd"


def test_no_character_is_lost_among_bytes_that_are_none(tokenizer):
    draw = random.Random(0)
    for _ in range(200):
        ids = [draw.randrange(262) for _ in range(draw.randrange(40))]
        got, _ = parts(tokenizer, ids)
        whole = tokenizer.decode(ids)
        assert [c for c in "".join(got) if c.isascii()] == [c for c in whole if c.isascii()]
