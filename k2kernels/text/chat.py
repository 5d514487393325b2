"""Conversations as tokens: the chat template of a checkpoint, or that of Kimi-K2."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from k2kernels.text.tokenizer import Tokenizer, special_token
from k2kernels.text.tools import call_id

ROLES = ("system", "developer", "user", "assistant", "tool")
NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# Tokens that end a turn in this family; config.json of some checkpoints (Kimi-VL) does not name its own.
TURN_ENDS = ("<|im_end|>", "<｜end▁of▁sentence｜>")
# Around a model's reasoning. They begin and end no turn, and templates look for them in what the assistant has said.
REASONING = ("<think>", "</think>", "◁think▷", "◁/think▷")
PRIVATE = range(0xE000, 0xF900)  # Unicode's private use area
# The turns of Kimi-K2 (chat_template.jinja of its checkpoints).
KIMI = """\
{%- if tools -%}<|im_system|>tool_declare<|im_middle|>{{ tools | tojson(separators=(',', ':')) }}<|im_end|>{%- endif -%}
{%- if messages and messages[0].role != 'system' -%}
<|im_system|>system<|im_middle|>You are Kimi, an AI assistant created by Moonshot AI.<|im_end|>
{%- endif -%}
{%- for message in messages -%}
{%- set name = message.name or message.role -%}
{%- if message.role == 'user' -%}<|im_user|>{{ name }}<|im_middle|>
{%- elif message.role == 'assistant' -%}<|im_assistant|>{{ name }}<|im_middle|>
{%- else -%}<|im_system|>{{ name }}<|im_middle|>
{%- endif -%}
{%- if message.role == 'tool' -%}{{ '## Return of ' + message.tool_call_id + '\\n' }}{%- endif -%}
{{- message.content or '' -}}
{%- if message.tool_calls -%}<|tool_calls_section_begin|>
{%- for call in message.tool_calls -%}
<|tool_call_begin|>{{ call.id }}<|tool_call_argument_begin|>
{%- if call.function.arguments is string -%}{{ call.function.arguments }}
{%- else -%}{{ call.function.arguments | tojson }}{%- endif -%}
<|tool_call_end|>
{%- endfor -%}
<|tool_calls_section_end|>{%- endif -%}
<|im_end|>
{%- endfor -%}
{%- if add_generation_prompt -%}<|im_assistant|>assistant<|im_middle|>{%- endif -%}
"""


class NoTemplate(ValueError):
    """A checkpoint has no chat template."""


class Chat:
    """Renders conversations with a Jinja template, in a sandbox, and encodes them.

    A text of a user never becomes a turn: where a string of a message or a tool holds the text of one of the
    tokenizer's own tokens, such as <|im_end|>, it is encoded as ordinary characters. In an assistant's message the
    markers of reasoning, such as </think>, are left to the template. What becomes such a token only in the tokenizer's
    normaliser, as <|IM_END|> in one that lowers the case, is refused.

    Args:
        tokenizer: of the model.
        template: a Jinja template as Hugging Face's apply_chat_template takes it.
        source: where it is from, for messages.
        special: variables of the template that hold special tokens, such as bos_token; unlike all other strings they
            are encoded as those tokens.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: str,
        source: str = "the chat template",
        special: Mapping[str, str] | None = None,
    ):
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _tojson
        environment.globals.update(raise_exception=_raise, strftime_now=lambda form: datetime.now().strftime(form))
        environment.globals.update(special or {})
        self.tokenizer, self.source = tokenizer, source
        ends = [name for name in (*TURN_ENDS, (special or {}).get("eos_token")) if name in tokenizer.added_tokens]
        self.ends = list(dict.fromkeys(tokenizer.added_tokens[name] for name in ends))  # ids that end a turn
        try:
            self._template = environment.from_string(template)
        except TemplateError as error:
            raise ValueError(f"{source}: must be a Jinja template: {error}") from None
        self._own_ids = frozenset(tokenizer.added_tokens.values())
        self._own_tokens = _any_of(tokenizer.added_tokens)
        self._turn_tokens = _any_of(set(tokenizer.added_tokens) - set(REASONING))

    def encode(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> list[int]:
        """The ids of a conversation, up to where the assistant's next message begins.

        Args:
            messages: as OpenAI's chat completions take them: role, content (a string, or parts of type "text"), and
                optionally name, tool_calls, tool_call_id. Ids of tool calls become functions.NAME:k with k counted
                over the conversation.
            tools: the functions that may be called.
            add_generation_prompt: end with the beginning of an assistant's message.
            variables: further variables of the template.

        Raises:
            TypeError, ValueError: for messages of another form, for what the template raises, and for texts that the
                tokenizer would make tokens of its own of, or that would change those of the template.
        """
        from jinja2 import TemplateError

        conversation = number_calls(check_messages(messages))
        given = {"tools": list(tools) if tools else None, **variables}
        forged: list[str] = []
        of_role = {"assistant": self._turn_tokens}

        def one(match: re.Match) -> str:
            forged.append(match[0])
            return f"{mark}{len(forged) - 1}{mark}"

        try:
            mark = _unused_character([conversation, given])
            hidden = _strings(given, partial(self._own_tokens.sub, one))
            hidden["messages"] = [
                _strings(message, partial(of_role.get(message["role"], self._own_tokens).sub, one))
                for message in conversation
            ]
            text = self._template.render(**hidden, add_generation_prompt=add_generation_prompt)
        except (TemplateError, ArithmeticError, LookupError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"{self.source}: cannot render these messages: {error}") from None
        pieces = text.split(mark)  # template, number, template, number, ...
        ids = self._encode(pieces[0])
        for number, piece in zip(pieces[1::2], pieces[2::2]):
            ids += self._plain(forged[int(number)]) + self._encode(piece)
        return ids

    def _encode(self, text: str, *, plain: bool = False) -> list[int]:
        """With the tokens whose texts stand in `text`, none if `plain`, and no other ones of the tokenizer's own."""
        own = self.tokenizer.added_tokens
        ids = self.tokenizer.encode(text) if text else []
        got = [token for token in ids if token in self._own_ids]
        wanted = [] if plain else [own[match[0]] for match in self._own_tokens.finditer(text)]
        if got != wanted:
            name = next((name for name, token in own.items() if got.count(token) != wanted.count(token)), "")
            raise ValueError(f"messages: must not hold text that the tokenizer normalises to {name!r} or joins with it")
        return ids

    def _plain(self, text: str) -> list[int]:
        """`text` without tokens of their own: each is cut behind its first character."""
        found = self._own_tokens.search(text)
        cut = len(text) if found is None else found.start() + 1
        return self._encode(text[:cut], plain=True) + (self._plain(text[cut:]) if found else [])


def _any_of(texts: Collection[str]) -> re.Pattern:
    """Matches the longest of `texts` at a place."""
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or r"(?!)")


def load_chat(path: Path, tokenizer: Tokenizer) -> Chat:
    """The chat of a checkpoint's directory: chat_template.jinja, or chat_template of tokenizer_config.json, or, for a
    tokenizer with its tokens, Kimi-K2's.

    Raises:
        NoTemplate: when there is none.
        ValueError: when it cannot be read.
    """
    file, config = path / "chat_template.jinja", path / "tokenizer_config.json"
    try:
        special = {key: token for key in SPECIAL if (token := special_token(path, key)) is not None}
        if file.is_file():
            return Chat(tokenizer, file.read_text(encoding="utf-8"), str(file), special)
        given = json.loads(config.read_text(encoding="utf-8")).get("chat_template") if config.is_file() else None
    except (UnicodeDecodeError, ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: the chat template cannot be read: {error}") from None
    if isinstance(given, list):  # named ones
        named = {entry.get("name"): entry.get("template") for entry in given if isinstance(entry, dict)}
        given = named.get("default")
    if isinstance(given, str):
        return Chat(tokenizer, given, f"chat_template of {config}", special)
    if {"<|im_user|>", "<|im_assistant|>", "<|im_middle|>", "<|im_end|>"} <= tokenizer.added_tokens.keys():
        return Chat(tokenizer, KIMI, "the chat template of Kimi-K2")
    raise NoTemplate(
        f"{path}: must hold chat_template.jinja, or a tokenizer with the tokens of Kimi-K2's turns, for a chat; "
        "a model without turns can continue a text"
    )


def check_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages whose content is a string or None.

    Raises:
        TypeError, ValueError: for another form, with the place in `messages`.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise ValueError("messages: must be a list with at least one message")
    checked = []
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        if not isinstance(message, Mapping):
            raise TypeError(f"{where}: must be an object, got {type(message).__name__}")
        if message.get("role") not in ROLES:
            raise ValueError(f"{where}.role: must be one of {', '.join(ROLES)}, got {message.get('role')!r}")
        name = message.get("name")
        if name is not None and not (isinstance(name, str) and NAME.fullmatch(name)):
            raise ValueError(f"{where}.name: must be 1 to 64 letters, digits, _ and -, got {name!r}")
        role = "system" if message["role"] == "developer" else message["role"]
        new = {**message, "role": role, "content": _content(message.get("content"), f"{where}.content")}
        if message.get("tool_calls"):
            new["tool_calls"] = _calls(message["tool_calls"], f"{where}.tool_calls")
        elif new["content"] is None:
            raise ValueError(f"{where}.content: must be a string or text parts, got none")
        if role == "tool" and not isinstance(message.get("tool_call_id"), str):
            raise ValueError(f"{where}.tool_call_id: must be the id of a call, got {message.get('tool_call_id')!r}")
        checked.append(new)
    return checked


def number_calls(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same with ids of tool calls in the model's form: models copy the ids that they see."""
    ids: dict[str, str] = {}
    numbered, count = [], 0
    for message in messages:
        if message.get("tool_calls"):
            calls = []
            for call in message["tool_calls"]:
                ids[call["id"]] = call_id(call["function"]["name"], count)
                calls.append({**call, "id": ids[call["id"]]})
                count += 1
            message = {**message, "tool_calls": calls}
        elif message["role"] == "tool":
            message = {**message, "tool_call_id": ids.get(message["tool_call_id"], message["tool_call_id"])}
        numbered.append(message)
    return numbered


def _content(content: Any, where: str) -> str | None:
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        raise TypeError(f"{where}: must be a string or a list of text parts, got {type(content).__name__}")
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        if kind != "text" or not isinstance(part.get("text"), str):
            raise ValueError(f"{where}: parts must be of type text, got {kind!r}; pictures and sound are not served")
        texts.append(part["text"])
    return "".join(texts)


def _calls(calls: Any, where: str) -> list[dict[str, Any]]:
    good = isinstance(calls, Sequence) and all(
        isinstance(call, Mapping)
        and isinstance(call.get("id"), str)
        and isinstance(call.get("function"), Mapping)
        and isinstance(call["function"].get("name"), str)
        and isinstance(call["function"].get("arguments"), (str, Mapping))
        for call in calls
    )
    if not good:
        raise ValueError(f"{where}: must be a list of {{id, function: {{name, arguments}}}}")
    return [dict(call) for call in calls]


def _unused_character(value: Any) -> str:
    """A private character that no string in `value` holds."""
    used: set[str] = set()
    _strings(value, lambda text: used.update(text) or text)
    mark = next((chr(code) for code in PRIVATE if chr(code) not in used), None)
    if mark is None:
        raise ValueError("messages: must leave a character of Unicode's private use area unused")
    return mark


def _strings(value: Any, change: Any) -> Any:
    """`value` with each string in it changed, keys of objects too."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {_strings(key, change): _strings(item, change) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strings(item, change) for item in value]
    return value


def _tojson(value: Any, **options: Any) -> str:
    """As in Hugging Face's templates: without the escapes of HTML, in which Jinja's own filter writes."""
    return json.dumps(value, ensure_ascii=options.pop("ensure_ascii", False), **options)


def _raise(message: str) -> None:
    from jinja2 import TemplateError

    raise TemplateError(message)
