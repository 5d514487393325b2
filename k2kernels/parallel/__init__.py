"""Who computes what: the experts of a layer over the ranks of a process group."""

from k2kernels._backend import PeerTimeout
from k2kernels.parallel.buffers import VirtualRanks
from k2kernels.parallel.expert import ExpertParallel
from k2kernels.parallel.model import expert_parallel

__all__ = ["ExpertParallel", "PeerTimeout", "VirtualRanks", "expert_parallel"]
