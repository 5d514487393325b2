"""The backend inside vLLM's engine, on a CPU: `make test-vllm` (the suite does not collect this file).

The engine runs in this process and thread, so that `emulated()` applies to its calls.
"""

import gc
import json
import os

os.environ.update(  # before vLLM is imported
    K2K_VLLM_CPU="1",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_LOGGING_LEVEL="ERROR",
)

import pytest
import tiny
import torch
import transformers
import vllm
from vllm.distributed import cleanup_dist_env_and_memory

import k2kernels
from k2kernels.engine import Engine, Sampling
from k2kernels.engine.latents import load_latents, write_latents
from k2kernels.integrations import vllm as integration
from k2kernels.integrations.transformers import register_kimi_k2
from k2kernels.model import K2Model

LAYERS, NEW = 2, 8
LENGTHS = (5, 37, 90, 150)  # one is longer than THRESHOLD: vLLM's own prefill
SHAPE = dict(
    vocab_size=320, hidden_size=256, intermediate_size=384, moe_intermediate_size=64, num_hidden_layers=LAYERS,
    kv_lora_rank=512, qk_rope_head_dim=64, qk_nope_head_dim=64, v_head_dim=64, q_lora_rank=96, dtype="bfloat16",
)  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny kimi_k2 with the cached rows of the large one, as K2Model.save_pretrained writes it."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("kimi_k2")
    tiny.model("kimi", **SHAPE).bfloat16().save_pretrained(path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "model_type": "kimi_k2"}))
    return path


@pytest.fixture(scope="module")
def their_tokens(checkpoint):
    """(prompts, greedy tokens of transformers), the same in float32 and bfloat16.

    Of a few random prompts of each length, the one whose tokens win by the most: rounding must not decide.
    """
    register_kimi_k2()
    models = [transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=d) for d in ("float32", "bfloat16")]
    options = dict(do_sample=False, eos_token_id=None, pad_token_id=0, output_logits=True, return_dict_in_generate=True)
    generator = torch.Generator().manual_seed(0)
    prompts, tokens = [], []
    for length in LENGTHS:
        candidates = torch.randint(1, SHAPE["vocab_size"], (24, length), generator=generator)
        exact, rounded = (model.generate(candidates, max_new_tokens=NEW, **options) for model in models)
        first, second = torch.stack(exact.logits).topk(2).values.unbind(-1)
        lead = (first - second).amin(0).masked_fill((exact.sequences != rounded.sequences).any(1), -1)
        best = lead.argmax()
        print("length", length, "lead", round(lead.max().item(), 3))
        prompts.append(candidates[best].tolist())
        tokens.append(exact.sequences[best, length:].tolist())
    return prompts, tokens


@pytest.fixture
def engine(checkpoint):
    """Makes one engine, and ends it with the test."""
    made = []

    def make(dtype="float32", **options):
        made.append(
            vllm.LLM(
                str(checkpoint),
                dtype=dtype,
                skip_tokenizer_init=True,
                enforce_eager=True,
                max_model_len=512,
                max_num_seqs=8,
                attention_backend="CPU_MLA",
                disable_log_stats=True,
                seed=0,
                **options,
            )
        )
        return made[0]

    yield make
    made.clear()
    gc.collect()
    cleanup_dist_env_and_memory()


@pytest.fixture
def calls(monkeypatch):
    """Calls of the ops that the backend made; of `mla_decode` also the ragged ones, and the splits."""
    counts = dict(mla_decode=0, mla_append=0, ragged=0, splits=set())

    def counting(name):
        op = getattr(integration, name)

        def count(*args, **kwargs):
            counts[name] += 1
            if name == "mla_decode":
                counts["ragged"] += kwargs["cu_seqlens_q"] is not None
                counts["splits"].add(kwargs["split"])
            return op(*args, **kwargs)

        return count

    for name in ("mla_decode", "mla_append"):
        monkeypatch.setattr(integration, name, counting(name))
    return counts


def generate(llm, prompts):
    options = vllm.SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, detokenize=False)
    outputs = llm.generate([dict(prompt_token_ids=prompt) for prompt in prompts], options, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def test_reference(engine, their_tokens, calls):
    """In one batch and alone: the tokens of transformers, with every step and every write through this backend."""
    prompts, tokens = their_tokens
    llm = engine()
    assert generate(llm, prompts) == tokens
    assert calls["mla_decode"] >= (NEW - 1) * LAYERS and calls["mla_append"] >= NEW * LAYERS and calls["ragged"]
    assert calls["splits"] == {"auto"}
    assert generate(llm, prompts[1:2]) == tokens[1:2]


def test_rows_that_our_engine_goes_on_from(engine, their_tokens, checkpoint, monkeypatch, tmp_path):
    """The pages of a prompt as vLLM wrote them, in a latent file: the same tokens, computed from the rest alone."""
    (*_, prompt), (*_, tokens) = their_tokens
    written, append = [], integration.mla_append

    def note(rows, cache, table, slots):
        written.append((cache, slots.flatten().clone()))
        return append(rows, cache, table, slots)

    monkeypatch.setattr(integration, "mla_append", note)
    assert generate(engine(), [prompt]) == [tokens]
    of_prompt = [(cache, slots) for cache, slots in written if len(slots) == len(prompt)]
    assert len(of_prompt) == LAYERS
    rows = torch.stack([cache.flatten(0, 1)[slots.long()] for cache, slots in of_prompt])
    model = K2Model.from_pretrained(checkpoint, dtype=torch.float32, progress=False)
    assert write_latents(model, prompt, rows, tmp_path / "a", rope_order="interleaved") == 128
    ours = Engine(model, cache_tokens=512)
    assert load_latents(ours, tmp_path / "a") == 128
    request = ours.submit(prompt, sampling=Sampling(max_new_tokens=NEW, eos_token_ids=[]))
    assert request.result() == [tokens] and request.cached_tokens == 128


def test_kernels(engine, their_tokens):
    """The CUDA source in the emulator, of both chips."""
    prompts, tokens = their_tokens
    llm = engine("bfloat16")
    assert generate(llm, prompts) == tokens
    for seed, arch in enumerate(("sm_80", "sm_90a")):
        before = [k2kernels.launch_count(op) for op in ("mla_decode", "mla_append")]
        with k2kernels.emulated(arch, seed=seed + 1):
            assert generate(llm, prompts) == tokens
        after = [k2kernels.launch_count(op) for op in ("mla_decode", "mla_append")]
        print(arch, "launches of mla_decode, mla_append:", after[0] - before[0], after[1] - before[1])
        assert min(b - a for a, b in zip(before, after)) >= (NEW - 1) * LAYERS


def test_batch_invariance(engine, their_tokens, calls, monkeypatch):
    """Every token takes the same way, with a fixed split. The backend alone: vLLM has no invariant experts on a CPU."""
    prompts, tokens = their_tokens
    monkeypatch.setattr(integration, "is_batch_invariant", lambda: True)
    assert generate(engine(), prompts) == tokens
    (split,) = calls["splits"]
    assert split % 64 == 0 and calls["mla_decode"] == NEW * LAYERS


def test_speculation(engine, their_tokens, calls):
    """Several tokens of a request in a step. The last test: with numba loaded, vLLM 0.32 can make no further engine."""
    prompts, _ = their_tokens
    drafts = dict(method="ngram", num_speculative_tokens=3, prompt_lookup_max=3, prompt_lookup_min=1)
    repeated = [prompt[:20] * 3 for prompt in prompts[1:3]]
    want = generate(engine(), repeated)
    gc.collect()
    cleanup_dist_env_and_memory()
    before = calls["ragged"]
    assert generate(engine(speculative_config=drafts), repeated) == want
    assert calls["ragged"] > before
