"""`moe_mlp` with packed 4-bit weights: the bits of the one with the dequantised weights."""

import pytest
import torch

import k2kernels
from k2kernels import W4, dequantize_w4, moe_mlp, pack_w4
from k2kernels.ops.moe import moe_route

TOKENS, EXPERTS, HIDDEN, INTERMEDIATE = 40, 5, 96, 72
QUANTIZERS = {"int4": k2kernels.quantize_int4_group32, "mxfp4": k2kernels.quantize_mxfp4}


class Layer:
    """x, logits (an expert gets no token), codes, packed and dequantised weights. I is a multiple of 32."""

    def __init__(self, kind, intermediate=64):
        torch.manual_seed(0)
        self.x, logits = torch.randn(TOKENS, HIDDEN).bfloat16(), torch.randn(TOKENS, EXPERTS)
        logits[:, 3] = -torch.inf
        self.logits = logits
        gate_up = torch.randn(EXPERTS, 2 * intermediate, HIDDEN) * HIDDEN**-0.5
        down = torch.randn(EXPERTS, HIDDEN, intermediate) * intermediate**-0.5
        codes = QUANTIZERS[kind](gate_up), QUANTIZERS[kind](down)
        self.packed = pack_w4(*codes[0], gated=True), pack_w4(*codes[1])
        self.plain = tuple(dequantize_w4(*pair) for pair in codes)

    def run(self, weights, logits=None, **options):
        routing = moe_route(self.logits if logits is None else logits, top_k=2)
        return moe_mlp(self.x, routing, *weights, **options)


@pytest.mark.parametrize("kind", QUANTIZERS)
@pytest.mark.parametrize("intermediate", [64, 96, 32])
def test_bits_are_those_of_the_dequantised(kind, intermediate):
    layer = Layer(kind, intermediate)
    for options in (
        {},
        dict(residual=layer.x, shared=layer.x * 2, out_dtype=torch.float32),
        dict(alignment=16),
        dict(capacity=30),
    ):
        assert torch.equal(layer.run(layer.packed, **options), layer.run(layer.plain, **options))


def test_gradients_of_what_is_not_quantised():
    layer = Layer("int4")
    found = []
    for weights in (layer.packed, layer.plain):
        logits, shared = layer.logits.clone().requires_grad_(), layer.x.clone().requires_grad_()
        out = layer.run(weights, logits, shared=shared)
        found.append(torch.autograd.grad(out.float().square().sum(), [logits, shared]))
    assert all(torch.equal(a, b) for a, b in zip(*found))


@pytest.mark.parametrize("kind", QUANTIZERS)
def test_gradients_pass_through_frozen_weights(kind):
    """What a LoRA of the layers before needs: the bits of the gradients through the dequantised weights."""
    layer, found = Layer(kind, 96), []
    for weights in (layer.packed, layer.plain):
        x, logits = layer.x.clone().requires_grad_(), layer.logits.clone().requires_grad_()
        out = moe_mlp(x, moe_route(logits, top_k=2), *weights, alignment=16)
        found.append(torch.autograd.grad(out.float().square().sum(), [x, logits]))
    assert all(torch.equal(a, b) for a, b in zip(*found)) and found[0][0].any()


def test_one_graph():
    layer = Layer("mxfp4")
    torch._dynamo.reset()
    run = torch.compile(layer.run, fullgraph=True, backend="aot_eager")
    assert torch.equal(run(layer.packed), layer.run(layer.packed))


def test_one_graph_with_gradients():
    """Through frozen weights, and through masters that are quantised in the graph."""
    layer = Layer("int4")
    masters = [w.clone().requires_grad_() for w in layer.plain]

    def loss(x, weights, w4):
        return moe_mlp(x, moe_route(layer.logits, top_k=2), *weights, w4=w4).float().square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for weights, leaves, w4 in ((layer.packed, [], None), (masters, masters, "mxfp4")):
        x = layer.x.clone().requires_grad_()
        one, other = compiled(x, weights, w4), loss(x, weights, w4)
        found = (torch.autograd.grad(out, [x, *leaves]) for out in (one, other))
        assert torch.equal(one, other) and all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_bad_inputs():
    layer = Layer("int4")
    gate_up, down = layer.packed
    fp8 = k2kernels.quantize_128x128(layer.plain[1])
    for weights, options, error, message in (
        ((gate_up, layer.plain[1]), {}, ValueError, "down must be a W4 like gate_up, got Tensor"),
        ((gate_up, fp8), {}, ValueError, "down must be a W4 like gate_up, got tuple"),
        ((layer.plain[0], down), {}, ValueError, "down must be a tensor like gate_up, got W4"),
        ((gate_up, down), dict(fp8=True), ValueError, "gate_up must be a tensor in high precision with fp8=True, got"),
        ((gate_up._replace(gated=False), down), {}, ValueError, "gate_up must be packed with gated=True, got gated=F"),
        ((gate_up, down._replace(gated=True)), {}, ValueError, "down must be packed with gated=False, got gated=True"),
        ((gate_up._replace(kind="mxfp4"), down), {}, ValueError, r"the data of gate_up must be \[5, 2, 2, 2176\]"),
        ((gate_up, W4(down.data[1:], *down[1:])), {}, ValueError, "the data of down must be"),
        (
            (W4(gate_up.data[0], "int4", (128, 96), True), down),
            {},
            ValueError,
            r"of gate_up must be \(E, 2I, H\)",
        ),
        (
            (gate_up, gate_up._replace(gated=False)),
            {},
            ValueError,
            r"down must be \(E, H, I\) = \[5, 96, 64\]",
        ),
    ):
        with pytest.raises(error, match=message):
            layer.run(weights, **options)
    for x, error, message in (
        (layer.x.float(), TypeError, "x must be .* bfloat16, got .* float32"),
        (layer.x[:, :64], ValueError, r"the shape of gate_up must be \(E, 2I, H=64\), got \[5, 128, 96\]"),
    ):
        layer.x = x
        with pytest.raises(error, match=message):
            layer.run((gate_up, down))
