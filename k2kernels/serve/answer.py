"""From the tokens of samples to answers in OpenAI's form, whole or as a stream of chunks."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any, NamedTuple

from k2kernels.engine import Request, Sample
from k2kernels.engine.sampling import TokenLogprobs
from k2kernels.serve.fields import Order, Refused
from k2kernels.text.stream import TextStream, overlap
from k2kernels.text.tokenizer import Tokenizer
from k2kernels.text.tools import OPENINGS, ToolCall, parse_tool_calls

UNANSWERED = ("error", "cancelled")  # finish reasons of the engine
Scored = tuple[int, TokenLogprobs | None]  # a token; None for the first one of a prompt


class Part(NamedTuple):
    """What is new in one choice."""

    choice: int
    text: str = ""
    tokens: Sequence[Scored] = ()  # with log-probabilities, if they are asked for
    calls: Sequence[ToolCall] = ()
    reason: str | None = None  # with the last part


class Reader:
    """The text of one sample: up to a stop id or a stop string, and with tools, without the calls.

    From where a call may begin, text is held back to the end, since it is no call unless all of it is.
    """

    def __init__(self, choice: int, sample: Sample, order: Order, tokenizer: Tokenizer):
        self.choice, self.sample, self.order = choice, sample, order
        self.stream = TextStream(tokenizer, order.stops)
        self.seen = 0  # tokens of the sample, the stop id included
        self.held = ""

    def read(self) -> Part | None:
        """What came since the last call; None: nothing to show.

        Raises:
            Refused: the engine has ended the sample without an answer.
        """
        sample, order = self.sample, self.order
        reason = sample.finish_reason  # read before the tokens, which are all there when it is
        if reason in UNANSWERED:
            message = sample.request.error or "the server is shutting down"
            raise Refused(message, status=500 if reason == "error" else 503, kind="server_error")
        first, text = self.seen, ""
        new = [] if order.empty else sample.tokens[first:]
        for token in new:
            self.seen += 1
            if token in sample.request.stops:
                break
            text += self.stream.add(token)
            if self.stream.stopped is not None:
                break
        if reason is not None:
            text += self.stream.finish()
        if self.stream.stopped is not None:
            sample.cancel()
            reason = "stop"
        calls: list[ToolCall] = []
        if order.tools:
            text = self._hold(text)
            if reason is not None:
                rest, calls = parse_tool_calls(self.held, order.tools, order.calls)
                text += rest
                reason = "tool_calls" if calls else reason
        tokens: list[Scored] = []
        if order.logprobs:
            scored = zip(sample.tokens[first : self.seen], sample.logprobs[first : self.seen])
            tokens = [(token, one) for token, one in scored if token not in sample.request.stops]
        part = Part(self.choice, text, tokens, calls, reason)
        return part if text or tokens or reason else None

    def _hold(self, text: str) -> str:
        """The part of the text so far that belongs to no call."""
        text = self.held + text
        start = min((text.find(marker) for marker in OPENINGS if marker in text), default=-1)
        if start < 0:
            start = len(text) - max(overlap(text, marker) for marker in OPENINGS)
        self.held = text[start:]
        return text[:start]


class Answer:
    """Parts as JSON; one object per request.

    Args:
        requests: one for each prompt, `order.n` samples each; choices are numbered through all of them.
    """

    def __init__(self, order: Order, requests: list[Request], tokenizer: Tokenizer, model: str):
        self.order, self.requests, self.tokenizer = order, requests, tokenizer
        kind = "chat.completion" if order.chat else "text_completion"
        self.whole_head = dict(
            id=("chatcmpl-" if order.chat else "cmpl-") + uuid.uuid4().hex,
            object=kind,
            created=int(time.time()),
            model=model,
        )
        self.chunk_head = self.whole_head | dict(object=kind + ".chunk" if order.chat else kind)
        samples = [sample for request in requests for sample in request.samples]
        self.readers = [Reader(choice, sample, order, tokenizer) for choice, sample in enumerate(samples)]
        self.lengths = [0] * len(samples)  # of the texts, for text_offset
        self.failed = False  # after the beginning of a stream

    def usage(self) -> dict[str, Any]:
        prompt = sum(map(len, self.order.prompts))
        new = sum(reader.seen for reader in self.readers)
        cached = sum(request.cached_tokens for request in self.requests)
        return dict(
            prompt_tokens=prompt,
            completion_tokens=new,
            total_tokens=prompt + new,
            prompt_tokens_details=dict(cached_tokens=cached),
        )

    async def whole(self, parts: AsyncIterator[Part]) -> dict[str, Any]:
        """All parts in one object."""
        of = [Part(choice) for choice in range(len(self.readers))]
        async for part in parts:
            text, tokens = of[part.choice].text + part.text, [*of[part.choice].tokens, *part.tokens]
            of[part.choice] = part._replace(text=text, tokens=tokens)
        choices = []
        for part in of:
            choice = dict(index=part.choice, finish_reason=part.reason, logprobs=self._logprobs(part))
            if self.order.chat:
                message = dict(role="assistant", content=part.text or (None if part.calls else ""), refusal=None)
                if part.calls:
                    message["tool_calls"] = [_call(call) for call in part.calls]
                choice["message"] = message
            else:
                choice["text"] = part.text
            choices.append(choice)
        return dict(self.whole_head, choices=choices, usage=self.usage())

    async def chunks(self, parts: AsyncIterator[Part]) -> AsyncIterator[str]:
        """Server-sent events. An error that ends them is one, too."""
        more = dict(usage=None) if self.order.usage else {}

        def chunk(part: Part, delta: dict[str, Any] | None = None) -> str:
            choice = dict(index=part.choice, finish_reason=part.reason, logprobs=self._logprobs(part))
            choice |= dict(delta=delta) if self.order.chat else dict(text=part.text)
            return _event(dict(self.chunk_head, choices=[choice], **more))

        try:
            for reader in self.readers if self.order.chat else ():
                yield chunk(Part(reader.choice), dict(role="assistant", content=""))
            async for part in parts:
                if not self.order.chat:
                    yield chunk(part)
                    continue
                delta: dict[str, Any] = dict(content=part.text) if part.text or part.tokens else {}
                if part.calls:
                    delta["tool_calls"] = [dict(_call(call), index=i) for i, call in enumerate(part.calls)]
                if delta:
                    yield chunk(part._replace(reason=None), delta)
                if part.reason:
                    yield chunk(Part(part.choice, reason=part.reason), {})
            if self.order.usage:
                yield _event(dict(self.chunk_head, choices=[], usage=self.usage()))
        except Refused as error:
            self.failed = True
            yield _event(error.body)
            return
        yield "data: [DONE]\n\n"

    def _logprobs(self, part: Part) -> dict[str, Any] | None:
        if not self.order.logprobs or not part.tokens:
            return None
        name = self._name
        if self.order.chat:

            def entry(token: int, logprob: float) -> dict[str, Any]:
                text = name(token)
                known = None if "\ufffd" in text else list(text.encode("utf-8", "replace"))
                return dict(token=text, logprob=logprob, bytes=known)

            content = [
                dict(entry(token, one.logprob), top_logprobs=[entry(*other) for other in one.top])
                for token, one in part.tokens
            ]
            return dict(content=content, refusal=None)
        tokens = [name(token) for token, _ in part.tokens]
        offsets = []
        for text in tokens:
            offsets.append(self.lengths[part.choice])
            self.lengths[part.choice] += len(text)
        top = []
        for text, (_, one) in zip(tokens, part.tokens):
            best: dict[str, float] = {}
            for token, logprob in one.top if one else ():
                best.setdefault(name(token), logprob)  # of several tokens of one text the likeliest
            top.append({text: one.logprob} | best if one else None)
        return dict(
            tokens=tokens,
            token_logprobs=[one.logprob if one else None for _, one in part.tokens],
            top_logprobs=top,
            text_offset=offsets,
        )

    def _name(self, token: int) -> str:
        return self.tokenizer.decode([token])


def _call(call: ToolCall) -> dict[str, Any]:
    return dict(id=call.id, type="function", function=dict(name=call.name, arguments=call.arguments))


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value)}\n\n"
