"""Tool calls in the text of Kimi models.

    <|tool_calls_section_begin|><|tool_call_begin|>functions.NAME:0<|tool_call_argument_begin|>{...}<|tool_call_end|>...
    <|tool_calls_section_end|>

Models also write other forms of the id: they copy those of other programs from the conversation. So an id is resolved
against the tools that the request declares. What cannot be resolved stays text: nothing is dropped.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

CALL_BEGIN, ARGUMENT_BEGIN, CALL_END = "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"
SECTION_BEGIN, SECTION_END = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
OPENINGS = (SECTION_BEGIN, "<|tool_call_section_begin|>", CALL_BEGIN)
MARKERS = (*OPENINGS, SECTION_END, "<|tool_call_section_end|>", ARGUMENT_BEGIN, CALL_END)
_CALL = re.compile(
    rf"{re.escape(CALL_BEGIN)}(?P<id>.*?){re.escape(ARGUMENT_BEGIN)}(?P<arguments>.*?)"
    rf"(?:{re.escape(CALL_END)}|(?={re.escape(CALL_BEGIN)})|<\|tool_calls?_section_end\|>|$)",
    re.DOTALL,
)


class ToolCall(NamedTuple):
    id: str  # functions.NAME:k
    name: str
    arguments: str  # a JSON object


def parse_tool_calls(text: str, tools: Sequence[Mapping[str, Any]], first: int = 0) -> tuple[str, list[ToolCall]]:
    """The calls in the answer `text`, and the text before them.

    Args:
        tools: as the request declares them: {"type": "function", "function": {"name", "parameters"}}.
        first: the number of calls in the conversation before.

    Returns:
        text, calls. Without a call, or if one of them names no declared tool or has arguments that are not an object,
        all of `text` and none.
    """
    start = min((text.find(marker) for marker in OPENINGS if marker in text), default=-1)
    if start < 0 or not tools:
        return text, []
    declared = {tool["function"]["name"]: _parameters(tool["function"]) for tool in tools}
    calls = []
    for found in _CALL.finditer(text, start):
        arguments = _object(found["arguments"])
        name = None if arguments is None else _resolve(found["id"].strip(), arguments, declared)
        if name is None:
            return text, []
        calls.append(ToolCall(call_id(name, first + len(calls)), name, json.dumps(arguments, ensure_ascii=False)))
    return (text[:start], calls) if calls else (text, [])


def call_id(name: str, number: int) -> str:
    """The id of call `number` of a conversation, as Kimi models write it."""
    return f"functions.{name}:{number}"


def _parameters(function: Mapping[str, Any]) -> set[str]:
    return set((function.get("parameters") or {}).get("properties") or {})


def _object(text: str) -> dict[str, Any] | None:
    """The object that a JSON text is, or that the string is which it is."""
    try:
        value = json.loads(text)
        value = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _resolve(written: str, arguments: Mapping[str, Any], declared: Mapping[str, set[str]]) -> str | None:
    """The declared tool that an id means."""
    exact = re.fullmatch(r"(?:functions\.)?(.+):\d+", written)
    body = re.sub(r"[:_]?\d+$", "", re.sub(r"^functions?[._:]?", "", written))
    for name in (exact[1] if exact else None, body, written):
        if name in declared:
            return name
    # A mere counter: the tool that has all of the arguments, if only one does.
    if re.fullmatch(r"call[_-]?\w*|\d+", written):
        fits = [name for name, parameters in declared.items() if set(arguments) <= parameters]
        return fits[0] if len(fits) == 1 else None
    return None
