"""The extension module, and the output of `info` and `doctor` on this machine."""

import re
import subprocess
import sys
import warnings

import pytest
import torch

import k2kernels
from k2kernels import _C, _emu
from k2kernels._backend import choose
from k2kernels.cli import main
from k2kernels.ops import fp8_gemm
from k2kernels.ops._launch import code_for


def test_extension_decodes_every_e4m3_code_as_torch_does():
    codes = torch.arange(256, dtype=torch.uint8)
    got = torch.full((256,), -1.0)
    _C.decode_e4m3(codes.data_ptr(), got.data_ptr(), 256)
    torch.testing.assert_close(got, codes.view(torch.float8_e4m3fn).float(), rtol=0, atol=0, equal_nan=True)


def test_extension_is_of_this_version():
    assert _C.build_info()["version"] == k2kernels.__version__


@pytest.mark.skipif(not _C.build_info()["cuda_archs"] or _C.device_count() > 0, reason="for kernels without a GPU")
def test_a_launch_without_a_gpu_says_so():
    with pytest.raises(_C.NoDeviceError, match=r"k2kernels: .*: cudaError"):
        _C.conformance("cp_async", 0, 0, 0)
    assert issubclass(_C.NoDeviceError, _C.Error) and issubclass(_C.Error, RuntimeError)


def test_both_modules_hold_the_same_functions():
    if not _C.build_info()["cuda_archs"]:
        pytest.skip("built without nvcc")
    own = {"allocate", "release", "configure", "counters", "EmulatorError", "Together", "sum_fp8_as_hopper"}, {
        "device_count", "compute_capability", "cudart_version"}  # fmt: skip
    assert {n for n in set(dir(_emu)) - own[0] if n[0] != "_"} == {n for n in set(dir(_C)) - own[1] if n[0] != "_"}
    assert _emu.shared_memory() == _C.shared_memory()  # kernels, and the sizes of their structs


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


def test_doctor_tells_what_kernels_take(capsys):
    facts = k2kernels.info()
    assert bool(facts["kernels"]) == bool(facts["extension"]["cuda_archs"])
    assert all(kernel["registers"] > 0 and kernel["spill_bytes"] == 0 for kernel in facts["kernels"])
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    for kernel in facts["kernels"]:
        taken = kernel["registers"], kernel["shared_bytes"] + kernel["dynamic_shared_bytes"]
        name = re.escape(kernel["kernel"].replace("k2k::", ""))
        assert re.search(rf"^{name} +{kernel['arch']} +{taken[0]} +{taken[1]} ", text, re.M)


def test_doctor_shows_the_plans_of_fp8_gemm(capsys, monkeypatch):
    facts = k2kernels.info()["fp8_gemm"]
    assert facts["pinned"] is None and len(facts["plans"]) % 8 == 0
    o_proj = next(row for row in facts["plans"] if row["linear"] == "o_proj")
    assert (o_proj["n"], o_proj["k"], list(o_proj["of_rows"])) == (7168, 8192, [1, 64, 512, 4096])
    for text, said in (
        ("", r"o_proj \(7168, 8192\) +portable_16x128 "),
        ("sm90_small_8x64,split=4", r"\nfp8_gemm   sm90_small_8x64 x4 serves every size: K2KERNELS_FP8_GEMM pins it"),
        ("best", r"\nfp8_gemm   no GEMM will start: K2KERNELS_FP8_GEMM: kernel must be one of .*, got 'best'"),
    ):
        monkeypatch.setenv("K2KERNELS_FP8_GEMM", text)
        fp8_gemm.pinned_plan.cache_clear()
        assert main(["doctor"]) == 0
        assert re.search(said, capsys.readouterr().out)
    fp8_gemm.pinned_plan.cache_clear()


def test_import_needs_neither_optional_packages_nor_the_extension():
    blocked = ["k2kernels._C", "k2kernels._emu", "tokenizers", "matplotlib", "transformers", "cupy", "pytest"]
    script = f"import sys\nfor name in {blocked}: sys.modules[name] = None\nimport k2kernels, k2kernels.cli"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_launches_are_counted_by_op():
    counts = [k2kernels.launch_count("swiglu")]
    k2kernels.swiglu(torch.randn(4, 8))
    counts.append(k2kernels.launch_count("swiglu"))
    with k2kernels.emulated():
        k2kernels.swiglu(torch.randn(4, 8))
        counts.append(k2kernels.launch_count("swiglu"))
        k2kernels.quantize_1x128(torch.randn(4, 8))
    counts.append(k2kernels.launch_count("swiglu"))
    assert [count - counts[0] for count in counts] == [0, 0, 1, 1]


@pytest.mark.parametrize(
    "context, device, message",
    [
        (lambda: k2kernels.backend("cuda"), "cpu", "an_op: backend\\('cuda'\\) takes CUDA tensors, got cpu tensors"),
        (lambda: k2kernels.backend("cuda"), "cuda", "an_op: not today; backend\\('auto'\\) serves it by the reference"),
        (lambda: k2kernels.emulated(), "cpu", "an_op: cannot be emulated: not today; leave emulated"),
        (lambda: k2kernels.emulated(), "cuda", "an_op: emulated\\(\\) takes CPU tensors, got cuda tensors"),
    ],
)
def test_a_backend_that_cannot_serve_says_so(context, device, message):
    with context(), pytest.raises(k2kernels.UnsupportedError, match=message):
        choose("an_op", device, lambda: "not today")


def test_the_body_that_serves():
    assert choose("an_op", "cpu", lambda: None) == "reference"
    with k2kernels.backend("reference"):
        assert choose("an_op", "cuda", lambda: None) == "reference"
    assert choose("an_op", "cuda", lambda: None) == "cuda"
    with k2kernels.emulated():
        assert choose("an_op", "cpu", lambda: None) == "emulated"


def test_a_gpu_without_kernels_gets_the_reference_and_one_warning():
    with pytest.warns(UserWarning, match="an_op: on Tuesdays; the reference .* runs on the GPU"):
        assert choose("an_op", "cuda", lambda: "on Tuesdays") == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose("an_op", "cuda", lambda: "on Tuesdays") == "reference"


def test_which_devices_compiled_code_serves():
    devices = [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0), (12, 1)]

    def served(*archs):
        return {device: code for device in devices if (code := code_for(archs, *device))}

    assert served("80-real") == dict.fromkeys([(8, 0), (8, 6), (8, 9)], "sm_80")
    assert served("89-real") == {(8, 9): "sm_89"}
    assert served("90a-real") == {(9, 0): "sm_90a"}
    assert served("100a") == {(10, 0): "sm_100a"}
    assert served("80") == served("80-real") | dict.fromkeys(devices[4:], "PTX of sm_80")
    assert served("80-real", "89") == served("80-real") | {(8, 9): "sm_89"} | dict.fromkeys(devices[4:], "PTX of sm_89")
    # What is compiled by default (CMakeLists.txt): every GPU since A100 runs kernels.
    default = served("80", "90a-real", "120-real")
    assert default == served("80") | {(9, 0): "sm_90a", (12, 0): "sm_120", (12, 1): "sm_120"}


def test_backend_and_emulated_refuse_unknown_names():
    with pytest.raises(ValueError, match="got 'gpu'"):
        k2kernels.backend("gpu")
    with pytest.raises(ValueError, match="got 'sm_70'"):
        k2kernels.emulated("sm_70")
    with pytest.raises(ValueError, match="emulated: seed must be an int, got 'random'"):
        k2kernels.emulated(seed="random")
