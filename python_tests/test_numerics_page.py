"""The code of docs/numerics.md."""

import re
from pathlib import Path


def test_the_examples_hold():
    page = Path(__file__).parents[1].joinpath("docs/numerics.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)
    assert len(blocks) == 2 and all("assert torch.equal" in block for block in blocks)
    names = {}
    for block in blocks:
        exec(block, names)
