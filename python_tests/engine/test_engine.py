"""Many requests at a time: the texts of `generate`, whatever is scheduled, shared, preempted or cancelled."""

import copy
import re
import threading
import zlib
from pathlib import Path

import pytest
import tiny
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_decode_pass import Recorder

import k2kernels
from k2kernels.engine import Engine, Sampling
from k2kernels.engine.cache import PAGE_SIZE
from k2kernels.model import attention

LENGTHS = [5, 63, 130, 1, 64, 62, 65, 100, 3, 127, 128, 90, 33, 2, 61, 50]
NEW = 5


def ids(length, seed, vocab=12):
    return torch.randint(0, vocab, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


PROMPTS = [ids(length, length) for length in LENGTHS]


@pytest.fixture(scope="module")
def model():
    """In float64 rounding does not decide between tokens."""
    torch.manual_seed(0)
    return tiny.model(num_hidden_layers=2, num_nextn_predict_layers=2, vocab_size=12).double()


@pytest.fixture(scope="module")
def alone(model):
    """What `generate` makes of each prompt."""
    return [
        model.generate(torch.tensor([prompt]), max_new_tokens=NEW, eos_token_ids=[])[0, len(prompt) :].tolist()
        for prompt in PROMPTS
    ]


def finish(engine):
    """All steps that remain, with a check after each; then no page is held."""
    for _ in range(3000):
        remain = engine.step()
        engine.check()
        if not remain:
            break
    assert engine.stats()["pages_held"] == engine.stats()["running"] == engine.stats()["waiting"] == 0


def sampling(**options):
    return Sampling(**{**dict(max_new_tokens=NEW, eos_token_ids=[]), **options})


def texts(engine, prompts=PROMPTS, **options):
    requests = [engine.submit(prompt, sampling=sampling(**options)) for prompt in prompts]
    finish(engine)
    assert all(request.done for request in requests)
    return [request.samples[0].tokens for request in requests]


@pytest.mark.parametrize(
    "options",
    [
        dict(cache_tokens=4096),
        dict(cache_tokens=4096, max_batch_tokens=37),
        dict(cache_tokens=2048, max_batch_tokens=50, speculative=True),
        dict(cache_tokens=192),
    ],
    ids=str,
)
def test_ragged_requests_have_the_texts_that_each_has_alone(options, model, alone):
    engine = Engine(model, **options)
    assert texts(engine) == alone
    stats = engine.stats()
    assert stats["generated_tokens"] == len(PROMPTS) * NEW
    assert (stats["accepted_tokens"] > 0) == options.get("speculative", False)
    rejected = stats["drafted_tokens"] - stats["accepted_tokens"]
    assert stats["computed_tokens"] == sum(LENGTHS) + len(PROMPTS) * (NEW - 1) + rejected
    assert stats["steps"] < sum(LENGTHS)


@pytest.mark.parametrize("speculative", [False, True])
def test_preempted_requests_have_the_same_texts(speculative, model, alone):
    engine = Engine(model, cache_tokens=960, speculative=speculative)
    requests = [engine.submit(prompt, sampling=sampling()) for prompt in PROMPTS[:8]]
    for step in range(1, 12):
        engine.step()
        for sample in engine.scheduler.running[step % 3 :: 3]:
            engine.scheduler.preempt(sample)
        engine.check()
    finish(engine)
    assert [request.samples[0].tokens for request in requests] == alone[:8]
    assert engine.stats()["preemptions"] > 10 and engine.stats()["prefix_hit_tokens"] > 0


@pytest.mark.filterwarnings("ignore:generate")
@pytest.mark.parametrize("speculative", [False, True])
def test_replayed_passes(speculative, model):
    """Passes without chunks are those of `generate`, in its recordings."""
    want = texts(Engine(model, cache_tokens=512), PROMPTS[:2], max_new_tokens=16)
    engine = Engine(model, cache_tokens=512, speculative=speculative)
    engine.recorder = Recorder()
    assert texts(engine, PROMPTS[:2], max_new_tokens=16) == want
    assert engine.recorder.plays > 3


def test_drafts_are_those_of_generate(model):
    """Each pass, and each MTP layer in it, gets the same ids: a draft at a wrong place would be rejected, and cost
    nothing but time."""
    seen, prompt = [], PROMPTS[2]
    hook = model.model.embed_tokens.register_forward_hook(lambda _, args, out: seen.append(args[0].flatten().tolist()))
    model.generate(torch.tensor([prompt]), max_new_tokens=10, eos_token_ids=[], speculative=True)
    want = list(seen)
    seen.clear()
    texts(Engine(model, cache_tokens=512, speculative=True), [prompt], max_new_tokens=10)
    hook.remove()
    count = 3 * 6  # the last passes have fewer drafts
    assert seen[:count] == want[:count] and len(want) > count


def test_draws_depend_on_seed_sample_and_position(model):
    options = dict(temperature=1.3, top_p=0.95, seed=4)
    drawn = [texts(Engine(model, cache_tokens=512), [prompt], **options)[0] for prompt in PROMPTS[:4]]
    engine = Engine(model, cache_tokens=4096, max_batch_tokens=40, speculative=True)
    assert texts(engine, PROMPTS[7:3:-1] + PROMPTS[:4], **options)[4:] == drawn
    assert len(set(map(tuple, drawn))) == 4
    engine = Engine(model, cache_tokens=512)
    requests = [engine.submit(PROMPTS[1], sampling=sampling(**options), n=n) for n in (1, 4)]
    for step in range(20):
        engine.step()
        if step % 3 == 1 and engine.scheduler.running:
            engine.scheduler.preempt(engine.scheduler.running[-1])
    finish(engine)
    samples = [sample.tokens for sample in requests[1].samples]
    assert requests[0].samples[0].tokens == samples[0] == drawn[1] and len(set(map(tuple, samples))) == 4
    one, other = (texts(engine, PROMPTS[:1], temperature=9.0)[0] for _ in range(2))
    assert one != other  # a new seed


@pytest.mark.parametrize("length", [63, 64, 65, 130, 129])
def test_samples_compute_their_prompt_once(length, model):
    """Full pages are shared, the last one is copied; each sample computes one token for its logits."""
    engine, prompt = Engine(model, cache_tokens=4096), ids(length, 1)
    request = engine.submit(prompt, sampling=sampling(max_new_tokens=8, temperature=1.0, seed=0), n=8)
    most = 0
    while engine.step():
        engine.check()
        most = max(most, engine.stats()["pages_held"])
    stats = engine.stats()
    assert stats["computed_tokens"] == length + 7 + 8 * 7 and stats["pages_held"] == 0
    full = (length - 1) // PAGE_SIZE
    assert most == full + 8 * (-(-(length + 7) // PAGE_SIZE) - full)
    assert len({tuple(text) for text in request.result()}) == 8
    single = engine.submit(prompt, sampling=sampling(max_new_tokens=8, temperature=1.0, seed=0))
    assert single.result() == request.result()[:1]
    first, second, third = engine.submit(prompt, sampling=sampling(), n=3).result()
    assert first == second == third


def test_requests_compute_a_common_beginning_once(model, alone):
    """Also if they come together: the others wait until the first one has computed it."""
    beginning = ids(150, 5)
    prompts = [beginning + ids(3 + k, k) for k in range(8)]
    want = texts(Engine(model, cache_tokens=4096), prompts[:1])[0]
    engine = Engine(model, cache_tokens=4096, max_batch_tokens=100)
    requests = [engine.submit(prompt, sampling=sampling()) for prompt in prompts]
    apart = engine.submit(prompts[0], sampling=sampling(), salt="another tenant")
    short = engine.submit(PROMPTS[0], sampling=sampling())
    engine.step()
    assert engine.stats()["running"] == 3 and short.samples[0].row >= 0  # passed the others
    finish(engine)
    computed = 2 * len(prompts[0]) + sum(len(prompt) - 128 for prompt in prompts[1:]) + LENGTHS[0] + 10 * (NEW - 1)
    assert engine.stats()["computed_tokens"] == computed
    assert engine.stats()["prefix_hits"] == 7 and engine.stats()["prefix_hit_tokens"] == 7 * 128
    assert [request.cached_tokens for request in (*requests, apart)] == [0] + 7 * [128] + [0]
    assert requests[0].samples[0].tokens == apart.samples[0].tokens == want
    # A conversation goes on: the answer is in the cache, too.
    text = prompts[1] + requests[1].samples[0].tokens
    again = engine.submit(text + ids(64, 9), sampling=sampling())
    finish(engine)
    assert again.cached_tokens == 128 and engine.stats()["computed_tokens"] - computed == len(text) + 64 - 128 + NEW - 1
    engine.forget()
    assert engine.stats()["pages_idle"] == 0
    last = engine.submit(prompts[0], sampling=sampling())
    finish(engine)
    assert last.cached_tokens == 0 and last.samples[0].tokens == want


def test_changed_weights(model):
    model = copy.deepcopy(model)
    engine, prompt = Engine(model, cache_tokens=512), ids(130, 3)
    before = texts(engine, [prompt])[0]
    with torch.no_grad():
        model.model.layers[1].self_attn.kv_b_proj.weight.mul_(-1)
    engine.forget()
    after = model.generate(torch.tensor([prompt]), max_new_tokens=NEW, eos_token_ids=[])[0, 130:].tolist()
    assert texts(engine, [prompt])[0] == after != before


def test_logits_that_are_not_finite_fail_one_request_only(model, alone):
    model = copy.deepcopy(model)
    bad = ids(260, 3)
    bad[70] = 11
    good = [[token % 11 for token in prompt] for prompt in PROMPTS]
    options = dict(logit_bias={11: -1e9})
    want = texts(Engine(model, cache_tokens=4096), good, **options)
    with torch.no_grad():
        model.model.embed_tokens.weight[11] = torch.nan
    engine = Engine(model, cache_tokens=4096, max_batch_tokens=100)
    requests = [engine.submit(prompt, sampling=sampling(**options)) for prompt in good[:8]]
    failing = engine.submit(bad, sampling=sampling(temperature=1.0), n=3)
    requests += [engine.submit(prompt, sampling=sampling(**options)) for prompt in good[8:]]
    finish(engine)
    assert [request.samples[0].tokens for request in requests] == want
    assert [sample.finish_reason for sample in failing.samples] == ["error"] * 3
    with pytest.raises(RuntimeError, match="logits must be finite, got NaN or infinity"):
        failing.result()
    assert len(engine.pool.find(failing.samples[0].keys)) == 0


def test_penalties_beyond_float32_fail_one_request_only(model, alone):
    single, most = copy.deepcopy(model).float(), float(torch.finfo(torch.float32).max)
    engine = Engine(single, cache_tokens=1024)
    failing = engine.submit(PROMPTS[0], sampling=sampling(presence_penalty=-most, frequency_penalty=-most))
    other = engine.submit(PROMPTS[1], sampling=sampling(temperature=1.0, top_p=5e-324, top_k=1))
    finish(engine)
    assert (failing.samples[0].finish_reason, len(failing.samples[0].tokens)) == ("error", 1)
    assert other.result() == [alone[1]] and "penalties or a bias that float32 cannot add" in failing.error


def test_ends(model, alone):
    engine, prompt = Engine(model, cache_tokens=512, speculative=True), PROMPTS[3]
    stop = alone[3][3]
    first = alone[3].index(stop)
    request = engine.submit(prompt, sampling=sampling(eos_token_ids=[stop, 300]))
    assert list(request) == alone[3][: first + 1] and request.samples[0].finish_reason == "stop"
    request = engine.submit(torch.tensor([prompt]), sampling=sampling(max_new_tokens=2))
    assert list(request) == alone[3][:2] and request.samples[0].finish_reason == "length"
    request = engine.submit(ids(510, 0), sampling=sampling(max_new_tokens=None))
    assert len(list(request)) == 2  # the context
    request = engine.submit(ids(63, 0), sampling=sampling(max_new_tokens=1))
    assert len(list(request)) == 1
    tiny_cache = Engine(model, cache_tokens=70)
    assert len(list(tiny_cache.submit([1] * 60, sampling=sampling(max_new_tokens=None)))) == 4
    finish(engine)
    finish(tiny_cache)


def test_logprobs(model, alone):
    engine, prompt = Engine(model, cache_tokens=2048, speculative=True), PROMPTS[2]
    plain = engine.submit(prompt, sampling=sampling(logprobs=3))
    other = engine.submit(prompt, sampling=sampling(logprobs=0, temperature=3.0, logit_bias={1: 9.0}, seed=1))
    finish(engine)
    assert plain.samples[0].tokens == alone[2]
    for sample in (*plain.samples, *other.samples):
        text = torch.tensor([prompt + sample.tokens])
        with torch.no_grad():
            want = model(text)[0, len(prompt) - 1 : -1].log_softmax(-1)
        assert len(sample.logprobs) == NEW
        for row, token, got in zip(want, sample.tokens, sample.logprobs):
            assert got.logprob == pytest.approx(float(row[token]), abs=1e-9)
            top = row.topk(3) if sample.request is plain else row.topk(0)
            assert [token for token, _ in got.top] == top.indices.tolist()
            assert [value for _, value in got.top] == pytest.approx(top.values.tolist(), abs=1e-9)


# Threads.


def test_requests_from_many_threads(model, alone):
    """One thread steps; others submit, read, cancel and disappear."""
    with Engine(model, cache_tokens=1024) as engine:
        got, updates = [None] * 16, []

        def serve(k):
            request = engine.submit(PROMPTS[k], sampling=sampling(), on_update=lambda r: updates.append(r.number))
            if k % 4 == 3:
                next(iter(request))
                request.cancel()
            got[k] = list(request)

        threads = [threading.Thread(target=serve, args=(k,)) for k in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for k, text in enumerate(got):
            assert text == alone[k][: len(text)] and (len(text) == NEW or k % 4 == 3)
        assert set(updates) == set(range(16))
        waiting = engine.submit(PROMPTS[2], sampling=sampling(max_new_tokens=300))
        next(iter(waiting))
    assert waiting.samples[0].finish_reason == "cancelled" and len(waiting.result()[0]) < 300
    assert engine.stats()["pages_held"] == 0
    with pytest.raises(RuntimeError, match="submit after close"):
        engine.submit([1])
    with pytest.raises(RuntimeError, match="start was called before, or close"):
        engine.start()


def test_threads_that_wait_do_the_steps(model, alone):
    """Without a thread of the engine's own."""
    engine, got = Engine(model, cache_tokens=1024), {}

    def serve(k):
        got[k] = list(engine.submit(PROMPTS[k], sampling=sampling()))

    threads = [threading.Thread(target=serve, args=(k,)) for k in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [got[k] for k in range(6)] == alone[:6]


@pytest.mark.parametrize("started", [False, True])
def test_faults_end_all_requests(started, model, monkeypatch):
    engine = Engine(model, cache_tokens=512)
    first = engine.submit(PROMPTS[2], sampling=sampling(), n=2)
    waiting = engine.submit(ids(400, 0), sampling=sampling())
    engine.step()
    monkeypatch.setattr(engine, "_extend", lambda works: 1 / 0)
    if started:
        engine.start()
    else:
        with pytest.raises(ZeroDivisionError):
            engine.step()
    for request in (first, waiting):
        with pytest.raises(RuntimeError, match="ZeroDivisionError: division by zero"):
            request.result()
    engine.check()
    assert engine.stats()["pages_held"] == engine.stats()["pages_idle"] == 0
    if started:
        with pytest.raises(RuntimeError, match="submit after ZeroDivisionError"):
            engine.submit([1])
    else:
        monkeypatch.undo()
        assert len(engine.submit([1], sampling=sampling()).result()[0]) == NEW
    engine.close()


def test_fault_of_a_callback_ends_its_request(model, alone):
    engine = Engine(model, cache_tokens=512)
    faulty = engine.submit(PROMPTS[0], sampling=sampling(), on_update=lambda request: 1 / 0)
    other = engine.submit(PROMPTS[1], sampling=sampling())
    assert other.result() == [alone[1]]
    with pytest.raises(RuntimeError, match="on_update raised ZeroDivisionError"):
        faulty.result()
    finish(engine)


# The scheduler, with a model that is a function of the ids.


class Hashing(Engine):
    """The next token is a hash of all ids before it, rows of the cache hold ids, and a third of all drafts is right.
    Each pass reads the cache where attention would, and must find the ids of its samples."""

    def _extend(self, works):
        assert len({work.sample.row for work in works}) == len(works)
        assert sum(len(work.tokens) for work in works) <= self.scheduler.max_batch_tokens
        self.tokens = sum(len(work.tokens) for work in works)
        page, table, written = self.pool.pages[0, ..., 0], self.pool.block_table, []
        for sample, tokens, _ in works:
            places = torch.arange(sample.computed, sample.computed + len(tokens))
            target = table[sample.row, places // PAGE_SIZE].long(), places % PAGE_SIZE
            page[target] = torch.tensor(tokens, dtype=page.dtype)
            written += (target[0] * PAGE_SIZE + target[1]).tolist()
        assert len(set(written)) == len(written)
        logits = []
        for work in works:
            sample, end = work.sample, work.sample.computed + len(work.tokens)
            places = torch.arange(end)
            seen = page[table[sample.row, places // PAGE_SIZE].long(), places % PAGE_SIZE].int().tolist()
            assert seen == (sample.ids + work.tokens[len(work.tokens) - work.drafts :])[:end]
            if work.chooses:
                logits += [following(seen[: end - k]) for k in range(work.drafts, -1, -1)]
        hidden = torch.zeros(1, 1, 1)
        return torch.nn.functional.one_hot(torch.tensor(logits, dtype=torch.int64), 12).double(), hidden, None

    def _draft(self, hidden, following_tokens, going, last, step):
        assert len(going) == len(last) and len(following_tokens) == self.tokens
        for sample in going:
            right = following(sample.ids)
            sample.drafts = [right if right % 3 else 0, following([*sample.ids, right])]


def following(text):
    return zlib.crc32(bytes(text)) % 12


def continued(prompt, new):
    text = list(prompt)
    for _ in range(new):
        text.append(following(text))
    return text[len(prompt) :]


def test_few_pages_do_not_thrash(model):
    """24 requests of 65 to 88 tokens that grow by two pages, in 16 pages. If samples were admitted whenever there are
    pages for their prompts, there would be 18 preemptions."""
    engine = Hashing(model, cache_tokens=16 * PAGE_SIZE)
    prompts = [ids(65 + k, k) for k in range(24)]
    got = texts(engine, prompts, max_new_tokens=130)
    assert got == [continued(prompt, 130) for prompt in prompts]
    assert 0 < engine.stats()["preemptions"] <= 8


def test_the_oldest_request_is_never_preempted(model):
    engine = Hashing(model, cache_tokens=6 * PAGE_SIZE, max_batch_tokens=8)
    requests = [engine.submit(ids(10, k), sampling=sampling(max_new_tokens=150)) for k in range(8)]
    while any(not request.done for request in requests):
        oldest = next(request.samples[0] for request in requests if not request.done)
        engine.step()
        engine.check()
        assert oldest.row >= 0 or oldest.finish_reason
    assert engine.stats()["preemptions"] > 0
    assert [request.samples[0].tokens for request in requests] == [continued(ids(10, k), 150) for k in range(8)]


def test_a_request_fails_while_a_sample_of_it_is_recomputed(model, monkeypatch):
    engine = Hashing(model, cache_tokens=1024, max_batch_tokens=21, speculative=True)
    request = engine.submit(ids(100, 0), sampling=sampling(max_new_tokens=30), n=2)
    while not all(sample.tokens for sample in request.samples):
        engine.step()
    engine.forget()
    engine.scheduler.preempt(request.samples[0])
    engine.step()
    assert request.samples[0].pending > 21 and request.samples[1].finish_reason is None
    extend = engine._extend
    monkeypatch.setattr(engine, "_extend", lambda works: (extend(works)[0] * torch.nan, torch.zeros(1, 1, 1), None))
    engine.step()
    assert [sample.finish_reason for sample in request.samples] == ["error", "error"]
    monkeypatch.undo()
    assert texts(engine, [ids(100, 0)], max_new_tokens=30) == [continued(ids(100, 0), 30)]


REQUESTS = st.lists(
    st.tuples(
        st.integers(0, 2),  # one of three texts
        st.integers(1, 150),  # length of its part
        st.integers(1, 150),  # new tokens
        st.integers(1, 3),  # samples
        st.integers(0, 30),  # step of the submission
        st.none() | st.integers(0, 60),  # step of the end by cancel()
    ),
    min_size=1,
    max_size=12,
)
TEXTS = [ids(150, 0), ids(150, 0)[:100] + ids(50, 1), ids(150, 2)]


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(requests=REQUESTS, pages=st.integers(5, 14), batch=st.integers(3, 90), speculative=st.booleans())
def test_any_schedule(requests, pages, batch, speculative, model):
    engine = Hashing(model, cache_tokens=pages * PAGE_SIZE, max_batch_tokens=batch, speculative=speculative)
    submitted, step, remain = [None] * len(requests), 0, True
    while remain or None in submitted:
        for i, (text, length, new, n, begin, end) in enumerate(requests):
            if begin == step:
                options = sampling(max_new_tokens=new)
                submitted[i] = engine.submit(TEXTS[text][:length], sampling=options, n=n)
            if submitted[i] is not None and end == step:
                submitted[i].cancel()
        remain, step = engine.step(), step + 1
        engine.check()
        assert step < 5000
    finish(engine)
    for (text, length, new, _, _, end), request in zip(requests, submitted):
        whole = continued(TEXTS[text][:length], new)
        for sample in request.samples:
            assert sample.finish_reason == "length" or (end is not None and sample.finish_reason == "cancelled")
            assert sample.tokens == (whole if sample.finish_reason == "length" else whole[: len(sample.tokens)])


@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    ends=st.lists(st.none() | st.integers(0, 10), min_size=9, max_size=9),  # of each sample: the step of its cancel()
    pages=st.integers(6, 12),
    batch=st.integers(30, 200),
    speculative=st.booleans(),
)
def test_cancelled_samples_leave_the_others_as_each_is_alone(ends, pages, batch, speculative, model, alone):
    engine = Engine(model, cache_tokens=pages * PAGE_SIZE, max_batch_tokens=batch, speculative=speculative)
    step, remain = 0, True
    requests = [engine.submit(PROMPTS[k], sampling=sampling(), n=1 + k % 2) for k in range(6)]
    samples = [(sample, alone[k]) for k, request in enumerate(requests) for sample in request.samples]
    while remain:
        for (sample, _), end in zip(samples, ends):
            if end == step:
                sample.cancel()
        remain, step = engine.step(), step + 1
        engine.check()
        assert step < 200
    assert engine.stats()["pages_held"] == 0
    for (sample, text), end in zip(samples, ends):
        assert sample.finish_reason == "length" or (end is not None and sample.finish_reason == "cancelled")
        assert sample.tokens == (text if sample.finish_reason == "length" else text[: len(sample.tokens)])


# Kernels.


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_kernels_in_the_ragged_pass(arch, monkeypatch):
    """Chunks, next tokens and drafts in one launch: the logits err at most twice as much as with the reference."""
    torch.manual_seed(1)
    sizes = dict(kv_lora_rank=512, qk_rope_head_dim=64, num_attention_heads=3, num_hidden_layers=1, vocab_size=256)
    model = tiny.model(first_k_dense_replace=9, num_nextn_predict_layers=1, **sizes).bfloat16()
    prompts, calls = [ids(length, length, 256) for length in (20, 7, 13)], []

    def run(model):
        """The requests enter one after another; what they chose, and the log-probabilities there."""
        engine = Engine(model, cache_tokens=512, max_batch_tokens=12, speculative=True)
        requests = [engine.submit(prompt, sampling=sampling(max_new_tokens=3, logprobs=0)) for prompt in prompts]
        finish(engine)
        return [request.samples[0] for request in requests]

    def errors(samples):
        for prompt, sample in zip(prompts, samples):
            with torch.no_grad():
                rows = double(torch.tensor([prompt + sample.tokens]))[0, len(prompt) - 1 : -1].log_softmax(-1)
            for row, token, got in zip(rows, sample.tokens, sample.logprobs):
                yield abs(float(row[token]) - got.logprob)

    double = copy.deepcopy(model).double()
    budget = 2 * max(errors(run(model)))
    original = attention.mla_decode

    def emulated(*args, **options):
        before = k2kernels.launch_count("mla_decode")
        with k2kernels.emulated(arch, seed=2):
            result = original(*args, **options)
        assert k2kernels.launch_count("mla_decode") > before
        calls.append(options["cu_seqlens_q"].diff().tolist())
        return result

    monkeypatch.setattr(attention, "mla_decode", emulated)
    assert 0 < max(errors(run(model))) <= budget
    assert any(1 < len(lengths) and 2 in lengths and max(lengths) > 3 for lengths in calls), calls


# Arguments.


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(cache_tokens=63), "Engine: cache_tokens must be an int >= 64, got 63"),
        (dict(max_batch_tokens=2, speculative=True), "max_batch_tokens must be an int >= 3, got 2"),
        (dict(speculative=1), "speculative must be True or False, got 1"),
        (dict(cache_dtype="int4"), "cache_dtype must be one of 'auto', 'fp8', got 'int4'"),
        (dict(cuda_graphs=None), "cuda_graphs must be True or False, got None"),
    ],
)
def test_bad_arguments_of_the_engine(options, message, model):
    with pytest.raises((TypeError, ValueError), match=message):
        Engine(model, **{"cache_tokens": 512, **options})


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(prompt_ids=[]), r"prompt_ids must be 1 or more ints, got \[\]"),
        (dict(prompt_ids="abc"), "prompt_ids must be 1 or more ints, got 'abc'"),
        (dict(prompt_ids=[1.0]), r"prompt_ids must be 1 or more ints, got \[1.0\]"),
        (
            dict(prompt_ids=torch.zeros(2, 3).long()),
            r"prompt_ids must be int64 or int32 \[T\] or \[1, T\], got \[2, 3\]",
        ),
        (dict(prompt_ids=[1, 12]), r"ids must be 0 to 11, got \[12\]"),
        (dict(sampling=Sampling(logit_bias={12: 1.0})), r"ids must be 0 to 11, got \[12\]"),
        (dict(sampling=dict(seed=1)), "sampling must be a Sampling, got dict"),
        (dict(n=0), "n must be an int >= 1, got 0"),
        (dict(salt=None), "salt must be a str, got None"),
        (dict(on_update=1), "on_update must be a function or None, got 1"),
        (
            dict(sampling=Sampling(max_new_tokens=126)),
            r"must be at most 128 tokens together \(the pages of cache_tokens\), got 129",
        ),
        (dict(prompt_ids=[1] * 128), r"at most 128 tokens together .*, got 129"),
    ],
)
def test_bad_requests(options, message, model):
    engine = Engine(model, cache_tokens=128)
    with pytest.raises((TypeError, ValueError), match=f"Engine.submit: .*{message}"):
        engine.submit(**{"prompt_ids": [1, 2, 3], **options})
    assert not engine.step()


def test_a_text_beyond_the_context(model):
    with pytest.raises(ValueError, match=r"at most 512 tokens together \(max_position_embeddings\), got 513"):
        Engine(model, cache_tokens=4096).submit([1] * 13, sampling=Sampling(max_new_tokens=500))


def test_several_samples_are_iterated_one_by_one(model):
    request = Engine(model, cache_tokens=512).submit([1], sampling=sampling(), n=2)
    with pytest.raises(ValueError, match="iterate over one of the 2 samples"):
        iter(request)
    assert len(list(request.samples[1])) == NEW


def test_the_examples_of_the_page(capsys):
    page = Path(__file__).parents[2].joinpath("docs/engine.md").read_text()
    names = {}
    first, second = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(first, names)
    assert names["request"].done and names["other"].samples[0].finish_reason == "cancelled"
    assert [sample.finish_reason for sample in names["four"].samples] == ["length"] * 4
    assert len(capsys.readouterr().out.splitlines()) == 8 + 4 + 1
    assert names["engine"].stats()["pages_held"] == 0
    exec(second, names)
    assert names["request"].cached_tokens == 128
