"""Training with FP8 products on weights in high precision: it computes nearly the same, and learns as well."""

import collections
import copy
import functools

import pytest
import tiny
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from k2kernels.functional import fp8_linear as functional
from k2kernels.model import K2Model
from k2kernels.model.linear import Fp8Linear
from k2kernels.optim import MuonClip, QKClip

# More than one block of 128, and no whole number of them, along every axis.
SIZES = dict(
    vocab_size=64,
    hidden_size=192,
    num_hidden_layers=2,
    q_lora_rank=136,
    kv_lora_rank=144,
    num_attention_heads=4,
    qk_nope_head_dim=32,
    qk_rope_head_dim=16,
    v_head_dim=48,
    intermediate_size=160,
    moe_intermediate_size=136,
    n_routed_experts=4,
)


def made(**changes):
    """With the weights that training begins with, blocks of 128x128 apart in size, so that a mix-up of scales shows."""
    model = K2Model(tiny.config(**{**SIZES, **changes}))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1 and "embed" not in name and "lm_head" not in name:
                grid = [-(-size // 128) for size in weight.shape[-2:]]
                sizes = torch.exp2(torch.randint(-1, 2, grid)).repeat_interleave(128, 0).repeat_interleave(128, 1)
                weight.mul_(sizes[: weight.shape[-2], : weight.shape[-1]])
    return model.train()


def text(batch, length, generator):
    """Each token has two successors, so that a model can learn all but one bit of it."""
    tokens = torch.randint(64, (batch, 1), generator=generator)
    for _ in range(length):
        coin = torch.randint(2, (batch, 1), generator=generator)
        tokens = torch.cat([tokens, (tokens[:, -1:] * 5 + 7 + 29 * coin) % 64], dim=1)
    return tokens


def loss_of(model, ids):
    return F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


def gradients(model, ids):
    model.zero_grad()
    loss_of(model, ids).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def least_cosine(model):
    """Of a gradient with that of the model in high precision, as far as noise adds up.

    A product of two operands rounded to e4m3 has noise of -28.8 dB, 0.036 of its size. n products in a chain, rounded
    independently, have 0.036 sqrt(n) at most: residual connections lessen it, and at the start of a training softmax
    and SwiGLU, nearly linear, do not add to it. No gradient depends on more products than one of each linear layer and
    expert in the forward pass, one on the way back, and its own.
    """
    modules = [name for name, module in model.named_modules() if hasattr(module, "fp8")]
    products = len(modules) + sum(name.endswith(".experts") for name in modules)  # which have two
    return (1 + 10 ** (-28.8 / 10) * (2 * products + 1)) ** -0.5


def cosines(got, want):
    return {n: float(F.cosine_similarity(got[n].flatten().double(), want[n].flatten().double(), 0)) for n in want}


@pytest.fixture
def batch():
    return text(4, 48, torch.Generator().manual_seed(0))


def test_gradients_point_where_those_of_high_precision_do(batch):
    """Both experts are taken by every token: with a choice, near ties would turn out otherwise."""
    model = made(n_routed_experts=2)
    want = gradients(model, batch)
    got = gradients(model.use_fp8(), batch)
    alike = cosines(got, want)
    assert min(alike.values()) > least_cosine(model) > 0.97, sorted((value, name) for name, value in alike.items())[:3]
    assert max(value for name, value in alike.items() if "proj" in name) < 1 - 1e-6  # they were FP8
    again = gradients(model.use_fp8(False), batch)
    assert all(torch.equal(again[name], want[name]) for name in want)


class Planted:
    """The ops that `fp8_linear` calls, with other scales of the transposed weight."""

    def __init__(self, bug):
        self.bug = bug

    def __getattr__(self, name):
        op = getattr(torch.ops.k2kernels, name)
        if not name.startswith(("fp8_gemm", "grouped_fp8_gemm")):
            return op

        def call(a, a_scales, b, b_scales, *rest):
            return op(a, a_scales, b, b_scales if b.stride(-1) == 1 else self.bug(b_scales), *rest)

        return call


BUGS = {
    "swapped": lambda scales: scales.flip(-1, -2),
    "not transposed": lambda scales: scales.mT.reshape(scales.shape),
    "left out": torch.ones_like,
}


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bugs_turn_the_gradients(bug, batch, monkeypatch):
    model = made(n_routed_experts=2)
    want = gradients(model, batch)
    monkeypatch.setattr(functional, "_ops", Planted(BUGS[bug]))
    assert min(cosines(gradients(model.use_fp8(), batch), want).values()) < least_cosine(model)


def train(model, steps=30):
    """Returns the loss of each step; the second half slows down to a halt, so that the end does not waver."""
    generator, losses = torch.Generator().manual_seed(1), []
    optimizer = MuonClip(model, 2e-2, adamw=dict(lr=3e-3))
    for step in range(steps):
        for group, lr in zip(optimizer.param_groups, (2e-2, 3e-3)):
            group["lr"] = lr * min(1, 2 * (steps - step) / steps)
        loss = loss_of(model, text(4, 32, generator))
        loss.backward()
        losses.append(float(loss.detach()))
        optimizer.step()
        optimizer.zero_grad()
        model.update_router_bias(1e-2)
    return losses


def test_training_follows_the_curve_of_high_precision():
    """To first order a step lowers the loss by its product with the gradient. What gradients of cosine c lose of that
    is 1 - c of it at most, step by step, and so of the whole way down. Both end models are judged in high precision."""
    start = made()
    plain, fp8 = copy.deepcopy(start), copy.deepcopy(start).use_fp8()
    losses, fp8_losses = train(plain), train(fp8)
    held_out = text(64, 32, torch.Generator().manual_seed(2))
    with torch.no_grad():
        first, end, fp8_end = (float(loss_of(model, held_out)) for model in (start, plain, fp8.use_fp8(False)))
    assert end < first - 3 and losses != fp8_losses
    assert abs(fp8_end - end) < (1 - least_cosine(start)) * (first - end)


def test_the_clip_finds_and_scales_the_masters(batch):
    model = made().use_fp8()
    gradients(model, batch)
    before = model.max_logits()[0]
    optimizer = MuonClip(model, 1e-9, weight_decay=0.0, qk_clip=QKClip(float(before.median())))
    optimizer.step()
    assert (optimizer.last_clip[0].gamma < 1).sum() == 2
    model(batch)
    # 48 products of two rounded operands, whose noise is 0.036 of each
    torch.testing.assert_close(model.max_logits()[0], before.clamp(max=before.median()), rtol=0.1, atol=0)


class Log(TorchDispatchMode):
    """Counts the operations in a `with` block."""

    def __init__(self):
        super().__init__()
        self.calls = collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls[function._schema.name.removeprefix("k2kernels::").removesuffix("_autograd")] += 1
        return function(*args, **(kwargs or {}))


def test_what_is_fp8_and_what_is_not(batch):
    """A dense layer and one with experts and a shared one, and an MTP layer like it."""
    model = made(num_nextn_predict_layers=1, n_group=1).use_fp8()
    ids = batch[:, :-1]
    with Log() as log:
        logits, hidden = model(ids, return_hidden=True)
        loss = logits.square().mean() + model.mtp_logits(ids, hidden)[0].square().mean()
    attention, mlp, layers, experts = 5, 2, 3, 2
    assert log.calls["fp8_gemm"] == layers * (attention + mlp)
    assert log.calls["grouped_fp8_gemm"] == experts * 2 and log.calls["grouped_gemm"] == 0
    # in high precision: two routers, the head twice, eh_proj
    assert sum(log.calls[f"aten::{name}"] for name in ("mm", "addmm", "bmm", "matmul", "linear")) == 5
    with Log() as log:
        loss.backward()
    assert log.calls["fp8_gemm"] == 2 * layers * (attention + mlp)
    assert log.calls["grouped_fp8_gemm_out"] == log.calls["grouped_fp8_wgrad"] == experts * 2
    assert log.calls["aten::index"] <= 2  # of the embedding: no rows are moved, experts begin at multiples of 128


def test_masters_keep_names_dtype_and_checkpoint(batch, tmp_path):
    model = made(moe_intermediate_size=40).bfloat16().use_fp8()
    names = {name: p.dtype for name, p in model.named_parameters()}
    assert names == {name: p.dtype for name, p in made(moe_intermediate_size=40).bfloat16().named_parameters()}
    loss_of(model, batch).backward()
    assert all(p.grad.dtype == p.dtype for p in model.parameters())
    model.save_pretrained(tmp_path)
    loaded = K2Model.from_pretrained(tmp_path, progress=False)
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    assert "quantization_config" not in (tmp_path / "config.json").read_text()
    want = model.eval()(batch)
    assert not torch.equal(loaded(batch), want) and torch.equal(loaded.use_fp8()(batch), want)


def test_checkpointed_layers_give_the_same_gradients(batch):
    model = made().use_fp8()
    want = gradients(model, batch)
    for layer in model.model.layers:
        layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
    got = gradients(model, batch)
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_experts_compile_as_one_graph():
    experts, x = made().use_fp8().eval().model.layers[1].mlp, torch.randn(2, 9, 192)
    assert torch.equal(torch.compile(experts, fullgraph=True, backend="aot_eager")(x), experts(x))


def test_other_weights_are_refused():
    with pytest.raises(ValueError, match="use_fp8: weights must be bfloat16, float16 or float32, got float64"):
        made().double().use_fp8()
    model = made()
    model.model.layers[0].self_attn.o_proj = Fp8Linear(192, 192)
    with pytest.raises(ValueError, match=r"use_fp8: weights must .* got FP8 codes; load it with keep_quantized=False"):
        model.use_fp8()
