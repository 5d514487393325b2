"""The endpoints, asked by OpenAI's own client."""

import pytest

ASK = [{"role": "user", "content": "he said 123"}]


def ask(running, **options):
    options = {**dict(model="tiny", messages=ASK, max_tokens=12, temperature=0), **options}
    return running.client.chat.completions.create(**options)


def test_whole_and_streamed_answers_are_equal(running):
    whole = ask(running)
    assert whole.usage.completion_tokens == 12 and whole.choices[0].finish_reason == "length"
    chunks = list(ask(running, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == whole.choices[0].message.content
    running.idle()
