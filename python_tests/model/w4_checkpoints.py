"""Tiny checkpoints in the forms of Kimi-K2-Thinking and Kimi-K2.5, written by compressed-tensors' own compressors."""

import json
import re

import compressed_tensors_oracle as oracle
import tiny
import torch
from checkpoints import read, write
from compressed_tensors.quantization import QuantizationConfig

EXPERT = re.compile(r".*\.mlp\.experts\.\d+\.(gate|up|down)_proj\.weight")
SIZES = dict(num_hidden_layers=3, hidden_size=128, moe_intermediate_size=96, n_routed_experts=4)
IGNORE = ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", r"re:.*mlp\.(gate|up|gate_up|down)_proj.*"]
PREFIX = "language_model."


class Made:
    """A checkpoint directory, its tensors, and the weights as compressed-tensors decompresses them."""

    def __init__(self, path, kind, *, nested=False, shards=1, kimi=True, **more):
        """`kimi`: INT4 scales of amax / 7 instead of compressed-tensors' own amax / 7.5; more: of the weights' args."""
        path.mkdir(exist_ok=True)
        model = tiny.model("kimi", **SIZES).to(torch.bfloat16)
        model.save_pretrained(path / "plain")
        self.path, self.tensors, self.exact = path / kind, {}, {}
        for name, weight in read(path / "plain").items():
            if EXPERT.fullmatch(name):
                packed = oracle.compress(weight, kind, kimi=kimi, **more)
                self.exact[name] = oracle.decompress(packed, kind, **more)
                self.tensors |= {f"{name.removesuffix('weight')}{end}": x for end, x in packed.items()}
            else:
                self.exact[name] = self.tensors[name] = weight
        groups = {"group_0": oracle.scheme(kind, **more)}
        entry = QuantizationConfig(
            config_groups=groups, format=oracle.FORMATS[kind], ignore=IGNORE, quantization_status="compressed"
        )
        self.entry = json.loads(entry.model_dump_json())
        config = {**json.loads((path / "plain" / "config.json").read_text()), "quantization_config": self.entry}
        if nested:
            text = {**config, "model_type": "kimi_k2", "architectures": ["DeepseekV3ForCausalLM"]}
            config = {"model_type": "kimi_k25", "text_config": text, "vision_config": {"hidden_size": 8}}
            stored = {PREFIX + name: x for name, x in self.tensors.items()}
            stored["vision_tower.patch.weight"] = torch.randn(4, 4).bfloat16()
        else:
            stored = self.tensors
        self.config, self.stored = config, stored
        write(self.path, stored, config, shards)

    def rewrite(self, change=lambda tensors, config: None):
        """The same directory after `change`, one file."""
        tensors, config = dict(self.stored), json.loads(json.dumps(self.config))
        change(tensors, config)
        for file in self.path.iterdir():
            file.unlink()
        write(self.path, tensors, config)
        return self.path
