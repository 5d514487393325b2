"""A checkpoint kept in FP8: the FP8 GEMMs serve every linear layer and expert, in the emulator by their kernels."""

import collections
import contextlib
import json

import checkpoints
import pytest
import tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import k2kernels
from k2kernels.engine.session import Session
from k2kernels.model import K2Model
from k2kernels.testing.compare import cos_diff

# A dense layer and two with experts, of sizes that all kernels of a decoding pass serve.
SIZES = dict(
    num_hidden_layers=3, hidden_size=192, q_lora_rank=136, kv_lora_rank=512, qk_rope_head_dim=64, num_attention_heads=2
)
WIDTHS = dict(intermediate_size=256, moe_intermediate_size=128, vocab_size=128, n_routed_experts=4)
DENSE, EXPERTS = 1, 2  # layers
LENGTHS = [9, 30, 1]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    torch.manual_seed(0)
    plain, kept = tmp_path_factory.mktemp("plain"), tmp_path_factory.mktemp("fp8")
    tiny.model(**SIZES, **WIDTHS).save_pretrained(plain)
    config = json.loads((plain / "config.json").read_text())
    stored = checkpoints.quantize(checkpoints.read(plain))
    checkpoints.write(kept, stored, {**config, "quantization_config": checkpoints.FP8_CONFIG})
    return kept


@pytest.fixture
def model(path):
    return K2Model.from_pretrained(path, dtype=torch.bfloat16, keep_fp8=True, progress=False)


class Log(TorchDispatchMode):
    """Counts this library's operations in a `with` block, and the products of PyTorch."""

    def __init__(self):
        super().__init__()
        self.calls = collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        namespace, name = function._schema.name.split("::")
        if namespace == "k2kernels":
            self.calls[name] += 1
        elif name in ("mm", "addmm", "bmm", "baddbmm", "linear", "matmul", "einsum", "_scaled_mm"):
            self.calls["torch"] += 1
        return function(*args, **(kwargs or {}))


@torch.no_grad()
def test_prefill_runs_through_the_fp8_gemms(model):
    ids = torch.randint(0, 128, (2, 12))
    with Log() as log:
        model(ids)
    layers = DENSE + EXPERTS
    # five of attention and two of a dense MLP or of the shared expert; q, kv, o and gate_up quantise their inputs
    assert log.calls["fp8_gemm"] == 6 * layers and log.calls["quantize_1x128"] == 6 * layers
    assert log.calls["grouped_fp8_gemm"] == EXPERTS and log.calls["moe_dispatch_quantize"] == EXPERTS
    assert log.calls["fp8_gemm_swiglu"] == layers and log.calls["grouped_fp8_gemm_swiglu"] == EXPERTS
    assert log.calls["swiglu"] == log.calls["swiglu_quantize"] == 0
    assert log.calls["torch"] == EXPERTS + 1  # routers and head
    assert log.calls["dequantize"] == log.calls["grouped_gemm"] == 0


class Scales(TorchDispatchMode):
    """Collects the scales with which this library quantises activations."""

    def __init__(self):
        super().__init__()
        self.of = collections.defaultdict(list)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        namespace, name = function._schema.name.split("::")
        if namespace == "k2kernels" and name != "dequantize" and ("quantize" in name or "swiglu" in name):
            self.of[name].append(result[1])
        return result


@torch.no_grad()
@pytest.mark.parametrize("scale_fmt", ["ue8m0", None])
def test_scales_of_activations_are_what_the_checkpoint_asks_for(path, tmp_path, scale_fmt):
    """In prefill and in decoding, of linear layers and experts: powers of two where config.json says ue8m0."""
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"]["scale_fmt"] = scale_fmt
    checkpoints.write(tmp_path / "fp8", checkpoints.read(path), config)
    model = K2Model.from_pretrained(tmp_path / "fp8", dtype=torch.bfloat16, keep_fp8=True, progress=False)
    with Scales() as scales:
        decode(model, torch.randint(0, 128, (3, max(LENGTHS))), contextlib.nullcontext())
    ops = {"quantize_1x128", "fp8_gemm_swiglu", "moe_dispatch_quantize", "grouped_fp8_gemm_swiglu"}
    assert set(scales.of) == ops
    for name, found in scales.of.items():
        powers = [bool((s[s > 0].log2() % 1 == 0).all()) for s in found]
        assert all(powers) if scale_fmt else not any(powers), name


DECODING = dict(
    quantize_1x128=5 * 3,
    fp8_gemm=5 * 3,
    fp8_gemm_swiglu=3,
    grouped_fp8_gemm=EXPERTS,
    grouped_fp8_gemm_swiglu=EXPERTS,
    moe_route=EXPERTS,
    moe_dispatch_quantize=EXPERTS,
    moe_combine=EXPERTS,
    mla_append=3,
)


def decode(model, ids, context):
    """Logits [B, 1, vocab] of a decoding pass, which alone runs in `context`, after the prefill of `ids`."""
    session = Session(model, LENGTHS, 4, 0, "auto")
    model.model(ids, session.prefill(ids.shape[1]))
    with context:
        return session.decode([0, 1, 2], ids[:, :1]).logits.float()


@torch.no_grad()
@pytest.mark.parametrize("arch, seed", [("sm_80", 2), ("sm_90a", 3)])
def test_decoding_runs_through_the_fp8_kernels(path, model, arch, seed):
    torch.manual_seed(0)
    ids = torch.randint(0, 128, (3, max(LENGTHS)))
    log = Log()
    want = decode(model, ids, log)
    assert {op: log.calls[op] for op in DECODING} == DECODING and log.calls["mla_decode"] == 3
    # routers, head, and the two halves of kv_b_proj, absorbed into queries and outputs in bfloat16
    assert log.calls["torch"] == EXPERTS + 1 + 2 * 3
    before = {op: k2kernels.launch_count(op) for op in DECODING}
    got = decode(model, ids, k2kernels.emulated(arch, seed=seed))
    launched = {op: k2kernels.launch_count(op) - before[op] for op in DECODING}
    assert launched == DECODING
    # Both differ from products in float32 by what FP8 codes cost, each by roundings of its own.
    exact = decode(K2Model.from_pretrained(path, dtype=torch.float32, progress=False), ids, contextlib.nullcontext())
    assert cos_diff(got, exact) < 2 * cos_diff(want, exact) < 0.1
