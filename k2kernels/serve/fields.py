"""The fields of requests: which are served, their types and ranges, and what is refused.

A field that is not served is refused by name, so that no request gets an answer of another kind than it asks for. Those
in IGNORED do not change an answer.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from k2kernels.engine import Engine, Sampling
from k2kernels.text.chat import NAME, Chat, check_messages
from k2kernels.text.tokenizer import Tokenizer

IGNORED = {"user", "metadata", "store", "service_tier", "safety_identifier", "parallel_tool_calls", "verbosity"}
STOPS, LOGPROBS, PROMPTS = 4, 20, 128  # at most
DEPTH = 100  # of lists and objects in a field: what reads them calls itself for each level
SEEDS, MOST = 2**63, 2**31 - 1
Check = Callable[[str, Any], Any]


class Refused(Exception):
    """A request that is answered with an error, in OpenAI's form."""

    def __init__(
        self,
        message: str,
        param: str | None = None,
        *,
        status: int = 400,
        kind: str = "invalid_request_error",
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.headers = status, headers
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


@dataclass
class Order:
    """What a request asks for."""

    chat: bool
    prompts: list[list[int]]
    sampling: Sampling
    n: int = 1
    stops: list[str] = field(default_factory=list)
    stream: bool = False
    usage: bool = False  # in a last chunk of the stream
    logprobs: bool = False
    salt: str = ""
    tools: list[dict[str, Any]] = field(default_factory=list)
    calls: int = 0  # tool calls in the conversation before
    echo: list[str] | None = None  # the prompts' texts, which the answers begin with
    empty: bool = False  # no new tokens: the prompts alone


def parse_json(data: bytes) -> dict[str, Any]:
    """The object in a body."""

    def constant(name: str) -> Any:
        raise ValueError(f"{name} is not JSON")

    try:
        body = json.loads(data, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        raise Refused(f"the body must be JSON: {error}") from None
    if not isinstance(body, dict):
        raise Refused(f"the body must be a JSON object, got {type(body).__name__}")
    for name, value in body.items():
        if _depth(value) > DEPTH:
            raise Refused(f"{name}: must be nested at most {DEPTH} deep", name)
    return body


def _depth(value: Any) -> int:
    depth, level = 0, [value]
    while level := [one for one in level if isinstance(one, (dict, list))]:
        level = [item for one in level for item in (one.values() if isinstance(one, dict) else one)]
        depth += 1
    return depth


def chat_order(body: Mapping[str, Any], engine: Engine, tokenizer: Tokenizer, chat: Chat | None) -> Order:
    """The order of /v1/chat/completions."""
    given = _read(body, CHAT)
    messages, tools = given.get("messages"), given.get("tools", [])
    if chat is None:
        raise Refused("the model has no chat template; /v1/completions continues a text", "messages")
    if messages is None:
        raise Refused("messages: must be given", "messages")
    if given.get("top_logprobs") is not None and not given.get("logprobs"):
        raise Refused("top_logprobs: needs logprobs true", "top_logprobs")
    variables = dict(given.get("chat_template_kwargs", {}))
    if "reasoning_effort" in given:
        variables.setdefault("reasoning_effort", given["reasoning_effort"])
    try:
        prompt = chat.encode(messages, tools=tools, **variables)
        calls = sum(len(message.get("tool_calls") or ()) for message in check_messages(messages))
    except (TypeError, ValueError) as error:
        raise Refused(str(error), "messages") from None
    return Order(
        chat=True,
        prompts=[prompt],
        sampling=_sampling(
            given,
            engine,
            given.get("max_completion_tokens", given.get("max_tokens")),
            given.get("top_logprobs", 0) if given.get("logprobs") else None,
            [*engine.model.config.eos_token_ids, *chat.ends],
        ),
        logprobs=given.get("logprobs", False),
        tools=[] if given.get("tool_choice") == "none" else tools,
        calls=calls,
        **_common(given),
    )


def text_order(body: Mapping[str, Any], engine: Engine, tokenizer: Tokenizer, chat: Chat | None) -> Order:
    """The order of /v1/completions."""
    given = _read(body, COMPLETIONS)
    prompts = given.get("prompt")
    if prompts is None:
        raise Refused("prompt: must be given", "prompt")
    vocabulary = engine.model.config.vocab_size
    wrong = [i for prompt in prompts if not isinstance(prompt, str) for i in prompt if not 0 <= i < vocabulary]
    if wrong:
        raise Refused(f"prompt: ids must be from 0 to {vocabulary - 1}, got {repr(wrong[0])[:60]}", "prompt")
    try:
        ids = [_encode(tokenizer, prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
        texts = [prompt if isinstance(prompt, str) else tokenizer.decode(prompt) for prompt in prompts]
    except ValueError as error:
        raise Refused(f"prompt: {error}", "prompt") from None
    if not all(ids):
        raise Refused("prompt: must hold tokens, got an empty one", "prompt")
    tokens = given.get("max_tokens", 16)
    if tokens == 0 and not given.get("echo"):
        raise Refused("max_tokens: must be at least 1 without echo, got 0", "max_tokens")
    return Order(
        chat=False,
        prompts=ids,
        sampling=_sampling(given, engine, max(tokens, 1), given.get("logprobs")),
        logprobs="logprobs" in given,
        echo=texts if given.get("echo") else None,
        empty=tokens == 0,
        **_common(given),
    )


def _read(body: Mapping[str, Any], table: Mapping[str, Check]) -> dict[str, Any]:
    """The checked values of the fields that are set."""
    given = {}
    for name, value in body.items():
        if value is None or name in IGNORED:
            continue
        if name not in table:
            raise Refused(f"{name}: is not served", name)
        given[name] = table[name](name, value)
    if "stream_options" in given and not given.get("stream"):
        raise Refused("stream_options: needs stream true", "stream_options")
    return given


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """With the BOS token that the tokenizer asks for, once."""
    ids, bos = tokenizer.encode(text), tokenizer.bos
    return ids if ids[: len(bos)] == bos else bos + ids


def _common(given: Mapping[str, Any]) -> dict[str, Any]:
    return dict(
        n=given.get("n", 1),
        stops=given.get("stop", []),
        stream=given.get("stream", False),
        usage=given.get("stream_options", {}).get("include_usage", False),
        salt=given.get("prompt_cache_key", ""),
    )


def _sampling(
    given: Mapping[str, Any],
    engine: Engine,
    max_tokens: int | None,
    logprobs: int | None,
    ends: list[int] | None = None,
) -> Sampling:
    names = ("top_k", "top_p", "min_p", "presence_penalty", "frequency_penalty")
    bias = {int(token): value for token, value in given.get("logit_bias", {}).items()}
    vocabulary = engine.model.config.vocab_size
    if any(token >= vocabulary for token in bias):
        raise Refused(f"logit_bias: ids must be from 0 to {vocabulary - 1}, got {max(bias)}", "logit_bias")
    return Sampling(
        max_new_tokens=max_tokens,
        temperature=given.get("temperature", 1.0),
        seed=given["seed"] % SEEDS if "seed" in given else None,
        logit_bias=bias or None,
        logprobs=logprobs,
        eos_token_ids=ends,
        **{name: given[name] for name in names if name in given},
    )


# ---- checks of a field ------------------------------------------------------------------------------------------


def _require(good: bool, name: str, wanted: str, got: Any) -> None:
    if not good:
        raise Refused(f"{name}: must be {wanted}, got {repr(got)[:60]}", name)


def _is(kind: type | tuple[type, ...], wanted: str) -> Check:
    def check(name: str, value: Any) -> Any:
        _require(isinstance(value, kind), name, wanted, value)
        return value

    return check


def _number(low: float, high: float, *, whole: bool = False, above: bool = False) -> Check:
    """`above`: more than `low`."""

    def check(name: str, value: Any) -> Any:
        kinds = (int,) if whole else (int, float)
        good = isinstance(value, kinds) and not isinstance(value, bool) and low <= value <= high
        wanted = f"{'an integer' if whole else 'a number'} {'above' if above else 'from'} {low} to {high}"
        _require(good and not (above and value == low), name, wanted, value)
        return value

    return check


def _stops(name: str, value: Any) -> list[str]:
    stops = [value] if isinstance(value, str) else value
    good = isinstance(stops, list) and len(stops) <= STOPS and all(isinstance(stop, str) and stop for stop in stops)
    _require(good, name, f"a string, or a list of up to {STOPS}, none empty", value)
    return stops


def _prompts(name: str, value: Any) -> list[str | list[int]]:
    """A text, ids, or a list of texts or of ids."""
    one = isinstance(value, str) or (isinstance(value, list) and value and isinstance(value[0], int))
    prompts = [value] if one else value
    good = isinstance(prompts, list) and 0 < len(prompts) <= PROMPTS
    good = good and all(isinstance(p, str) or (isinstance(p, list) and all(type(i) is int for i in p)) for p in prompts)
    _require(good, name, f"a string or a list of ids, or a list of 1 to {PROMPTS} of these", value)
    return prompts


def _options(name: str, value: Any) -> dict[str, bool]:
    good = isinstance(value, dict) and set(value) <= {"include_usage"}
    good = good and all(isinstance(flag, bool) for flag in value.values())
    _require(good, name, "an object with include_usage alone", value)
    return value


def _bias(name: str, value: Any) -> dict[str, float]:
    good = isinstance(value, dict) and all(token.isascii() and token.isdigit() and len(token) < 10 for token in value)
    _require(good, name, "an object of token ids and numbers", value)
    return {token: _number(-100, 100)(name, bias) for token, bias in value.items()}


def _tools(name: str, value: Any) -> list[dict[str, Any]]:
    def good(tool: Any) -> bool:
        function = tool.get("function") if isinstance(tool, dict) and tool.get("type") == "function" else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            return False
        parameters = function.get("parameters") or {}
        objects = isinstance(parameters, dict) and isinstance(parameters.get("properties") or {}, dict)
        return objects and NAME.fullmatch(function["name"]) is not None

    wanted = "a list of {type: function, function: {name, parameters}}"
    _require(isinstance(value, list) and all(map(good, value)), name, wanted, value)
    return value


def _template(name: str, value: Any) -> dict[str, Any]:
    reserved = {"self", "messages", "tools", "add_generation_prompt"}
    good = isinstance(value, dict) and not set(value) & reserved
    _require(good, name, f"an object without {', '.join(sorted(reserved))}", value)
    return value


def _one_of(*values: Any) -> Check:
    def check(name: str, value: Any) -> Any:
        wanted = " or ".join(json.dumps(one) for one in values)
        _require(value in values, name, f"{wanted}; nothing else is served", value)
        return value

    return check


_string, _boolean = _is(str, "a string"), _is(bool, "true or false")
COMMON: dict[str, Check] = dict(
    model=_string,
    n=_number(1, 1024, whole=True),
    seed=_number(-(2**63), 2**63 - 1, whole=True),
    stop=_stops,
    stream=_boolean,
    stream_options=_options,
    temperature=_number(0, 2),
    top_p=_number(0, 1, above=True),
    top_k=_number(1, MOST, whole=True),
    min_p=_number(0, 1),
    presence_penalty=_number(-2, 2),
    frequency_penalty=_number(-2, 2),
    logit_bias=_bias,
    prompt_cache_key=_string,
)
CHAT: dict[str, Check] = COMMON | dict(
    messages=_is(list, "a list of messages"),
    max_tokens=_number(1, MOST, whole=True),
    max_completion_tokens=_number(1, MOST, whole=True),
    logprobs=_boolean,
    top_logprobs=_number(0, LOGPROBS, whole=True),
    tools=_tools,
    tool_choice=_one_of("auto", "none"),
    chat_template_kwargs=_template,
    reasoning_effort=_string,
    response_format=_one_of({"type": "text"}),
    modalities=_one_of(["text"]),
)
COMPLETIONS: dict[str, Check] = COMMON | dict(
    prompt=_prompts,
    max_tokens=_number(0, MOST, whole=True),
    echo=_boolean,
    logprobs=_number(0, LOGPROBS, whole=True),
)
