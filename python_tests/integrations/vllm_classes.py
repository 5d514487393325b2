"""The backend's classes against the checks of the installed vLLM, without its kernels: `make test-vllm`."""

import inspect

import pytest
import torch
import vllm
from vllm.model_executor.layers.attention import mla_attention as mla
from vllm.platforms.interface import DeviceCapability
from vllm.v1.attention.backends.mla.cpu_mla import CPUMLAImpl
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from k2kernels.integrations import vllm as integration

KIMI = dict(
    head_size=576, dtype=torch.bfloat16, kv_cache_dtype="auto", block_size=64, use_mla=True, has_sink=False,
    use_sparse=False, use_mm_prefix=False, use_per_head_quant_scales=False, attn_type="decoder",
    device_capability=DeviceCapability(9, 0),
)  # fmt: skip


@pytest.fixture(scope="module")
def backend():
    integration.register()
    integration.register()
    return AttentionBackendEnum[integration.NAME].get_class()


def test_version_and_name(backend):
    print("vLLM", vllm.__version__)
    assert tuple(int(n) for n in vllm.__version__.split(".")[:2]) in integration.TESTED
    assert backend.get_name() == integration.NAME and backend.get_preferred_block_size(16) == 64
    module, name = backend.full_cls_name()  # vLLM passes this on and imports it again
    assert getattr(inspect.importlib.import_module(module), name) is backend


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)])
@pytest.mark.parametrize("invariant", [False, True])
def test_served(backend, capability, invariant):
    for changes in ({}, dict(dtype=torch.float16), dict(kv_cache_dtype="bfloat16"), dict(block_size=16)):
        case = {**KIMI, "device_capability": DeviceCapability(*capability), **changes}
        assert backend.validate_configuration(**case, use_batch_invariant=invariant) == []


@pytest.mark.parametrize(
    "changes, reason",
    [
        (dict(head_size=512), "head_size must be 576"),
        (dict(kv_cache_dtype="fp8"), "pass --kv-cache-dtype auto"),
        (dict(kv_cache_dtype="fp8_ds_mla"), "pass --kv-cache-dtype auto"),
        (dict(kv_cache_dtype="float16"), "kv_cache_dtype must be that of the model, got float16"),
        (dict(block_size=8), "block_size must be a multiple of 16, got 8"),
        (dict(dtype=torch.float32), "dtype not supported"),
        (dict(use_sparse=True), "sparse not supported"),
        (dict(has_sink=True), "attention sinks not supported"),
        (dict(has_sliding_window=True), "sliding window not supported"),
        (dict(use_non_causal=True), "non-causal attention not supported"),
        (dict(use_dcp=True), "DCP not supported"),
        (dict(use_pcp=True), "PCP not supported"),
        (dict(device_capability=DeviceCapability(7, 5)), "compute capability not supported"),
    ],
)
def test_refused(backend, changes, reason):
    assert reason in "; ".join(backend.validate_configuration(**{**KIMI, **changes}))


def test_methods_take_what_vllm_passes(backend):
    """Arguments of the methods that are overridden: as in vLLM's own classes."""

    def names(function):
        return [p.name for p in inspect.signature(function).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]

    impl, builder = backend.get_impl_cls(), backend.get_builder_cls()
    assert not getattr(impl, "__abstractmethods__", None)
    assert names(impl.forward_mqa) == names(mla.MLACommonImpl.forward_mqa)
    ours, theirs = names(impl.do_kv_cache_update), names(CPUMLAImpl.do_kv_cache_update)
    assert ours == theirs[: len(ours)]  # the rest are scales
    ours, theirs = names(builder.__init__), names(mla.MLACommonMetadataBuilder.__init__)
    assert ours == theirs[: len(ours)]
    assert not inspect.isabstract(builder) and builder.query_len_support is mla.QueryLenSupport.VARLEN
