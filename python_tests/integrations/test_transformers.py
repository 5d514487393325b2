"""Patched models of transformers against the same models as they are: tokens, logits, gradients, files."""

import copy
import json
import re
from base64 import b64encode
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from torch import nn

import k2kernels

transformers = pytest.importorskip("transformers", minversion="5.17")

from transformers.integrations.finegrained_fp8 import FP8Experts, FP8Linear  # noqa: E402
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek  # noqa: E402

from k2kernels.integrations import transformers as integration  # noqa: E402
from k2kernels.integrations.transformers import patch, register_kimi_k2, report, unpatch  # noqa: E402
from k2kernels.text.tokenizer import load_tokenizer  # noqa: E402

LAYERS = 2
GREEDY = dict(do_sample=False, eos_token_id=None, pad_token_id=0)


def their_config(name="kimi", **changes):
    values = {**tiny.CONFIGS[name], "num_hidden_layers": LAYERS, "first_k_dense_replace": 1, **changes}
    scaling = values.pop("rope_scaling", None) or dict(rope_type="default")
    values["rope_parameters"] = dict(scaling, rope_theta=values.pop("rope_theta"))
    heads = values["num_attention_heads"]
    return transformers.DeepseekV3Config(**values, num_mtp_layers=0, num_key_value_heads=heads)


def make(name="kimi", **changes):
    torch.manual_seed(len(name))
    if name == "k25":
        vision = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
        text = their_config().to_dict()
        special = dict(image_token_id=250, video_token_id=251, vision_start_token_id=252, vision_end_token_id=253)
        config = transformers.Kimi_K25Config(
            text_config=text, vision_config=vision, projection_hidden_size=32, tie_word_embeddings=False, **special
        )
        model = transformers.Kimi_K25ForConditionalGeneration(config).eval()
    else:
        model = transformers.DeepseekV3ForCausalLM(their_config(name, **changes)).eval()
    tiny.fill(model)
    return model


@pytest.fixture(scope="module")
def stock():
    """A model that no test patches."""
    return make()


@pytest.fixture
def patched(stock):
    model = patch(copy.deepcopy(stock))
    yield model
    unpatch(model)


@pytest.fixture
def calls(monkeypatch):
    """How often patched layers called each op."""
    counts = dict.fromkeys(("mla_decode", "mla_append", "moe_mlp", "fp8_gemm"), 0)

    def counting(name):
        op = getattr(integration, name)

        def count(*args, **kwargs):
            counts[name] += 1
            return op(*args, **kwargs)

        return count

    for name in counts:
        monkeypatch.setattr(integration, name, counting(name))
    return counts


def padded(rows, length, left=True):
    """Random prompts in a batch of `rows`, with padding of different lengths, and its mask."""
    ids, mask = torch.randint(1, 250, (rows, length)), torch.ones(rows, length, dtype=torch.int64)
    for row in range(1, rows):
        pad = slice(0, 3 * row) if left else slice(length - 3 * row, None)
        ids[row, pad], mask[row, pad] = 0, 0
    return ids, mask


@pytest.mark.parametrize("name", [*tiny.CONFIGS, "k25"])
def test_greedy_tokens(name, calls):
    """Across the end of a page, in a batch with padding; then as before the patch."""
    model = make(name)
    classes = [type(module) for module in model.modules()]
    ids, mask = padded(3, 58)
    options = dict(attention_mask=mask, max_new_tokens=9, **GREEDY)
    want = model.generate(ids, **options)
    assert patch(model) is model and torch.equal(patch(model).generate(ids, **options), want)
    assert calls["mla_decode"] == 8 * LAYERS and calls["moe_mlp"] == 9 * (LAYERS - 1)
    assert "attention 2 of 2, experts 1 of 1" in report(model) and report(model).count("\n") == 0
    unpatch(model)
    assert [type(module) for module in model.modules()] == classes
    assert "experts 0 of 1" in report(model) and torch.equal(model.generate(ids, **options), want)
    assert calls["mla_decode"] == 8 * LAYERS and calls["moe_mlp"] == 9 * (LAYERS - 1)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_several_new_tokens(stock, patched, calls, attention):
    """Logits of 20 + 5 + 1 tokens are those of 26, with padding at the left or none, by either form of mask."""
    for ids, mask in (padded(2, 26), padded(1, 26)):
        stock.set_attn_implementation(attention)
        patched.set_attn_implementation(attention)
        want = stock(ids, attention_mask=mask).logits
        cache, got, before = transformers.DynamicCache(config=stock.config), [], calls["mla_decode"]
        for part in (slice(0, 20), slice(20, 25), slice(25, 26)):
            positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, part]
            names = dict(attention_mask=mask[:, : part.stop], position_ids=positions, **{CACHE: cache})
            got.append(patched(ids[:, part], **names).logits)
        seen = mask.bool()
        assert (torch.cat(got, 1) - want)[seen].abs().max() < 1e-4
        assert calls["mla_decode"] - before == 2 * LAYERS
    stock.set_attn_implementation("sdpa")


CACHE = "cache" if tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 24) else "past_key_values"


def test_other_ways_to_generate(stock, patched, calls):
    """Caches that are reordered, cropped, repeated, adopted, static, offloaded or filled with gradients."""
    ids, _ = padded(1, 20)
    ids = ids.repeat(1, 2)  # for prompt lookup to find something
    options = dict(max_new_tokens=8, **GREEDY)
    for more, in_latent_space in (
        (dict(num_beams=3), True),
        (dict(prompt_lookup_num_tokens=3), True),
        (dict(cache_implementation="static"), False),
        (dict(use_cache=False), False),
        (dict(output_attentions=True, return_dict_in_generate=True), False),
    ):
        before = calls["mla_decode"]
        want, got = (model.generate(ids, **options, **more) for model in (stock, patched))
        got, want = (out if isinstance(out, torch.Tensor) else out.sequences for out in (got, want))
        assert torch.equal(got, want), more
        assert (calls["mla_decode"] > before) == in_latent_space, more


def test_caches_of_others(stock, patched, calls):
    """A cache that transformers' layers filled, one that was filled under autograd, and a copy of one of ours."""
    ids, _ = padded(2, 12)
    ids[ids == 0] = 1
    with torch.no_grad():
        want = stock(ids).logits[:, -1]
    cache = transformers.DynamicCache(config=stock.config)
    with torch.no_grad():
        stock(ids[:, :5], **{CACHE: cache})
    patched(ids[:, 5:9], **{CACHE: cache})  # autograd: transformers' layers
    assert calls["mla_decode"] == 0
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys.detach(), layer.values.detach()
    with torch.no_grad():
        patched(ids[:, 9:11], **{CACHE: cache})
        with torch.inference_mode():
            inference = copy.deepcopy(cache)
            patched(ids[:, :1], **{CACHE: inference})
        patched(ids[:, :1], **{CACHE: inference})  # rows of inference mode are copied before they are written to
        other = copy.deepcopy(cache)
        patched(ids[:, :1], **{CACHE: cache})  # does not reach the copy
        with torch.inference_mode():
            got = patched(ids[:, 11:], **{CACHE: copy.deepcopy(other)}).logits[:, -1]
        assert (got - want).abs().max() < 1e-4 and calls["mla_decode"] == 5 * LAYERS
        assert (patched(ids[:, 11:], **{CACHE: other}).logits[:, -1] - want).abs().max() < 1e-4


@torch.no_grad()
def test_padding_that_is_not_at_the_left(stock, patched, calls):
    ids, mask = padded(2, 16, left=False)
    full = torch.cat([mask, torch.ones(2, 1, dtype=torch.int64)], -1)
    logits = []
    for model in (stock, patched):
        cache = transformers.DynamicCache(config=stock.config)
        model(ids, attention_mask=mask, **{CACHE: cache})
        logits.append(model(ids[:, :1], attention_mask=full, **{CACHE: cache}).logits)
    assert calls["mla_decode"] == 0 and (logits[0] - logits[1]).abs().max() < 1e-4


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training(stock, calls, checkpointing):
    ids, gradients = torch.randint(1, 250, (2, 12)), []
    for change in (unpatch, patch):
        model = change(copy.deepcopy(stock)).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        loss = model(ids, labels=ids).loss
        loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()} | {"loss": loss.detach()})
        unpatch(model)
    assert calls["moe_mlp"] == (LAYERS - 1) * (2 if checkpointing else 1) and calls["mla_decode"] == 0
    for name, want in gradients[0].items():
        assert (gradients[1][name] - want).abs().max() <= 1e-5 * want.abs().max(), name


def test_files_of_a_patched_model(stock, patched, tmp_path):
    for model, folder in ((stock, tmp_path / "stock"), (patched, tmp_path / "patched")):
        model.save_pretrained(folder)
    names = sorted(path.name for path in (tmp_path / "stock").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "patched").iterdir()) and len(names) >= 2
    for name in names:
        assert (tmp_path / "stock" / name).read_bytes() == (tmp_path / "patched" / name).read_bytes()


def test_kimi_k2_without_remote_code(stock, tmp_path):
    """Reads what transformers wrote for deepseek_v3 under the other name, and writes it back."""
    stock.save_pretrained(tmp_path / "read")
    path = tmp_path / "read" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_type": "kimi_k2"}))
    register_kimi_k2()
    register_kimi_k2()
    model, found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "read", output_loading_info=True)
    assert not found["missing_keys"] and not found["unexpected_keys"]
    assert type(model.config) is type(transformers.AutoConfig.from_pretrained(tmp_path / "read"))
    model.save_pretrained(tmp_path / "written")
    weights = [(tmp_path / folder / "model.safetensors").read_bytes() for folder in ("read", "written")]
    assert weights[0] == weights[1]
    assert json.loads((tmp_path / "written" / "config.json").read_text())["model_type"] == "kimi_k2"
    ids = torch.randint(1, 250, (1, 9))
    assert torch.equal(
        patch(model).generate(ids, max_new_tokens=4, **GREEDY), stock.generate(ids, max_new_tokens=4, **GREEDY)
    )
    unpatch(model)


def test_kimi_tokenizer_without_remote_code(tmp_path):
    """tiktoken.model beside a tokenizer_config.json that names remote code: the ids of this package's tokenizer."""
    merges = [
        "th",
        "the",
        "\u4f60".encode(),
        "\u597d".encode(),
        "\u4f60\u597d".encode(),
        "re",
        "'re",
        "aB",
        "\u4f60a".encode(),
    ]
    tokens = [bytes([i]) for i in range(256)] + [m if isinstance(m, bytes) else m.encode() for m in merges]
    tokens += ["\u4f60".encode()[:2], "\u597d".encode()[:2]]
    ranks = [b64encode(token) + f" {rank}".encode() for rank, token in enumerate(tokens)]
    (tmp_path / "tiktoken.model").write_bytes(b"\n".join(ranks) + b"\n")
    added = {str(len(tokens) + 4): dict(content="<|im_user|>", special=True)}
    remote = dict(AutoTokenizer=["tokenization_kimi.TikTokenTokenizer", None])
    config = dict(auto_map=remote, tokenizer_class="TikTokenTokenizer", added_tokens_decoder=added)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text(json.dumps(dict(model_type="kimi_k2")))
    register_kimi_k2()
    made, own = transformers.AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path)
    for text in ("the there're \u4f60\u597d\u4f60a 12345 aBaB THE\n\n x", "<|im_user|>the"):
        assert made.encode(text, add_special_tokens=False) == own.encode(text)
        assert made.decode(own.encode(text)) == text


# Continuous batching

batching = pytest.mark.skipif(not integration.LATENT_PAGES, reason="latent pages need transformers 5.23")


def generate_batch(model, prompts, **config):
    options = transformers.GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=0)
    settings = transformers.ContinuousBatchingConfig(page_size=16, num_blocks=60, **config)
    made = model.generate_batch(
        prompts, generation_config=options, continuous_batching_config=settings, progress_bar=False
    )
    assert len(made) == len(prompts)
    return [made[name] for name in sorted(made)]


@batching
@pytest.mark.parametrize("name", ["kimi", "k25"])
def test_continuous_batching(name, calls):
    """Prompts in parts, with a common beginning: the tokens of `generate`; transformers alone ends in errors."""
    model = make(name)
    prompts = [torch.randint(1, 250, (n,)).tolist() for n in (3, 50, 33)]
    prompts.append([*prompts[1][:40], 7])
    want = [model.generate(torch.tensor([p]), max_new_tokens=6, **GREEDY)[0, len(p) :].tolist() for p in prompts]
    got = generate_batch(patch(model), prompts, max_batch_tokens=32)
    assert [(out.error, out.generated_tokens) for out in got] == [(None, tokens) for tokens in want]
    assert calls["mla_append"] == calls["mla_decode"] >= 8 * LAYERS
    if name == "kimi":
        assert all(out.error for out in generate_batch(unpatch(model), prompts[:1]))
    unpatch(model)


@batching
@torch.no_grad()
def test_places_of_one_token_each(patched):
    """The table of blocks, which transformers gives with flash attention on a GPU, names the rows of the indices."""
    settings = transformers.ContinuousBatchingConfig(page_size=4, num_blocks=24, max_batch_tokens=8)
    settings.max_blocks_per_request, settings.max_requests_per_batch = 6, 3
    settings.max_memory_percent = 0.01
    cache = integration.LatentPagedCache(patched.config, settings, "cpu", SimpleNamespace(tp_size=1), torch.float32)
    assert cache.row_size == 64
    past, table = [9, 3, 12], torch.full((1, 3, 6), -1, dtype=torch.int32)
    read, write = [[]], [[]]
    for number, length in enumerate(past):
        state = SimpleNamespace(request_id=str(number), current_len=lambda: 0)
        assert cache.can_store_request_tokens(state, length + 1)
        cache.extend_read_and_write_indices(str(number), length, 1, read, write)
        cache.fill_block_table(str(number), length, 1, table[:, number])
    ends = torch.tensor([0, 10, 14, 27], dtype=torch.int32)
    lengths = dict(cu_seq_lens_k={"full_attention": ends}, starts=torch.arange(4))
    read, write = ([torch.tensor(index) for index in indices] for indices in (read, write))
    for layer in range(LAYERS):
        a = cache.place(layer, max_length_k={"full_attention": 13}, read_index=read, write_index=write, **lengths)
        b = cache.place(
            layer, max_length_k={"full_attention": 1}, read_index=[], write_index=[], block_table=table, **lengths
        )
        rows = torch.arange(1.0, 4.0)[:, None].expand(3, 64)
        a.pages.zero_()
        k2kernels.mla_append(rows, a.pages, a.new_table, a.new_positions)
        one = k2kernels.mla_gather(a.pages, b.new_table, b.new_positions, dtype=torch.float32)
        assert torch.equal(one, rows) and torch.equal(a.lengths, b.lengths) and a.lengths.tolist() == [10, 4, 13]
        for row, length in enumerate(past):
            used = -(-(length + 1) // 4)
            assert torch.equal(a.table[row, :used], b.table[row, :used])


# Kernels, FP8, refusals


@torch.no_grad()
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_kernels_read_pages_that_overlap(arch):
    """A page begins at any row; what lies beyond a sequence is not read."""
    layer = integration.PagedLatents()
    first = torch.tensor([0, 37])
    for new in (70, 3, 130):  # more than was reserved at first
        rows = torch.randn(2, 1, new, 576).bfloat16()
        if new == 70:
            rows[1, 0, :37] = torch.nan
        layer.update(rows[..., :512], rows[..., 512:])
    arguments = torch.randn(2, 1, 4, 576).bfloat16(), *layer.pages(first)
    want = k2kernels.mla_decode(*arguments, softmax_scale=0.07).out
    with k2kernels.emulated(arch, seed=3):
        got = k2kernels.mla_decode(*arguments, softmax_scale=0.07).out
    assert (got.float() - want.float()).abs().max() < 0.02
    keys = torch.cat([layer.keys, layer.values], -1)[1, 0, 37:].float()
    plain = (arguments[0][1, 0].float() @ keys.mT * 0.07).softmax(-1) @ keys[:, :512]
    assert (want[1, 0].float() - plain).abs().max() < 0.02


def fp8(linear):
    """An FP8Linear with the quantised weight of a linear, and that linear with what the codes stand for."""
    made = FP8Linear(linear.in_features, linear.out_features, block_size=(128, 128))
    codes, scales = k2kernels.quantize_128x128(linear.weight.detach())
    made.weight, made.weight_scale_inv = (nn.Parameter(x, requires_grad=False) for x in (codes, scales))
    linear.weight.data = k2kernels.dequantize(codes, scales, block=(128, 128), dtype=torch.float32)
    return made


@torch.no_grad()
@pytest.mark.parametrize("shape", [(576, 512), (192, 256), (256, 384)])
def test_fp8_linear(shape, calls):
    linear = nn.Linear(shape[1], shape[0], bias=False)
    holder = nn.ModuleList([fp8(linear), deepseek.DeepseekV3Attention(their_config(), 0)])
    x = torch.randn(2, 3, shape[1])
    error = (patch(holder)[0](x) - linear(x)).norm() / linear(x).norm()
    assert calls["fp8_gemm"] == 1 and 0 < error < 0.05  # of quantised activations
    assert "FP8 linears 1 of 1" in report(holder) and type(unpatch(holder)[0]) is FP8Linear


@torch.no_grad()
def test_fp8_model(calls, monkeypatch):
    """Linears and experts in FP8; kv_b_proj is decoded once, and again when it is written to."""
    exact = make(kv_lora_rank=128, hidden_size=128)
    model = copy.deepcopy(exact)
    for one, other in zip(model.model.layers, exact.model.layers):
        for name in ("q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"):
            setattr(one.self_attn, name, fp8(getattr(other.self_attn, name)))
    dense = exact.model.layers[1].mlp.experts
    moe = model.model.layers[1].mlp
    wrapped = transformers.integrations.moe.use_experts_implementation(
        FP8Experts, experts_interface=transformers.integrations.finegrained_fp8.ALL_FP8_EXPERTS_FUNCTIONS
    )
    moe.experts = wrapped(model.config, block_size=(128, 128))
    for name in ("gate_up_proj", "down_proj"):
        codes, scales = k2kernels.quantize_128x128(getattr(dense, name))
        setattr(moe.experts, name, nn.Parameter(codes, requires_grad=False))
        setattr(moe.experts, f"{name}_scale_inv", nn.Parameter(scales, requires_grad=False))
        getattr(dense, name).data = k2kernels.dequantize(codes, scales, block=(128, 128), dtype=torch.float32)
    decoded = []
    real = integration.dequantize
    monkeypatch.setattr(integration, "dequantize", lambda *a, **k: decoded.append(1) or real(*a, **k))
    patch(model)
    assert "attention 2 of 2, experts 1 of 1, FP8 linears 8 of 8" in report(model)
    ids = torch.randint(1, 250, (2, 20))
    cache = transformers.DynamicCache(config=model.config)
    model(ids[:, :-1], **{CACHE: cache})
    got, want = model(ids[:, -1:], **{CACHE: cache}).logits[:, 0], exact(ids).logits[:, -1]
    assert (got - want).norm() < 0.15 * want.norm() and calls["mla_decode"] == LAYERS and calls["moe_mlp"] == 2
    assert len(decoded) == LAYERS
    linear = model.model.layers[0].self_attn.kv_b_proj
    linear.weight_scale_inv.mul_(2)
    model(ids[:, -1:], **{CACHE: cache})
    assert len(decoded) == LAYERS + 1
    unpatch(model)


def test_what_is_refused(stock):
    with pytest.raises(ValueError, match="patch: model must hold attention layers of model type deepseek_v3"):
        patch(nn.Linear(2, 2))
    model = copy.deepcopy(stock)
    model.model.layers[1].self_attn.o_proj._hf_hook = SimpleNamespace(hooks=[SimpleNamespace(offload=True)])
    with pytest.raises(k2kernels.UnsupportedError, match=r"layers.1.self_attn.o_proj offloaded; load it without"):
        patch(model)
    assert type(model.model.layers[0].self_attn) is deepseek.DeepseekV3Attention


def test_what_stays(stock, calls):
    """Layers with adapters or hooks are left alone, and reported; experts of another activation too."""
    model = copy.deepcopy(stock)
    first, second = (layer.self_attn for layer in model.model.layers)
    first.forward = first.forward
    second.kv_b_proj = nn.Sequential(second.kv_b_proj)
    second.kv_b_proj.weight = None
    model.config.hidden_act = "gelu"
    line = report(patch(model))
    assert "attention 0 of 2, experts 0 of 1" in line
    assert "layers.0.self_attn (its forward was replaced)" in line and "kv_b_proj is no plain matrix" in line
    model.config.hidden_act = "silu"
    ids = torch.randint(1, 250, (1, 5))
    assert torch.equal(model.generate(ids, max_new_tokens=3, **GREEDY), stock.generate(ids, max_new_tokens=3, **GREEDY))
    assert sum(calls.values()) == 0
    unpatch(model)


@batching
def test_page_of_documentation(stock, tmp_path):
    """The code of docs/transformers.md, with a checkpoint of kimi_k2."""
    stock.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_type": "kimi_k2"}))
    page = (Path(__file__).parents[2] / "docs" / "transformers.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)
    assert len(blocks) == 3
    names = {}
    exec(blocks[0].replace("path/to/checkpoint", str(tmp_path)), names)
    assert report(names["model"]) in " ".join(page.split()).replace("`", "")
    for block in blocks[1:]:
        exec(block, names)
    assert len(names["outputs"]) == 2
