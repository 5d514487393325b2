"""The text of a sample, token by token, without a model."""

from k2kernels.engine import Request, Sampling
from k2kernels.engine.sampling import TokenLogprobs
from k2kernels.serve.answer import Reader
from k2kernels.serve.fields import Order

TOOLS = [{"type": "function", "function": {"name": "exec"}}]
CALL = "<|tool_call_begin|>exec:0<|tool_call_argument_begin|>{}<|tool_call_end|>"


class Characters:
    def decode(self, tokens):
        return "".join(map(chr, tokens))


def request(n=1):
    return Request(0, [1], Sampling(), n, limit=999, stops={0}, salt="", on_update=None, wait=None)


def read(text, **options):
    """The parts of `text`, a character at a time, then the stop id; and their sample."""
    order = Order(chat=True, prompts=[[1]], sampling=Sampling(), logprobs=True, **options)
    sample, parts = request(2).samples[0], []
    reader = Reader(0, sample, order, Characters())
    for token in [*map(ord, text), 0]:
        sample.tokens.append(token)
        sample.logprobs.append(TokenLogprobs(-1.0, []))
        sample.finish_reason = None if token else "stop"
        parts.append(reader.read())
        if parts[-1] is not None and parts[-1].reason is not None:
            break
    return [part for part in parts if part is not None], sample


def test_the_stop_id_is_no_part_of_an_answer():
    parts, sample = read("abc")
    assert [part.text for part in parts] == ["a", "b", "c", ""] and parts[-1].reason == "stop"
    assert [token for part in parts for token, _ in part.tokens] == list(map(ord, "abc"))
    assert not sample.cancelled


def test_a_stop_string_cancels_its_sample_alone():
    parts, sample = read("one two three", stops=["two"])
    assert "".join(part.text for part in parts) == "one " and parts[-1].reason == "stop"
    assert [other.cancelled for other in sample.request.samples] == [True, False]


def test_a_marker_of_several_tokens_is_held_back():
    parts, _ = read("x <| y" + CALL, tools=TOOLS)
    assert "".join(part.text for part in parts) == "x <| y" and parts[-1].calls[0].name == "exec"
    assert all("<|t" not in part.text for part in parts) and parts[-1].reason == "tool_calls"
    parts, _ = read("x" + CALL[:15], tools=TOOLS)
    assert "".join(part.text for part in parts) == "x" + CALL[:15] and parts[-1].reason == "stop"
