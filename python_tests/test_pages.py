"""The code of README.md and docs/numerics.md. Other pages' code is run by the tests of what they describe."""

import re
from pathlib import Path

from k2kernels.model import K2Config, K2Model

ROOT = Path(__file__).parents[1]


def blocks(page):
    return re.findall(r"^```python\n(.*?)^```", ROOT.joinpath(page).read_text(), re.M | re.S)


def test_readme(tmp_path):
    """With a checkpoint, and a narrower matrix to quantise in the emulator."""
    K2Model(K2Config.preset("tiny")).save_pretrained(tmp_path / "model")
    (block,) = blocks("README.md")
    names = {}
    exec(block.replace("path/to/checkpoint", str(tmp_path / "model")).replace("7168", "256"), names)
    assert names["out"].shape == (2, 1, 64, 512) and names["y"].shape == (16, 2112) and names["tokens"].shape == (1, 11)


def test_numerics():
    first, second = blocks("docs/numerics.md")
    assert "assert torch.equal" in first and "assert torch.equal" in second
    names = {}
    exec(first, names)
    exec(second, names)
