import copy
import io
import math
import re

import plain
import pytest
import tiny
import torch
import torch.nn.functional as F

from k2kernels.model import K2Config, K2Model
from k2kernels.model.linear import Fp8Linear
from k2kernels.ops.quant import dequantize, quantize_1x128, quantize_128x128

IDS = torch.arange(2 * 24).view(2, 24) * 5 % 256


def test_logits_and_hidden_states():
    model = tiny.model()
    logits, hidden = model(IDS, return_hidden=True)
    assert logits.shape == (2, 24, 256) and logits.dtype == torch.float32
    assert hidden.shape == (2, 24, 96)
    torch.testing.assert_close(logits, hidden @ model.lm_head.weight.T)
    torch.testing.assert_close(hidden, F.rms_norm(hidden, (96,)) * hidden.pow(2).mean(-1, keepdim=True).sqrt())
    assert torch.equal(logits, model(IDS.int()))


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_the_model_written_out(name):
    """Logits, and the largest attention logits in training mode, of two sequences."""
    model = tiny.model(name)
    want = [plain.forward(model, sequence) for sequence in IDS]
    torch.testing.assert_close(model(IDS), torch.stack([logits for logits, _ in want]).float(), atol=3e-4, rtol=0)
    model.train()(IDS)
    peaks = torch.maximum(want[0][1], want[1][1])
    for layer, got in model.max_logits().items():
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, peaks[layer].float(), atol=3e-4, rtol=0)


def test_a_token_sees_the_past_of_its_own_sequence_only():
    model = tiny.model()
    changed = IDS.clone()
    changed[0, 10] += 1
    difference = (model(IDS) - model(changed)).abs().amax(-1)
    assert difference[0, 10:].min() > 1e-3
    assert difference[0, :10].max() < 1e-5 and difference[1].max() < 1e-5


def test_initial_weights():
    model = K2Model(tiny.config("kimi", initializer_range=0.05))
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            assert (parameter == 1).all(), name
        else:
            assert math.isclose(float(parameter.detach().std()), 0.05, rel_tol=0.1), name
    assert not model.model.layers[1].mlp.gate.e_score_correction_bias.any()


def test_names_and_shapes_of_the_state():
    state = {k: list(v.shape) for k, v in tiny.model("kimi", num_nextn_predict_layers=1).state_dict().items()}
    layers = {name for name in state if not name.startswith(("model.embed_tokens.", "model.norm.", "lm_head."))}
    assert {re.sub(r"layers\.\d", "layers.#", name).removeprefix("model.layers.#.") for name in layers} == {
        *(f"self_attn.{n}.weight" for n in ("q_a_proj", "q_a_layernorm", "q_b_proj", "kv_b_proj", "o_proj")),
        *(f"self_attn.{n}.weight" for n in ("kv_a_proj_with_mqa", "kv_a_layernorm")),
        "input_layernorm.weight",
        "post_attention_layernorm.weight",
        *(f"mlp.{part}{n}.weight" for part in ("", "shared_experts.") for n in ("gate_up_proj", "down_proj")),
        *("mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight", "mlp.gate.e_score_correction_bias"),
        *(f"{n}.weight" for n in ("enorm", "hnorm", "eh_proj", "shared_head.norm")),
    }
    assert state["model.layers.0.mlp.gate_up_proj.weight"] == [320, 96]
    assert state["model.layers.1.mlp.experts.gate_up_proj"] == [8, 80, 96]
    assert state["model.layers.1.mlp.experts.down_proj"] == [8, 96, 40]
    assert state["model.layers.4.eh_proj.weight"] == [96, 192]
    assert "model.layers.0.mlp.gate.weight" not in state and "model.layers.4.mlp.gate.weight" in state
    assert not any("self_attn.q_a_proj" in name for name in tiny.model("moonlight").state_dict())
    assert tiny.model("moonlight").state_dict()["model.layers.0.self_attn.q_proj.weight"].shape == (160, 96)


def test_parameter_count_is_the_configurations():
    for name in tiny.CONFIGS:
        model = tiny.model(name)
        biases = sum(b.numel() for n, b in model.named_buffers() if n.endswith("e_score_correction_bias"))
        assert sum(p.numel() for p in model.parameters()) + biases == model.config.parameter_counts()[0]


def test_moe_layer_freq_and_no_shared_experts():
    model = tiny.model("kimi", moe_layer_freq=2, n_shared_experts=0)
    assert [hasattr(layer.mlp, "experts") for layer in model.model.layers] == [False, False, True, False]
    assert model(IDS).isfinite().all()
    assert list(model.expert_load()) == [2]


def test_gradients():
    """The slope along random directions, against finite differences in float64."""
    model = tiny.model("deepseek", num_nextn_predict_layers=1).double().train()
    targets = IDS.roll(-1, dims=1)

    def loss():
        logits, hidden = model(IDS, return_hidden=True)
        (mtp,) = model.mtp_logits(IDS, hidden)
        return (
            F.cross_entropy(logits.flatten(0, 1), targets.flatten())
            + F.cross_entropy(mtp.flatten(0, 1), targets[:, 1:].flatten())
            + model.sequence_loss(0.1)
        )

    loss().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name
    for part in ("self_attn", "mlp.gate.", "experts", "eh_proj", ""):
        chosen = [p for name, p in model.named_parameters() if part in name]
        directions = [torch.randn_like(p) for p in chosen]
        want = sum(float((p.grad * d).sum()) for p, d in zip(chosen, directions))
        step, sides = 1e-7, []
        with torch.no_grad():
            for sign in (1, -2, 1):
                for p, d in zip(chosen, directions):
                    p.add_(d, alpha=sign * step)
                sides.append(float(loss()))
        assert math.isclose((sides[0] - sides[1]) / (2 * step), want, rel_tol=1e-3, abs_tol=1e-4), part


def test_bfloat16():
    """Dense layers only: near ties a rounding would send a token to another expert."""
    model = tiny.model("kimi", first_k_dense_replace=4).bfloat16()
    exact = copy.deepcopy(model).double()
    logits, hidden = model(IDS, return_hidden=True)
    assert logits.dtype == torch.float32 and hidden.dtype == torch.bfloat16
    want = exact(IDS)
    assert (logits - want).norm() / want.norm() < 0.03


def test_the_router_computes_in_float32():
    gate = tiny.model().bfloat16().model.layers[1].mlp.gate
    x = torch.randn(50, 96).bfloat16()
    assert gate(x).dtype == torch.float32
    torch.testing.assert_close(gate(x).double(), x.double() @ gate.weight.double().T, atol=1e-5, rtol=1e-5)


def test_casts_leave_the_bias_and_the_counters_alone():
    model = tiny.model()
    bias = model.model.layers[1].mlp.gate.e_score_correction_bias.clone()
    model.train()(IDS)
    before = model.max_logits(), model.expert_load()
    model.bfloat16()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.equal(model.model.layers[1].mlp.gate.e_score_correction_bias, bias)
    after = model.max_logits(), model.expert_load()
    for x, y in zip(before, after):
        assert all(torch.equal(x[layer], y[layer]) for layer in x)
    model(IDS).sum().backward()


def test_from_the_meta_device():
    with torch.device("meta"):
        model = K2Model(tiny.config())
    model.to_empty(device="cpu").load_state_dict(tiny.model().state_dict())
    assert (model.max_logits()[0] == -math.inf).all() and not model.expert_load()[1].any()
    assert model(IDS).isfinite().all()


def test_tied_embedding():
    model = tiny.model("kimi", tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model(IDS).sum().backward()


# Attention logits


def test_max_logits_run_until_reset_and_in_training_mode_only():
    model = tiny.model("kimi", num_nextn_predict_layers=1)
    model(IDS)
    assert all((peak == -math.inf).all() for peak in model.max_logits().values())
    model.train()
    peaks = []
    for part in (IDS[:1], IDS[1:], IDS):
        model.reset_max_logits()
        model.mtp_logits(part, model(part, return_hidden=True)[1])
        peaks.append(model.max_logits())
    assert list(peaks[0]) == [0, 1, 2, 3, 4]
    assert any((peaks[0][layer] != peaks[1][layer]).any() for layer in peaks[0])
    for layer in peaks[0]:
        torch.testing.assert_close(torch.maximum(peaks[0][layer], peaks[1][layer]), peaks[2][layer])
    model(IDS[:1])  # smaller peaks do not lower it
    for layer, peak in model.max_logits().items():
        torch.testing.assert_close(peak, peaks[2][layer])
    assert not any(name.endswith("max_logit") for name in model.state_dict())


@pytest.mark.parametrize("name", ["kimi", "moonlight"])
def test_qk_clip_spec(name):
    """Scaling the named rows scales the logits of one head, and nothing else."""
    model = tiny.model(name).train()
    spec = model.model.layers[0].self_attn.qk_clip_spec()
    assert {k: v for k, v in spec.items() if k not in ("query", "key")} == dict(
        num_heads=4, nope_dim=24, rope_dim=16, value_dim=32
    )
    model(IDS)
    before = model.max_logits()[0]
    model.reset_max_logits()
    with torch.no_grad():
        query, key = spec["query"].view(4, 40, -1)[2], spec["key"].view(4, 56, -1)[2]
        query[:24] *= 0.5
        key[:24] *= 0.5
        query[24:] *= 0.25
    model(IDS)
    torch.testing.assert_close(model.max_logits()[0], before * torch.tensor([1, 1, 0.25, 1]))


# Around the model


def test_compiled():
    """One graph, the same numbers: logits, gradients, recorded maxima and counts."""
    torch._dynamo.reset()
    eager, compiled = (tiny.model("kimi", num_hidden_layers=2).train() for _ in range(2))
    compiled.load_state_dict(eager.state_dict())
    function = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    for length in (24, 17):
        ids = IDS[:, :length].contiguous()
        want, got = eager(ids), function(ids)
        torch.testing.assert_close(got, want)
        want.square().mean().backward()
        got.square().mean().backward()
    for x, y in zip(eager.parameters(), compiled.parameters()):
        torch.testing.assert_close(x.grad, y.grad)
    for x, y in ((eager.max_logits(), compiled.max_logits()), (eager.expert_load(), compiled.expert_load())):
        for layer in x:
            torch.testing.assert_close(x[layer], y[layer])
    torch.testing.assert_close(eager.sequence_loss(0.01), compiled.sequence_loss(0.01))


def test_copies_and_pickles_after_training():
    model = tiny.model().train()
    model(IDS).sum().backward()
    copied = copy.deepcopy(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert torch.equal(copied(IDS), model(IDS)) and torch.equal(loaded(IDS), model(IDS))


def test_bad_ids():
    model = tiny.model()
    with pytest.raises(ValueError, match=r"K2Model: input_ids must be \[B, T\], T from 1 to 512, got \[2, 0\]"):
        model(IDS[:, :0])
    for shape in [(24,), (0, 24), (1, 513)]:
        with pytest.raises(ValueError, match=rf"T from 1 to 512, got {re.escape(str(list(shape)))}"):
            model(torch.zeros(shape, dtype=torch.int64))
    for token in (256, -1):
        with pytest.raises(ValueError, match=rf"K2Model: input_ids must be 0 to 255, got {token}"):
            model(torch.tensor([[1, token, 3]]))
    with pytest.raises(TypeError, match=r"K2Model: input_ids must be an int64 or int32 tensor, got torch\.float32"):
        model(IDS.float())
    with pytest.raises(TypeError, match="generate: input_ids must be an int64 or int32 tensor, got list"):
        model.generate(IDS.tolist(), max_new_tokens=1)
    with pytest.raises(ValueError, match="K2Model: input_ids must be on cpu like the model, got meta"):
        model(IDS.to("meta"))


def test_a_config_is_wanted():
    with pytest.raises(TypeError, match=r"K2Model: config must be a K2Config, got dict; see K2Config.from_dict"):
        K2Model(K2Config.preset("tiny").to_dict())


@pytest.mark.parametrize("shape", [(5, 200), (2, 3, 136)])
def test_fp8_linear(shape):
    x = torch.randn(shape)
    linear = Fp8Linear(shape[-1], 150)
    codes, scales = quantize_128x128(torch.randn(150, shape[-1]))
    linear.load_state_dict({"weight": codes, "weight_scale_inv": scales})
    data, row_scales = quantize_1x128(x)
    want = dequantize(data, row_scales, dtype=torch.float64) @ linear.dequantized(torch.float64).T
    got = linear(x)
    assert got.dtype == torch.float32 and not any(p.requires_grad for p in linear.parameters())
    torch.testing.assert_close(got.double(), want, atol=1e-4, rtol=1e-5)
    assert linear(x.bfloat16()).dtype == torch.bfloat16


def test_preset_trains():
    """A few plain steps on the tiny preset lower the loss on one batch."""
    model = K2Model(K2Config.preset("tiny")).train()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    ids = torch.randint(0, 1024, (4, 65))
    losses = []
    for _ in range(8):
        loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[0] == pytest.approx(math.log(1024), abs=0.3)
    assert losses[-1] < losses[0] - 1.5
