"""Log-probabilities of a model, the example of GRPO, and the code of docs/post_training.md."""

import json
import re
import runpy
from pathlib import Path

import pytest
import torch

from k2kernels.engine import Engine
from k2kernels.model import K2Config, K2Model

ROOT = Path(__file__).parents[2]


def test_log_probs_of_a_model():
    torch.manual_seed(0)
    model = K2Model(K2Config.preset("tiny"))
    ids = torch.randint(1024, (3, 6))
    log_probs, entropy = model.log_probs(ids, temperature=0.5, entropy=True)
    want = (model(ids)[:, :-1] / 0.5).log_softmax(-1)
    torch.testing.assert_close(log_probs, want.gather(-1, ids[:, 1:, None])[..., 0])
    torch.testing.assert_close(entropy, -(want.exp() * want).sum(-1))
    log_probs.sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    with pytest.raises(ValueError, match=r"log_probs: input_ids must have 2 tokens or more, got \[3, 1\]"):
        model.log_probs(ids[:, :1])


def test_the_example_of_grpo(tmp_path, capsys, monkeypatch):
    forgotten, forget = [], Engine.forget
    monkeypatch.setattr(Engine, "forget", lambda engine: forgotten.append(forget(engine)))
    main = runpy.run_path(str(ROOT / "examples" / "grpo_tiny.py"))["main"]
    out = tmp_path / "curve.jsonl"
    rows = main(["--warmup", "2", "--updates", "3", "--tests", "4", "--out", str(out)])
    assert [json.loads(line) for line in out.read_text().splitlines()] == rows
    updates = rows[1:-1]
    assert len(updates) == len(forgotten) == 3 and "after 3 updates" in capsys.readouterr().out
    assert updates[0]["kl"] == 0  # exactly
    # Rounding of float32; other places of the texts give 0.01 and more.
    assert max(row["sampler_gap"] for row in updates) < 1e-4


def test_the_page():
    page = (ROOT / "docs" / "post_training.md").read_text()
    names = {}
    for block in re.findall(r"^```python\n(.*?)^```", page, re.M | re.S):
        exec(block, names)
    assert names["result"].kl == 0 and names["preference"].accuracy == 0
