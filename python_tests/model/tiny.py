"""Small configurations that keep every convention of the large models, and weights with which each of them matters."""

from __future__ import annotations

import torch
from torch import nn

from k2kernels.model import K2Config, K2Model

YARN_STEP = dict(
    rope_type="yarn",
    factor=32.0,
    original_max_position_embeddings=16,
    beta_fast=1.0,
    beta_slow=1.0,
    mscale=1.0,
    mscale_all_dim=1.0,
)
YARN_RAMP = dict(YARN_STEP, factor=40.0, original_max_position_embeddings=512, beta_fast=32.0, mscale_all_dim=0.6)

_COMMON = dict(
    vocab_size=256,
    hidden_size=96,
    num_hidden_layers=4,
    num_attention_heads=4,
    max_position_embeddings=512,
    kv_lora_rank=48,
    qk_nope_head_dim=24,
    qk_rope_head_dim=16,
    v_head_dim=32,
    intermediate_size=160,
    moe_intermediate_size=40,
    first_k_dense_replace=1,
    n_shared_experts=1,
)
CONFIGS = {
    # one group, YaRN as a step: Kimi-K2
    "kimi": dict(
        _COMMON,
        q_lora_rank=56,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        routed_scaling_factor=2.827,
        rope_theta=50000.0,
        rope_scaling=YARN_STEP,
    ),
    # groups, YaRN as a ramp, an attention factor other than 1: DeepSeek-V3
    "deepseek": dict(
        _COMMON,
        q_lora_rank=56,
        first_k_dense_replace=2,
        n_routed_experts=16,
        num_experts_per_tok=4,
        n_group=4,
        topk_group=2,
        routed_scaling_factor=2.5,
        rope_theta=10000.0,
        rope_scaling=YARN_RAMP,
    ),
    # full-rank queries, two shared experts, another eps, no YaRN: Moonlight
    "moonlight": dict(
        _COMMON,
        q_lora_rank=None,
        n_routed_experts=8,
        num_experts_per_tok=3,
        n_group=1,
        topk_group=1,
        n_shared_experts=2,
        routed_scaling_factor=2.446,
        rms_norm_eps=1e-5,
        rope_theta=50000.0,
    ),
}


def config(name: str = "kimi", **changes) -> K2Config:
    return K2Config(**{**CONFIGS[name], "dtype": "float32", **changes})


def model(name: str = "kimi", **changes) -> K2Model:
    """A random model in evaluation mode."""
    made = K2Model(config(name, **changes))
    fill(made)
    return made.eval()


@torch.no_grad()
def fill(module: nn.Module) -> None:
    """Random weights under which no part of the model is negligible, whichever library the module is of.

    Matrices keep the size of their input; norms weigh between 1/2 and 3/2; router biases reorder the experts.
    """
    for name, tensor in {**dict(module.named_parameters()), **dict(module.named_buffers())}.items():
        if name.endswith("e_score_correction_bias"):
            tensor.normal_(std=0.2)
        elif tensor.dim() == 1 and name.endswith("weight"):
            tensor.uniform_(0.5, 1.5)
        elif name.endswith("embed_tokens.weight"):
            tensor.normal_()
        elif tensor.dim() > 1:
            # Sharper attention than with 1: its pattern must matter.
            gain = 2.0 if "q_" in name.rsplit(".", 2)[-2] or "kv_a" in name else 1.0
            tensor.normal_(std=gain * tensor.shape[-1] ** -0.5)
