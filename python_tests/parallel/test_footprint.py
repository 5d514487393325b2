"""The bytes of `footprint` against those that small models hold and keep when they run."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from k2kernels.engine.cache import LatentCache
from k2kernels.model import K2Config, K2Model
from k2kernels.model.capacity import capacity
from k2kernels.model.convert import convert
from k2kernels.model.layer import DecoderLayer
from k2kernels.optim import MuonClip
from k2kernels.parallel import VirtualRanks, expert_parallel, footprint
from k2kernels.parallel.footprint import Pass

BATCH, LENGTH = 3, 50
TOKENS = BATCH * LENGTH
CONFIGS = {
    "tiny": {},
    "full-rank queries, no shared experts": dict(q_lora_rank=None, n_shared_experts=0),
    "two shared experts, two dense layers": dict(n_shared_experts=2, first_k_dense_replace=2, num_experts_per_tok=3),
}


def config(changes=None) -> K2Config:
    return K2Config.from_dict({**K2Config.preset("tiny").to_dict(), **(changes or {})})


def held(tensors) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


class FusedNorm(torch.autograd.Function):
    """Keeps what PyTorch's fused norm of a GPU keeps: its input, one factor a row, and the weight."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        factor = (x.float().pow(2).mean(-1, keepdim=True) + eps).rsqrt()
        ctx.save_for_backward(x, factor, weight)
        return (x.float() * factor).to(x.dtype) * weight

    @staticmethod
    def backward(ctx, grad):
        x, factor, weight = ctx.saved_tensors
        normed = x.float() * factor
        d = grad.float() * weight
        d_x = factor * (d - normed * (d * normed).mean(-1, keepdim=True))
        return d_x.to(x.dtype), (grad * normed).flatten(0, -2).sum(0).to(weight.dtype), None


class Kept:
    """Bytes of the storages that a backward pass keeps, each once, without parameters and buffers."""

    def __init__(self, model):
        self.ours = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
        self.storages = {}

    def __enter__(self):
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda t: t)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error):
        self.hooks.__exit__(*error)

    def pack(self, t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in self.ours and storage.nbytes():
            self.storages[storage.data_ptr()] = storage  # kept alive, so that no other gets its address
        return t

    @property
    def bytes(self):
        return sum(storage.nbytes() for storage in self.storages.values())


def run(model, checkpointed=False):
    """A training step's forward and backward; returns what was kept between them."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (BATCH, LENGTH), generator=generator)
    targets = torch.randint(model.config.vocab_size, (TOKENS,), generator=generator)
    plain = DecoderLayer.forward
    with pytest.MonkeyPatch.context() as patch:
        if checkpointed:
            wrapped = lambda self, x, step: checkpoint(plain, self, x, step, use_reentrant=False)  # noqa: E731
            patch.setattr(DecoderLayer, "forward", wrapped)
        with Kept(model) as kept:
            loss = F.cross_entropy(model(ids).flatten(0, 1), targets)
        kept_bytes = kept.bytes
        loss.backward()
    return kept_bytes


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_parameters_and_optimizer_state(name, dtype):
    model = K2Model(config(CONFIGS[name])).to(dtype).train()
    weights, size = footprint.weights(model.config), dtype.itemsize
    assert {w.name for w in weights} == {*dict(model.named_parameters()), *dict(model.named_buffers())}
    assert sum(w.bytes(size) for w in weights if w.method) == held(model.parameters())
    assert sum(w.bytes(size) for w in weights if not w.method) == held(model.buffers())
    for momentum in (torch.float32, torch.bfloat16):
        optimizer = MuonClip(model, 1e-3, momentum_dtype=momentum)
        run(model)
        optimizer.step()
        for weight, parameter in ((w, dict(model.named_parameters())[w.name]) for w in weights if w.method):
            state = held(optimizer.state[parameter].values())
            assert footprint.state_bytes(weight.method, weight.numel, size, momentum.itemsize) == state, weight
            assert weight.bytes(size) == held([parameter.grad])
        optimizer.zero_grad()


@pytest.mark.parametrize("kind", ["int4", "mxfp4"])
def test_experts_in_4_bits(kind):
    """Of a model that keeps them, sizes that fill no chunk included; and of Kimi-K2-Thinking as `capacity` counts."""
    model = K2Model(config(dict(moe_intermediate_size=96, hidden_size=96))).bfloat16()
    for layer in model.model.layers[1:]:
        layer.mlp.experts.use_w4(kind)
    weights = footprint.weights(model.config)
    assert sum(w.bytes(2, w4=kind) for w in weights) == held([*model.parameters(), *model.buffers()])
    thinking = K2Config.preset("kimi-k2-thinking")
    of_capacity = [w for w in footprint.weights(thinking) if w.method or w.name.endswith("e_score_correction_bias")]
    assert sum(w.bytes(2, w4=kind) for w in of_capacity) == getattr(capacity(thinking), f"weights_{kind}")


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("name", ["kimi-k2", "deepseek-v3", "moonlight-16b-a3b"])
def test_weights_of_published_models(name, fp8):
    """As `capacity` counts them, which leaves out MTP layers and buffers but for the router's bias."""
    c = K2Config.preset(name)
    depth = c.num_hidden_layers
    found = [w for w in footprint.weights(c) if isinstance(w.place, str) or w.place < depth]
    found = [w for w in found if w.method or w.name.endswith("e_score_correction_bias")]
    whole = capacity(c)
    assert sum(w.bytes(2, fp8) for w in found) == (whole.weights_fp8 if fp8 else whole.weights_bf16)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("kind", ["bfloat16", "float32", "fp8", "fp8 of float32"])
def test_activations(kind, name, fused, monkeypatch):
    """Exactly, with the norms of a CPU; and with norms that keep what a GPU's keep."""
    dtype = torch.float32 if "float32" in kind else torch.bfloat16
    model = K2Model(config(CONFIGS[name])).to(dtype).train().use_fp8("fp8" in kind)
    if fused:
        monkeypatch.setattr(nn.RMSNorm, "forward", lambda self, x: FusedNorm.apply(x, self.weight, self.eps))
    c = model.config
    p = Pass(TOKENS, dtype.itemsize, "fp8" in kind, fused_norms=fused)
    layers = [footprint.layer_bytes(c, layer, p) for layer in range(c.num_hidden_layers)]
    around = footprint.stem_bytes(c, p, sequences=BATCH) + footprint.head_bytes(c, p)
    assert run(model) == sum(layers) + around


def test_activations_with_checkpointing():
    model = K2Model(config()).bfloat16().train()
    c, p = model.config, Pass(TOKENS, fused_norms=False)
    inputs = c.num_hidden_layers * footprint.checkpoint_bytes(c, p)
    # Cosines, sines and offsets are arguments of the layers that the recomputation reads: no node of the graph keeps
    # them. PyTorch's own bookkeeping is a few bytes a layer.
    around = footprint.head_bytes(c, p) + 8 * TOKENS
    got = run(model, checkpointed=True)
    assert inputs + around <= got <= inputs + around + 64 * c.num_hidden_layers
    routers = [layer.mlp._logits for layer in model.model.layers[1:]]
    assert held(routers) == 3 * footprint.logits_bytes(c, p)  # beside the graph


def test_attention_of_kimi_k2():
    """74.1 KB of a token and layer are what mla_prefill keeps: see csrc/mla_prefill/README.md."""
    c = K2Config.preset("kimi-k2")
    rest = 2 * (7168 + 1536 + 512) + 2 * (7168 + 1536 + 576) + 12  # inputs of the projections and of the norms
    assert footprint.attention_bytes(c, Pass(1)) == 74_112 + rest


@pytest.mark.parametrize("fp8", [False, True])
def test_cache(fp8):
    c = config(dict(kv_lora_rank=512, qk_rope_head_dim=64) if fp8 else None)
    cache = LatentCache(c, layers=4, rows=3, max_tokens=130, dtype=torch.bfloat16, cache_dtype="fp8" if fp8 else "auto")
    assert footprint.serves_fp8_cache(c) == fp8
    assert footprint.cache_bytes(c, 3, 130, 2, fp8) == held([cache.pages, cache.block_table])


def test_decoded_projections_of_an_fp8_session(tmp_path):
    K2Model(config(dict(moe_intermediate_size=128))).save_pretrained(tmp_path / "bf16")
    convert(tmp_path / "bf16", tmp_path / "fp8", to="fp8")
    model = K2Model.from_pretrained(tmp_path / "fp8", keep_fp8=True, progress=False, dtype=torch.bfloat16)
    weights = footprint.weights(model.config)
    assert sum(w.bytes(2, fp8=True) for w in weights) == held([*model.parameters(), *model.buffers()])
    decoded = [t for layer in model.model.layers for t in layer.self_attn.absorbed(torch.bfloat16)]
    assert footprint.absorbed_bytes(model.config) == held(decoded)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_buffers(ranks):
    c = config()
    virtual = VirtualRanks(ranks, num_experts=8, hidden=c.hidden_size, top_k=2, max_tokens=5)
    assert all(m.buffer.numel() == footprint.buffer_bytes(c, ranks, 5) for m in virtual.group.members)


@pytest.mark.parametrize("capacity", [None, 256, 384])
@pytest.mark.parametrize("fp8", [False, True])
def test_activations_of_experts_behind_an_exchange(fp8, capacity):
    """With the slots that the exchange gives. It holds slots and tokens of the rows beside the graph's tensors."""
    model = K2Model(config()).bfloat16().train().use_fp8(fp8)
    expert_parallel(model, None, max_tokens=TOKENS, capacity=capacity, transport="virtual")
    c = model.config
    slots = capacity or footprint.expert_slots(TOKENS * c.num_experts_per_tok, c.n_routed_experts, fp8)
    p = Pass(TOKENS, fp8=fp8, slots=slots, fused_norms=False)
    layers = sum(footprint.layer_bytes(c, layer, p) for layer in range(c.num_hidden_layers))
    around = footprint.stem_bytes(c, p, sequences=BATCH) + footprint.head_bytes(c, p)
    beside = 3 * (4 * TOKENS * c.num_experts_per_tok + 4 * slots)
    assert run(model) + beside == layers + around
