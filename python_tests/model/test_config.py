"""K2Config: both styles of config.json, every check, presets, parameter counts; transformers is the second opinion."""

import json
import math

import pytest
import torch

from k2kernels import UnsupportedError
from k2kernels.model.config import PRESETS, K2Config

YARN = {
    "type": "yarn",
    "factor": 32.0,
    "original_max_position_embeddings": 4096,
    "beta_fast": 1.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
# The keys of Kimi-K2-Instruct's config.json that say something about the decoder.
KIMI = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "aux_loss_alpha": 0.001,
    "bos_token_id": 163584,
    "eos_token_id": 163585,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "initializer_range": 0.02,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 131072,
    "model_type": "kimi_k2",
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 1,
    "n_routed_experts": 384,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 64,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 64,
    "num_nextn_predict_layers": 0,
    "pad_token_id": 163839,
    "pretraining_tp": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
    "rms_norm_eps": 1e-6,
    "rope_scaling": YARN,
    "rope_theta": 50000.0,
    "routed_scaling_factor": 2.827,
    "scoring_func": "sigmoid",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "v_head_dim": 128,
    "vocab_size": 163840,
}


def test_kimi_file_is_the_preset():
    read = K2Config.from_dict(KIMI)
    assert read.weight_block_size == (128, 128)
    read.quantization_config = None
    assert read == K2Config.preset("kimi-k2")


def test_kimi_k2_thinking_is_the_preset():
    """Against what others took from its config.json, as no copy of the file was at hand (2026-11-30).

    NVIDIA's Model-Optimizer (`modelopt/torch/speculative/eagle/default_config.py` at 7a5d1ad, `kimi_k2`) has every key
    of it but the number of layers, hidden_size and vocab_size, and for these miles
    (`scripts/models/kimi-k2-thinking.sh` at 85956cf), which has the other sizes, norms and routing too. They agree with
    each other, and with Kimi-K2-Instruct but for four values. K2.5's file has one more, as quoted in
    ikawrakow/ik_llama.cpp#1298: beta_fast is 32 in it.
    """
    changes = dict(max_position_embeddings=262144, eos_token_id=163586, rms_norm_eps=1e-5)
    yarn = {**YARN, "factor": 64.0}
    thinking = K2Config.from_dict({**KIMI, **changes, "rope_scaling": yarn, "quantization_config": None})
    assert thinking == K2Config.preset("kimi-k2-thinking")
    later = K2Config.from_dict({**thinking.to_dict(), "rope_scaling": {**yarn, "beta_fast": 32.0}})
    assert later.softmax_scale == thinking.softmax_scale and later.rope_scaling != thinking.rope_scaling


def test_new_style_says_the_same():
    new = {key: value for key, value in KIMI.items() if key not in ("rope_scaling", "rope_theta", "torch_dtype")}
    new |= {"rope_parameters": {**YARN, "rope_type": "yarn", "rope_theta": 50000.0}, "dtype": "bfloat16"}
    assert K2Config.from_dict(new) == K2Config.from_dict(KIMI)
    assert K2Config.from_dict({**new, "rope_theta": 50000.0, "rope_scaling": YARN}) == K2Config.from_dict(KIMI)


def test_plain_rope_in_both_styles():
    for rope in ({"rope_scaling": None}, {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}, {}):
        read = K2Config.from_dict({"model_type": "deepseek_v3", **rope})
        assert read.rope_scaling is None and read.rope_theta == 10000.0
        assert read.softmax_scale == 192**-0.5 and read.rope_attention_factor == 1.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_theta": 1e4, "rope_parameters": {"rope_type": "default", "rope_theta": 5e4}}, "rope_theta must agree"),
        ({"rope_scaling": YARN, "rope_parameters": {**YARN, "factor": 64.0}}, "rope_scaling must agree"),
        ({"rope_scaling": YARN, "rope_parameters": {"rope_type": "default"}}, "rope_scaling must agree"),
        ({"rope_scaling": {**YARN, "low_freq_factor": 1.0}}, "low_freq_factor"),
        ({"rope_scaling": {k: v for k, v in YARN.items() if k != "factor"}}, "given with 'factor'"),
        ({"rope_scaling": {k: v for k, v in YARN.items() if k[0] != "o"}}, "'original_max_position_embeddings'"),
        ({"rope_scaling": {**YARN, "factor": 0.5}}, "rope_scaling.factor must be 1 or more, got 0.5"),
        ({"rope_scaling": {**YARN, "beta_fast": "32"}}, "rope_scaling.beta_fast must be a finite number"),
        ({"rope_scaling": {**YARN, "beta_fast": 0}}, "rope_scaling.beta_fast must be a finite number above 0, got 0"),
        ({"rope_scaling": {**YARN, "mscale": float("nan")}}, "rope_scaling.mscale must be"),
        ({"rope_scaling": "yarn"}, "rope_scaling must be an object or null"),
        ({"hidden_size": 0}, "hidden_size must be an int >= 1, got 0"),
        ({"hidden_size": 7168.0}, "hidden_size must be an int >= 1, got 7168.0"),
        ({"num_hidden_layers": "61"}, "num_hidden_layers must be an int >= 1, got '61'"),
        ({"vocab_size": True}, "vocab_size must be an int >= 1, got True"),
        ({"q_lora_rank": 0}, "q_lora_rank must be an int >= 1, got 0"),
        ({"first_k_dense_replace": -1}, "first_k_dense_replace must be an int >= 0, got -1"),
        ({"num_nextn_predict_layers": -1}, "num_nextn_predict_layers must be an int >= 0"),
        ({"moe_layer_freq": 0}, "moe_layer_freq must be an int >= 1"),
        ({"norm_topk_prob": 1}, "norm_topk_prob must be true or false, got 1"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps must be a finite number above 0, got 0.0"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps must be a finite number above 0, got '1e-6'"),
        ({"routed_scaling_factor": float("inf")}, "routed_scaling_factor must be a finite number"),
        ({"rope_theta": -1.0}, "rope_theta must be a finite number above 0"),
        ({"scoring_func": "tanh"}, "scoring_func must be one of 'sigmoid', 'softmax', got 'tanh'"),
        ({"torch_dtype": "int8"}, "dtype must be one of 'bfloat16', 'float16', 'float32', 'float64', got 'int8'"),
        ({"qk_rope_head_dim": 63}, "qk_rope_head_dim must be even, got 63"),
        ({"n_group": 7}, "n_group must be a divisor of n_routed_experts=384, got 7"),
        ({"n_group": 384}, "n_group must be one with 2 or more experts a group, got 384"),
        ({"n_group": 8, "topk_group": 9}, "topk_group must be at most n_group=8, got 9"),
        ({"n_group": 64, "topk_group": 1}, "num_experts_per_tok must be at most 6"),
        ({"num_experts_per_tok": 385}, "num_experts_per_tok must be at most 384"),
        ({"eos_token_id": "</s>"}, "eos_token_id must be an integer or null"),
        ({"bos_token_id": [1]}, "bos_token_id must be an integer or null"),
        ({"quantization_config": 8}, "quantization_config must be an object or null"),
        (
            {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128]}},
            "weight_block_size must be two positive integers, got \\[128\\]",
        ),
        ({"model_type": "llama"}, "model_type must be one of deepseek_v3, kimi_k2, kimi_k25, kimi_vl, got 'llama'"),
        ({"model_type": None}, "model_type must be one of"),
        ({"model_type": "kimi_k25"}, "text_config must be an object"),
    ],
)
def test_bad_values(changes, message):
    base = {**KIMI, "rope_scaling": None, "rope_theta": None}
    with pytest.raises(ValueError, match=message):
        K2Config.from_dict({**base, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "kimi_k3"}, r"got 'kimi_k3' \(Kimi-K3: linear attention .*\), which is another architecture"),
        ({"model_type": "kimi_k25", "text_config": {"model_type": "kimi_linear"}}, "got 'kimi_linear'"),
        ({"model_type": "gpt_oss"}, r"must be one of deepseek_v3, .*got 'gpt_oss' \(gpt-oss: grouped-query"),
        ({"model_type": "deepseek_v4"}, "got 'deepseek_v4'"),
        (
            {"quantization_config": {"quant_method": "compressed-tensors", "format": "pack-quantized"}},
            "config_groups must be an object with one group or more, got None",
        ),
        ({"quantization_config": {"quant_method": "awq"}}, "must be 'fp8' or 'compressed-tensors', got 'awq'"),
        ({"quantization_config": {"quant_method": "fp8", "fmt": "e5m2"}}, "fmt must be 'e4m3', got 'e5m2'"),
        ({"quantization_config": {"quant_method": "fp8"}}, "weight_block_size must be given"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "type 'yarn' or 'default', got 'longrope'"),
        ({"rope_scaling": {**YARN, "partial_rotary_factor": 0.5}}, "partial_rotary_factor must be 1, got 0.5"),
        ({"attention_bias": True}, "attention_bias must be False, got True"),
        ({"hidden_act": "gelu"}, "hidden_act must be 'silu', got 'gelu'"),
        ({"topk_method": "greedy"}, "topk_method must be 'noaux_tc', got 'greedy'"),
        ({"num_key_value_heads": 8}, "num_key_value_heads must equal num_attention_heads=64"),
    ],
)
def test_recognised_but_not_served(changes, message):
    with pytest.raises(UnsupportedError, match=message):
        K2Config.from_dict({**KIMI, **changes})


def test_number_of_key_heads_left_at_transformers_default():
    small = {**KIMI, "num_attention_heads": 4}
    assert K2Config.from_dict({**small, "num_key_value_heads": 128}) == K2Config.from_dict(
        {**small, "num_key_value_heads": 4}
    )


def test_constructor_checks_too():
    with pytest.raises(ValueError, match="hidden_size"):
        K2Config(hidden_size=-1)
    with pytest.raises(UnsupportedError, match="attention_bias"):
        K2Config(attention_bias=True)
    with pytest.raises(ValueError, match="kimi-k2, kimi-k2-thinking, deepseek-v3, moonlight-16b-a3b, tiny, got 'kimi'"):
        K2Config.preset("kimi")


def test_multimodal_file_gives_its_decoder():
    text = {**KIMI, "quantization_config": None}
    wrapped = {"model_type": "kimi_k25", "text_config": text, "vision_config": {"hidden_size": 3}}
    assert K2Config.from_dict(wrapped) == K2Config.from_dict(text)
    wrapped["quantization_config"] = {"quant_method": "compressed-tensors"}
    with pytest.raises(UnsupportedError, match="config_groups must be an object"):
        K2Config.from_dict(wrapped)


@pytest.mark.parametrize("name", PRESETS)
def test_save_and_read_back(tmp_path, name):
    config = K2Config.preset(name)
    config.save(tmp_path)
    assert K2Config.from_pretrained(tmp_path) == config
    assert K2Config.from_pretrained(tmp_path / "config.json") == config
    # In the words of DeepSeek's own modelling code, which looks for `type`.
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["model_type"] == "deepseek_v3" and written["architectures"] == ["DeepseekV3ForCausalLM"]
    assert (written["rope_scaling"] or {}).get("type") == ("yarn" if config.rope_scaling else None)
    assert "quantization_config" not in written


@pytest.mark.parametrize(
    ("config_eos", "generation_eos", "expected"),
    [
        (163585, 163586, [163585, 163586]),
        (1, 1, 1),
        (None, 7, 7),
        (1, None, 1),
        (1, [2, 1, 3], [1, 2, 3]),
        (None, None, None),
    ],
)
def test_stop_ids_of_both_files(tmp_path, config_eos, generation_eos, expected):
    (tmp_path / "config.json").write_text(json.dumps({**KIMI, "eos_token_id": config_eos}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": generation_eos}))
    config = K2Config.from_pretrained(tmp_path)
    assert config.eos_token_id == expected
    assert config.eos_token_ids == (expected if isinstance(expected, list) else [expected] if expected else [])


def test_bad_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no config\.json in"):
        K2Config.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not JSON"):
        K2Config.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="must hold a JSON object, got list"):
        K2Config.from_pretrained(tmp_path)


# Published: 671 B (DeepSeek-V3); 15.29 B and 2.24 B without embedding and head (Moonlight's README).
@pytest.mark.parametrize(
    ("name", "total", "active"),
    [
        ("kimi-k2", 1_026_408_232_448, 32_861_500_928),
        ("deepseek-v3", 671_026_419_200, 37_552_297_472),
        ("moonlight-16b-a3b", 15_960_110_208, 2_914_776_192),
        ("tiny", 1_372_952, 930_584),
    ],
)
def test_parameter_counts(name, total, active):
    config = K2Config.preset(name)
    assert config.parameter_counts() == (total, active)
    if name == "moonlight-16b-a3b":
        embeddings = 2 * config.vocab_size * config.hidden_size
        assert f"{(total - embeddings) / 1e9:.2f} {(active - embeddings) / 1e9:.2f}" == "15.29 2.24"


def test_softmax_scales():
    """192^-0.5 (0.1 ln factor + 1)^2 by hand: Kimi-K2 with factor 32, its successors with 64, DeepSeek-V3 with 40."""
    assert math.isclose(K2Config.preset("kimi-k2").softmax_scale, 0.130861, rel_tol=5e-6)
    longer = K2Config.from_dict({**KIMI, "rope_scaling": {**YARN, "factor": 64.0}})
    assert math.isclose(longer.softmax_scale, 0.144680, rel_tol=5e-6)
    assert math.isclose(K2Config.preset("deepseek-v3").softmax_scale, 0.135234, rel_tol=5e-6)
    assert K2Config.preset("moonlight-16b-a3b").softmax_scale == 192**-0.5


def test_dense_and_moe_layers():
    config = K2Config.preset("deepseek-v3")
    assert [config.is_moe_layer(i) for i in (0, 2, 3, 60, 61)] == [False, False, True, True, True]
    config = K2Config(first_k_dense_replace=1, moe_layer_freq=2, num_hidden_layers=5)
    assert [config.is_moe_layer(i) for i in range(5)] == [False, False, True, False, True]


def test_tiny_turns_yarn_on():
    from k2kernels.model.rope import inverse_frequencies

    config = K2Config.preset("tiny")
    plain = config.rope_theta ** -(torch.arange(0, 16, 2) / 16)
    ratio = inverse_frequencies(config.qk_rope_head_dim, config.rope_theta, config.rope_scaling) / plain
    torch.testing.assert_close(ratio, torch.tensor([1, 1, 1, 0.25, 0.25, 0.25, 0.25, 0.25]))
    assert config.max_position_embeddings == 4 * config.rope_scaling["original_max_position_embeddings"]


class TestTransformers:
    """The same questions put to transformers' DeepseekV3Config and an empty model of it."""

    @pytest.fixture(autouse=True)
    def _import(self):
        self.transformers = pytest.importorskip("transformers")

    def theirs(self, config):
        return self.transformers.DeepseekV3Config.from_dict(config.to_dict())

    @pytest.mark.parametrize("name", PRESETS)
    def test_reads_ours_and_we_read_theirs(self, tmp_path, name):
        config = K2Config.preset(name)
        config.save(tmp_path)
        theirs = self.transformers.AutoConfig.from_pretrained(tmp_path)
        assert type(theirs).__name__ == "DeepseekV3Config"
        for field in ("hidden_size", "q_lora_rank", "n_group", "routed_scaling_factor", "rms_norm_eps", "eos_token_id"):
            assert getattr(theirs, field) == getattr(config, field), field
        assert theirs.num_mtp_layers == config.num_nextn_predict_layers
        assert theirs.dtype == getattr(torch, config.dtype)
        theirs.save_pretrained(tmp_path / "theirs")
        assert K2Config.from_pretrained(tmp_path / "theirs") == config

    def test_same_defaults(self):
        theirs = self.transformers.DeepseekV3Config().to_dict()
        ours = K2Config.from_dict({"model_type": "deepseek_v3"})
        skipped = {"num_nextn_predict_layers", "bos_token_id", "eos_token_id", "dtype", "rope_theta", "rope_scaling"}
        shared = (set(theirs) & set(vars(ours))) - skipped
        assert len(shared) > 20
        assert {key: getattr(ours, key) for key in shared} == {key: theirs[key] for key in shared}

    @pytest.mark.parametrize("name", PRESETS)
    def test_parameter_counts(self, name):
        with torch.device("meta"):
            model = self.transformers.DeepseekV3ForCausalLM(self.theirs(K2Config.preset(name)))
        biases = [b for n, b in model.named_buffers() if n.endswith("e_score_correction_bias")]
        total = sum(t.numel() for t in [*model.parameters(), *biases])
        assert K2Config.preset(name).parameter_counts()[0] == total

    @pytest.mark.parametrize("all_dim", [0.0, 0.7, 1.0])
    @pytest.mark.parametrize("mscale", [0.7, 1.0])
    def test_scales(self, mscale, all_dim):
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
        from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention

        rope = {**YARN, "mscale": mscale, "mscale_all_dim": all_dim}
        config = K2Config(rope_scaling=rope, hidden_size=64, num_attention_heads=2)
        theirs = self.theirs(config)
        attention = DeepseekV3Attention(theirs, 0)
        assert math.isclose(config.softmax_scale, attention.scaling, rel_tol=1e-12)
        factor = ROPE_INIT_FUNCTIONS["yarn"](theirs, torch.device("cpu"))[1]
        assert math.isclose(config.rope_attention_factor, factor, rel_tol=1e-12)
