"""A text's cache in a file: another engine goes on from it."""

import pytest
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from k2kernels.engine import Engine, Sampling
from k2kernels.engine.latents import load_latents, save_latents, write_latents

PROMPT = torch.randint(0, 12, (150,), generator=torch.Generator().manual_seed(0)).tolist()
GREEDY = Sampling(max_new_tokens=4, eos_token_ids=[])


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return tiny.model(num_hidden_layers=2, num_nextn_predict_layers=1, vocab_size=12).double()


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    """An engine that had a request, its file, its tokens."""
    engine, path = Engine(model, cache_tokens=512, speculative=True), tmp_path_factory.mktemp("latents") / "a.latents"
    tokens = engine.submit(PROMPT, sampling=GREEDY).result()[0]
    assert save_latents(engine, PROMPT + tokens, path) == 128
    return engine, path, tokens


def test_rows_of_another_program(model, saved, tmp_path):
    """Rows of whole layers, with rotated pairs side by side, and a part of a page behind them."""
    engine, _, tokens = saved
    pages = engine.pool.pages[:2, engine.pool.find(engine.submit(PROMPT, sampling=GREEDY).samples[0].keys)]
    latent, rope = pages.flatten(1, 2).split([model.config.kv_lora_rank, model.config.qk_rope_head_dim], dim=-1)
    rows = torch.cat([latent, torch.stack(rope.chunk(2, dim=-1), dim=-1).flatten(-2)], dim=-1)
    rows = torch.cat([rows, torch.full_like(rows[:, :7], torch.nan)], dim=1)
    assert write_latents(model, PROMPT, rows, tmp_path / "b", rope_order="interleaved") == 128
    other = Engine(model, cache_tokens=512)
    load_latents(other, tmp_path / "b")
    request = other.submit(PROMPT, sampling=GREEDY)
    assert request.result() == [tokens] and request.cached_tokens == 128
    for wrong in (rows[:1], rows[..., 1:], rows[:, :63], rows[0], rows.repeat(1, 2, 1)):
        with pytest.raises(ValueError, match=r"write_latents: rows must be \[2, 64 to 150, \d+\], got "):
            write_latents(model, PROMPT, wrong, tmp_path / "c")
    with pytest.raises(ValueError, match="rope_order must be half-split or interleaved, got 'x'"):
        write_latents(model, PROMPT, rows, tmp_path / "c", rope_order="x")
    assert not (tmp_path / "c").exists()


def changed(path, to, tensors=None, **metadata):
    with safe_open(path, "pt") as file:
        old = {name: file.get_tensor(name) for name in file.keys()}
        save_file({**old, **(tensors(old) if tensors else {})}, to, {**file.metadata(), **metadata})
    return to


def interleaved(old):
    return dict(rope=torch.stack(old["rope"].chunk(2, dim=-1), dim=-1).flatten(-2).contiguous())


@pytest.mark.parametrize("speculative, order", [(False, "half-split"), (True, "half-split"), (True, "interleaved")])
def test_another_engine_goes_on(speculative, order, model, saved, tmp_path):
    _, path, tokens = saved
    if order == "interleaved":
        path = changed(path, tmp_path / "b", interleaved, rope_order=order)
    engine = Engine(model, cache_tokens=512, speculative=speculative)
    assert load_latents(engine, path) == load_latents(engine, path) == 128
    assert load_latents(engine, path, salt="other") == 128
    engine.check()
    request = engine.submit(PROMPT, sampling=GREEDY)
    assert request.result() == [tokens] and request.cached_tokens == 128
    there, here = (made.pool.pages[:2, made.pool.find(request.samples[0].keys)] for made in (saved[0], engine))
    assert torch.equal(here, there) and here.shape[1] == 2
    engine.check()
    small = Engine(model, cache_tokens=64)
    assert load_latents(small, path) == 64
    small.check()


def test_packed_rows(tmp_path):
    sizes = dict(kv_lora_rank=512, qk_rope_head_dim=64, num_attention_heads=1, num_hidden_layers=1, vocab_size=12)
    model = tiny.model(first_k_dense_replace=9, **sizes)
    first, second = (Engine(model, cache_tokens=512, cache_dtype="fp8") for _ in range(2))
    tokens = first.submit(PROMPT, sampling=GREEDY).result()
    save_latents(first, PROMPT, tmp_path / "a")
    assert load_latents(second, tmp_path / "a") == 128
    request = second.submit(PROMPT, sampling=GREEDY)
    assert request.result() == tokens and request.cached_tokens == 128
    with pytest.raises(ValueError, match=r"tensors of .* must be \['latent', 'rope', 'tokens'\], got \['packed'"):
        load_latents(Engine(model, cache_tokens=512), tmp_path / "a")
    other = changed(tmp_path / "a", tmp_path / "b", rope_order="interleaved")
    with pytest.raises(ValueError, match=r"rope_order of .* must be half-split, as rows are packed, got interleaved"):
        load_latents(second, other)


@pytest.mark.parametrize(
    "tensors, metadata, message",
    [
        (None, dict(form="latent-2"), "form of .* must be latent-1, got latent-2"),
        (None, dict(model="0"), "model of .* must be that of the engine, got another one"),
        (None, dict(rope_order="?"), r"rope_order of .* must be half-split or interleaved, got \?"),
        (lambda old: dict(more=torch.zeros(1)), {}, "tensors of .* must be "),
        (lambda old: dict(tokens=old["tokens"][:100]), {}, r"tokens of .* must be int32 \[T\], T a multiple of 64"),
        (lambda old: dict(tokens=old["tokens"].long()), {}, r"tokens of .* got torch.int64 \[128\]"),
        (
            lambda old: dict(latent=old["latent"].float()),
            {},
            r"latent of .* must be torch.float64 \[3 or more, 128, 48",
        ),
        (lambda old: dict(rope=old["rope"][:2].clone()), {}, r"rope of .* must be .*\[3 or more.*got .*\[2, 128, 16\]"),
    ],
)
def test_foreign_files_are_refused(tensors, metadata, message, model, saved, tmp_path):
    path = changed(saved[1], tmp_path / "b", tensors, **metadata)
    engine = Engine(model, cache_tokens=512, speculative=True)
    with pytest.raises(ValueError, match=f"load_latents: {message}"):
        load_latents(engine, path)
    assert engine.stats()["pages_idle"] == 0


def test_other_faults(model, saved, tmp_path):
    (tmp_path / "b").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="is not a safetensors file"):
        load_latents(saved[0], tmp_path / "b")
    with pytest.raises(ValueError, match="the cache must have the first 64 of ids under this salt, has none"):
        save_latents(saved[0], PROMPT, tmp_path / "c", salt="other")
    trained = tiny.model(num_hidden_layers=2, num_nextn_predict_layers=1, vocab_size=12).double()
    with pytest.raises(ValueError, match=r"model of .* must be that of the engine"):
        load_latents(Engine(trained, cache_tokens=512), saved[1])
