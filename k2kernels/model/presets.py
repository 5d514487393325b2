"""Published configurations, by name. What a preset leaves out has K2Config's default."""

from __future__ import annotations

from typing import Any


def _yarn(factor: float, original: int, beta_fast: float, beta_slow: float) -> dict[str, Any]:
    return {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": original,
        "beta_fast": beta_fast,
        "beta_slow": beta_slow,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    }


PRESETS: dict[str, dict[str, Any]] = {
    # Kimi-K2-Instruct, July 2025
    "kimi-k2": dict(
        vocab_size=163840,
        num_attention_heads=64,
        max_position_embeddings=131072,
        first_k_dense_replace=1,
        n_routed_experts=384,
        n_group=1,
        topk_group=1,
        routed_scaling_factor=2.827,
        rope_theta=50000.0,
        rope_scaling=_yarn(32.0, 4096, 1.0, 1.0),
        bos_token_id=163584,
        eos_token_id=163585,
        pad_token_id=163839,
    ),
    # Kimi-K2-Thinking, November 2025; published in INT4. Not compared with the released config.json itself, but key by
    # key with what others took from it (see `test_kimi_k2_thinking_is_the_preset`). K2.5 and later have beta_fast 32.
    "kimi-k2-thinking": dict(
        vocab_size=163840,
        num_attention_heads=64,
        max_position_embeddings=262144,
        first_k_dense_replace=1,
        n_routed_experts=384,
        n_group=1,
        topk_group=1,
        routed_scaling_factor=2.827,
        rms_norm_eps=1e-5,
        rope_theta=50000.0,
        rope_scaling=_yarn(64.0, 4096, 1.0, 1.0),
        bos_token_id=163584,
        eos_token_id=163586,
        pad_token_id=163839,
    ),
    "deepseek-v3": dict(
        max_position_embeddings=163840,
        rope_scaling=_yarn(40.0, 4096, 32.0, 1.0),
        num_nextn_predict_layers=1,
        bos_token_id=0,
        eos_token_id=1,
    ),
    "moonlight-16b-a3b": dict(
        vocab_size=163840,
        hidden_size=2048,
        num_hidden_layers=27,
        num_attention_heads=16,
        max_position_embeddings=8192,
        q_lora_rank=None,
        intermediate_size=11264,
        moe_intermediate_size=1408,
        first_k_dense_replace=1,
        n_routed_experts=64,
        n_shared_experts=2,
        num_experts_per_tok=6,
        n_group=1,
        topk_group=1,
        routed_scaling_factor=2.446,
        rms_norm_eps=1e-5,
        rope_theta=50000.0,
        bos_token_id=163584,
        eos_token_id=163585,
    ),
    # K2 in miniature: every convention of the large one is on, YaRN's step included (it slows pairs 3..7 of 8).
    "tiny": dict(
        vocab_size=1024,
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=512,
        q_lora_rank=96,
        kv_lora_rank=64,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=32,
        intermediate_size=384,
        moe_intermediate_size=64,
        first_k_dense_replace=1,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        routed_scaling_factor=2.827,
        rope_theta=50000.0,
        rope_scaling=_yarn(4.0, 128, 1.0, 1.0),
        dtype="float32",
    ),
}
