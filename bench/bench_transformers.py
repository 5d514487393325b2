"""A decoding step of a DeepSeek-V3 model of transformers, as it is and patched, after contexts of several lengths.

CPU seconds of one thread, which other work on the machine changes least. `python bench/bench_transformers.py` appends
lines to results/transformers.jsonl.
"""

from __future__ import annotations

import datetime
import functools
import json
import time
from pathlib import Path
from statistics import median

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.17")

from k2kernels.integrations.transformers import patch, unpatch  # noqa: E402

CONTEXTS = (256, 1024, 4000)
SHAPE = dict(num_attention_heads=16, kv_lora_rank=512, qk_rope_head_dim=64, qk_nope_head_dim=128, v_head_dim=128)
SIZES = dict(hidden_size=512, num_hidden_layers=2, q_lora_rank=256, n_routed_experts=8, num_experts_per_tok=2)
REST = dict(vocab_size=256, n_group=1, topk_group=1, moe_intermediate_size=128, intermediate_size=512)


@functools.cache
def model():
    torch.manual_seed(0)
    config = transformers.DeepseekV3Config(
        **SHAPE, **SIZES, **REST, num_key_value_heads=16, first_k_dense_replace=1, max_position_embeddings=8192
    )
    return transformers.DeepseekV3ForCausalLM(config).eval()


def decoding_step(context: int, who: str):
    """A function that computes one token after `context` others."""
    torch.set_num_threads(1)
    made = {"transformers": unpatch, "patched": patch}[who](model())
    cache = transformers.DynamicCache(config=made.config)
    ids = torch.randint(0, 256, (1, context), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for part in ids.split(512, dim=1):  # bounds the memory of expanded keys
            made(part, past_key_values=cache)

    @torch.no_grad()
    def step():
        made(ids[:, :1], past_key_values=cache)
        cache.crop(-1)

    step()
    return step


@pytest.mark.benchmark(group="transformers", timer=time.process_time)
@pytest.mark.parametrize("who", ["transformers", "patched"])
@pytest.mark.parametrize("context", CONTEXTS)
def test_decoding_step(benchmark, context, who):
    benchmark(decoding_step(context, who))


def main() -> None:
    from fp8_training import _run, device_name

    lines = []
    for context in CONTEXTS:
        seconds = {}
        for who in ("transformers", "patched"):
            step, times = decoding_step(context, who), []
            for _ in range(15):
                start = time.process_time()
                step()
                times.append(time.process_time() - start)
            seconds[who] = round(median(times), 5)
        figures = dict(context=context, cpu_seconds=seconds, speed_up=seconds["transformers"] / seconds["patched"])
        where = dict(
            device=device_name(), date=str(datetime.date.today()), commit=_run("git", "rev-parse", "--short", "HEAD")
        )
        versions = dict(torch=torch.__version__, transformers=transformers.__version__)
        lines.append({**figures, **where, **versions, "command": "python bench/bench_transformers.py"})
        print(lines[-1], flush=True)
    with (Path(__file__).parent / "results" / "transformers.jsonl").open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


if __name__ == "__main__":
    main()
