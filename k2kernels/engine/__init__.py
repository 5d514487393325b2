"""Generation: the paged latent cache, a session of sequences, the replayed decoding pass, sampling, `generate`.

`Engine` serves many requests at a time: a pool of pages that they share, a scheduler, one ragged pass a step.
"""

from k2kernels.engine.engine import Engine
from k2kernels.engine.request import Request, Sample
from k2kernels.engine.sampling import Sampling

__all__ = ["Engine", "Request", "Sample", "Sampling"]
