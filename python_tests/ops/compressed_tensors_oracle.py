"""compressed-tensors' own compressors on one matrix."""

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams

FORMATS = {"int4": "pack-quantized", "mxfp4": "mxfp4-pack-quantized"}
_GROUPS = dict(num_bits=4, symmetric=True, strategy="group", group_size=32)
ARGS = {"int4": dict(_GROUPS, type="int"), "mxfp4": dict(_GROUPS, type="float", scale_dtype=torch.uint8)}


def scheme(kind, **more):
    args = QuantizationArgs(**{**ARGS[kind], **more})
    return QuantizationScheme(targets=["Linear"], weights=args, format=FORMATS[kind])


def compress(weight, kind, *, kimi=False, **more):
    """The tensors of a file: weight_packed, weight_scale and, for INT4, weight_shape.

    kimi: INT4 scales are amax / 7, as in Kimi-K2, instead of compressed-tensors' amax / 7.5.
    """
    rule = scheme(kind, **more)
    groups = weight.unflatten(-1, (-1, rule.weights.group_size))
    scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), rule.weights)
    if kimi and kind == "int4":
        scale = torch.where(groups.any(-1), groups.abs().amax(-1) / 7, scale)
    state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero}
    state = BaseCompressor.get_value_from_registry(FORMATS[kind]).compress(state, rule)
    return {name: x for name, x in state.items() if name != "weight_zero_point"}


def decompress(tensors, kind, **more):
    compressor = BaseCompressor.get_value_from_registry(FORMATS[kind])
    return compressor.decompress(dict(tensors), scheme(kind, **more))["weight"]
