import math

import pytest
import tiny
import torch

from k2kernels.model import K2Config
from k2kernels.model.rope import Rope, apply_rope, inverse_frequencies


def frequencies(config):
    return inverse_frequencies(config.qk_rope_head_dim, config.rope_theta, config.rope_scaling)


def test_kimi_k2_slows_the_pairs_from_20_on():
    config = K2Config.preset("kimi-k2")
    plain = 50000.0 ** -(torch.arange(32, dtype=torch.float64) / 32)
    factor = torch.where(torch.arange(32) < 20, 1.0, 1 / 32)
    torch.testing.assert_close(frequencies(config), (plain * factor).float())


def test_deepseek_v3_blends_between_pairs_10_and_23():
    config = K2Config.preset("deepseek-v3")
    plain = 10000.0 ** -(torch.arange(32, dtype=torch.float64) / 32)
    share = (frequencies(config).double() / plain - 1 / 40) / (1 - 1 / 40)
    want = 1 - ((torch.arange(32, dtype=torch.float64) - 10) / 13).clamp(0, 1)
    torch.testing.assert_close(share, want, atol=1e-5, rtol=0)


@pytest.mark.parametrize("changes", [{}, dict(truncate=False), dict(beta_fast=4.0), dict(mscale=0.7), dict(factor=1.0)])
@pytest.mark.parametrize("scaling", [tiny.YARN_STEP, tiny.YARN_RAMP])
def test_yarn_is_that_of_transformers(scaling, changes):
    transformers = pytest.importorskip("transformers")
    scaling = {**scaling, **changes}
    config = tiny.config("kimi", rope_scaling=scaling, rope_theta=10000.0, qk_rope_head_dim=64)
    theirs = transformers.DeepseekV3Config(qk_rope_head_dim=64, rope_parameters=dict(scaling, rope_theta=10000.0))
    want, factor = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["yarn"](theirs)
    torch.testing.assert_close(frequencies(config), want, atol=0, rtol=1e-6)
    cos, sin = Rope(config)(torch.tensor([0, 5]))
    torch.testing.assert_close(cos, (torch.tensor([0, 5])[:, None] * want).cos() * factor)
    torch.testing.assert_close(sin, (torch.tensor([0, 5])[:, None] * want).sin() * factor)


@pytest.mark.parametrize("interleaved", [True, False])
def test_rotation_of_complex_numbers(interleaved):
    angle = torch.rand(5, 4, dtype=torch.float64) * 6
    x = torch.randn(5, 3, 8, dtype=torch.float64)
    first, second = (x[..., ::2], x[..., 1::2]) if interleaved else (x[..., :4], x[..., 4:])
    want = torch.complex(first, second) * torch.exp(1j * angle)[:, None]
    got = apply_rope(x, angle.cos(), angle.sin(), interleaved)
    torch.testing.assert_close(got, torch.cat([want.real, want.imag], dim=-1))
    torch.testing.assert_close(apply_rope(x[:, 0], angle.cos(), angle.sin(), interleaved), got[:, 0])


def test_products_depend_on_the_distance_only():
    rope = Rope(tiny.config("kimi"))
    q, k = torch.randn(1, 16), torch.randn(1, 16)

    def product(at_q, at_k):
        return float(apply_rope(q, *rope(torch.tensor([at_q])))[0] @ apply_rope(k, *rope(torch.tensor([at_k])))[0])

    assert math.isclose(product(7, 3), product(104, 100), abs_tol=1e-4)
    assert not math.isclose(product(7, 3), product(8, 3), abs_tol=1e-2)


def test_bfloat16_is_rounded_once():
    rope = Rope(tiny.config("kimi"))
    cos, sin = rope(torch.arange(50))
    x = torch.randn(50, 2, 16).bfloat16()
    got = apply_rope(x, cos, sin)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, apply_rope(x.float(), cos, sin).bfloat16())
    assert (got != apply_rope(x, cos.bfloat16(), sin.bfloat16())).any()


def test_frequencies_survive_casts_and_the_meta_device():
    rope = Rope(tiny.config("kimi"))
    want = rope.inverse_frequency.clone()
    assert torch.equal(rope.to(torch.bfloat16).inverse_frequency, want)
    with torch.device("meta"):
        rope = Rope(tiny.config("kimi"))
    assert rope.inverse_frequency.is_meta
    assert torch.equal(rope.to_empty(device="cpu").inverse_frequency, want)
    assert not rope.state_dict()
