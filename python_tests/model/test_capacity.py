"""The figures of `info`, against numbers computed by hand."""

import pytest

from k2kernels.cli import main
from k2kernels.model import K2Config
from k2kernels.model.capacity import GPU_COUNTS, GPU_GB, capacity
from k2kernels.model.presets import PRESETS


def test_kimi_k2():
    c = capacity(K2Config.preset("kimi-k2"))
    assert c.total_parameters == 1_026_408_232_448
    # 61 layers of 512 + 64 numbers; of 512 codes, 4 scales, 64 BF16; of 64 heads with 192 + 128 numbers.
    assert (c.cache_bf16, c.cache_fp8, c.cache_expanded) == (70_272, 40_016, 2_498_560)
    # All parameters in BF16, but the 60 x 384 biases in float32.
    assert c.weights_bf16 == 2 * 1_026_408_232_448 + 2 * 23_040
    # 1536·7168, 12288·1536, 576·7168, 16384·512, 7168·8192 in each layer; one dense MLP, 60 x 385 experts.
    attention = 11_010_048 + 18_874_368 + 4_128_768 + 8_388_608 + 58_720_256
    assert attention == 101_122_048
    codes = 61 * attention + 3 * 7168 * 18432 + 60 * 385 * 3 * 7168 * 2048
    # Blocks: 12x56, 96x12, 5x56 (576 rows: the last block is half full), 128x4, 56x64.
    blocks = 61 * (672 + 1152 + 280 + 512 + 3584) + 3 * 56 * 144 + 60 * 385 * 3 * 56 * 16
    rest = 2 * 163840 * 7168 + 60 * 384 * 7168 + 7168 * (1 + 2 * 61) + 61 * (1536 + 512)
    assert c.weights_fp8 == codes + 4 * blocks + 2 * rest + 4 * 23_040


def test_deepseek_v3_and_moonlight():
    c = capacity(K2Config.preset("deepseek-v3"))
    assert (c.cache_bf16, c.cache_fp8, c.cache_expanded) == (70_272, 40_016, 61 * 128 * 320 * 2)
    c = capacity(K2Config.preset("moonlight-16b-a3b"))
    assert (c.cache_bf16, c.cache_fp8, c.cache_expanded) == (31_104, 27 * 656, 27 * 16 * 320 * 2)
    assert c.weights_bf16 == 2 * 15_960_110_208 + 2 * 26 * 64


@pytest.mark.parametrize("name", ["kimi-k2", "kimi-k2-thinking"])
def test_four_bit_experts(name):
    c = capacity(K2Config.preset(name))
    experts = 60 * 384 * 3 * 7168 * 2048
    rest = c.weights_bf16 - 2 * experts
    assert c.weights_int4 == rest + experts // 2 + experts // 32 * 2
    assert c.weights_mxfp4 == rest + experts // 2 + experts // 32
    assert (c.weights_int4 // 10**9, c.weights_mxfp4 // 10**9) == (594, 562)


def test_four_bit_experts_are_filled_up_to_chunks():
    """gate and up to 32 rows each, rows of down and all columns to 64."""
    config = K2Config(**{**PRESETS["tiny"], "moe_intermediate_size": 40, "hidden_size": 96})
    c = capacity(config)
    layers, chunks = 3, 2 * 2 + 2 * 1  # (2 * 64) x 128 and 128 x 64
    experts = layers * 8 * 3 * 96 * 40
    assert c.weights_int4 == c.weights_bf16 - 2 * experts + layers * 8 * chunks * 2304
    assert c.weights_mxfp4 == c.weights_bf16 - 2 * experts + layers * 8 * chunks * 2176


def test_what_fits_on_some_gpus(capsys):
    assert main(["info", "kimi-k2-thinking", "--gpus", "8", "--gpu", "h200"]) == 0
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line}
    assert "1,015.2 GB" in rows["8"]
    assert "short 1,037" in rows["BF16"] and "short" in rows["FP8"]
    c = capacity(K2Config.preset("kimi-k2-thinking"))
    left = 8 * 141 * 10**9 * 9 // 10 - c.weights_int4
    assert f"594.2 GB          421.0 GB{left // 70_272:>16,}{left // 40_016:>16,}" in rows["INT4"]
    assert "452.7 GB" in rows["MXFP4"]
    assert main(["info", "kimi-k2-thinking", "--gpus", "8", "--gpu", "80"]) == 0
    assert "short 18.2 GB" in capsys.readouterr().out
    for arguments, message in ((("0", "h200"), "gpus must be an int >= 1"), (("8", "h900"), "gpu must be one of a100")):
        assert main(["info", "tiny", "--gpus", arguments[0], "--gpu", arguments[1]]) == 2
        assert f"info: {message}" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["kimi-k2", "deepseek-v3", "moonlight-16b-a3b", "tiny"])
def test_weights_are_all_parameters(name):
    config = K2Config.preset(name)
    moe_layers = config.num_hidden_layers - config.first_k_dense_replace
    biases = moe_layers * config.n_routed_experts
    assert capacity(config).weights_bf16 == 2 * config.parameter_counts()[0] + 2 * biases


def test_no_fp8_cache_for_other_sizes():
    c = capacity(K2Config.preset("tiny"))
    assert c.cache_bf16 == 4 * 80 * 2 and c.cache_fp8 is None
    assert all(fit.tokens_fp8 is None for fit in c.fits)
    assert "cache per token FP8   not served" in c.format()


def test_fits():
    c = capacity(K2Config.preset("kimi-k2"))
    assert len(c.fits) == len(GPU_GB) * len(GPU_COUNTS) * 4
    fits = {(fit.gpus, fit.gpu_gb, fit.weights): fit for fit in c.fits}
    assert not fits[8, 80, "fp8"].fits and not fits[8, 141, "fp8"].fits  # 0.58 and 1.02 TB for 1.03 TB of weights
    fit = fits[16, 141, "fp8"]
    assert fit.fits and not fits[16, 141, "bf16"].fits
    free = 16 * 141 * 10**9 * 9 // 10 - c.weights_fp8
    assert fit.tokens_bf16 == free // 70_272 and fit.tokens_fp8 == free // 40_016
    # Moonlight in BF16 runs on one GPU of 80 GB.
    assert capacity(K2Config.preset("moonlight-16b-a3b")).fits[0].tokens_bf16 == (72 * 10**9 - 31_920_223_744) // 31_104


def test_table():
    text = capacity(K2Config.preset("kimi-k2")).format()
    for part in ("1,026,408,232,448", "32,861,500,928", "70,272 bytes", "40,016 bytes", "2,498,560 bytes (35.6 times"):
        assert part in text
    rows = [line.split() for line in text.splitlines()[-6:]]
    assert [row[0] for row in rows] == [str(count) for count in GPU_COUNTS]
    mxfp4 = (8 * 80 * 10**9 * 9 // 10 - capacity(K2Config.preset("kimi-k2")).weights_mxfp4) // 70_272
    assert rows[3][:7] == ["8", "-", "-", "-", f"{mxfp4:,}", "-", "-"] and rows[4][1] == "-" and rows[4][2] != "-"
    assert max(map(len, text.splitlines())) <= 120


def test_mtp_layers_do_not_count():
    config = K2Config.preset("deepseek-v3")
    without = K2Config.from_dict({**config.to_dict(), "num_nextn_predict_layers": 0})
    assert capacity(config) == capacity(without)
