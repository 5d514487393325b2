"""Mixture of experts: `route` chooses the experts, `dispatch` moves rows to them and back, `balance` evens the load.

T tokens, E experts, K experts per token, H hidden, S slots: rows of the expert-major buffer that dispatch fills and the
grouped GEMMs (`k2kernels.ops.grouped_gemm`, `k2kernels.ops.fp8_gemm`) read. The expert MLP, which is composed of these
ops, is `k2kernels.functional.moe_mlp`.

- `route`: moe_route.
- `dispatch`: moe_dispatch, moe_combine; both, and permute, of rows that arrived from other ranks.
- `balance`: moe_sequence_loss, moe_update_bias.
"""

from k2kernels.ops.moe.balance import moe_sequence_loss, moe_update_bias
from k2kernels.ops.moe.dispatch import Dispatched, DispatchHandle, moe_combine, moe_dispatch
from k2kernels.ops.moe.route import Routing, moe_route

__all__ = [
    "DispatchHandle",
    "Dispatched",
    "Routing",
    "moe_combine",
    "moe_dispatch",
    "moe_route",
    "moe_sequence_loss",
    "moe_update_bias",
]
