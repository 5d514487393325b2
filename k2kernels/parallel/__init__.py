"""Who computes what: the experts of a layer over the ranks of a process group."""

from k2kernels.parallel.expert import ExpertParallel

__all__ = ["ExpertParallel"]
