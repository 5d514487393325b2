"""Parallelism: the ranks of a model, and the experts of a layer over them."""

from k2kernels._backend import PeerTimeout
from k2kernels.parallel.expert import ExpertParallel
from k2kernels.parallel.layout import Layout, make_mesh
from k2kernels.parallel.model import expert_parallel
from k2kernels.parallel.virtual import VirtualRanks

__all__ = ["ExpertParallel", "Layout", "PeerTimeout", "VirtualRanks", "expert_parallel", "make_mesh"]
