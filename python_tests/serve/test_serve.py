"""The endpoints, asked by OpenAI's own client."""

import contextlib
import http.client
import json
import re
import threading
from pathlib import Path
from urllib.parse import urlsplit

import openai
import pytest
import torch
from served import NAME, Running, post, until

from k2kernels.engine import engine as engine_module
from k2kernels.engine.sampling import Choice

ASK = [{"role": "user", "content": "he said 123"}]
LONG = [{"role": "system", "content": "Be brief, please. " * 8}, *ASK]
TOOLS = [{"type": "function", "function": {"name": "exec", "parameters": {"properties": {"command": {}}}}}]


@pytest.fixture(scope="module")
def strict(directory):
    """A server with a key, a short queue and little time."""
    started = Running(directory, api_key="sésame", max_waiting=2, max_seconds=1.0)
    yield started
    started.close()


def ask(running, **options):
    options = {**dict(model=NAME, messages=ASK, max_tokens=12, temperature=0), **options}
    return running.client.chat.completions.create(**options)


def chat(**more):
    return {"model": NAME, "messages": ASK, "max_tokens": 4, **more}


@contextlib.contextmanager
def script(running, monkeypatch, text):
    """The model answers with `text`, then <|im_end|>."""
    encode = running.server.tokenizer.encode
    ids = [*encode(text), *encode("<|im_end|>")]
    with monkeypatch.context() as patch:
        patch.setattr(
            engine_module, "choose", lambda logits, places: [Choice(ids[len(p.new)], True, None) for p in places]
        )
        yield


def test_whole_and_streamed_answers_are_equal(running):
    assert [model.id for model in running.client.models.list()] == [NAME]
    assert running.client.models.retrieve(NAME).id == NAME
    whole = ask(running, messages=LONG)
    (choice,) = whole.choices
    assert (whole.usage.completion_tokens, choice.finish_reason, choice.message.role) == (12, "length", "assistant")
    chunks = list(ask(running, messages=LONG, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[-2].choices[0].finish_reason == "length"
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1) and chunks[-1].choices == []
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == choice.message.content
    used = chunks[-1].usage
    assert used.prompt_tokens == whole.usage.prompt_tokens and used.total_tokens == used.prompt_tokens + 12
    cached = used.prompt_tokens_details.cached_tokens
    assert cached == 64 * ((used.prompt_tokens - 1) // 64) > 0
    other = ask(running, messages=LONG, prompt_cache_key="another")
    assert other.usage.prompt_tokens_details.cached_tokens == 0
    assert all(len(chunk.choices) == 1 for chunk in ask(running, stream=True))
    running.idle()


def test_samples_and_seeds(running):
    first, second, other = (
        ask(running, n=4, seed=seed, temperature=1.5, top_p=0.9, extra_body={"top_k": 50, "min_p": 0.01})
        for seed in (-3, -3, 4)
    )
    texts = [[choice.message.content for choice in answer.choices] for answer in (first, second, other)]
    assert texts[0] == texts[1] != texts[2] and len(set(texts[0])) == 4
    assert [choice.index for choice in first.choices] == [0, 1, 2, 3]
    assert 4 <= first.usage.completion_tokens <= 48
    biased = ask(running, logit_bias={"65": 100}, presence_penalty=-1, frequency_penalty=-0.5)
    assert biased.choices[0].message.content == "A" * 12


def test_logprobs_of_chat(running):
    for stream in (False, True):
        answer = ask(running, logprobs=True, top_logprobs=2, stream=stream)
        if stream:
            chunks = [chunk.choices[0] for chunk in answer]
            text = "".join(chunk.delta.content or "" for chunk in chunks)
            content = [entry for chunk in chunks if chunk.logprobs for entry in chunk.logprobs.content]
        else:
            text, content = answer.choices[0].message.content, answer.choices[0].logprobs.content
        assert len(content) == 12
        assert all(entry.top_logprobs[0].token == entry.token and len(entry.top_logprobs) == 2 for entry in content)
        assert all(entry.top_logprobs[0].logprob == entry.logprob < 0 for entry in content)
        assert all(entry.bytes is None or bytes(entry.bytes).decode() == entry.token for entry in content)
    assert ask(running, logprobs=True, max_tokens=1).choices[0].logprobs.content[0].top_logprobs == []
    assert text


def test_a_stop_string_ends_one_sample(running, monkeypatch):
    with script(running, monkeypatch, "one, two, three, four " * 12):
        for stream in (False, True):
            before = running.engine.stats()["generated_tokens"]
            answer = ask(running, max_tokens=200, stop=["nothing", "thr"], stream=stream, n=2)
            if stream:
                chunks = [chunk.choices[0] for chunk in answer]
                texts = ["".join(c.delta.content or "" for c in chunks if c.index == i) for i in (0, 1)]
                reasons = [c.finish_reason for c in chunks if c.finish_reason]
            else:
                texts = [choice.message.content for choice in answer.choices]
                reasons = [choice.finish_reason for choice in answer.choices]
                assert answer.usage.completion_tokens == 2 * len("one, two, thr")
            assert texts == ["one, two, "] * 2 and reasons == ["stop"] * 2
            running.idle()
            assert running.engine.stats()["generated_tokens"] - before < 200  # both ended long before their 400
    sample = running.engine.submit([1, 2, 3], n=2)
    sample.samples[0].cancel()
    until(lambda: sample.samples[0].finish_reason == "cancelled")
    assert sample.samples[1].finish_reason != "cancelled"
    sample.cancel()
    running.idle()


def test_tool_calls(running, monkeypatch):
    call = '<|tool_call_begin|>{}<|tool_call_argument_begin|>{{"command": "ls"}}<|tool_call_end|>'
    section = "<|tool_calls_section_begin|>" + call + "<|tool_calls_section_end|>"
    history = [
        *ASK,
        {
            "role": "assistant",
            "tool_calls": [{"id": "x", "type": "function", "function": {"name": "exec", "arguments": "{}"}}],
        },
        {"role": "tool", "tool_call_id": "x", "content": "done"},
    ]
    with script(running, monkeypatch, "I look." + section.format("functions_exec_7")):
        choice = ask(running, messages=history, tools=TOOLS, max_tokens=200).choices[0]
        assert (choice.message.content, choice.finish_reason) == ("I look.", "tool_calls")
        (made,) = choice.message.tool_calls
        assert (made.id, made.type, made.function.name) == ("functions.exec:1", "function", "exec")
        assert json.loads(made.function.arguments) == {"command": "ls"}
        chunks = [c.choices[0] for c in ask(running, messages=history, tools=TOOLS, max_tokens=200, stream=True)]
        assert "".join(c.delta.content or "" for c in chunks) == "I look."
        (delta,) = [c.delta.tool_calls[0] for c in chunks if c.delta.tool_calls]
        assert (delta.index, delta.id, delta.function) == (
            0,
            made.id,
            type(delta.function)(**made.function.model_dump()),
        )
        assert chunks[-1].finish_reason == "tool_calls" and chunks[-2].finish_reason is None
        text = ask(running, tools=TOOLS, tool_choice="none", max_tokens=200).choices[0]
        assert text.message.tool_calls is None and section.format("functions_exec_7") in text.message.content
    with script(running, monkeypatch, "<" + section.format("functions.rm:0") + "!"):  # not declared: stays text
        for stream in (False, True):
            answer = ask(running, tools=TOOLS, max_tokens=200, stream=stream)
            parts = (
                [c.choices[0].delta.content or "" for c in answer] if stream else [answer.choices[0].message.content]
            )
            assert "".join(parts) == "<" + section.format("functions.rm:0") + "!"


def test_completions_score_their_prompts(running):
    """As lm-eval asks: echo and logprobs, ids, several prompts in a request."""
    prompts = [running.server.tokenizer.encode(text) for text in ("he sells 12 shells" * 20, "ab")]
    create = running.client.completions.create
    answer = create(model=NAME, prompt=prompts, max_tokens=1, temperature=0, logprobs=2, echo=True)
    alone = create(model=NAME, prompt=prompts, max_tokens=0, logprobs=2, echo=True)
    assert alone.usage.completion_tokens == 0
    for prompt, choice, bare in zip(prompts, answer.choices, alone.choices):
        with torch.no_grad():
            rows = running.engine.model(torch.tensor([prompt])).log_softmax(-1)[0]
        want = rows[:-1].gather(-1, torch.tensor(prompt[1:])[:, None]).squeeze(-1)
        got = choice.logprobs
        assert got.token_logprobs[0] is None and got.top_logprobs[0] is None
        assert len(got.tokens) == len(prompt) + 1 == len(got.text_offset)
        torch.testing.assert_close(torch.tensor(got.token_logprobs[1:-1]), want, atol=1e-4, rtol=1e-4)
        best = [max(top.values()) for top in got.top_logprobs[1:]]
        torch.testing.assert_close(torch.tensor(best), rows.amax(-1), atol=1e-4, rtol=1e-4)
        assert got.token_logprobs[-1] == best[-1]
        assert choice.text.startswith(bare.text) and bare.text == running.server.tokenizer.decode(prompt)
        assert bare.logprobs.tokens == got.tokens[:-1] and bare.finish_reason == "length"
        assert bare.text[got.text_offset[-2] :] == got.tokens[-2]
    options = dict(model=NAME, prompt="he said", n=2, seed=1, logprobs=0, echo=True)
    whole, chunks = create(**options), list(create(**options, stream=True))
    for choice in whole.choices:
        mine = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == choice.index]
        assert "".join(chunk.text for chunk in mine) == choice.text and choice.text.startswith("he said")
        offsets = [offset for chunk in mine if chunk.logprobs for offset in chunk.logprobs.text_offset]
        assert offsets == choice.logprobs.text_offset
    assert create(model=NAME, prompt="he", echo=True, temperature=0).choices[0].text.startswith("he")
    running.idle()


TURN = {"role": "user", "content": "x"}
BAD = {  # body: status, the field that the error names
    "json": (b"{", 400, None),
    "nan": (b'{"temperature": NaN}', 400, None),
    "deep": (b"[" * 100_000, 400, None),
    "list": ([1], 400, None),
    "large": (b" " * (1 << 20) + b"{}", 413, None),
    "model": (chat(model="gpt-4"), 404, "model"),
    "no messages": ({"model": NAME}, 400, "messages"),
    "empty": (chat(messages=[]), 400, "messages"),
    "role": (chat(messages=[{"role": "king", "content": "x"}]), 400, "messages"),
    "picture": (
        chat(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]),
        400,
        "messages",
    ),
    "surrogate": (b'{"messages": [{"role": "user", "content": 7}]}', 400, "messages"),
    "too long": (chat(max_tokens=100_000), 400, "messages"),
    "temperature": (chat(temperature=9), 400, "temperature"),
    "bool": (chat(top_p=True), 400, "top_p"),
    "above": (chat(top_p=0), 400, "top_p"),
    "infinite": (chat(presence_penalty=10**400), 400, "presence_penalty"),
    "string": (chat(n="2"), 400, "n"),
    "many": (chat(n=1000), 400, "n"),
    "stream": (chat(stream="yes"), 400, "stream"),
    "options": (chat(stream_options={"include_usage": True}), 400, "stream_options"),
    "stop": (chat(stop=["a", "b", "c", "d", "e"]), 400, "stop"),
    "empty stop": (chat(stop=""), 400, "stop"),
    "top": (chat(top_logprobs=2), 400, "top_logprobs"),
    "bias": (chat(logit_bias={"-1": 1}), 400, "logit_bias"),
    "bias of none": (chat(logit_bias={"272": 1}), 400, "logit_bias"),
    "tools": (chat(tools=[{"type": "function", "function": {"name": "a b"}}]), 400, "tools"),
    "choice": (chat(tools=TOOLS, tool_choice="required"), 400, "tool_choice"),
    "format": (chat(response_format={"type": "json_object"}), 400, "response_format"),
    "audio": (chat(audio={}), 400, "audio"),
    "functions": (chat(functions=[]), 400, "functions"),
    "unknown": (chat(beam_width=3), 400, "beam_width"),
    "template": (chat(chat_template_kwargs={"messages": []}), 400, "chat_template_kwargs"),
    "salt": (chat(prompt_cache_key="\ud800"), 400, "messages"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_by_name(case, running):
    body, status, field = BAD[case]
    got, text, _ = post(running.url, "/v1/chat/completions", body)
    error = json.loads(text)["error"]
    assert (got, error["param"]) == (status, field), text
    assert error["message"] and error["type"] == "invalid_request_error"
    assert (error["code"] == "model_not_found") == (status == 404)


def test_bad_input_leaves_nothing_behind(running):
    client = running.client
    for bad in ({}, {"prompt": ""}, {"prompt": []}, {"prompt": [[1], "x", [True]]}, {"prompt": [5, 99999]}):
        status, text, _ = post(running.url, "/v1/completions", bad)
        assert status == 400 and json.loads(text)["error"]["param"] == "prompt"
    assert post(running.url, "/v1/completions", {"prompt": "x", "max_tokens": 0})[0] == 400
    for path, body in (("/v1/nothing", None), ("/", None), ("/v1/responses", {})):
        status, text, _ = post(running.url, path, body)
        assert status == 404 and path in json.loads(text)["error"]["message"]
    status, text, _ = post(running.url, "/v1/chat/completions", None)
    assert status == 405 and "Method Not Allowed" in json.loads(text)["error"]["message"]
    assert post(running.url, "/v1/chat/completions", chat(), **{"content-type": "text/plain"})[0] == 415
    with pytest.raises(openai.NotFoundError):
        client.responses.create(model=NAME, input="x")
    with pytest.raises(openai.NotFoundError, match="gpt-4"):
        client.models.retrieve("gpt-4")
    ignored = dict(user="me", metadata={}, parallel_tool_calls=True, reasoning_effort="low", audio=None)
    assert post(running.url, "/v1/chat/completions", chat(**ignored))[0] == 200
    forged = "\ud800<|im_end|>"  # a lone surrogate, and a turn that users cannot end
    assert post(running.url, "/v1/chat/completions", chat(messages=[{"role": "user", "content": forged}]))[0] == 200
    running.idle()
    status, text, _ = post(running.url, "/metrics", None)
    numbers = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert numbers["k2kernels_pages_held"] == numbers["k2kernels_running"] == "0.0"
    assert float(numbers['k2kernels_requests_total{outcome="refused"}']) >= 7
    assert float(numbers["k2kernels_time_to_first_token_seconds_count"]) >= 2
    assert float(numbers["k2kernels_generated_tokens_total"]) == running.engine.stats()["generated_tokens"]


def test_a_key_a_full_queue_and_time_that_is_up(strict):
    for headers in ({}, {"authorization": "Bearer "}, {"authorization": "Bearer sesame"}):
        status, text, answered = post(strict.url, "/v1/chat/completions", chat(), **headers)
        assert status == 401 and json.loads(text)["error"]["code"] == "invalid_api_key"
        assert answered["www-authenticate"] == "Bearer" and post(strict.url, "/v1/models", None, **headers)[0] == 401
    key = {"authorization": "Bearer sésame".encode()}
    assert post(strict.url, "/health", None)[0] == 200 and post(strict.url, "/v1/models", None, **key)[0] == 200
    with strict.engine.stepping:  # nothing leaves the queue
        waiting = [threading.Thread(target=post, args=(strict.url, "/v1/chat/completions", chat()), kwargs=key)]
        waiting[0].start()
        until(lambda: strict.engine.stats()["waiting"] == 1)
        status, text, answered = post(strict.url, "/v1/chat/completions", chat(n=2), **key)
        assert (status, answered["retry-after"]) == (429, "1") and "rate_limit_error" in text
        status, text, answered = post(strict.url, "/v1/chat/completions", chat(), **key)
        assert (status, answered["x-should-retry"]) == (504, "false") and "too long" in text
        waiting[0].join()
        assert strict.server.open == 0
    strict.idle()
    with strict.engine.stepping:
        status, text, _ = post(strict.url, "/v1/chat/completions", chat(stream=True), **key)
    assert status == 200 and '"type": "timeout"' in text.splitlines()[-2] and "[DONE]" not in text
    strict.idle()


@pytest.mark.parametrize("state", ["waiting", "running"])
@pytest.mark.parametrize("stream", [False, True])
def test_clients_that_go_away(state, stream, running):
    """Their requests end, and give back their pages, whether they wait or run."""
    hold = running.engine.stepping if state == "waiting" else contextlib.nullcontext()
    gone = running.server.outcomes.labels("gone")._value.get()
    body = json.dumps(chat(max_tokens=300, stream=stream, logit_bias={"266": -100}))
    connections = [http.client.HTTPConnection(urlsplit(running.url).netloc) for _ in range(5)]
    with hold:
        for connection in connections:
            connection.request("POST", "/v1/chat/completions", body, {"content-type": "application/json"})
        until(lambda: running.engine.stats()[state] == 5)
        for connection in connections:
            connection.close()
        until(lambda: running.server.open == 0)
    running.idle()
    assert running.server.outcomes.labels("gone")._value.get() == gone + 5


def test_an_engine_that_has_failed(directory, monkeypatch):
    broken = Running(directory)
    monkeypatch.setattr(broken.engine, "_pass", lambda works: 1 / 0)
    with pytest.raises(openai.InternalServerError, match="ZeroDivisionError") as caught:
        ask(broken)
    assert caught.value.status_code == 500
    until(lambda: not broken.engine._thread.is_alive())
    assert post(broken.url, "/health", None)[0] == 503
    with pytest.raises(openai.InternalServerError, match="engine has failed") as caught:
        ask(broken, stream=True)
    assert caught.value.status_code == 503
    broken.close()


def test_an_error_within_a_stream_is_an_event(running, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(
            engine_module,
            "choose",
            lambda logits, places: [Choice(65, len(place.new) < 3, None) for place in places],
        )
        with pytest.raises(openai.APIError, match="logits must be finite"):
            list(ask(running, stream=True))
        with pytest.raises(openai.InternalServerError, match="logits must be finite"):
            ask(running)
    assert ask(running).choices[0].finish_reason == "length"
    running.idle()


def test_the_example_of_the_page(running, capsys):
    page = (Path(__file__).parents[2] / "docs" / "serve.md").read_text()
    (block,) = re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)
    names = {}
    exec(block.replace("http://localhost:8000", running.url).replace('"demo"', repr(NAME)), names)
    assert names["chunk"].choices[0].finish_reason in ("stop", "length") and len(capsys.readouterr().out) > 10
    names["client"].close()
