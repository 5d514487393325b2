"""Generation through the paged latent cache: the prompts in one pass or in chunks, then a few tokens at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Generator, Iterator, Sequence

import torch
from torch import Tensor, nn

from k2kernels.engine.lockstep import Lockstep
from k2kernels.engine.options import check_length, check_options
from k2kernels.engine.sampling import sample
from k2kernels.engine.session import Session, draft
from k2kernels.model.attention import Step
from k2kernels.model.trunk import Trunk
from k2kernels.ops._check import Arguments

Spans = list[tuple[int, slice]]  # rows, and some tokens of each


def generate(
    model: Trunk,
    input_ids: Tensor,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    eos_token_ids: Sequence[int] | None = None,
    attention_mask: Tensor | None = None,
    speculative: bool = False,
    cache_dtype: str = "auto",
    prefill_chunk: int | None = None,
    on_token: Callable[[Tensor], None] | None = None,
    cuda_graphs: bool = True,
) -> Tensor:
    """Continues each prompt until a stop id or for `max_new_tokens` tokens.

    Of a model whose experts are shared out over ranks (`k2kernels.parallel.expert_parallel`), every rank of "ep" calls
    it, with its own prompts, their number and length, and its own options; a rank may have none, [0, T]. A rank whose
    rows have ended serves the others with its experts until all have ended. An argument that one rank finds wrong is an
    error on every rank. The tokens are those of one process with all experts.

    Args:
        input_ids: int64 or int32 [B, T].
        max_new_tokens: 1 or more.
        temperature: 0 takes the likeliest token; else logits are divided by it and a token is drawn.
        top_k, top_p: draw from the k likeliest tokens, and from the smallest set of likeliest ones that together have
            probability p or more.
        seed: of the draws, 0 or more: same call, same tokens. None draws from PyTorch's global generator.
        eos_token_ids: a row ends with the first of these; None takes the checkpoint's, [] never stops early.
        attention_mask: [B, T], 1 (or True) at real tokens. Prompts of different lengths are padded on the left or on
            the right; the padding does not affect the results.
        speculative: draft with the MTP layers and verify several tokens in one pass. The tokens are those of greedy
            decoding. The same on all ranks.
        cache_dtype: "auto" (the model's), or "fp8" (656 bytes per token and layer; 512 + 64 dimensions only).
        prefill_chunk: take in so many tokens of each prompt at a time, 1 or more: memory beyond the cache then does not
            grow with the prompt. None: whole prompts in one pass. The results are the same up to rounding; with
            cache_dtype "fp8" a chunk reads its own tokens rounded, a whole prompt does not.
        on_token: called with each new column of the result, int64 [B] on the CPU, as soon as every row has it. What it
            raises ends this rank's rows.
        cuda_graphs: on a GPU, replay the decoding passes from CUDA graphs, recorded in the second pass of a batch size;
            see `DecodePass`. As rows end, the batch shrinks in powers of two.

    Returns:
        int64 [B, T + new]: `input_ids`, then up to max_new_tokens columns. After its stop id a row is filled with
        config.pad_token_id (or, without one, with the stop id).

    Raises:
        TypeError, ValueError: for any argument of another type or out of range; a sequence longer than
            config.max_position_embeddings; `speculative` without MTP layers or with a temperature; logits that are NaN
            or infinite.
        UnsupportedError: weights other than the experts are in parts (FSDP).
        RuntimeError: says what another rank raised, before anything was computed.
        PeerTimeout: a rank that shares the experts did not take part in time.
    """
    ranks = Lockstep(model)
    with torch.no_grad(), ranks.together("generate", speculative=speculative):
        stops = model.config.eos_token_ids if eos_token_ids is None else eos_token_ids
        args = Arguments("generate")
        good = isinstance(stops, Collection) and all(type(token) is int for token in stops)
        args.require(good, "eos_token_ids", "a list of ints", repr(eos_token_ids))
        check_options(
            args,
            model.config,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            speculative=speculative,
            mtp_layers=len(model.mtp_layers),
            cache_dtype=cache_dtype,
            prefill_chunk=prefill_chunk,
        )
        args.boolean("cuda_graphs", cuda_graphs)
        args.require(on_token is None or callable(on_token), "on_token", "a function or None", on_token)
        drafts = len(model.mtp_layers) if speculative else 0
        prompts, lengths = _prompts(args, model, input_ids, attention_mask, ranks.several)
        check_length(args, model.config, max(lengths, default=0), max_new_tokens)
        chunks = None if prefill_chunk is None else _chunks(lengths, prefill_chunk)
        first = prompts.numel() if chunks is None else max((_tokens(spans) for spans in chunks), default=0)
        ranks.check("generate", max(first, len(lengths) * (1 + drafts)))
        session = None
        if lengths:
            session = Session(model, lengths, max_new_tokens, drafts, cache_dtype, cuda_graphs)

    generator = None if seed is None else torch.Generator(prompts.device).manual_seed(seed)

    def pick(logits: Tensor) -> tuple[Tensor, Tensor]:
        finite = logits.amax(dim=-1).isfinite()
        if not temperature:
            return logits.argmax(dim=-1), finite
        usable = torch.where(finite[..., None], logits.float(), 0.0)  # a draw from NaN would end a GPU's context
        return sample(usable, temperature, top_k, top_p, generator), finite

    result = _Result(len(lengths), max_new_tokens, stops, model.config.pad_token_id, on_token)
    with torch.no_grad(), _evaluating(model):
        ranks.run(_passes(session, prompts, chunks, pick, result) if session else _no_passes(), drafts)
    return torch.cat([input_ids.long(), result.columns(0, result.reported).to(input_ids.device)], dim=1)


def _passes(
    session: Session,
    prompts: Tensor,
    chunks: list[Spans] | None,
    pick: Callable[[Tensor], tuple[Tensor, Tensor]],
    result: _Result,
) -> Generator[None, None, Exception | None]:
    """The passes of one call, for `Lockstep.run`. An error of `on_token` or of the logits is returned: other ranks are
    not stopped."""
    model, speculative = session.model, session.drafts > 0
    rows = list(range(len(session.prompt_lengths)))  # those that continue; the tensors below have one entry for each

    hidden, following, last, step = yield from _prefill(session, prompts, chunks)
    newest, finite = pick(model.lm_head(hidden.flatten(0, 1)[last]))  # chosen, not yet in the cache
    following.view(-1)[last] = newest
    drafts = draft(model, hidden, following, last, step) if speculative else prompts[:, :0]
    chosen = torch.stack([newest, finite], dim=1).tolist()
    session.check()
    ready, broken = [[token] for token, _ in chosen], [row for row, (_, good) in enumerate(chosen) if not good]

    while True:
        if broken:
            return ValueError(
                f"generate: logits must be finite, got NaN or infinity in rows {broken} of input_ids; look for such "
                f"weights, or ones that are too large for {model.lm_head.weight.dtype}"
            )
        try:
            going = result.add(rows, ready)
        except Exception as error:
            return error
        if not going:
            return None
        yield
        if len(going) < len(rows):
            keep = torch.tensor(going, device=prompts.device)
            rows, newest, drafts = [rows[i] for i in going], newest[keep], drafts[keep]
        decode = session.decode(rows, torch.cat([newest[:, None], drafts], dim=1))
        chosen, finite = pick(decode.logits)  # after each of its tokens
        # A draft is accepted if it and all drafts before it equal the model's own choices.
        last = (decode.tokens[:, 1:] == chosen[:, :-1]).cumprod(dim=1).sum(dim=1)
        newest = chosen.gather(1, last[:, None]).squeeze(1)
        places = last + torch.arange(0, chosen.numel(), chosen.shape[1], device=last.device)
        drafts = draft(model, decode.hidden, chosen, places, decode.step) if speculative else chosen[:, :0]
        good = finite.long().cumprod(dim=1).sum(dim=1) > last  # of the accepted ones
        accepted = torch.cat([chosen, last[:, None] + 1, good[:, None]], dim=1)[: len(rows)].tolist()
        session.check()  # before tokens of a faulty pass are reported
        ready = [tokens[:count] for *tokens, count, _ in accepted]
        broken = [row for row, (*_, good) in zip(rows, accepted) if not good]
        session.advance(rows, [len(tokens) for tokens in ready])


def _no_passes() -> Generator[None, None, None]:
    """Those of a rank without rows."""
    yield from ()


def _prefill(
    session: Session, prompts: Tensor, chunks: list[Spans] | None
) -> Generator[None, None, tuple[Tensor, Tensor, Tensor, Step]]:
    """Runs the passes over the prompts, [B, longest], on the right of which is padding; yields before each.

    Returns, of the last pass, in which all rows end: hidden states, the token after each place (anything after a row's
    last), the places of the rows' last tokens, the pass.
    """
    model = session.model
    if chunks is None:
        yield
        step = session.prefill(prompts.shape[1])
        ends = torch.arange(0, prompts.numel(), prompts.shape[1]) + torch.tensor(session.prompt_lengths)
        return model.model(prompts, step), prompts.roll(-1, dims=1), ends.to(prompts.device) - 1, step

    ahead = [prompts, *(prompts.roll(-k, dims=1) for k in range(1, 1 + max(1, session.drafts)))]  # the ids k places on
    for spans in chunks:
        yield
        tokens, *following = ([ids[span] for span in spans] for ids in ahead)
        hidden, step = session.extend([row for row, _ in spans], tokens)
        following = [torch.cat(some)[None] for some in following]
        if spans is chunks[-1]:
            return hidden, following[0], step.last, step
        # The cache of the MTP layers. What follows the prompt is not known here, which can only cost a draft.
        for layer, some in zip(model.mtp_layers[: session.drafts], following):
            hidden = layer(hidden, model.model.embed_tokens(some), step)


def _chunks(lengths: list[int], chunk: int) -> list[Spans]:
    """The rows of each pass over the prompts, and the part of each: rows with fewer chunks begin later."""
    counts = [-(-length // chunk) for length in lengths]
    passes = []
    for left in range(max(counts, default=0), 0, -1):
        spans = []
        for row, (length, count) in enumerate(zip(lengths, counts)):
            if count >= left:
                first = (count - left) * chunk
                spans.append((row, slice(first, min(first + chunk, length))))
        passes.append(spans)
    return passes


def _tokens(spans: Spans) -> int:
    return sum(part.stop - part.start for _, part in spans)


class _Result:
    """The new tokens of all rows, and which rows have ended."""

    def __init__(
        self, rows: int, limit: int, stops: Collection[int], pad: int | None, on_token: Callable[[Tensor], None] | None
    ):
        self.new: list[list[int]] = [[] for _ in range(rows)]
        self.ended = [False] * rows
        self.limit, self.stops, self.pad, self.on_token = limit, set(stops), pad, on_token
        self.reported = 0

    def add(self, rows: list[int], ready: list[list[int]]) -> list[int]:
        """Adds the new tokens of `rows`; returns the indices into `rows` of those that continue."""
        for row, tokens in zip(rows, ready):
            for token in tokens[: self.limit - len(self.new[row])]:
                self.new[row].append(token)
                if token in self.stops:
                    self.ended[row] = True
                    break
            self.ended[row] |= len(self.new[row]) == self.limit
        complete = self._complete()
        if self.on_token is not None:
            for column in self.columns(self.reported, complete).unbind(dim=1):
                self.on_token(column)
        self.reported = complete
        return [i for i, row in enumerate(rows) if not self.ended[row]]

    def columns(self, start: int, stop: int) -> Tensor:
        """Some of the columns, int64 [B, stop - start]; ended rows are padded."""
        pads = [tokens[-1] if self.pad is None else self.pad for tokens in self.new]
        parts = [tokens[start:stop] for tokens in self.new]
        padded = [part + [pad] * (stop - start - len(part)) for part, pad in zip(parts, pads)]
        return torch.tensor(padded, dtype=torch.int64).view(len(parts), stop - start)

    def _complete(self) -> int:
        """The number of leading columns that are final in every row."""
        lengths = [len(tokens) for tokens in self.new]
        return min((n for n, ended in zip(lengths, self.ended) if not ended), default=max(lengths, default=0))


def _prompts(
    args: Arguments, model: Trunk, input_ids: Tensor, attention_mask: Tensor | None, may_be_none: bool
) -> tuple[Tensor, list[int]]:
    """The prompts moved to the left edge, [B, longest], and their lengths."""
    device = model.lm_head.weight.device
    if may_be_none and isinstance(input_ids, Tensor) and input_ids.dim() == 2 and len(input_ids) == 0:
        return input_ids.long().to(device), []
    model.check_ids("generate", input_ids, wait=True)
    input_ids = input_ids.long().to(device)
    if attention_mask is None:
        return input_ids, [input_ids.shape[1]] * input_ids.shape[0]
    got = list(getattr(attention_mask, "shape", [attention_mask]))
    args.require(got == list(input_ids.shape), "attention_mask", f"{list(input_ids.shape)} like input_ids", got)
    real = (attention_mask.to(device) != 0).int()
    runs = (torch.diff(real, dim=1, prepend=torch.zeros_like(real[:, :1])) == 1).sum(dim=1).tolist()
    args.require(set(runs) == {1}, "attention_mask", "one run of ones in each row", f"{runs} runs")
    lengths = real.sum(dim=1)
    source = torch.arange(int(lengths.max()), device=device) + real.argmax(dim=1, keepdim=True)
    return input_ids.gather(1, source.clamp(max=input_ids.shape[1] - 1)), lengths.tolist()


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block; restores the mode of every module."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
