"""The parts of the vLLM backend that need no vLLM; `make test-vllm` runs vLLM's engine."""

import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

import k2kernels
from k2kernels.integrations import vllm as integration


@pytest.fixture
def registry(monkeypatch):
    """A stand-in for the modules of vLLM that `register` may import; returns the names that were registered."""
    names = {}

    class AttentionBackendEnum:
        CPU_MLA = "CPU_MLA"

    def register_backend(name, path):
        assert name not in names  # vLLM refuses to register a new name twice
        names[name] = path
        setattr(AttentionBackendEnum, name, name)

    platforms, classes = ModuleType("vllm.platforms"), ModuleType("vllm.v1.attention.backends.registry")
    platforms.current_platform = SimpleNamespace(is_cpu=lambda: True)
    classes.AttentionBackendEnum, classes.register_backend = AttentionBackendEnum, register_backend
    for name in ("vllm", "vllm.v1", "vllm.v1.attention", "vllm.v1.attention.backends"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    for module in (platforms, classes):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return names


def test_register(registry, monkeypatch, caplog):
    """Twice, as vLLM may; in the place of CPU_MLA only on request; a vLLM without this registry is left alone."""
    monkeypatch.delenv("K2K_VLLM_CPU", raising=False)
    integration.register()
    integration.register()
    assert registry == {"K2KERNELS_MLA": "k2kernels.integrations.vllm.Backend"}
    monkeypatch.setenv("K2K_VLLM_CPU", "1")
    integration.register()
    assert registry["CPU_MLA"] == "k2kernels.integrations.vllm.CPUBackend"
    sys.modules["vllm.platforms"].current_platform.is_cpu = lambda: False
    integration.register()
    del sys.modules["vllm.v1.attention.backends.registry"].register_backend
    integration.register()
    assert "K2KERNELS_MLA is not registered, this vLLM has another registry" in caplog.text


def test_entry_point():
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    (path,) = re.findall(r'entry-points."vllm.general_plugins"\]\nk2kernels = "(.*)"', text)
    assert path == f"{integration.__name__}:{integration.register.__name__}"


def test_versions(monkeypatch):
    """Refused when the backend is selected, not when vLLM starts."""
    monkeypatch.delenv("K2K_VLLM_UNTESTED", raising=False)
    for version in ("0.32.0", "0.33.1rc1", "0.32.1.dev4+gabc"):
        integration.check_version(version)
    fake = ModuleType("vllm")
    monkeypatch.setitem(sys.modules, "vllm", fake)
    for version in ("0.31.0", "0.34.0", "1.32.0", "dev"):
        fake.__version__ = version
        with pytest.raises(
            k2kernels.UnsupportedError, match=rf"must be 0.32 and 0.33, got {version}; set K2K_VLLM_UNT"
        ):
            _ = integration.Backend
    with pytest.raises(AttributeError, match="no attribute 'Other'"):
        _ = integration.Other
    monkeypatch.setenv("K2K_VLLM_UNTESTED", "1")
    integration.check_version("0.34.0")


def test_obstacles():
    assert integration.obstacle(576, torch.bfloat16, "auto", 64) is None
    assert integration.obstacle(576, torch.float16, "float16", None) is None
    for case, reason in (
        ((320, torch.bfloat16, "auto", 64), r"head_size must be 576 .*, got 320; leave out --attention-backend"),
        ((576, torch.bfloat16, "fp8", 64), r"kv_cache_dtype must be that of the model, got fp8; pass .* auto"),
        ((576, torch.bfloat16, "float16", 64), r"got float16"),
        ((576, torch.bfloat16, "auto", 24), r"block_size must be a multiple of 16, got 24; pass --block-size 64"),
    ):
        assert re.search(reason, integration.obstacle(*case))


@pytest.mark.parametrize("tokens, heads, length", [(2048, 64, 131072), (8192, 128, 131072), (512, 8, 300), (1, 1, 1)])
def test_fixed_split(tokens, heads, length):
    """As many units as the workspace allows, at least one."""
    split = integration.fixed_split(tokens, heads, length)
    units, row = -(-length // split), 514 * 4
    assert split % 64 == 0 and split > 0
    assert units == 1 or units * tokens * max(heads, 16) * row <= integration.WORKSPACE
    if split > 64:
        assert (length // (split - 64)) * tokens * max(heads, 16) * row > integration.WORKSPACE / 2


def rows(*lengths, pages=9, dtype=torch.bfloat16):
    """A cache of sequences with these lengths in scattered pages, written as vLLM does, and their block table."""
    cache = torch.full((pages, 64, 576), torch.nan, dtype=dtype)
    order = torch.randperm(pages).int()
    table, used = torch.full((len(lengths), 3), -1, dtype=torch.int32), 0
    latent, rope, slots = torch.randn(sum(lengths) + 3, 512), torch.randn(sum(lengths) + 3, 1, 64), []
    for sequence, length in enumerate(lengths):
        count = -(-length // 64)
        table[sequence, :count] = order[used : used + count]
        used += count
        place = torch.arange(length)
        slots.append(table[sequence, place // 64].long() * 64 + place % 64)
    slots = torch.cat(slots)
    slots[-1] = -1  # as for padding
    integration.write(latent.to(dtype), rope.to(dtype), cache, slots, torch.arange(pages, dtype=torch.int32)[None])
    want = torch.full_like(cache, torch.nan)
    want.view(-1, 576)[slots[:-1]] = torch.cat([latent, rope[:, 0]], -1)[: len(slots) - 1].to(dtype)
    assert torch.equal(cache.nan_to_num(9), want.nan_to_num(9))
    return cache, table


def metadata(table, lengths, queries):
    ends = torch.tensor([0, *queries]).cumsum(0)
    decode = SimpleNamespace(block_table=table, seq_lens=torch.tensor(lengths))
    # Of prefills, which stand behind, the starts are given too.
    return SimpleNamespace(decode=decode, query_start_loc=torch.cat([ends, ends[-1:] + 7]), max_query_len=max(queries))


@pytest.mark.parametrize("queries", [(1, 1, 1), (2, 1, 5), (1, 0, 1), (2, 0, 1)], ids=str)
def test_attend(queries):
    """Single tokens, several, and requests without any, of which the numbers may add up to one each."""
    lengths = [70, 5, 130]
    cache, table = rows(*lengths, 1, dtype=torch.float32)
    q = torch.randn(sum(queries), 4, 576)
    out, lse = integration.attend(q, cache, metadata(table[:3], lengths, queries), scale=0.05, split="auto")
    first = 0
    for sequence, (length, count) in enumerate(zip(lengths, queries)):
        keys = cache[table[sequence].clamp(min=0).long()].flatten(0, 1)[:length].double()
        for i in range(count):
            seen = keys[: length - count + i + 1]
            logits = q[first + i].double() @ seen.mT * 0.05
            torch.testing.assert_close(out[first + i].double(), logits.softmax(-1) @ seen[:, :512], atol=1e-5, rtol=0)
            torch.testing.assert_close(lse[first + i].double(), logits.logsumexp(-1), atol=1e-5, rtol=0)
        first += count


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_fixed_split_keeps_bits(arch):
    """One token alone, and as the last of a chunk in a batch, in two units: the same bits."""
    lengths = [90, 20]
    cache, table = rows(*lengths, 1)
    q = torch.randn(5, 64, 576).bfloat16()
    before = k2kernels.launch_count("mla_decode")
    with k2kernels.emulated(arch, seed=1):
        both = integration.attend(q, cache, metadata(table[:2], lengths, (3, 2)), scale=0.05, split=64)
        alone = integration.attend(q[2:3], cache, metadata(table[:1], lengths[:1], (1,)), scale=0.05, split=64)
    assert k2kernels.launch_count("mla_decode") > before
    for one, other in zip(both, alone):
        assert torch.equal(one[2:3], other)
