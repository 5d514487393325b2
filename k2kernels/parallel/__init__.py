"""Parallelism: the experts of a layer over the ranks of a process group."""

from k2kernels._backend import PeerTimeout
from k2kernels.parallel.expert import ExpertParallel
from k2kernels.parallel.model import expert_parallel
from k2kernels.parallel.virtual import VirtualRanks

__all__ = ["ExpertParallel", "PeerTimeout", "VirtualRanks", "expert_parallel"]
