"""An attention backend for vLLM: MLA decoding by `mla_decode`, on every GPU since A100.

    pip install path/to/k2kernels              # vLLM finds the plugin by its entry point
    vllm serve MODEL --attention-backend K2KERNELS_MLA

It is never selected unless asked for. vLLM keeps its own prefill, absorption, experts and scheduler; this backend
writes the latent rows (`mla_append`) and attends to them (`mla_decode`): single tokens, several tokens of a
speculative step, and prompts or chunks of at most `THRESHOLD` tokens, all in one ragged call.

With VLLM_BATCH_INVARIANT=1 every token goes through that one kernel with a fixed split, so that the bits of a row of
attention depend on its own sequence alone: not on the batch, on chunks, or on a hit in the prefix cache.

Tested inside vLLM 0.32's engine on a CPU, where K2K_VLLM_CPU=1 puts it in the place of vLLM's CPU_MLA; by vLLM's own
checks of a configuration with 0.33. vLLM's classes for backends are not a stable interface: other minor versions are
refused when the backend is selected, unless K2K_VLLM_UNTESTED=1. Not run on a GPU yet.
"""

from __future__ import annotations

import functools
import logging
import os
from typing import Any

import torch
from torch import Tensor

from k2kernels._backend import UnsupportedError
from k2kernels.ops.mla_cache import mla_append
from k2kernels.ops.mla_decode import mla_decode

NAME = "K2KERNELS_MLA"
TESTED = ((0, 32), (0, 33))  # minor versions of vLLM
HEAD_SIZE = 576  # 512 latent and 64 rope
PAGE_SIZE = 64  # unless --block-size says otherwise: Hopper's kernel copies up to 64 rows at once
THRESHOLD = 128  # tokens of a request; the absorbed form takes fewer FLOPs up to 170 (csrc/mla_decode)
WORKSPACE = 1 << 30  # bytes that a fixed split may take for partial results
_log = logging.getLogger(__name__)


def register() -> None:
    """Makes the backend known to vLLM, which calls this in each of its processes, perhaps more than once.

    vLLM and the classes that depend on its version are imported when the backend is selected.
    """
    try:
        from vllm.platforms import current_platform
        from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
    except ImportError as error:
        _log.warning("k2kernels: %s is not registered, this vLLM has another registry: %s", NAME, error)
        return
    if os.environ.get("K2K_VLLM_CPU") == "1" and current_platform.is_cpu():
        register_backend(AttentionBackendEnum.CPU_MLA, f"{__name__}.CPUBackend")
    if not hasattr(AttentionBackendEnum, NAME):
        register_backend(NAME, f"{__name__}.Backend")


def check_version(version: str) -> None:
    """Raises UnsupportedError for a minor version of vLLM that is not in TESTED, unless K2K_VLLM_UNTESTED=1."""
    minor = tuple(int(part) if part.isdigit() else -1 for part in version.split(".")[:2])
    if minor not in TESTED and os.environ.get("K2K_VLLM_UNTESTED") != "1":
        tested = " and ".join(f"{major}.{number}" for major, number in TESTED)
        raise UnsupportedError(
            f"{NAME}: vLLM must be {tested}, got {version}; set K2K_VLLM_UNTESTED=1 to try it anyway, or leave out "
            f"--attention-backend"
        )


def obstacle(
    head_size: int, dtype: torch.dtype | None, kv_cache_dtype: str | None, block_size: int | None
) -> str | None:
    """Why this backend cannot serve a configuration, with the remedy, if it cannot.

    Args:
        head_size: elements of a cached row.
        dtype: of the model; None: not known.
        kv_cache_dtype: as in --kv-cache-dtype.
        block_size: rows of a page.
    """
    if head_size != HEAD_SIZE:
        return f"head_size must be {HEAD_SIZE} (512 latent, 64 rope), got {head_size}; leave out --attention-backend"
    own = "auto" if dtype is None else str(dtype).removeprefix("torch.")
    if kv_cache_dtype not in (None, "auto", own):
        return f"kv_cache_dtype must be that of the model, got {kv_cache_dtype}; pass --kv-cache-dtype auto"
    if block_size is not None and block_size % 16:
        return f"block_size must be a multiple of 16, got {block_size}; pass --block-size {PAGE_SIZE}"
    return None


def fixed_split(tokens: int, heads: int, length: int) -> int:
    """Tokens of a sequence that are one unit of `mla_decode` when bits must not depend on the batch.

    The more units, the more SMs share a long sequence; each takes `tokens` rows of partial results.

    Args:
        tokens: most tokens of a step (max_num_batched_tokens).
        heads: query heads of this rank.
        length: most tokens of a sequence (max_model_len).
    """
    unit = tokens * max(heads, 16) * (HEAD_SIZE - 64 + 2) * 4
    units = max(1, WORKSPACE // unit)
    return -(-length // (64 * units)) * 64


def is_batch_invariant() -> bool:
    from vllm import envs

    return envs.VLLM_BATCH_INVARIANT


def write(latent: Tensor, rope: Tensor, cache: Tensor, slots: Tensor, table: Tensor) -> None:
    """Writes rows to the slots of a cache.

    Args:
        latent: [T, C]; rope: [T, 1, R]. Rows beyond the last slot are padding.
        cache: [pages, page_size, C + R].
        slots: int64, page * page_size + place in the page; -1 writes nothing.
        table: int32 [1, pages], 0 to pages - 1: the whole cache as one sequence.
    """
    rows = torch.cat([latent[: len(slots)], rope.squeeze(1)[: len(slots)]], dim=-1)
    mla_append(rows, cache, table, slots)


def attend(q: Tensor, cache: Tensor, metadata: Any, *, scale: float, split: int | str) -> tuple[Tensor, Tensor]:
    """Attention of the requests that vLLM counts as decoding: any number of tokens each.

    Args:
        q: [T, H, C + R], absorbed.
        cache: [pages, page_size, C + R].
        metadata: vLLM's MLACommonMetadata.

    Returns:
        out [T, H, C] and lse float32 [T, H], natural logarithm.
    """
    decode = metadata.decode
    requests = len(decode.seq_lens)
    # Requests may have no token at all (padding), so that the numbers alone do not tell.
    single = metadata.max_query_len == 1 and len(q) == requests
    out, lse, _ = mla_decode(
        q[:, None] if single else q,
        cache,
        decode.block_table.int(),
        decode.seq_lens.int(),
        cu_seqlens_q=None if single else metadata.query_start_loc[: requests + 1].int(),
        softmax_scale=scale,
        head_dim_v=HEAD_SIZE - 64,
        split=split,
    )
    return (out[:, 0], lse[:, 0]) if single else (out, lse)


def __getattr__(name: str) -> type:
    if name == "Backend":
        return _backends()[0]
    if name == "CPUBackend":
        return _backends()[1]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@functools.cache
def _backends() -> tuple[type, type]:
    """The backend of GPUs and that of CPUs, over the classes of the installed vLLM."""
    import vllm

    check_version(vllm.__version__)
    from vllm.config import get_current_vllm_config
    from vllm.model_executor.layers.attention import mla_attention as mla
    from vllm.v1.attention.backend import MultipleOf
    from vllm.v1.attention.backends.mla import cpu_mla

    class Builder(mla.MLACommonMetadataBuilder):
        query_len_support = mla.QueryLenSupport.VARLEN
        reorder_batch_threshold = THRESHOLD

        def __init__(self, kv_cache_spec: Any, layer_names: Any, vllm_config: Any, device: Any, **more: Any):
            if is_batch_invariant():  # no token may take another path
                self.reorder_batch_threshold = vllm_config.scheduler_config.max_num_batched_tokens
            super().__init__(kv_cache_spec, layer_names, vllm_config, device, **more)

    def implementation(base: type) -> type:
        class Impl(base):
            can_return_lse_for_decode = True
            supports_pcp = supports_dcp = False  # contexts over several ranks: not tried

            def __init__(self, *args: Any, **kwargs: Any):
                super().__init__(*args, **kwargs)
                for option in ("alibi_slopes", "sliding_window", "logits_soft_cap"):
                    if kwargs.get(option):
                        raise UnsupportedError(
                            f"{NAME}: {option} must be None, got {kwargs[option]!r}; leave out --attention-backend"
                        )
                config = get_current_vllm_config()
                if reason := obstacle(self.head_size, config.model_config.dtype, self.kv_cache_dtype, None):
                    raise UnsupportedError(f"{NAME}: {reason}")
                self.supports_quant_query_input = False
                self.table = torch.empty(1, 0, dtype=torch.int32)
                self.split = "auto"
                if is_batch_invariant():
                    tokens, length = config.scheduler_config.max_num_batched_tokens, config.model_config.max_model_len
                    self.split = fixed_split(tokens, self.num_heads, length)

            def do_kv_cache_update(
                self, kv_c_normed: Tensor, k_pe: Tensor, kv_cache: Tensor, slot_mapping: Tensor, *scales: Any
            ) -> None:
                if kv_cache.numel() == 0:
                    return
                if self.table.shape[1] != len(kv_cache) or self.table.device != kv_cache.device:
                    self.table = torch.arange(len(kv_cache), dtype=torch.int32, device=kv_cache.device)[None]
                write(kv_c_normed, k_pe, kv_cache, slot_mapping.flatten(), self.table)

            def forward_mqa(
                self, q: Tensor | tuple[Tensor, Tensor], kv_c_and_k_pe_cache: Tensor, attn_metadata: Any, layer: Any
            ) -> tuple[Tensor, Tensor]:
                q = torch.cat(q, dim=-1) if isinstance(q, tuple) else q
                return attend(q, kv_c_and_k_pe_cache, attn_metadata, scale=self.scale, split=self.split)

        return Impl

    class Backend(mla.MLACommonBackend):
        supported_dtypes = [torch.bfloat16, torch.float16]  # noqa: RUF012, as in vLLM's class
        supported_kv_cache_dtypes = ["auto", "bfloat16", "float16"]  # noqa: RUF012
        impl = implementation(mla.MLACommonImpl)

        @staticmethod
        def get_name() -> str:
            return NAME

        @classmethod
        def get_impl_cls(cls) -> type:
            return cls.impl

        @staticmethod
        def get_builder_cls() -> type:
            return Builder

        @classmethod
        def get_supported_head_sizes(cls) -> list[int]:
            return [HEAD_SIZE]

        @staticmethod
        def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[Any]:
            return [MultipleOf(16)]

        @classmethod
        def get_preferred_block_size(cls, default_block_size: int) -> int:
            return PAGE_SIZE

        @classmethod
        def supports_compute_capability(cls, capability: Any) -> bool:
            return capability.major >= 8

        @classmethod
        def supports_batch_invariance(cls) -> bool:
            return True

        @classmethod
        def supports_combination(
            cls, head_size: int, dtype: torch.dtype, kv_cache_dtype: str | None, block_size: int | None, *more: Any,
            **flags: Any,
        ) -> str | None:  # fmt: skip
            return obstacle(head_size, dtype, kv_cache_dtype, block_size)

    class CPUBackend(Backend):
        supported_dtypes = [*Backend.supported_dtypes, torch.float32]  # noqa: RUF012
        impl = implementation(cpu_mla.CPUMLAImpl)

        @staticmethod
        def get_name() -> str:
            return "CPU_MLA"

    for backend in (Backend, CPUBackend):
        backend.__qualname__ = backend.__name__  # vLLM imports it by this
    return Backend, CPUBackend
