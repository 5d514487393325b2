"""The extension module and what `info` and `doctor` say of this machine."""

import subprocess
import sys

import pytest
import torch

import k2kernels
from k2kernels import _C
from k2kernels.cli import main


def test_extension_decodes_every_e4m3_code_as_torch_does():
    codes = torch.arange(256, dtype=torch.uint8)
    got = torch.full((256,), -1.0)
    _C.decode_e4m3(codes.data_ptr(), got.data_ptr(), 256)
    torch.testing.assert_close(got, codes.view(torch.float8_e4m3fn).float(), rtol=0, atol=0, equal_nan=True)


def test_extension_is_of_this_version():
    assert _C.build_info()["version"] == k2kernels.__version__


def test_info_names_a_body_for_every_op():
    facts = k2kernels.info()
    assert facts["extension"]["self_check"] == "passed"
    assert {"mla_decode", "fp8_gemm", "moe_route", "newton_schulz"} <= set(facts["ops"])
    assert all(served["cpu"] and served["cuda"] and served["why"] for served in facts["ops"].values())


def test_doctor_prints_what_is_there(capsys):
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert torch.__version__ in text and "self-check (all 256 e4m3 codes): passed" in text and "mla_decode" in text


def test_doctor_without_the_extension_says_how_to_build_it(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "k2kernels._C", None)
    monkeypatch.delattr(k2kernels, "_C", raising=False)
    assert main(["doctor"]) == 0
    assert "pip install -e ." in capsys.readouterr().out


def test_import_needs_neither_optional_packages_nor_the_extension():
    blocked = ["k2kernels._C", "tokenizers", "matplotlib", "transformers", "cupy", "pytest"]
    script = f"import sys\nfor name in {blocked}: sys.modules[name] = None\nimport k2kernels, k2kernels.cli"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_launch_count_stays_at_zero_without_kernels():
    before = k2kernels.launch_count()
    k2kernels.swiglu(torch.randn(4, 8))
    assert k2kernels.launch_count() == before == k2kernels.launch_count("swiglu")


@pytest.mark.parametrize(
    "context, message",
    [
        (lambda: k2kernels.backend("cuda"), "swiglu: backend\\('cuda'\\) takes CUDA tensors, got cpu tensors"),
        (lambda: k2kernels.emulated(), "swiglu: no kernel to emulate yet"),
    ],
)
def test_a_backend_that_cannot_serve_says_so(context, message):
    with context(), pytest.raises(k2kernels.UnsupportedError, match=message):
        k2kernels.swiglu(torch.randn(4, 8))
    k2kernels.swiglu(torch.randn(4, 8))  # outside the block all is as before


def test_backend_and_emulated_refuse_unknown_names():
    with pytest.raises(ValueError, match="got 'gpu'"):
        k2kernels.backend("gpu")
    with pytest.raises(ValueError, match="got 'sm_70'"):
        k2kernels.emulated("sm_70")
    with pytest.raises(ValueError, match="emulated: seed must be an int, got 'random'"):
        k2kernels.emulated(seed="random")
