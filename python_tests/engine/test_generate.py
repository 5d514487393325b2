import pytest
import tiny
import torch

from k2kernels.engine.sampling import sample
from k2kernels.model import K2Config, K2Model


def ids(rows, length, seed=0):
    return torch.randint(0, 256, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def recomputed(model, prompt, new):
    """Greedy continuation without a cache: the whole text through the training path for each token."""
    for _ in range(new):
        prompt = torch.cat([prompt, model(prompt)[:, -1].argmax(-1, keepdim=True)], dim=1)
    return prompt


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_the_cache_changes_nothing(name):
    model = tiny.model(name)
    prompt = ids(3, 20)
    got = model.generate(prompt, max_new_tokens=30, eos_token_ids=[])
    assert got.dtype == torch.int64 and got.shape == (3, 50)
    assert torch.equal(got, recomputed(model, prompt, 30))


@pytest.mark.parametrize("length", [1, 63, 64, 65, 128])
def test_around_the_edges_of_pages(length):
    model = tiny.model()
    prompt = ids(2, length)
    assert torch.equal(model.generate(prompt, max_new_tokens=3, eos_token_ids=[]), recomputed(model, prompt, 3))


@torch.no_grad()
def test_long_text_over_several_pages():
    """Also the logits of each decoding step are those of the training path."""
    model = tiny.model()
    steps = []
    hook = model.lm_head.register_forward_hook(lambda module, args, out: steps.append(out.flatten(0, -2)))
    text = model.generate(ids(1, 250), max_new_tokens=80, eos_token_ids=[])
    hook.remove()
    want = model(text)[0, 249:-1]
    torch.testing.assert_close(torch.cat(steps), want, atol=1e-4, rtol=1e-4)
    assert torch.equal(want.argmax(-1), text[0, 250:])


@pytest.mark.parametrize("side", ["left", "right"])
def test_prompts_of_different_lengths(side):
    model = tiny.model()
    lengths = [70, 3, 64, 1]
    prompts = [ids(1, n, seed=n) for n in lengths]
    batch, mask = torch.full((4, 72), 7), torch.zeros(4, 72, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        place = slice(72 - lengths[row], 72) if side == "left" else slice(0, lengths[row])
        batch[row, place], mask[row, place] = prompt[0], 1
    got = model.generate(batch, max_new_tokens=12, eos_token_ids=[], attention_mask=mask)
    assert torch.equal(got[:, :72], batch)
    for row, prompt in enumerate(prompts):
        alone = model.generate(prompt, max_new_tokens=12, eos_token_ids=[])
        assert torch.equal(got[row, 72:], alone[0, lengths[row] :])
    boolean = model.generate(batch, max_new_tokens=12, eos_token_ids=[], attention_mask=mask.bool())
    assert torch.equal(boolean, got)


def test_rows_end_at_their_stop_ids():
    model = tiny.model()
    prompt = ids(3, 20)
    free = model.generate(prompt, max_new_tokens=12, eos_token_ids=[])[:, 20:].tolist()
    stops = [free[0][2], free[1][5]]
    assert free[0].index(stops[0]) == 2 and stops[0] not in free[1][:6] and not set(stops) & set(free[2])
    first, second = (next(i for i, t in enumerate(row) if t in stops) for row in free[:2])

    def padded(row, length, pad):
        return row[:length] + [pad] * (12 - length)

    got = model.generate(prompt, max_new_tokens=12, eos_token_ids=stops)[:, 20:].tolist()
    assert got == [padded(free[0], first + 1, stops[0]), padded(free[1], second + 1, free[1][second]), free[2]]
    model.config.pad_token_id = 9
    got = model.generate(prompt, max_new_tokens=12, eos_token_ids=stops)[:, 20:].tolist()
    assert got == [padded(free[0], first + 1, 9), padded(free[1], second + 1, 9), free[2]]
    got = model.generate(prompt[:2], max_new_tokens=12, eos_token_ids=stops)
    assert got.shape == (2, 20 + max(first, second) + 1)  # no pass more than needed


def test_stop_ids_of_the_checkpoint():
    model = tiny.model()
    prompt = ids(1, 20)
    free = model.generate(prompt, max_new_tokens=8)
    model.config.eos_token_id = [300, int(free[0, 23])]
    end = 20 + free[0, 20:].tolist().index(int(free[0, 23])) + 1
    assert torch.equal(model.generate(prompt, max_new_tokens=8), free[:, :end])
    assert torch.equal(model.generate(prompt, max_new_tokens=8, eos_token_ids=[]), free)


def test_on_token_gets_the_columns_in_order():
    model = tiny.model()
    prompt = ids(3, 20)
    free = model.generate(prompt, max_new_tokens=9, eos_token_ids=[])
    columns = []
    got = model.generate(prompt, max_new_tokens=9, eos_token_ids=[int(free[0, 21])], on_token=columns.append)
    assert torch.equal(torch.stack(columns, dim=1), got[:, 20:])
    counts = []
    hook = model.model.norm.register_forward_hook(lambda *_: counts.append(len(columns)))
    columns.clear()
    model.generate(prompt, max_new_tokens=9, eos_token_ids=[], on_token=columns.append)
    hook.remove()
    assert counts == list(range(9))  # each column is reported before the pass after it


def test_same_seed_same_tokens():
    model = tiny.model()
    options = dict(max_new_tokens=40, temperature=1.5, eos_token_ids=[])
    first, again, other = (model.generate(ids(2, 10), seed=seed, **options) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    model.generate(ids(2, 10), seed=1, **options)
    assert torch.equal(torch.get_rng_state(), state)  # a seeded call leaves the global generator alone
    first = model.generate(ids(2, 10), **options)
    torch.manual_seed(5)
    assert torch.equal(model.generate(ids(2, 10), **options), first)


@pytest.mark.parametrize("options", [dict(top_k=1), dict(top_p=1e-6), dict(top_p=1e-300), dict(temperature=1e-4)])
def test_narrow_sampling_is_greedy(options):
    model = tiny.model()
    want = model.generate(ids(2, 10), max_new_tokens=10, eos_token_ids=[])
    options = {"temperature": 2.0, **options}
    assert torch.equal(model.generate(ids(2, 10), max_new_tokens=10, eos_token_ids=[], seed=0, **options), want)


@pytest.mark.parametrize(
    "top_k, top_p, kept",
    [
        (None, None, [0.5, 0.3, 0.15, 0.05]),
        (2, None, [0.5, 0.3, 0, 0]),
        (9, None, [0.5, 0.3, 0.15, 0.05]),
        (None, 0.5, [0.5, 0, 0, 0]),
        (None, 0.6, [0.5, 0.3, 0, 0]),
        (None, 0.95, [0.5, 0.3, 0.15, 0]),
        (3, 0.6, [0.5, 0.3, 0, 0]),  # of what top_k left
        (None, 1.0, [0.5, 0.3, 0.15, 0.05]),
    ],
)
def test_frequencies_of_samples(top_k, top_p, kept):
    order = torch.tensor([2, 0, 3, 1])
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()[order] * 0.7 + 3
    drawn = sample(logits.expand(40000, 4), 0.7, top_k, top_p, torch.Generator().manual_seed(0))
    got = drawn.bincount(minlength=4) / 40000
    want = (torch.tensor(kept) / sum(kept))[order]
    assert torch.equal(got == 0, want == 0)
    torch.testing.assert_close(got, want, atol=0.015, rtol=0)
    assert sample(logits.expand(2, 3, 4), 0.7, top_k, top_p, None).shape == (2, 3)


def wide(**changes):
    """A model with the latent dimensions of Kimi-K2, which the FP8 cache needs."""
    sizes = dict(kv_lora_rank=512, qk_rope_head_dim=64, num_attention_heads=2, num_hidden_layers=2)
    return tiny.model("kimi", **{**sizes, **changes})


def test_fp8_cache_is_close_to_the_exact_one():
    model = wide(first_k_dense_replace=2)
    prompt = ids(2, 90)
    steps = {"auto": [], "fp8": []}
    for cache_dtype, logits in steps.items():
        hook = model.lm_head.register_forward_hook(lambda m, args, out, logits=logits: logits.append(out[:, -1]))
        model.generate(prompt, max_new_tokens=2, eos_token_ids=[], cache_dtype=cache_dtype)
        hook.remove()
    (_, want), (_, got) = steps.values()
    error = float((got - want).norm() / want.norm())
    assert 1e-4 < error < 0.05


def test_bfloat16_model():
    """Dense layers only: near ties a rounding would send a token to another expert."""
    model = tiny.model("kimi", first_k_dense_replace=4).bfloat16()
    prompt = ids(2, 70)
    steps = []
    hook = model.lm_head.register_forward_hook(lambda m, args, out: steps.append(out.flatten(0, -2)))
    text = model.generate(prompt, max_new_tokens=4, eos_token_ids=[])
    hook.remove()
    want = model(text)[:, 69:-1]
    got = torch.stack([step.float() for step in steps], dim=1)
    assert (got - want).norm() / want.norm() < 0.03


def test_weights_may_change_between_calls():
    model = tiny.model()
    prompt = ids(1, 20)
    before = model.generate(prompt, max_new_tokens=20, eos_token_ids=[])
    with torch.no_grad():
        model.model.layers[2].self_attn.kv_b_proj.weight.mul_(-1)
    after = model.generate(prompt, max_new_tokens=20, eos_token_ids=[])
    assert not torch.equal(after, before) and torch.equal(after, recomputed(model, prompt, 20))


def test_training_goes_on_undisturbed():
    model = tiny.model().train()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    got = model.generate(ids(2, 10), max_new_tokens=3, eos_token_ids=[])
    assert not got.is_inference()
    with pytest.raises(ZeroDivisionError):
        model.generate(ids(2, 10), max_new_tokens=3, on_token=lambda _: 1 / 0)
    assert [module.training for module in model.modules()] == modes
    assert all((peak == -torch.inf).all() for peak in model.max_logits().values())
    assert not any(load.any() for load in model.expert_load().values())
    assert all(p.grad is None for p in model.parameters())


def test_ends_of_the_context():
    model = tiny.model("kimi", max_position_embeddings=32)
    assert model.generate(ids(1, 20), max_new_tokens=12, eos_token_ids=[]).shape == (1, 32)
    with pytest.raises(ValueError, match=r"generate: prompt and max_new_tokens must be at most 32 tokens .*, got 33"):
        model.generate(ids(1, 20), max_new_tokens=13)
    mask = torch.ones(1, 20)
    mask[:, 0] = 0
    model.generate(ids(1, 20), max_new_tokens=13, eos_token_ids=[], attention_mask=mask)  # padding does not count


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            dict(input_ids=torch.zeros(1, 0, dtype=torch.int64)),
            r"input_ids must be \[B, T\], T from 1 to 512, got \[1, 0\]",
        ),
        (dict(input_ids=torch.tensor([[1, 256]])), r"input_ids must be 0 to 255, got 256"),
        (dict(input_ids=torch.tensor([[1, -100]])), r"input_ids must be 0 to 255, got -100"),
        (dict(max_new_tokens=0), "max_new_tokens must be an int >= 1, got 0"),
        (dict(temperature=-1.0), "temperature must be 0 or more, got -1.0"),
        (dict(temperature=float("nan")), "temperature must be finite, got nan"),
        (dict(temperature="hot"), "temperature must be a number, got str"),
        (dict(temperature=1.0, top_k=0), "top_k must be an int >= 1, got 0"),
        (dict(temperature=1e39), r"temperature must be within \+-3.4028235e\+38, which float32 can hold, got 1e\+39"),
        (dict(temperature=1.0, top_p=0.0), "top_p must be above 0 and at most 1, got 0.0"),
        (dict(temperature=1.0, top_p=1.1), "top_p must be above 0 and at most 1, got 1.1"),
        (dict(temperature=1.0, top_p="most"), "top_p must be a number, got str"),
        (dict(temperature=1.0, seed="first"), "seed must be an int >= 0, got 'first'"),
        (dict(eos_token_ids=5), "eos_token_ids must be a list of ints, got 5"),
        (dict(eos_token_ids=["</s>"]), r"eos_token_ids must be a list of ints, got \['</s>'\]"),
        (dict(on_token=5), "on_token must be a function or None, got 5"),
        (dict(input_ids=ids(2, 5).to("meta")), "generate: input_ids must be on cpu like the model, got meta"),
        (dict(cache_dtype="int4"), "cache_dtype must be one of 'auto', 'fp8', got 'int4'"),
        (dict(cache_dtype="fp8"), "cache_dtype must be 'auto' for 48 latent and 16 rope dimensions"),
        (dict(attention_mask=torch.ones(2, 4)), r"attention_mask must be \[2, 5\] like input_ids"),
        (
            dict(attention_mask=torch.tensor([[1] * 5, [0] * 5])),
            r"attention_mask must be one run of ones in each row, got \[1, 0\] runs",
        ),
        (
            dict(attention_mask=torch.tensor([[1] * 5, [1, 0, 1, 1, 1]])),
            r"attention_mask must be one run of ones in each row, got \[1, 2\] runs",
        ),
        (dict(cuda_graphs="yes"), "cuda_graphs must be True or False, got 'yes'"),
        (dict(prefill_chunk=0), "prefill_chunk must be an int >= 1, got 0; or None for whole prompts"),
        (dict(prefill_chunk=True), "prefill_chunk must be an int >= 1, got True"),
        (dict(prefill_chunk=64.0), "prefill_chunk must be an int >= 1, got 64.0"),
        (dict(speculative="yes"), "speculative must be True or False, got 'yes'"),
        (dict(speculative=True), "speculative must be False for a model without MTP layers"),
    ],
)
def test_bad_arguments(changes, message):
    model = tiny.model()
    with pytest.raises((TypeError, ValueError), match=message):
        model.generate(**{**dict(input_ids=ids(2, 5), max_new_tokens=4), **changes})


def test_preset_generates():
    model = K2Model(K2Config.preset("tiny"))
    assert model.generate(ids(1, 5).int(), max_new_tokens=3, eos_token_ids=[]).shape == (1, 8)


@pytest.mark.parametrize("how", [{}, dict(temperature=1.0), dict(speculative=True)], ids=["greedy", "drawn", "drafts"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_logits_that_are_not_finite_are_reported(value, how):
    """Of a row that comes to a token whose embedding is broken; and of a prompt with it, at once."""
    model = tiny.model(num_nextn_predict_layers=1).eval()
    options = dict(max_new_tokens=9, eos_token_ids=[], seed=1, **how)
    prompt = ids(2, 6)
    tokens = model.generate(prompt, **options)
    others = set(tokens[0].tolist())
    new = tokens[1, 6:-1].tolist()
    at = next(i for i, token in enumerate(new) if i and token not in others | set(tokens[1, : 6 + i].tolist()))
    with torch.no_grad():
        model.model.embed_tokens.weight[new[at]] = value
    seen = []
    with pytest.raises(ValueError, match=r"logits must be finite, got NaN or infinity in rows \[1\] of input_ids"):
        model.generate(prompt, on_token=seen.append, **options)
    assert torch.equal(torch.stack(seen, dim=1), tokens[:, 6 : 6 + len(seen)])
    assert len(seen) == at + 1 or (how.get("speculative") and len(seen) <= at + 1)
    prompt[1, 0] = new[at]
    with pytest.raises(ValueError, match=r"rows \[1\] of input_ids"):
        model.generate(prompt, **options)
