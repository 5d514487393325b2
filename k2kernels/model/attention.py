"""Multi-head latent attention: expanded keys and values for prefill and training, the absorbed form for decoding.

Between the two, new tokens over a long past take the form that needs fewer FLOPs (`Extend`).

Letters of shapes: B sequences of T tokens, N = B T, H heads, C latent (kv_lora_rank), R rope, D nope + rope,
V value, P pages.

Source: DeepSeek-V2 (2024), section 2.1 and appendix C.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from k2kernels.model.config import K2Config
from k2kernels.model.extend import Absorbed, Expanded, Extend
from k2kernels.model.linear import Float32Buffers, Fp8Linear, Linear
from k2kernels.model.micro_batch import MicroBatch
from k2kernels.model.rope import apply_rope
from k2kernels.ops.mla_cache import mla_append, mla_gather
from k2kernels.ops.mla_decode import mla_decode
from k2kernels.ops.mla_prefill import mla_prefill, mla_prefill_piece

LATENT_EPS = 1e-6  # of the two latent norms, independent of config.rms_norm_eps


@dataclass
class Prefill:
    """A pass over whole sequences from their first token; with a cache, their rows are written to it."""

    rope: tuple[Tensor, Tensor]  # cos and sin of each token [N, R/2]
    cu_seqlens: Tensor  # int32 [B+1]
    pages: Tensor | None = None  # of the cache, for all layers: [layers, P, page size, C + R]
    block_table: Tensor | None = None  # int32 [B, pages per row]
    positions: Tensor | None = None  # of each token's row in its sequence [N]; -1: not written
    micro_batch: MicroBatch | None = None  # where the pass has several; a step is then of its sequences alone


@dataclass
class Decode:
    """A pass over the next T tokens of each of B sequences, whose past is in the cache."""

    rope: tuple[Tensor, Tensor]
    pages: Tensor  # [layers, P, page size, C + R]
    block_table: Tensor
    positions: Tensor
    seq_lens: Tensor  # int32 [B], these tokens included
    absorbed: list[tuple[Tensor, Tensor]]  # what `LatentAttention.absorbed` gave, by layer
    cu_seqlens: Tensor | None = None  # int32 [B+1]; None: T tokens of each


Step = Prefill | Decode | Extend


class LatentAttention(Float32Buffers):
    """Latent attention of one layer; `layer` is its index in the cache.

    In training mode the buffer `max_logit` float32 [H] keeps the largest scaled, masked logit that each head has seen.
    """

    def __init__(self, config: K2Config, layer: int):
        super().__init__()
        self.config, self.layer = config, layer
        heads = config.num_attention_heads
        if config.q_lora_rank is None:
            self.q_proj = Linear(config.hidden_size, heads * config.qk_head_dim)
        else:
            self.q_a_proj = Linear(config.hidden_size, config.q_lora_rank)
            self.q_a_layernorm = nn.RMSNorm(config.q_lora_rank, LATENT_EPS)
            self.q_b_proj = Linear(config.q_lora_rank, heads * config.qk_head_dim)
        self.kv_a_proj_with_mqa = Linear(config.hidden_size, config.latent_dim)
        self.kv_a_layernorm = nn.RMSNorm(config.kv_lora_rank, LATENT_EPS)
        key_value = config.qk_nope_head_dim + config.v_head_dim
        self.kv_b_proj = Linear(config.kv_lora_rank, heads * key_value)
        self.o_proj = Linear(heads * config.v_head_dim, config.hidden_size)
        self.register_buffer("max_logit", torch.empty(heads, dtype=torch.float32), persistent=False)
        self.reset_buffers()

    def reset_buffers(self) -> None:
        self.max_logit.fill_(-torch.inf)

    def forward(self, x: Tensor, step: Step) -> Tensor:
        """x [B, T, hidden] -> [B, T, hidden]."""
        config, heads = self.config, self.config.num_attention_heads
        flat = x.flatten(0, 1)
        compressed = flat if config.q_lora_rank is None else self.q_a_layernorm(self.q_a_proj(flat))
        query = self.q_proj if config.q_lora_rank is None else self.q_b_proj
        q = query(compressed).view(-1, heads, config.qk_head_dim)
        latent, k_rope = self.kv_a_proj_with_mqa(flat).split([config.kv_lora_rank, config.qk_rope_head_dim], dim=-1)
        latent = self.kv_a_layernorm(latent)
        rotary = (..., slice(config.qk_nope_head_dim, None))
        q[rotary] = apply_rope(q[rotary], *step.rope, config.rope_interleave)
        k_rope = apply_rope(k_rope, *step.rope, config.rope_interleave)
        if step.pages is not None:
            row = torch.cat([latent, k_rope], dim=-1)
            mla_append(row, step.pages[self.layer], step.block_table, step.positions)
        if isinstance(step, Prefill):
            out = self._whole(q, latent, k_rope, step)
        elif isinstance(step, Decode):
            out = self._absorbed(q, step, step)
        else:
            outs = [
                self._absorbed(q[part.tokens], step, part)
                if isinstance(part, Absorbed)
                else self._in_pieces(q[part.tokens], step, part)
                for part in step.parts
            ]
            out = outs[0] if len(outs) == 1 else torch.cat(outs)
        return self.o_proj(out.flatten(1)).view_as(x)

    def _whole(self, q: Tensor, latent: Tensor, k_rope: Tensor, step: Prefill) -> Tensor:
        """Attention over the pass's own tokens, with keys and values of full width -> [N, H, V]."""
        result = mla_prefill(
            q,
            self.kv_b_proj(latent).view(len(q), self.config.num_attention_heads, -1),
            None,
            k_rope=k_rope,
            cu_seqlens_q=step.cu_seqlens,
            cu_seqlens_k=step.cu_seqlens,
            softmax_scale=self.config.softmax_scale,
            return_max_logits=self.training,
        )
        if self.training:
            peak = result.max_logits.detach().amax(dim=0).float()
            if step.micro_batch is None:
                self._record(peak)
            else:
                step.micro_batch.later(self._record, peak)
        return result.out

    def _record(self, peak: Tensor) -> None:
        self.max_logit.copy_(torch.maximum(self.max_logit, peak))

    def _in_pieces(self, q: Tensor, step: Extend, part: Expanded) -> Tensor:
        """Attention over the cache, whose keys and values are expanded piece by piece -> [N, H, V]."""
        config, state = self.config, None
        for piece in part.pieces:
            rows = mla_gather(step.pages[self.layer], piece.block_table, piece.positions, dtype=q.dtype)
            latent, k_rope = rows.split([config.kv_lora_rank, config.qk_rope_head_dim], dim=-1)
            state = mla_prefill_piece(
                state,
                q,
                self.kv_b_proj(latent).view(len(rows), config.num_attention_heads, -1),
                None,
                k_rope=k_rope,
                cu_seqlens_q=part.cu_seqlens,
                cu_seqlens_k=piece.cu_seqlens,
                diagonal=piece.diagonal,
                softmax_scale=config.softmax_scale,
                last=piece is part.pieces[-1],
            )
        return state.out

    def _absorbed(self, q: Tensor, step: Decode | Extend, part: Decode | Absorbed) -> Tensor:
        """Attention over the cache in latent space: kv_b_proj is applied to queries and outputs -> [N, H, V].

        q · (W_UK c) = (W_UKᵀ q) · c, and the weighted sum of W_UV c is W_UV times that of c.
        """
        key, value = step.absorbed[self.layer]
        q_nope, q_rope = q.split([self.config.qk_nope_head_dim, self.config.qk_rope_head_dim], dim=-1)
        q = torch.cat([torch.einsum("nhd,hdc->nhc", q_nope, key), q_rope], dim=-1)
        result = mla_decode(
            q.unflatten(0, (part.seq_lens.shape[0], -1)) if part.cu_seqlens is None else q,
            step.pages[self.layer],
            part.block_table,
            part.seq_lens,
            cu_seqlens_q=part.cu_seqlens,
            softmax_scale=self.config.softmax_scale,
            head_dim_v=self.config.kv_lora_rank,
        )
        return torch.einsum("nhc,hvc->nhv", result.out.flatten(0, -3), value)

    def absorbed(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """kv_b_proj split into W_UK [H, nope, C] and W_UV [H, V, C]: views of the weight, unless that is FP8."""
        config, projection = self.config, self.kv_b_proj
        weight = projection.dequantized(dtype) if isinstance(projection, Fp8Linear) else projection.weight
        return weight.view(config.num_attention_heads, -1, config.kv_lora_rank).split(
            [config.qk_nope_head_dim, config.v_head_dim], dim=1
        )

    def qk_clip_spec(self) -> dict[str, Any]:
        """The weights that QK-Clip scales: rows of `query` per head [nope | rope], of `key` per head [nope | value]."""
        config = self.config
        return dict(
            query=(self.q_proj if config.q_lora_rank is None else self.q_b_proj).weight,
            key=self.kv_b_proj.weight,
            num_heads=config.num_attention_heads,
            nope_dim=config.qk_nope_head_dim,
            rope_dim=config.qk_rope_head_dim,
            value_dim=config.v_head_dim,
        )
