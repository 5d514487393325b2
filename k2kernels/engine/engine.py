"""Many requests at a time: continuous batching over a pool of pages that requests share."""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from k2kernels._backend import UnsupportedError
from k2kernels.engine.cache import PAGE_SIZE
from k2kernels.engine.decode_pass import DecodePass
from k2kernels.engine.lockstep import Lockstep
from k2kernels.engine.options import check_engine
from k2kernels.engine.pool import Pool
from k2kernels.engine.replay import CudaRecorder
from k2kernels.engine.request import Request, Sample
from k2kernels.engine.sampling import Choice, Place, Sampling, choose, uniform
from k2kernels.engine.scheduler import Scheduler, Work
from k2kernels.engine.session import draft
from k2kernels.model.attention import Step
from k2kernels.model.extend import Extend
from k2kernels.model.trunk import Trunk
from k2kernels.ops._check import Arguments


class Engine:
    """Serves requests with a model on one device.

    A step is one pass over the next token of every running sample and over chunks of the prompts of new ones: see
    `Scheduler`. Requests with the same beginning, of 64 tokens and more, compute it once, and so do the samples of one
    request. The texts are those of `generate`, up to rounding: a product of matrices may round otherwise in another
    batch.

    `submit`, `cancel` and the iteration over requests may be called from any thread. Steps are done by whoever calls
    `step` or waits for a request, one at a time; or, after `start`, by a thread of the engine.

    Args:
        model: is put into evaluation mode. After a change of its weights call `forget`, with no request running.
        cache_tokens: tokens that the cache has room for, of all requests together; rounded down to pages of 64.
        max_batch_tokens: the most tokens of a pass, and (divided by 1 + MTP layers, if speculative) of requests that
            run at a time; None: 256 on a CPU, 2048 on a GPU.
        speculative: draft with the MTP layers and verify in the next pass. The texts stay the same.
        cache_dtype: "auto" (the model's), or "fp8" (656 bytes per token and layer; 512 + 64 dimensions only).
        cuda_graphs: on a GPU, replay passes without chunks, and with equally many tokens of each sample, from CUDA
            graphs, as `generate` does.

    Raises:
        TypeError, ValueError: for an argument of another type or out of range.
        UnsupportedError: the experts of the model are shared out over ranks, or its weights are in parts.
    """

    def __init__(
        self,
        model: Trunk,
        *,
        cache_tokens: int,
        max_batch_tokens: int | None = None,
        speculative: bool = False,
        cache_dtype: str = "auto",
        cuda_graphs: bool = True,
    ):
        args = Arguments("Engine")
        ranks, weight = Lockstep(model), model.lm_head.weight
        if ranks.several:
            raise UnsupportedError("Engine: all experts must be on one device, got ranks that share them; use generate")
        layers = len(model.mtp_layers)
        args.boolean("cuda_graphs", cuda_graphs)
        check_engine(
            args,
            model.config,
            cache_tokens=cache_tokens,
            max_batch_tokens=max_batch_tokens,
            speculative=speculative,
            mtp_layers=layers,
            cache_dtype=cache_dtype,
        )
        if max_batch_tokens is None:
            max_batch_tokens = 256 if weight.device.type == "cpu" else 2048
        self.drafts = layers if speculative else 0
        ranks.check("Engine", max_batch_tokens)
        self.model, self.device = model.eval(), weight.device
        layers = model.model.layers[: model.config.num_hidden_layers + self.drafts]
        num_pages = cache_tokens // PAGE_SIZE
        self.max_tokens = min(model.config.max_position_embeddings, num_pages * PAGE_SIZE)  # of a text
        self.pool = Pool(
            model.config,
            layers=len(layers),
            num_pages=num_pages,
            rows=max_batch_tokens // (1 + self.drafts),
            max_tokens=self.max_tokens,
            dtype=weight.dtype,
            device=self.device,
            cache_dtype=cache_dtype,
        )
        with torch.no_grad():
            self.absorbed = [layer.self_attn.absorbed(weight.dtype) for layer in layers]
        self.scheduler = Scheduler(self.pool, max_batch_tokens, 1 + self.drafts)
        self.recorder = CudaRecorder(self.device) if cuda_graphs and self.device.type == "cuda" else None
        self.error: BaseException | None = None  # what ended the engine's thread
        self._passes: dict[tuple[int, int], DecodePass] = {}  # by slots and width
        self._numbers = itertools.count()
        self._inbox: deque[Request] = deque()
        self._updated: dict[Request, None] = {}
        self.stepping = threading.Lock()  # held in a step, and by what else changes the pool
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closed = False
        self._counts = dict.fromkeys(
            ("steps", "computed_tokens", "generated_tokens", "drafted_tokens", "accepted_tokens"), 0
        )

    # ---- for any thread -----------------------------------------------------------------------------------------

    def submit(
        self,
        prompt_ids: Sequence[int] | Tensor,
        *,
        sampling: Sampling | None = None,
        n: int = 1,
        salt: str = "",
        on_update: Callable[[Request], None] | None = None,
    ) -> Request:
        """Queues a request; requests are served in the order of submission.

        Args:
            prompt_ids: 1 or more ids, or a tensor of them [T] or [1, T].
            sampling: by default the likeliest tokens.
            n: samples. They share the prompt's pages; with a seed, sample i is the same for every n.
            salt: requests of different salts share nothing in the cache, so that none can detect what another had.
            on_update: called by the thread that steps, after each step in which the request got tokens or samples of it
                ended; it must not wait for requests. What it raises ends the request with "error".

        Raises:
            TypeError, ValueError: for an argument of another type or out of range; a text that is longer than the
                context, or than the cache would have room for if it were alone.
            RuntimeError: the engine is closed, or its thread has ended with an error.
        """
        args, config = Arguments("Engine.submit"), self.model.config
        sampling = Sampling() if sampling is None else sampling
        args.require(isinstance(sampling, Sampling), "sampling", "a Sampling", type(sampling).__name__)
        args.integer("n", n, 1)
        args.require(on_update is None or callable(on_update), "on_update", "a function or None", on_update)
        args.require(isinstance(salt, str), "salt", "a str", repr(salt))
        prompt = _ids(args, prompt_ids)
        wrong = [i for i in (*prompt, *(sampling.logit_bias or ())) if not 0 <= i < config.vocab_size]
        args.require(not wrong, "ids", f"0 to {config.vocab_size - 1}", wrong[:1])
        most, what = config.max_position_embeddings, "max_position_embeddings"
        if most > self.max_tokens:
            most, what = self.max_tokens, "the pages of cache_tokens"
        limit = most if sampling.max_new_tokens is None else len(prompt) + sampling.max_new_tokens
        args.require(
            len(prompt) < limit <= most,
            "prompt and max_new_tokens",
            f"at most {most} tokens together ({what})",
            max(limit, len(prompt) + 1),
        )
        stops = config.eos_token_ids if sampling.eos_token_ids is None else sampling.eos_token_ids
        request = Request(
            next(self._numbers), prompt, sampling, n,
            limit=limit, stops=set(stops), salt=salt, on_update=on_update, wait=self._wait,
        )  # fmt: skip
        with self._changed:
            if self._closed or self.error is not None:
                raise RuntimeError(f"Engine: submit after {'close' if self.error is None else repr(self.error)}")
            self._inbox.append(request)
            self._changed.notify_all()
        return request

    def stats(self) -> dict[str, int]:
        """What there is, and what was done since the engine was made.

        waiting, running: samples; pages, pages_held, pages_idle: all, those of running samples, and those kept because
        a later request may begin alike; prefix_hits, prefix_hit_tokens: samples that found pages, and tokens in these;
        preemptions; steps; computed_tokens: rows of the cache that were computed, rejected drafts included;
        generated_tokens; drafted_tokens, accepted_tokens.
        """
        scheduler, pool = self.scheduler, self.pool
        return dict(
            waiting=len(scheduler.waiting) + sum(len(request.samples) for request in list(self._inbox)),
            running=len(scheduler.running),
            pages=pool.num_pages,
            pages_held=pool.held,
            pages_idle=pool.idle,
            prefix_hits=scheduler.prompts_found,
            prefix_hit_tokens=scheduler.found_tokens,
            preemptions=scheduler.preemptions,
            **self._counts,
        )

    def start(self) -> Engine:
        """Starts a thread that does the steps until `close`; also by `with engine:`."""
        with self._changed:
            if self._closed or self._thread is not None:
                raise RuntimeError("Engine: start was called before, or close")
            self._thread = threading.Thread(target=self._run, name="k2kernels engine", daemon=True)
            self._thread.start()
        return self

    def close(self) -> None:
        """Ends all requests with "cancelled", and the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()
        with self.stepping:
            self._end_all("cancelled")

    __enter__ = start

    def __exit__(self, *_: object) -> None:
        self.close()

    def forget(self) -> None:
        """Lets no later request find pages that were computed before: for changed weights."""
        with self.stepping, torch.no_grad():
            self.pool.forget()
            self._passes.clear()
            layers, dtype = self.model.model.layers[: len(self.absorbed)], self.model.lm_head.weight.dtype
            self.absorbed = [layer.self_attn.absorbed(dtype) for layer in layers]

    def check(self) -> None:
        """Raises AssertionError unless every page is free, idle, or held by the running samples that list it."""
        with self.stepping:
            self.pool.check(sample.pages for sample in self.scheduler.running)

    # ---- steps --------------------------------------------------------------------------------------------------

    def step(self) -> bool:
        """Drops cancelled requests, admits waiting ones, runs a pass and chooses its tokens.

        Returns:
            Whether requests remain.

        Raises:
            What a pass raises. All requests then end with "error".
        """
        with self.stepping:
            try:
                with torch.no_grad():
                    self._receive()
                    self.scheduler.admit()
                    if works := self.scheduler.plan():
                        self._pass(works)
            except BaseException as error:
                self._end_all("error", f"{type(error).__name__}: {error}")
                raise
            self._notify()
            return self._remain()

    def _remain(self) -> bool:
        return bool(self.scheduler.running or self.scheduler.waiting or self._inbox)

    def _receive(self) -> None:
        while self._inbox:
            for sample in self._inbox.popleft().samples:
                self.scheduler.add(sample)
        for sample in [*self.scheduler.waiting, *self.scheduler.running]:
            if sample.cancelled:
                self._end(sample, "cancelled")

    def _pass(self, works: list[Work]) -> None:
        """Computes rows of the cache, chooses tokens where ids end, and drafts what may follow."""
        lengths = [len(work.tokens) for work in works]
        logits, hidden, step = self._decode(works) if self._uniform(works) else self._extend(works)
        rows = [
            Place(
                sample.request.sampling,
                [*sample.tokens, *tokens[-drafts : k - drafts or None]] if k else sample.tokens,
                uniform(sample.request.seed, sample.index, len(sample.tokens) + k),
            )
            for sample, tokens, drafts in (work for work in works if work.chooses)
            for k in range(1 + drafts)
        ]
        choices = choose(logits, rows) if rows else []
        self._counts["steps"] += 1
        self._counts["computed_tokens"] += sum(lengths)
        self._counts["drafted_tokens"] += sum(work.drafts for work in works)

        following, going, last, broken, ends = [], [], [], [], itertools.accumulate(lengths)
        for work, end in zip(works, ends):
            sample, after = work.sample, work.sample.ids[work.sample.computed + 1 :]
            if not work.chooses:
                following += after[: len(work.tokens)]
                self.scheduler.advance(sample, len(work.tokens))
                continue
            mine, choices = choices[: 1 + work.drafts], choices[1 + work.drafts :]
            following += after + [choice.token for choice in mine]
            accepted = self._take(work, mine)
            if accepted is None:
                broken.append(sample.request)
            elif sample.finish_reason is None:
                going.append(sample)
                last.append(end - 1 - work.drafts + accepted)
        if self.drafts and self.scheduler.running:
            self._draft(hidden, following, going, last, step)
        for request in broken:
            self._fail(
                request,
                "Engine: logits must be finite, got NaN or infinity; look for such weights, or ones that are too large "
                f"for {self.model.lm_head.weight.dtype}, or for penalties or a bias that float32 cannot add",
            )

    def _take(self, work: Work, choices: list[Choice]) -> int | None:
        """Appends the chosen tokens to a sample; the number of drafts that were right. None: logits are not finite."""
        sample, request = work.sample, work.sample.request
        drafts = work.tokens[len(work.tokens) - work.drafts :]
        accepted = 0
        while accepted < work.drafts and drafts[accepted] == choices[accepted].token:
            accepted += 1
        reason, before = None, len(sample.tokens)
        for choice in choices[: accepted + 1]:
            if not choice.finite:
                return None
            if choice.logprobs is not None:
                sample.logprobs.append(choice.logprobs)
            sample.ids.append(choice.token)
            sample.tokens.append(choice.token)
            if choice.token in request.stops or len(sample.ids) == request.limit:
                reason = "stop" if choice.token in request.stops else "length"
                break
        self._updated[request] = None
        self._counts["accepted_tokens"] += accepted
        self._counts["generated_tokens"] += len(sample.tokens) - before
        rows = len(work.tokens) - work.drafts + accepted
        self.scheduler.advance(sample, min(rows, len(sample.ids) - 1 - sample.computed))
        if reason is not None:
            self._end(sample, reason)
        return accepted

    def _extend(self, works: list[Work]) -> tuple[Tensor, Tensor, Step]:
        """One ragged pass over chunks, next tokens and drafts together. Returns the logits [n, vocab] of the n places
        where a token is chosen, the hidden states [1, N, hidden], the pass."""
        samples, lengths = [work.sample for work in works], [len(work.tokens) for work in works]
        table = self.pool.block_table[[sample.row for sample in samples]]
        before = [sample.computed for sample in samples]
        step = Extend(self.model.rope, self.pool.pages, table, self.absorbed, before, lengths)
        ids = torch.tensor([[token for work in works for token in work.tokens]], device=self.device)
        places = [
            place
            for work, end in zip(works, itertools.accumulate(lengths))
            if work.chooses
            for place in range(end - 1 - work.drafts, end)
        ]
        hidden = self.model.model(ids, step)
        places = torch.tensor(places, dtype=torch.int64, device=self.device)
        return self.model.lm_head(hidden[0, places]), hidden, step

    def _uniform(self, works: list[Work]) -> bool:
        """Whether a recorded pass serves: the same number of tokens for every sample, and no chunks."""
        width = len(works[0].tokens)
        return self.recorder is not None and all(
            work.sample.pending == 1 and len(work.tokens) == width for work in works
        )

    def _decode(self, works: list[Work]) -> tuple[Tensor, Tensor, Step]:
        """The same for next tokens and drafts alone, replayed; the hidden states are [slots, width, hidden], of which
        the first ones are those of the samples."""
        width = len(works[0].tokens)
        slots = min(self.scheduler.max_running, 1 << (len(works) - 1).bit_length())
        if (slots, width) not in self._passes:
            self._passes[slots, width] = DecodePass(self.model, self.pool, self.absorbed, slots, width, self.recorder)
        decode = self._passes[slots, width]
        tokens = torch.tensor([work.tokens for work in works])
        decode(tokens, [work.sample.row for work in works], [work.sample.computed for work in works])
        return decode.logits.flatten(0, 1)[: tokens.numel()], decode.hidden, decode.step

    def _draft(self, hidden: Tensor, following: list[int], going: list[Sample], last: list[int], step: Step) -> None:
        """Runs the MTP layers over the pass: fills their caches, and drafts what follows `going` at the places `last`.

        Of a chunk within a prompt, the layers beyond the first may see a wrong token after its end.
        """
        tokens = torch.zeros(hidden.shape[0] * hidden.shape[1], dtype=torch.int64)
        tokens[: len(following)] = torch.tensor(following)
        places = torch.tensor(last, dtype=torch.int64, device=self.device)
        drafts = draft(self.model, hidden, tokens.to(self.device).view(hidden.shape[:2]), places, step)
        for sample, some in zip(going, drafts.tolist()):
            sample.drafts = some

    # ---- ends ---------------------------------------------------------------------------------------------------

    def _end(self, sample: Sample, reason: str) -> None:
        self.scheduler.stop(sample, forget=reason == "error")
        self._updated[sample.request] = None
        sample.finish_reason = reason

    def _fail(self, request: Request, error: str) -> None:
        """Ends what is left of a request with "error"."""
        for sample in request.samples:
            if sample.finish_reason is None:
                request.error = error
                self._end(sample, "error")

    def _end_all(self, reason: str, error: str | None = None) -> None:
        while self._inbox:
            for sample in self._inbox.popleft().samples:
                self.scheduler.add(sample)
        for sample in [*self.scheduler.waiting, *self.scheduler.running]:
            sample.request.error = error
            self._end(sample, reason)
        self._notify()

    def _notify(self) -> None:
        """Informs those that wait for requests, and calls `on_update`."""
        updated, self._updated = self._updated, {}
        for request in updated:
            try:
                if request.on_update is not None:
                    request.on_update(request)
            except Exception as error:
                request.on_update = None
                self._fail(request, f"on_update raised {type(error).__name__}: {error}")
        with self._changed:
            self._changed.notify_all()

    def _wait(self, ready: Callable[[], bool]) -> None:
        """Returns when `ready`, after steps of the engine's thread, or else of this one."""
        while not ready():
            if self._thread is None:
                self.step()
            else:
                with self._changed:
                    self._changed.wait_for(ready)

    def _run(self) -> None:
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._closed or self._remain())
                while not self._closed and self.step():
                    pass
                if self._closed:
                    return
        except BaseException as error:
            with self._changed:  # no request comes after this
                self.error = error
            with self.stepping:
                self._end_all("error", f"{type(error).__name__}: {error}")


def _ids(args: Arguments, ids: Sequence[int] | Tensor) -> list[int]:
    if isinstance(ids, Tensor):
        one = ids[0] if ids.dim() == 2 and len(ids) == 1 else ids
        args.require(
            one.dim() == 1 and one.dtype in (torch.int64, torch.int32),
            "prompt_ids",
            "int64 or int32 [T] or [1, T]",
            f"{list(ids.shape)} {ids.dtype}",
        )
        ids = one.tolist()
    good = isinstance(ids, Sequence) and len(ids) > 0 and all(type(token) is int for token in ids)
    args.require(good, "prompt_ids", "1 or more ints", repr(ids)[:60])
    return list(ids)
