"""Prompts in chunks, and more tokens for rows that hold some: attention over the cache in both forms."""

import copy
import gc
import json

import checkpoints
import pytest
import tiny
import torch
from torch.profiler import ProfilerActivity, profile

import k2kernels
from k2kernels.engine.session import Session
from k2kernels.model import K2Config, K2Model, attention, extend
from k2kernels.model.attention import Prefill
from k2kernels.model.extend import Absorbed, Expanded, Extend
from k2kernels.model.rope import Rope
from k2kernels.ops.mla_cache import mla_append
from k2kernels.ops.mla_decode import MlaOutput
from k2kernels.ops.mla_prefill import mla_prefill
from k2kernels.testing.compare import check_close

DENSE = dict(first_k_dense_replace=9)
# Up to 67 new tokens of a sequence are absorbed with the tiny sizes, and expanded beyond.
CASES = [(1, [40, 3, 17]), (7, [75, 3, 20]), *[(chunk, [330, 3, 128, 200]) for chunk in (64, 128, 200)]]


def prompts(lengths, vocab=256):
    """Ids and mask, padded on the left."""
    batch, mask = torch.randint(0, vocab, (len(lengths), max(lengths))), torch.ones(len(lengths), max(lengths))
    for row, length in enumerate(lengths):
        mask[row, : max(lengths) - length] = 0
    return batch, mask


def generated(model, batch, mask, **options):
    """The text, and the logits after the prompts [B, vocab]."""
    seen = []
    hook = model.lm_head.register_forward_hook(lambda module, args, out: seen.append(out))
    options = {**dict(max_new_tokens=5, eos_token_ids=[], attention_mask=mask), **options}
    text = model.generate(batch, **options)
    hook.remove()
    assert seen[0].shape == (len(batch), model.config.vocab_size)  # there are none before the last tokens
    return text, seen[0].double()


@pytest.mark.parametrize(
    "name, chunk, lengths",
    [*[("kimi", *case) for case in CASES], ("deepseek", *CASES[4]), ("moonlight", *CASES[2])],
    ids=str,
)
def test_chunked_prompts_in_float64(name, chunk, lengths):
    """Both ways compute one formula and round at different places, which moves logits by 1e-13. A key more or less
    moves them by 1e-3 and more."""
    model, (batch, mask) = tiny.model(name).double(), prompts(lengths)
    want, logits = generated(model, batch, mask)
    got, chunked = generated(model, batch, mask, prefill_chunk=chunk)
    assert torch.equal(got, want)
    check_close(chunked, logits, budget=1e-10, name="logits")


@torch.no_grad()
@pytest.mark.parametrize("chunk, lengths", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunked_prompts_err_as_whole_ones(dtype, chunk, lengths):
    """Attention over whole prompts rounds q, the keys and values and its result; the absorbed form q twice and the
    result twice, beside the cached rows: sqrt(5/3) of the error; 2 with what one sample may deviate. Dense layers: near
    ties a rounding would send a token to another expert."""
    model, (batch, mask) = tiny.model(**DENSE).to(dtype), prompts(lengths)
    double = copy.deepcopy(model).double()
    want, logits = generated(model, batch, mask)
    _, exact = generated(double, batch, mask, max_new_tokens=1)
    got, chunked = generated(model, batch, mask, prefill_chunk=chunk)
    assert (chunked - exact).norm() <= 2 * (logits - exact).norm()
    if dtype == torch.float32:
        assert torch.equal(got, want)
        return
    for row, length in enumerate(lengths):  # near ties may go either way
        text = got[row : row + 1, max(lengths) - length :]
        after = double(text)[0, length - 1 : -1]
        missed = after.amax(-1) - after.gather(-1, text[0, length:, None]).squeeze(-1)
        assert missed.max() <= 4 * (logits - exact).abs().max() and (missed == 0).float().mean() > 0.5


def test_which_form_takes_fewer_flops():
    """170 tokens of Kimi-K2 are absorbed, 171 expanded, over any past."""
    for config in (K2Config.preset("kimi-k2"), K2Config.preset("deepseek-v3"), tiny.config()):
        latent, rope = config.kv_lora_rank, config.qk_rope_head_dim
        nope, value = config.qk_nope_head_dim, config.v_head_dim
        for past in (10_000, 100_000):
            for new in range(1, 300):
                pairs = 2 * new * past
                absorbed = pairs * (latent + rope) + pairs * latent
                expanded = pairs * (nope + rope) + pairs * value + 2 * past * latent * (nope + value)
                assert extend._expands(config, new) == (expanded < absorbed)
    assert [extend._expands(K2Config.preset("kimi-k2"), new) for new in (170, 171)] == [False, True]


@torch.no_grad()
def whole(model, text):
    """Hidden states of a text [T] by the training path."""
    return model(text[None], return_hidden=True)[1][0]


def test_pieces_begin_where_blocks_of_keys_do():
    assert extend.EXPANDED_TOKENS % 128 == 0


@torch.no_grad()
def test_rows_that_hold_tokens_get_more():
    """Rows with few and with many new tokens, in any order, with decoding passes in between."""
    model, lengths = tiny.model().double(), [0] * 4
    text = torch.randint(0, 256, (4, 400))
    session = Session(model, [0] * 4, 400, 0, "auto")

    def extended(counts):
        rows = list(counts)
        hidden, step = session.extend(rows, [text[row, lengths[row] : lengths[row] + n] for row, n in counts.items()])
        parts = [hidden[0, place - n + 1 : place + 1] for place, n in zip(step.last.tolist(), counts.values())]
        for row, part in zip(rows, parts):
            lengths[row] += len(part)
            check_close(part, whole(model, text[row, : lengths[row]])[-len(part) :], budget=1e-10, name=f"row {row}")
        assert session.lengths == lengths
        return [type(part) for part in step.parts]

    assert extended({2: 5}) == [Absorbed]
    assert extended({0: 70, 1: 100, 2: 3, 3: 1}) == [Expanded, Absorbed]
    assert extended({3: 67, 1: 68, 0: 64, 2: 130}) == [Absorbed, Expanded, Absorbed, Expanded]
    tokens = torch.stack([text[row, lengths[row] : lengths[row] + 2] for row in (1, 2)])
    session.decode([1, 2], tokens)
    session.advance([1, 2], [2, 1])
    lengths[1], lengths[2] = lengths[1] + 2, lengths[2] + 1
    assert extended({2: 100, 1: 1}) == [Expanded, Absorbed]
    with pytest.raises(ValueError, match="tokens of row 0 must be at most max_tokens=400, got 434"):
        session.extend([0], [text[0, :300]])


@torch.no_grad()
@pytest.mark.parametrize("new", [5, 70])
def test_prompts_share_the_pages_of_their_prefix(new):
    """The block table of one prompt names pages that another filled."""
    model = tiny.model().double()
    text, other = torch.randint(0, 256, (2, 128 + new))
    other[:128] = text[:128]
    pages = torch.zeros(4, 6, 64, 64, dtype=torch.float64)
    absorbed = [layer.self_attn.absorbed(torch.float64) for layer in model.model.layers]

    def hidden(table, before, *texts):
        step = Extend(
            model.rope, pages, torch.tensor(table, dtype=torch.int32), absorbed, [before] * len(texts),
            [len(some) - before for some in texts],
        )  # fmt: skip
        return model.model(torch.cat([some[before:] for some in texts])[None], step)[0].split(step.last[0].item() + 1)

    hidden([[3, 1]], 0, text[:128])
    tails = hidden([[3, 1, 0, 5], [3, 1, 4, 2]], 128, text, other)
    for tail, all_of_it in zip(tails, (text, other)):
        check_close(tail, whole(model, all_of_it)[128:], budget=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("tokens", [128, 256])
def test_workspace_is_bounded(tokens, monkeypatch):
    """Short sequences share it, a long one fills it several times, in pieces that begin where blocks of keys do."""
    monkeypatch.setattr(extend, "EXPANDED_TOKENS", tokens)
    model = tiny.model().double()
    text, before, new = torch.randint(0, 256, (5, 480)), [30, 0, 0, 300, 20], [70, 68, 90, 180, 100]
    session = Session(model, [0] * 5, 480, 0, "auto")
    session.extend([0, 3, 4], [text[row, : before[row]] for row in (0, 3, 4)])
    sizes = []
    for layer in model.model.layers:
        layer.self_attn.kv_b_proj.register_forward_hook(lambda module, args, out: sizes.append(len(out)))
    hidden, step = session.extend(list(range(5)), [row[a : a + n] for row, a, n in zip(text, before, new)])
    pieces = [[len(piece.positions) for piece in part.pieces] for part in step.parts]
    assert (
        pieces
        == {
            128: [[100], [68], [90], [128, 128, 128, 96], [120]],
            256: [[168], [90], [256, 224], [120]],
        }[tokens]
    )
    assert sizes == [size for part in pieces for size in part] * model.config.num_hidden_layers
    for row, part in enumerate(hidden[0].split(new)):
        check_close(part, whole(model, text[row, : before[row] + new[row]])[before[row] :], budget=1e-10)


def blocked(q, kv, v, *, k_rope, cu_seqlens_q, cu_seqlens_k, **options):
    """`mla_prefill` of one sequence, 512 queries at a time: its scores are 512 x T."""
    outs = []
    for first in range(0, len(q), 512):
        queries = q[first : first + 512]
        seen = first + len(queries)
        cu = dict(cu_seqlens_q=torch.tensor([0, len(queries)]).int(), cu_seqlens_k=torch.tensor([0, seen]).int())
        outs.append(mla_prefill(queries, kv[:seen], v, k_rope=k_rope[:seen], **cu, **options).out)
    return MlaOutput(torch.cat(outs), None, None)


def peak_bytes(run):
    """The result of `run`, and the most bytes that tensors took at a time, those inside of ops included."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = run()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = torch.tensor([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]).cumsum(0)
    return result, int(live.max())


def test_memory_does_not_grow_with_the_prompt(monkeypatch):
    """Beside the cache, 2,048 and 8,192 tokens differ by their ids and by where their rows are. The tokens are those
    of one pass, whose attention goes block by block, as T x T scores would take 268 MB."""
    monkeypatch.setattr(extend, "EXPANDED_TOKENS", 1024)
    sizes = dict(kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, num_attention_heads=1)
    model = tiny.model(
        hidden_size=32, num_hidden_layers=2, intermediate_size=64, max_position_embeddings=20000, **DENSE, **sizes
    )
    batch = torch.randint(0, 256, (1, 8192))

    def chunked(length):
        result, peak = peak_bytes(lambda: generated(model, batch[:, :length], None, prefill_chunk=512, **new))
        return *result, peak - model.config.num_hidden_layers * (length + 64) * model.config.latent_dim * 4

    new = dict(max_new_tokens=2)
    *_, short = chunked(2048)
    got, logits, long = chunked(8192)
    assert 0 <= long - short <= 32 * (8192 - 2048), (short, long)
    monkeypatch.setattr(attention, "mla_prefill", blocked)
    want, whole_logits = generated(model, batch, None, **new)
    assert torch.equal(got, want)
    check_close(logits, whole_logits, budget=1e-4, name="logits")


@pytest.mark.parametrize("chunk, lengths", [(1, [9, 4, 2]), (6, [20, 11, 2]), (75, [80, 71, 2])], ids=str)
def test_drafts_are_those_after_whole_prompts(chunk, lengths):
    """The passes over the prompts fill the caches of both MTP layers."""
    model, (batch, mask) = tiny.model(num_nextn_predict_layers=2, vocab_size=12).double(), prompts(lengths, 12)
    options = dict(max_new_tokens=8, eos_token_ids=[], attention_mask=mask)
    text, heads = model.generate(batch, **options), []
    hook = model.lm_head.register_forward_hook(lambda module, args, out: heads.append(out))
    for more in ({}, dict(prefill_chunk=chunk)):
        heads.append(None)
        assert torch.equal(model.generate(batch, speculative=True, **options, **more), text)
    hook.remove()
    whole, chunked = heads[1:4], heads[heads.index(None, 1) + 1 :][:3]
    # The second layer cannot know what follows the end of a chunk that ends one token before the prompt.
    for got, want in zip(chunked[: 2 if chunk == 1 else 3], whole):
        check_close(got, want, budget=1e-10, name="logits")


def test_draws_are_those_after_whole_prompts():
    model, (batch, mask) = tiny.model().double(), prompts([90, 5, 40])
    options = dict(temperature=1.0, seed=3, max_new_tokens=12)
    want, _ = generated(model, batch, mask, **options)
    assert torch.equal(generated(model, batch, mask, prefill_chunk=33, **options)[0], want)


def test_fp8_cache():
    """Rows are read back as they were rounded, by either form: the size of chunks changes nothing, and a whole prompt,
    which reads its own keys exactly, differs by the rounding of FP8."""
    sizes = dict(kv_lora_rank=512, qk_rope_head_dim=64, num_attention_heads=2, num_hidden_layers=2)
    model, (batch, mask) = tiny.model(**sizes, **DENSE).double(), prompts([180, 60])
    _, exact = generated(model, batch, mask, max_new_tokens=1)
    several = [
        generated(model, batch, mask, cache_dtype="fp8", prefill_chunk=chunk, max_new_tokens=1)[1]
        for chunk in (16, 100, 180)
    ]
    assert [extend._expands(model.config, chunk) for chunk in (16, 100)] == [False, True]
    for logits in several:
        check_close(logits, several[0], budget=1e-10, name="logits")
    assert 1e-4 < (several[0] - exact).norm() / exact.norm() < 0.05


def test_model_kept_in_fp8(tmp_path):
    """Expanding quantises the cached latents as the pass over whole prompts does; the absorbed form takes the weight
    back to bfloat16, and errs less."""
    plain, kept = tmp_path / "plain", tmp_path / "fp8"
    sizes = dict(hidden_size=192, q_lora_rank=136, kv_lora_rank=128, num_attention_heads=2, num_hidden_layers=2)
    exact = tiny.model(**sizes, **DENSE, intermediate_size=128, moe_intermediate_size=128)
    exact.save_pretrained(plain)
    config = json.loads((plain / "config.json").read_text())
    stored = checkpoints.quantize(checkpoints.read(plain))
    checkpoints.write(kept, stored, {**config, "quantization_config": checkpoints.FP8_CONFIG})
    model = K2Model.from_pretrained(kept, dtype=torch.bfloat16, keep_fp8=True, progress=False)
    assert [extend._expands(model.config, chunk) for chunk in (16, 180)] == [False, True]
    batch, mask = prompts([180, 60])
    want, whole, absorbed, expanded = (
        generated(made, batch, mask, max_new_tokens=1, prefill_chunk=chunk)[1]
        for made, chunk in ((exact, None), (model, None), (model, 16), (model, 180))
    )
    assert (expanded - whole).norm() <= 0.01 * whole.norm()
    assert (absorbed - want).norm() <= 2 * (whole - want).norm()


@torch.no_grad()
@pytest.mark.parametrize("arch, cache_dtype", [("sm_80", "auto"), ("sm_90a", "auto"), ("sm_90a", "fp8")])
def test_kernels_in_the_absorbed_form(arch, cache_dtype, monkeypatch):
    """Chunks of different lengths in one call of `mla_decode`, whose new rows have a table entry each."""
    sizes = dict(kv_lora_rank=512, qk_rope_head_dim=64, num_attention_heads=3, num_hidden_layers=2)
    model, (batch, mask) = tiny.model(**sizes, **DENSE).bfloat16(), prompts([20, 7, 13])
    options = dict(max_new_tokens=1, prefill_chunk=8, cache_dtype=cache_dtype)
    _, exact = generated(copy.deepcopy(model).double(), batch, mask, **options)
    _, want = generated(model, batch, mask, **options)
    calls = []

    def in_emulator(op):
        original = getattr(attention, op)

        def emulated(*args, **kwargs):
            before = k2kernels.launch_count(op)
            with k2kernels.emulated(arch, seed=3):
                result = original(*args, **kwargs)
            assert k2kernels.launch_count(op) > before
            calls.append(op)
            return result

        monkeypatch.setattr(attention, op, emulated)

    in_emulator("mla_append")
    in_emulator("mla_decode")
    _, got = generated(model, batch, mask, **options)
    assert calls == ["mla_append", "mla_decode"] * 6
    assert (got - exact).norm() <= 2 * (want - exact).norm()


@torch.no_grad()
@pytest.mark.parametrize("arch, tokens", [("sm_80", 256), ("sm_90a", 128), ("sm_90a", 256), ("sm_90a", 8192)])
def test_kernels_in_the_expanded_form_have_the_bits_of_whole_prompts(arch, tokens, monkeypatch):
    """Whatever the chunks and the pieces of their keys: one sequence in two chunks beside a whole one. The projection
    goes row by row, as PyTorch may multiply a row otherwise in another batch."""
    monkeypatch.setattr(extend, "EXPANDED_TOKENS", tokens)
    sizes = dict(kv_lora_rank=512, qk_rope_head_dim=64, qk_nope_head_dim=128, v_head_dim=128, num_attention_heads=2)
    layer = tiny.model(**sizes, num_hidden_layers=1).bfloat16().model.layers[0].self_attn
    weight = layer.kv_b_proj.weight
    layer.kv_b_proj.forward = lambda x: torch.cat([row[None] @ weight.T for row in x])
    lengths, chunks = [375, 171], [([0], [0], [200]), ([0, 1], [200, 0], [175, 171])]
    q = [torch.randn(length, 2, 192).bfloat16() for length in lengths]
    rows = [torch.randn(length, 576).bfloat16() for length in lengths]
    pages = torch.zeros(1, 9, 64, 576).bfloat16()
    table = torch.tensor([[3, 1, 4, 0, 5, 8], [2, 6, 7, -1, -1, -1]]).int()
    outs, before = [[], []], k2kernels.launch_count("mla_prefill_piece")
    with k2kernels.emulated(arch, seed=2):
        for sequence, length in enumerate(lengths):
            prefill = Prefill((), torch.tensor([0, length]).int())
            outs[sequence].append(layer._whole(q[sequence], *rows[sequence].split([512, 64], 1), prefill))
        for some, past, new in chunks:
            cut = [(b, slice(first, first + count)) for b, first, count in zip(some, past, new)]
            step = Extend(Rope(layer.config), pages, table[some], [], past, new)
            mla_append(torch.cat([rows[b][span] for b, span in cut]), pages[0], step.block_table, step.positions)
            queries = torch.cat([q[b][span] for b, span in cut])
            out = torch.cat([layer._in_pieces(queries[part.tokens], step, part) for part in step.parts])
            for b, part in zip(some, out.split(new)):
                outs[b].append(part)
    launches = {128: 2 + 3 + 2, 256: 1 + 2 + 1, 8192: 1 + 1}[tokens]
    assert k2kernels.launch_count("mla_prefill_piece") - before == launches
    for whole, *parts in outs:
        assert torch.equal(torch.cat(parts), whole)
