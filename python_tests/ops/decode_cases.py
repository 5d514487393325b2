"""Attention over a paged cache, one query at a time, and the inputs of its tests."""

import math

import numpy as np
import torch

from k2kernels.testing.inputs import poisoned_cache


def cumulative(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def naive(queries, rows, scale, causal, latent):
    """out, lse, max_logits of queries[b] [s_q, H, D] over rows[b] [s_k, D], one query at a time, packed."""
    outs, lses, peaks = [], [], []
    for q, kv in zip(queries, rows):
        for i in range(len(q)):
            seen = max(len(kv) - len(q) + i + 1, 0) if causal else len(kv)
            logits = q[i] @ kv[:seen].T * scale
            outs.append(torch.softmax(logits, -1) @ kv[:seen, :latent])  # of no keys: zeros
            lses.append(torch.logsumexp(logits, -1))
            peaks.append(logits.max(-1).values if seen else torch.full_like(lses[-1], -math.inf))
    return torch.stack(outs), torch.stack(lses), torch.stack(peaks)


def make(seq_lens, q_lens, heads, latent, rope, page_size, dtype=torch.float64, scale_q=1.0, **options):
    rows = [torch.randn(n, latent + rope, dtype=dtype) for n in seq_lens]
    queries = [torch.randn(n, heads, latent + rope, dtype=dtype) * scale_q for n in q_lens]
    return queries, rows, poisoned_cache(rows, page_size, **options)


def e4m3(code):
    """Sign, 4 bits of exponent (bias 7), 3 of mantissa."""
    sign, exponent, mantissa = (-1) ** (code >> 7), code >> 3 & 15, code & 7
    return sign * (mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10))


def dequantised_rows(cache, b):
    """float64 [seq_len, 576] of sequence b, from the bytes."""
    values = np.array([math.nan if c & 0x7F == 0x7F else e4m3(c) for c in range(256)])
    rows = []
    for position in range(int(cache.seq_lens[b])):
        page, slot = divmod(position, cache.kv_cache.shape[1])
        raw = cache.kv_cache[int(cache.block_table[b, page]), slot].numpy().tobytes()
        latent = values[np.frombuffer(raw[:512], np.uint8)].reshape(4, 128)
        scales = np.frombuffer(raw[512:528], "<f4").astype(np.float64)
        rope = (np.frombuffer(raw[528:], "<u2").astype(np.uint32) << 16).view(np.float32).astype(np.float64)
        rows.append(np.concatenate([(latent * scales[:, None]).ravel(), rope]))
    return torch.from_numpy(np.array(rows).reshape(-1, 576))
