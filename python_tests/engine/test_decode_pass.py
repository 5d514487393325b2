"""The decoding pass of `generate`: replayed from recordings, and with the attention kernel in the emulator."""

import contextlib
import copy
import warnings

import pytest
import tiny
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import k2kernels
from k2kernels.engine import replay
from k2kernels.engine.replay import Replay
from k2kernels.engine.session import Session, draft
from k2kernels.model import attention
from k2kernels.model.moe import Experts, Moe
from k2kernels.ops import grouped_gemm
from k2kernels.ops.moe import moe_combine, moe_dispatch
from k2kernels.testing.compare import check_close

PROMPT = torch.arange(3 * 20).view(3, 20) * 11 % 256
GROUPED_GEMM = "k2kernels::grouped_gemm"  # its reference reads the sizes of the groups, its kernel does not


class Log(TorchDispatchMode):
    """Notes the operations in a `with` block, and what the tensors that they write into held before."""

    def __init__(self):
        super().__init__()
        self.calls, self.before = [], {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        for declared, value in zip(function._schema.arguments, args):
            if declared.alias_info is not None and declared.alias_info.is_write:
                self.before.setdefault(id(value), (value, value.clone()))
        result = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, result))
        return result


class Recorder:
    """Does with operations on a CPU what CudaRecorder does with launches on a GPU.

    A recording consists of operations and the tensors that they read and wrote. Playing it runs no Python of the model,
    and puts each result where it was at the time of recording.
    """

    def __init__(self):
        self.recordings, self.plays = 0, 0

    def waits(self, run):
        with Log() as log:
            run()
        return any(
            function.name() == GROUPED_GEMM and grouped_gemm._unserved(*args[:2]) is not None
            for function, args, *_ in log.calls
        )

    def record(self, runs):
        self.recordings += 1
        with Log() as log:
            for run in runs:
                run()
        for tensor, old in log.before.values():  # recording executes nothing
            tensor.copy_(old)

        def play():
            self.plays += 1
            for function, args, kwargs, result in log.calls:
                for old, new in zip(tree_leaves(result), tree_leaves(function(*args, **kwargs))):
                    if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)

        return play


@contextlib.contextmanager
def recorded():
    """Sessions made in the block record as on a GPU; yields the list of their recorders."""
    made, original = [], Session.__init__

    def init(session, *args):
        original(session, *args)
        session.recorder = Recorder()
        made.append(session.recorder)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Session, "__init__", init)
        yield made


@pytest.fixture(autouse=True)
def _warnings_come_again():
    replay._warn_once.cache_clear()


DENSE = dict(first_k_dense_replace=9)


@pytest.mark.filterwarnings("ignore:generate")
@pytest.mark.parametrize("changes", [{}, dict(num_nextn_predict_layers=2)], ids=["greedy", "speculative"])
def test_replayed_generation_is_the_same(changes):
    """Lengths, pages and tokens differ from pass to pass and rows end; nothing of that is frozen in a recording."""
    model = tiny.model(**changes)
    mask = torch.ones(3, 20, dtype=torch.int64)
    mask[0, :15] = mask[2, :1] = 0
    options = dict(max_new_tokens=50, attention_mask=mask, speculative="num_nextn_predict_layers" in changes)
    free = model.generate(PROMPT, eos_token_ids=[], **options)
    some = [int(free[0, 40]), int(free[1, 50])]
    for stops, want in (([], free), (some, model.generate(PROMPT, eos_token_ids=some, **options))):
        with recorded() as recorders:
            got = model.generate(PROMPT, eos_token_ids=stops, **options)
        assert torch.equal(got, want)
        assert recorders[0].recordings > 0 and recorders[0].plays > 20


@torch.no_grad()
def test_batch_shrinks_by_powers_of_two():
    model = tiny.model(**DENSE)
    session = Session(model, [3, 5, 2, 9, 4], 8, 0, "auto")
    session.prefill(9)
    for rows, slots in (([0, 1, 2, 3, 4], 5), ([0, 1, 2, 4], 4), ([1, 2, 4], 4), ([2, 4], 2), ([4], 1)):
        decode = session.decode(rows, torch.zeros(len(rows), 1, dtype=torch.int64))
        assert decode.logits.shape == (slots, 1, 256)
    assert sorted(session.passes) == [(1, 1), (2, 1), (4, 1), (5, 1)]


@torch.no_grad()
@pytest.mark.parametrize("width", [1, 3])
def test_one_pass_serves_other_lengths_and_fewer_rows(width):
    """Each result equals the training path on the whole text, whatever the buffers held before; idle slots write
    nothing."""
    model = tiny.model(**DENSE)
    lengths = [61, 5, 30, 126]
    text = torch.randint(0, 256, (4, 200))
    session = Session(model, lengths, 40, 0, "auto")
    padded = torch.stack([torch.cat([row[:n], row.new_zeros(126 - n)]) for row, n in zip(text, lengths)])
    model.model(padded, session.prefill(126))
    addresses = None
    for rows in ([0, 1, 2, 3], [3, 1, 0], [1, 3, 2], [0, 1, 2, 3]):
        before = session.cache.pages.clone()
        tokens = torch.stack([text[row, session.lengths[row] : session.lengths[row] + width] for row in rows])
        decode = session.decode(rows, tokens)
        for slot, row in enumerate(rows):
            end = session.lengths[row] + width
            torch.testing.assert_close(
                decode.logits[slot], model(text[row : row + 1, :end])[0, -width:], atol=1e-4, rtol=1e-4
            )
        changed = (session.cache.pages != before).any(-1).any(0).sum()
        assert changed == len(rows) * width
        assert (decode.step.seq_lens[len(rows) :] == 0).all() and (
            decode.step.positions[len(rows) * width :] == -1
        ).all()
        session.advance(rows, [width] * len(rows))
        step = decode.step
        now = [t.data_ptr() for t in (decode.tokens, decode.hidden, decode.logits, step.seq_lens, step.block_table)]
        assert addresses in (None, now)
        addresses = now
    assert list(session.passes) == [(4, width)]


@torch.no_grad()
def test_the_host_reads_nothing_back():
    """Fake tensors have shapes but no numbers: reading one fails."""
    with FakeTensorMode():
        model = tiny.model(num_nextn_predict_layers=1)
        session = Session(model, [5, 70, 9], 8, 1, "auto")
        session.prefill(70)
        decode = session.decode([0, 2, 1], torch.zeros(3, 2, dtype=torch.int64))
        assert decode.logits.shape == (3, 2, 256)
        last = torch.zeros(3, dtype=torch.int64)
        assert draft(model, decode.hidden, decode.tokens, last, decode.step).shape == (3, 1)
        with pytest.raises(DataDependentOutputException):
            decode.logits.argmax().item()


def test_what_cannot_be_recorded_is_said_once():
    model = tiny.model()
    with recorded() as recorders, pytest.warns(UserWarning) as warned:
        for _ in range(2):
            model.generate(PROMPT, max_new_tokens=4, eos_token_ids=[])
    assert [str(w.message) for w in warned] == [
        "generate: 3 of 10 parts of a decoding pass, the first of them layers.1.mlp, wait for the device; they are "
        "launched between CUDA graphs of the others"
    ]
    assert [r.recordings for r in recorders] == [4, 4]  # what stands before, between and after three layers of experts


def keep_experts_in_fp8(model):
    for experts in (module for module in model.modules() if isinstance(module, Experts)):
        for name in ("gate_up_proj", "down_proj"):
            codes, scales = k2kernels.quantize_128x128(getattr(experts, name).detach())
            setattr(experts, name, torch.nn.Parameter(codes, requires_grad=False))
            setattr(experts, f"{name}_scale_inv", torch.nn.Parameter(scales, requires_grad=False))


@pytest.mark.parametrize("experts", ["bfloat16", "fp8"])
def test_a_pass_with_experts_is_one_recording(experts):
    """Where kernels multiply: what they must know of the routing stays on the device."""
    model = tiny.model("deepseek").bfloat16()
    if experts == "fp8":
        keep_experts_in_fp8(model)
    options = dict(max_new_tokens=30, eos_token_ids=[])
    want = model.generate(PROMPT, **options)
    with recorded() as recorders, warnings.catch_warnings():
        warnings.simplefilter("error")
        got = model.generate(PROMPT, **options)
    assert torch.equal(got, want)
    assert recorders[0].recordings == 1 and recorders[0].plays > 20


class Exchange:
    """All experts are here, until `fails`: from then on what comes back is NaN, which `check` alone tells."""

    fails = False

    def dispatch(self, x, indices, weights, **options):
        return moe_dispatch(x, indices, weights, num_experts=16, **options)

    def combine(self, y, handle, **options):
        return moe_combine(y, handle, **options)

    def check(self):
        if self.fails:
            raise k2kernels.PeerTimeout("rank 1 did not send", ranks=(1,))


@pytest.mark.filterwarnings("ignore:generate")
@pytest.mark.parametrize("speculative", [False, True])
@pytest.mark.parametrize("after", [0, 3])
def test_a_fault_in_a_replayed_pass_is_raised_before_its_token_gets_out(after, speculative):
    """No Python of the exchange runs in a replay."""
    model, exchange = tiny.model("deepseek", num_nextn_predict_layers=int(speculative)), Exchange()
    for layer in model.modules():
        if isinstance(layer, Moe):
            layer.exchange = exchange
    free = model.generate(PROMPT, max_new_tokens=20, eos_token_ids=[])
    columns = []

    def on_token(column):
        columns.append(column)
        exchange.fails = len(columns) > after  # in the pass that follows

    with recorded() as recorders, pytest.raises(k2kernels.PeerTimeout, match="rank 1 did not send"):
        model.generate(PROMPT, max_new_tokens=20, eos_token_ids=[], speculative=speculative, on_token=on_token)
    assert torch.equal(torch.stack(columns, 1), free[:, 20 : 20 + len(columns)]) and len(columns) < 8
    assert after == 0 or recorders[0].plays > 0


class Refusing(Recorder):
    def record(self, runs):
        raise RuntimeError("operation not permitted when stream is capturing")


def test_a_recording_that_fails_is_said_and_launched():
    done = []
    parts = [(name, lambda name=name: done.append(name)) for name in ("first", "second")]
    passes = Replay(parts, Refusing())
    passes()
    with pytest.warns(UserWarning, match="generate: first to second cannot be recorded .*: operation not permitted"):
        passes()
    passes()
    assert done == ["first", "second"] * 3


# The kernel of mla_decode in the place of the reference.


@pytest.fixture
def in_emulator(monkeypatch):
    """A function that sends the model's attention over the cache to the emulator; its calls are in the list given."""

    def patch(arch, seed):
        calls = []

        def emulated_mla_decode(q, kv_cache, block_table, seq_lens, **options):
            before = k2kernels.launch_count("mla_decode")
            with k2kernels.emulated(arch, seed=seed):
                result = k2kernels.mla_decode(q, kv_cache, block_table, seq_lens, **options)
            assert k2kernels.launch_count("mla_decode") > before
            assert all(x.is_contiguous() for x in (q, block_table, seq_lens)) and q.data_ptr() % 16 == 0  # no copies
            calls.append((q.shape[1], kv_cache.dtype))
            return result

        monkeypatch.setattr(attention, "mla_decode", emulated_mla_decode)
        return calls

    return patch


def first_pass(model, **options):
    """The text, and tokens [B, s_q] and logits [B, s_q, vocab] of the first decoding pass."""
    seen = []
    hooks = [
        model.model.embed_tokens.register_forward_hook(lambda m, args, out: seen.append(args[0].clone())),
        model.lm_head.register_forward_hook(lambda m, args, out: seen.append(out.clone())),
    ]
    text = model.generate(PROMPT, eos_token_ids=[], **options)
    for hook in hooks:
        hook.remove()
    first = next(i for i, x in enumerate(seen) if i and x.dtype == torch.int64 and seen[i + 1].dim() == 3)
    return text, seen[first], seen[first + 1].float()


@torch.no_grad()
@pytest.mark.parametrize("drafts", [0, 1, 2, 3])
@pytest.mark.parametrize("cache_dtype", ["auto", "fp8"])
def test_kernel_in_generate(cache_dtype, drafts, in_emulator):
    """The likeliest tokens come out, with logits within twice the error that bfloat16 makes with the reference."""
    sizes = dict(kv_lora_rank=512, qk_rope_head_dim=64, num_attention_heads=3, num_hidden_layers=2, vocab_size=256)
    model = tiny.model("kimi", num_nextn_predict_layers=drafts, **sizes, **DENSE).bfloat16()
    options = dict(max_new_tokens=6, speculative=drafts > 0)
    _, tokens, want = first_pass(model, cache_dtype=cache_dtype, **options)
    _, _, unquantized = first_pass(model, **options)
    calls = in_emulator(("sm_80", "sm_90a")[drafts % 2], drafts)  # all four schedules
    got_text, got_tokens, got = first_pass(model, cache_dtype=cache_dtype, **options)
    assert set(calls) == {(1 + drafts, torch.bfloat16 if cache_dtype == "auto" else torch.uint8)}
    assert len(calls) >= 2 + drafts  # layers
    assert torch.equal(got_tokens, tokens)

    double = copy.deepcopy(model).double()
    exact = double(torch.cat([PROMPT, tokens], dim=1))[:, -1 - drafts :]
    check_close(got, exact, same_precision=want, name="logits")
    error = 2 * (unquantized - exact).abs().max()  # of bfloat16, without that of an FP8 cache
    check_close(got, want.double(), budget=error, name="logits beside the reference's")
    # Near ties may go either way, here and in the reference.
    logits = double(got_text)[:, 19:-1]
    missed = logits.amax(-1) - logits.gather(-1, got_text[:, 20:, None]).squeeze(-1)
    assert missed.max() <= 2 * (got - exact).abs().max() and (missed == 0).float().mean() > 0.5
