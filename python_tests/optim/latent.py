"""A latent-attention model of a few lines, in any precision, whose logits a test can look at head by head."""

import torch
from torch import nn

HEADS, NOPE, ROPE, VALUE, HIDDEN, QUERY_LATENT, KEY_LATENT = 3, 4, 2, 4, 12, 8, 6


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_a_proj = nn.Linear(HIDDEN, QUERY_LATENT, bias=False)
        self.q_b_proj = nn.Linear(QUERY_LATENT, HEADS * (NOPE + ROPE), bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(HIDDEN, KEY_LATENT + ROPE, bias=False)
        self.kv_b_proj = nn.Linear(KEY_LATENT, HEADS * (NOPE + VALUE), bias=False)
        self.o_proj = nn.Linear(HEADS * VALUE, HIDDEN, bias=False)
        self.register_buffer("max_logit", torch.full((HEADS,), -torch.inf), persistent=False)

    def heads(self, x):
        """Logits [H, N, N], keys' rope part [N, R] and values [N, H, V] of tokens [N, hidden]."""
        q = self.q_b_proj(self.q_a_proj(x)).view(-1, HEADS, NOPE + ROPE)
        latent, k_rope = self.kv_a_proj_with_mqa(x).split([KEY_LATENT, ROPE], dim=-1)
        k_nope, value = self.kv_b_proj(latent).view(-1, HEADS, NOPE + VALUE).split([NOPE, VALUE], dim=-1)
        logits = torch.einsum("ihd,jhd->hij", q[..., :NOPE], k_nope) + torch.einsum(
            "ihr,jr->hij", q[..., NOPE:], k_rope
        )
        return logits, k_rope, value

    def forward(self, x):
        logits, _, value = self.heads(x)
        if self.training:
            peak = logits.detach().amax((1, 2)).to(self.max_logit)
            self.max_logit.copy_(torch.maximum(self.max_logit, peak))
        return self.o_proj(torch.einsum("hij,jhv->ihv", logits.softmax(-1), value).flatten(1))

    def qk_clip_spec(self):
        return dict(
            query=self.q_b_proj.weight,
            key=self.kv_b_proj.weight,
            num_heads=HEADS,
            nope_dim=NOPE,
            rope_dim=ROPE,
            value_dim=VALUE,
        )


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Linear(HIDDEN, 2 * 10, bias=False)
        self.down_proj = nn.Linear(10, HIDDEN)

    def forward(self, x):
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(torch.nn.functional.silu(gate) * up)


class Model(nn.Module):
    """Two layers; tokens of one sequence [N] in, logits [N, vocabulary] out."""

    def __init__(self):
        super().__init__()
        self.embed_tokens = nn.Embedding(16, HIDDEN)
        self.layers = nn.ModuleList(
            nn.ModuleDict(dict(self_attn=Attention(), mlp=Mlp(), norm=nn.LayerNorm(HIDDEN))) for _ in range(2)
        )
        self.lm_head = nn.Linear(HIDDEN, 16, bias=False)

    def forward(self, ids):
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = x + layer["self_attn"](layer["norm"](x))
            x = x + layer["mlp"](x)
        return self.lm_head(x)

    def max_logits(self):
        return {i: layer["self_attn"].max_logit for i, layer in enumerate(self.layers)}

    def reset_max_logits(self):
        for layer in self.layers:
            layer["self_attn"].max_logit.fill_(-torch.inf)

    def set_max_logits(self, *values):
        """Pretends that these maxima were seen: one list per layer."""
        for layer, v in zip(self.layers, values):
            layer["self_attn"].max_logit.copy_(torch.tensor(v))


def backward(model, seed=0, micro_batches=1):
    """Gradients of a next-token loss on random tokens."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(micro_batches):
        ids = torch.randint(16, (9,), generator=generator)
        torch.nn.functional.cross_entropy(model(ids)[:-1].float(), ids[1:]).backward()


def clone(model):
    """A model with the same numbers."""
    other = type(model)().to(next(model.parameters()).dtype)
    other.load_state_dict(model.state_dict())
    return other
