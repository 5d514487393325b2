"""The model against transformers' DeepseekV3: equal logits and continuations, and each convention is seen to matter."""

import functools
import json
import math
from types import SimpleNamespace

import checkpoints
import pytest
import tiny
import torch
import torch.nn.functional as F
from plain import PlainRouter
from safetensors.torch import save_file
from torch import nn

from k2kernels.model import K2Config, K2Model, attention, rope
from k2kernels.model import moe as moe_module

transformers = pytest.importorskip("transformers", minversion="5.17")

TOLERANCE = 3e-4  # float32, logits up to about 5
FAR = 1.0  # a wrong convention moves some logit by more


def their_config(name, **changes):
    values = {**tiny.CONFIGS[name], **changes}
    scaling = values.pop("rope_scaling", None) or dict(rope_type="default")
    values["rope_parameters"] = dict(scaling, rope_theta=values.pop("rope_theta"))
    values["num_mtp_layers"] = values.pop("num_nextn_predict_layers", 0)
    return transformers.DeepseekV3Config(**values, num_key_value_heads=values["num_attention_heads"])


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """theirs(name): a random transformers model, saved to `path`, with its logits of `ids`."""

    @functools.cache
    def make(name):
        torch.manual_seed(len(name))
        model = transformers.DeepseekV3ForCausalLM(their_config(name)).eval()
        tiny.fill(model)
        if name == "deepseek":  # all choices below 0, so that a group masked by 0 would win
            for layer in model.model.layers[2:]:
                layer.mlp.gate.e_score_correction_bias.sub_(1.5)
        if name == "moonlight":  # small activations, on which the eps of the norms weighs
            model.model.embed_tokens.weight.data.mul_(3e-3)
            for layer in model.model.layers:
                layer.self_attn.kv_a_proj_with_mqa.weight.data[:48].mul_(1e-3)
        path = tmp_path_factory.mktemp(name)
        model.save_pretrained(path)
        ids = torch.randint(0, 256, (3, 40))
        with torch.no_grad():
            return SimpleNamespace(model=model, path=path, ids=ids, logits=model(ids).logits)

    return make


def load(path, **kwargs):
    return K2Model.from_pretrained(path, progress=False, **kwargs)


def distance(model, case):
    with torch.no_grad():
        return float((model(case.ids) - case.logits).abs().max())


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_logits_of_their_checkpoint(theirs, name):
    case = theirs(name)
    assert case.logits.abs().max() > 3
    assert distance(load(case.path), case) < TOLERANCE


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_greedy_continuations_of_their_checkpoint(theirs, name):
    case = theirs(name)
    want = case.model.generate(case.ids, max_new_tokens=32, do_sample=False, eos_token_id=None, pad_token_id=0)
    got = load(case.path).generate(case.ids, max_new_tokens=32, eos_token_ids=[])
    assert torch.equal(got, want)
    assert len(set(got[0, 40:].tolist())) > 10  # no fixed point that any model would give


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_they_read_our_checkpoint(name, tmp_path):
    ours = tiny.model(name)
    ours.save_pretrained(tmp_path)
    model, report = transformers.DeepseekV3ForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    ids = torch.randint(0, 256, (2, 30))
    with torch.no_grad():
        assert (ours(ids) - model.eval()(ids).logits).abs().max() < TOLERANCE


def test_tied_embedding(tmp_path):
    ours = tiny.model("kimi", tie_word_embeddings=True)
    ours.save_pretrained(tmp_path)
    model = transformers.DeepseekV3ForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.randint(0, 256, (2, 30))
    with torch.no_grad():
        assert (ours(ids) - model(ids).logits).abs().max() < TOLERANCE


# MTP


def their_mtp(path, config, monkeypatch):
    """Their main model and MTP layers, read from our checkpoint; they expect MTP layers at index 61."""
    mtp = [rf"model\.layers\.{config.num_hidden_layers + k}.*" for k in range(config.num_nextn_predict_layers)]
    monkeypatch.setattr(transformers.DeepseekV3ForCausalLM, "_keys_to_ignore_on_load_unexpected", mtp)
    main = transformers.DeepseekV3ForCausalLM.from_pretrained(path).eval()
    return main, transformers.modeling_layers.MtpModel.from_pretrained(main).eval()


@pytest.mark.parametrize("name, layers", [("kimi", 2), ("deepseek", 1)])
@torch.no_grad()
def test_mtp_logits(name, layers, tmp_path, monkeypatch):
    ours = tiny.model(name, num_nextn_predict_layers=layers)
    ours.save_pretrained(tmp_path)
    main, mtp = their_mtp(tmp_path, ours.config, monkeypatch)
    ids = torch.randint(0, 256, (2, 20))
    _, hidden = ours(ids, return_hidden=True)
    assert (hidden - main.model(ids).last_hidden_state).abs().max() < TOLERANCE
    got = ours.mtp_logits(ids, hidden)
    for k in range(layers):
        cache = transformers.cache_utils.MtpCache(config=mtp.config)
        positions = torch.arange(k + 1, 20)[None]
        hidden = mtp.forward_layer(k, hidden[:, :-1], positions, cache, input_ids=ids[:, k + 1 :])
        assert got[k].shape == (2, 19 - k, 256)
        assert (got[k] - mtp.shared_head(hidden)).abs().max() < TOLERANCE


@torch.no_grad()
def test_speculative_continuation(tmp_path, monkeypatch):
    ours = tiny.model("deepseek", num_nextn_predict_layers=1)
    ours.save_pretrained(tmp_path)
    main, _ = their_mtp(tmp_path, ours.config, monkeypatch)
    ids = torch.randint(0, 256, (1, 20))
    want = main.generate(ids, max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0, use_mtp=True)
    assert torch.equal(ours.generate(ids, max_new_tokens=24, eos_token_ids=[], speculative=True), want)


# Block FP8

FP8 = dict(
    tiny.CONFIGS["kimi"],
    hidden_size=192,
    kv_lora_rank=136,
    q_lora_rank=72,
    intermediate_size=256,
    moe_intermediate_size=128,
)


@pytest.fixture(scope="module")
def fp8(tmp_path_factory):
    """A block-FP8 checkpoint, and transformers' model of the numbers that its codes stand for."""
    torch.manual_seed(8)
    model = transformers.DeepseekV3ForCausalLM(their_config("kimi", **FP8)).eval()
    tiny.fill(model)
    path, plain = tmp_path_factory.mktemp("fp8"), tmp_path_factory.mktemp("plain")
    model.save_pretrained(plain)
    stored = checkpoints.quantize(checkpoints.read(plain))
    exact = checkpoints.dequantize(stored, torch.float32)
    assert sum(name.endswith("_scale_inv") for name in stored) == 4 * 5 + 3 + 3 * (8 + 1) * 3
    save_file(exact, plain / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((plain / "config.json").read_text())
    checkpoints.write(path, stored, {**config, "quantization_config": checkpoints.FP8_CONFIG})
    model = transformers.DeepseekV3ForCausalLM.from_pretrained(plain).eval()
    ids = torch.randint(0, 256, (3, 40))
    with torch.no_grad():
        return SimpleNamespace(model=model, path=path, plain=plain, ids=ids, logits=model(ids).logits)


def test_fp8_checkpoint_dequantised(fp8):
    model = load(fp8.path)
    assert model.model.layers[1].self_attn.kv_a_proj_with_mqa.weight.shape == (152, 192)  # partial blocks both ways
    assert distance(model, fp8) < TOLERANCE
    want = fp8.model.generate(fp8.ids, max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(model.generate(fp8.ids, max_new_tokens=24, eos_token_ids=[]), want)


def quantised_rows(x):
    """x, each 128 neighbours of a row rounded to what e4m3 codes and one scale can say."""
    parts = x.split(128, dim=-1)
    scales = [part.abs().amax(-1, keepdim=True) / 448 for part in parts]
    return torch.cat([(part / s).to(torch.float8_e4m3fn).float() * s for part, s in zip(parts, scales)], dim=-1)


@torch.no_grad()
def test_fp8_checkpoint_kept(fp8, monkeypatch):
    """Codes and scales are used as they are: like the exact weights under quantised activations."""
    model, exact = load(fp8.path, keep_fp8=True), load(fp8.plain)
    assert model.model.layers[1].mlp.experts.down_proj.dtype == torch.float8_e4m3fn
    ids = fp8.ids[:1]
    assert torch.equal(model.generate(ids, max_new_tokens=4)[:, 40], model(ids)[:, -1].argmax(-1))
    got, unquantised = after_third_layer(model, ids), after_third_layer(exact, ids)
    plant_quantised_activations(exact, monkeypatch)
    want = after_third_layer(exact, ids)
    # A number on the border of two codes may fall either way and changes its token: most agree, not all.
    assert (got - want).abs().amax(-1).median() < 1e-4
    assert (got - unquantised).abs().amax(-1).median() > 0.1


def after_third_layer(model, ids):
    states = []
    hook = model.model.layers[2].register_forward_hook(lambda module, args, out: states.append(out))
    model(ids)
    hook.remove()
    return states[0]


def plant_quantised_activations(model, monkeypatch):
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            module.forward = lambda x, weight=module.weight: F.linear(quantised_rows(x), weight)

    def experts(x, routing, gate_up, down, *, shared, exchange, capacity, power_of_two):
        assert exchange is None and capacity is None and not power_of_two
        out = shared.clone()
        for token, (chosen, weights) in enumerate(zip(routing.indices, routing.weights)):
            for e, weight in zip(chosen, weights):
                gate, up = F.linear(quantised_rows(x[token]), gate_up[e]).chunk(2)
                out[token] += weight * F.linear(quantised_rows(F.silu(gate) * up), down[e])
        return out

    monkeypatch.setattr(moe_module, "moe_mlp", experts)


# Each convention, got wrong on purpose


def named(name, plant):
    plant.__name__ = name
    return plant


def mscale_to_the(power):
    def plant(model, monkeypatch):
        config = model.config
        mscale = 0.1 * config.rope_scaling["mscale_all_dim"] * math.log(config.rope_scaling["factor"]) + 1
        monkeypatch.setattr(K2Config, "softmax_scale", config.qk_head_dim**-0.5 * mscale**power)

    return named(f"mscale_to_the_{power}", plant)


def softmax_scale(dim):
    def plant(model, monkeypatch):
        right, config = model.config.softmax_scale, model.config
        wrong = right * (getattr(config, dim) / config.qk_head_dim) ** -0.5
        monkeypatch.setattr(K2Config, "softmax_scale", wrong)

    return named(f"scale_of_{dim}", plant)


def half_split_rope(model, monkeypatch):
    right = attention.apply_rope
    monkeypatch.setattr(attention, "apply_rope", lambda x, cos, sin, interleaved: right(x, cos, sin, not interleaved))


def no_yarn(model, monkeypatch):
    c = model.config
    model.rope.inverse_frequency.copy_(rope.inverse_frequencies(c.qk_rope_head_dim, c.rope_theta, None))


def inverted_ramp(model, monkeypatch):
    c = model.config
    plain = rope.inverse_frequencies(c.qk_rope_head_dim, c.rope_theta, None)
    right, slow = model.rope.inverse_frequency, plain / c.rope_scaling["factor"]
    model.rope.inverse_frequency.copy_(plain + slow - right)


def no_attention_factor(model, monkeypatch):
    monkeypatch.setattr(K2Config, "rope_attention_factor", 1.0)


def other_eps(wrong):
    def plant(model, monkeypatch):
        for name, module in model.named_modules():
            if name.rpartition(".")[2] == wrong:
                module.eps = {1e-5: 1e-6, 1e-6: 1e-5}[module.eps]

    return named(f"other_eps_of_{wrong}", plant)


def without(norm):
    def plant(model, monkeypatch):
        for name, module in model.named_modules():
            if name.rpartition(".")[2] == norm:
                module.forward = lambda x: x

    return named(f"without_{norm}", plant)


def value_before_key(model, monkeypatch):
    c = model.config
    for layer in model.model.layers:
        weight = layer.self_attn.kv_b_proj.weight
        weight.copy_(weight.view(c.num_attention_heads, -1, c.kv_lora_rank).roll(-c.v_head_dim, dims=1).view_as(weight))


def rope_before_nope(model, monkeypatch):
    c = model.config
    for layer in model.model.layers:
        weight = layer.self_attn.q_b_proj.weight
        weight.copy_(weight.unflatten(0, (-1, c.qk_head_dim)).roll(-c.qk_rope_head_dim, dims=1).view_as(weight))


def up_before_gate(model, monkeypatch):
    for name, weight in model.named_parameters():
        if "gate_up_proj" in name:
            rows = weight.dim() - 2
            weight.copy_(weight.roll(weight.shape[rows] // 2, dims=rows))


def no_shared_expert(model, monkeypatch):
    for layer in model.model.layers:
        layer.mlp.shared_experts = None


def router(wrong):
    def plant(model, monkeypatch):
        monkeypatch.setattr(moe_module, "moe_route", PlainRouter(wrong))

    return named(wrong.replace(" ", "_"), plant)


@pytest.mark.parametrize("name", ["kimi", "deepseek"])
def test_plain_router(theirs, name, monkeypatch):
    """The router that the wrong ones below are variants of is right."""
    case = theirs(name)
    monkeypatch.setattr(moe_module, "moe_route", PlainRouter())
    assert distance(load(case.path), case) < TOLERANCE


WRONG = [
    ("kimi", half_split_rope),
    ("kimi", mscale_to_the(0)),
    ("kimi", mscale_to_the(1)),
    ("kimi", mscale_to_the(4)),
    ("kimi", softmax_scale("qk_nope_head_dim")),
    ("kimi", softmax_scale("latent_dim")),
    ("kimi", no_yarn),
    ("kimi", inverted_ramp),
    ("deepseek", no_yarn),
    ("deepseek", inverted_ramp),
    ("deepseek", no_attention_factor),
    ("kimi", value_before_key),
    ("kimi", rope_before_nope),
    ("kimi", up_before_gate),
    ("kimi", no_shared_expert),
    ("kimi", without("kv_a_layernorm")),
    ("kimi", without("q_a_layernorm")),
    ("kimi", without("norm")),
    ("moonlight", other_eps("kv_a_layernorm")),
    ("moonlight", other_eps("input_layernorm")),
    ("kimi", router("bias in the weights")),
    ("kimi", router("no bias")),
    ("kimi", router("no normalisation")),
    ("kimi", router("no scaling")),
    ("kimi", router("softmax scores")),
    ("deepseek", router("group maximum")),
    ("deepseek", router("no groups")),
    ("deepseek", router("masked by 0")),
]


@pytest.mark.parametrize("name, plant", WRONG, ids=[f"{name}-{plant.__name__}" for name, plant in WRONG])
@torch.no_grad()
def test_a_wrong_convention_shows(theirs, name, plant, monkeypatch):
    case = theirs(name)
    model = load(case.path)
    plant(model, monkeypatch)
    assert distance(model, case) > FAR
