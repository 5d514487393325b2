"""The model written out in the plainest way, in float64 and token by token, from the papers and config.json alone."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from k2kernels.model import K2Config, K2Model
from k2kernels.ops.moe import Routing


class PlainRouter:
    """A stand-in for `moe_route`, with switches that get one thing wrong."""

    def __init__(self, wrong: str = ""):
        self.wrong = wrong

    def __call__(self, logits, bias, *, top_k, n_group, topk_group, score, normalize, scale):
        wrong = self.wrong
        scores = logits.softmax(-1) if wrong == "softmax scores" else logits.sigmoid()
        choice = scores if wrong == "no bias" else scores + bias
        rows = []
        for row in choice:
            groups = row.split(len(row) // n_group)
            best = [max(g) if wrong == "group maximum" else sum(sorted(g)[-2:]) for g in groups]
            kept = sorted(range(n_group), key=lambda g: -best[g])[: n_group if wrong == "no groups" else topk_group]
            masked = 0.0 if wrong == "masked by 0" else -math.inf
            values = [float(v) if g in kept else masked for g, group in enumerate(groups) for v in group]
            rows.append(sorted(range(len(row)), key=lambda e: -values[e])[:top_k])
        indices = torch.tensor(rows)
        weights = (choice if wrong == "bias in the weights" else scores).gather(1, indices)
        if wrong != "no normalisation":
            weights = weights / weights.sum(-1, keepdim=True)
        weights = weights * (1 if wrong == "no scaling" else scale)
        return Routing(indices.int(), weights, indices.flatten().bincount(minlength=logits.shape[1]))


def forward(model: K2Model, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [T, vocab] of one sequence [T], and the largest attention logit of each layer and head."""
    c = model.config
    state = {name: tensor.detach().double() for name, tensor in model.state_dict().items()}
    x = state["model.embed_tokens.weight"][ids]
    peaks = []
    for index in range(c.num_hidden_layers):
        layer = {n.removeprefix(f"model.layers.{index}."): t for n, t in state.items() if f".layers.{index}." in n}
        h, peak = attention(layer, c, norm(x, layer["input_layernorm.weight"], c.rms_norm_eps))
        x = x + h
        h = norm(x, layer["post_attention_layernorm.weight"], c.rms_norm_eps)
        x = x + (experts(layer, c, h) if index >= c.first_k_dense_replace else mlp(h, *weights(layer, "mlp")))
        peaks.append(peak)
    return norm(x, state["model.norm.weight"], c.rms_norm_eps) @ state["lm_head.weight"].T, torch.stack(peaks)


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def weights(layer: dict[str, Tensor], name: str) -> tuple[Tensor, Tensor]:
    return layer[f"{name}.gate_up_proj.weight"], layer[f"{name}.down_proj.weight"]


def mlp(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    gate, up = (x @ gate_up.T).chunk(2, dim=-1)
    return (gate / (1 + (-gate).exp()) * up) @ down.T


def experts(layer: dict[str, Tensor], c: K2Config, x: Tensor) -> Tensor:
    route = PlainRouter()
    bias = layer["mlp.gate.e_score_correction_bias"]
    options = dict(top_k=c.num_experts_per_tok, n_group=c.n_group, topk_group=c.topk_group)
    routing = route(
        x @ layer["mlp.gate.weight"].T, bias, **options, score="sigmoid", normalize=True, scale=c.routed_scaling_factor
    )
    out = mlp(x, *weights(layer, "mlp.shared_experts"))
    for token in range(len(x)):
        for e, weight in zip(routing.indices[token], routing.weights[token]):
            stacks = (layer[f"mlp.experts.{part}_proj"][e] for part in ("gate_up", "down"))
            out[token] += weight * mlp(x[token], *stacks)
    return out


def attention(layer: dict[str, Tensor], c: K2Config, x: Tensor) -> tuple[Tensor, Tensor]:
    w = {
        name: layer.get(f"self_attn.{name}.weight")
        for name in ("q_proj", "q_a_proj", "q_b_proj", "kv_b_proj", "o_proj")
    }
    heads, nope, rope = c.num_attention_heads, c.qk_nope_head_dim, c.qk_rope_head_dim
    if c.q_lora_rank is None:
        q = x @ w["q_proj"].T
    else:
        q = norm(x @ w["q_a_proj"].T, layer["self_attn.q_a_layernorm.weight"], 1e-6) @ w["q_b_proj"].T
    compressed = x @ layer["self_attn.kv_a_proj_with_mqa.weight"].T
    latent = norm(compressed[:, : c.kv_lora_rank], layer["self_attn.kv_a_layernorm.weight"], 1e-6)
    q, kv = q.unflatten(-1, (heads, -1)), (latent @ w["kv_b_proj"].T).unflatten(-1, (heads, -1))
    turned_k = rotated(compressed[:, c.kv_lora_rank :], c)
    scale = (nope + rope) ** -0.5
    if c.rope_scaling:
        scale *= (0.1 * c.rope_scaling["mscale_all_dim"] * math.log(c.rope_scaling["factor"]) + 1) ** 2
    out, peaks = [], []
    for h in range(heads):
        scores = scale * (q[:, h, :nope] @ kv[:, h, :nope].T + rotated(q[:, h, nope:], c) @ turned_k.T)
        scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -math.inf)
        out.append(scores.softmax(-1) @ kv[:, h, nope:])
        peaks.append(scores.max())
    return torch.cat(out, dim=-1) @ w["o_proj"].T, torch.stack(peaks)


def rotated(x: Tensor, c: K2Config) -> Tensor:
    """Row t turned by t times the frequencies, as complex numbers of neighbouring pairs."""
    frequencies, factor = yarn(c)
    turn = torch.exp(1j * torch.arange(len(x))[:, None] * torch.tensor(frequencies, dtype=torch.float64)) * factor
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * turn).flatten(1)


def yarn(c: K2Config) -> tuple[list[float], float]:
    """The frequency of each pair, and what cosines and sines are multiplied by."""
    dim, scaling = c.qk_rope_head_dim, c.rope_scaling
    plain = [c.rope_theta ** (-i / dim) for i in range(0, dim, 2)]
    if scaling is None:
        return plain, 1.0

    def pair(turns):
        return dim / 2 * math.log(scaling["original_max_position_embeddings"] / (2 * math.pi * turns), c.rope_theta)

    low = max(math.floor(pair(scaling["beta_fast"])), 0)
    high = min(math.ceil(pair(scaling["beta_slow"])), dim - 1)
    frequencies = []
    for i, frequency in enumerate(plain):
        slow = min(max((i - low) / ((high - low) or 0.001), 0), 1)
        frequencies.append(frequency * (slow / scaling["factor"] + 1 - slow))
    mscale = [0.1 * scaling[key] * math.log(scaling["factor"]) + 1 for key in ("mscale", "mscale_all_dim")]
    return frequencies, mscale[0] / mscale[1]
