"""Parallelism: the experts of a layer over the ranks of a process group, the matrices of MuonClip over those of a mesh."""

from k2kernels._backend import PeerTimeout
from k2kernels.parallel.expert import ExpertParallel
from k2kernels.parallel.model import expert_parallel
from k2kernels.parallel.muon import MuonClip, muon_traffic, sum_expert_counts
from k2kernels.parallel.virtual import VirtualRanks

__all__ = [
    "ExpertParallel",
    "MuonClip",
    "PeerTimeout",
    "VirtualRanks",
    "expert_parallel",
    "muon_traffic",
    "sum_expert_counts",
]
