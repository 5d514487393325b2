"""Writes w4_golden.json: one matrix of an expert, quantised and read back by compressed-tensors (tried: 0.20.0)."""

import json
from pathlib import Path

import torch
from compressed_tensors_oracle import compress, decompress

torch.manual_seed(0)
weight = (torch.randn(24, 96) * torch.rand(24, 1)).bfloat16()
weight[3, 32:64] = 0
golden = {}
for kind in ("int4", "mxfp4"):
    tensors = compress(weight, kind)
    tensors = {"weight": weight, **tensors, "decompressed": decompress(tensors, kind)}
    found = {"tensors": {}}
    for name, x in tensors.items():
        found["tensors"][name] = [str(x.dtype).removeprefix("torch."), list(x.shape)]
        found[name] = x.contiguous().view(torch.uint8).numpy().tobytes().hex()
    golden[kind] = found
path = Path(__file__).parent / "w4_golden.json"
path.write_text(json.dumps(golden, indent=1) + "\n")
