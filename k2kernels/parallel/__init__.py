"""Parallelism: the ranks of a model, the experts of a layer over them, MuonClip's matrices over those of a mesh."""

from typing import Any

from k2kernels._backend import PeerTimeout
from k2kernels.parallel.expert import ExpertParallel
from k2kernels.parallel.layout import Layout, make_mesh
from k2kernels.parallel.model import expert_parallel
from k2kernels.parallel.parallelize import parallelize
from k2kernels.parallel.pipeline import Pipeline
from k2kernels.parallel.virtual import VirtualRanks

__all__ = [
    "ExpertParallel",
    "Layout",
    "MuonClip",
    "PeerTimeout",
    "Pipeline",
    "VirtualRanks",
    "checkpoint_info",
    "expert_parallel",
    "load_checkpoint",
    "make_mesh",
    "muon_traffic",
    "parallelize",
    "save_checkpoint",
]


def __getattr__(name: str) -> Any:
    """Imports what needs torch.distributed when it is used: a torch built without it serves one rank too."""
    if name in ("MuonClip", "muon_traffic"):
        from k2kernels.parallel import muon

        return getattr(muon, name)
    if name in ("save_checkpoint", "load_checkpoint", "checkpoint_info"):
        from k2kernels.parallel import checkpoint

        return getattr(checkpoint, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
