"""Processes that torchrun has started: joins them, makes their mesh, and leaves at the end.

    torchrun --nproc-per-node 2 -m k2kernels generate DIR --prompt "..." --prompt "..."

Commands call `launched`; nothing else in this package creates the group of all ranks.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from k2kernels.parallel.layout import make_mesh

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # of torchrun
BACKENDS = {"cpu": "gloo", "cuda": "nccl"}


class Launched(NamedTuple):
    """This process among those that run the same command."""

    rank: int
    world_size: int
    device: torch.device  # of this rank's tensors
    mesh: DeviceMesh | None  # see `make_mesh`; None: one process without torchrun

    @property
    def first(self) -> bool:
        """Whether this rank prints."""
        return self.rank == 0

    def gather(self, value: Any) -> list:
        """The values of all ranks, on every rank: small objects. Collective."""
        if self.mesh is None:
            return [value]
        import torch.distributed as dist

        values = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values


ALONE = Launched(0, 1, torch.device("cpu"), None)


@contextlib.contextmanager
def launched(
    *, pp: int = 1, ep: int | None = 1, device: str = "cpu", timeout: float | None = None
) -> Iterator[Launched]:
    """Joins the other processes of torchrun for the block, with gloo on CPUs and NCCL on GPUs.

    After an error the group is left to the end of the process: torchrun then ends the others, which may be waiting.

    Args:
        pp: pipeline stages.
        ep: ranks that share the experts of a layer; None: all ranks of a stage. What is left are replicas ("dp").
        device: "cpu", or "cuda": this host's GPU of this process's number. Without torchrun, any device.
        timeout: seconds for a collective; None: torch's default.

    Raises:
        ValueError: on every rank, when the sizes do not give the world size, or there are fewer GPUs than processes.
    """
    if not all(name in os.environ for name in VARIABLES):
        for name, size in (("pp", pp), ("ep", ep)):
            if size not in (1, None):
                raise ValueError(f"{name} must be 1 in one process, got {size}; start several with torchrun")
        yield Launched(0, 1, _device(device), None)
        return
    import torch.distributed as dist

    rank, world, local = (int(os.environ[name]) for name in VARIABLES[:3])
    if pp < 1 or world % pp:
        raise ValueError(f"pp must divide the {world} processes, got {pp}")
    ep = world // pp if ep is None else ep
    if ep < 1 or world // pp % ep:
        raise ValueError(f"ep must divide the {world // pp} processes of a pipeline stage, got {ep}")
    kind = _device(device).type
    if kind not in BACKENDS or _device(device).index is not None:
        raise ValueError(f"device must be 'cpu' or 'cuda' for several processes, got {device!r}")
    place = torch.device(kind)
    if kind == "cuda":
        if local >= torch.cuda.device_count():
            raise ValueError(
                f"device 'cuda' needs a GPU for each process of a host, got {torch.cuda.device_count()} GPUs for "
                f"{os.environ.get('LOCAL_WORLD_SIZE', local + 1)} processes"
            )
        place = torch.device(kind, local)
        torch.cuda.set_device(place)
    dist.init_process_group(BACKENDS[kind], timeout=None if timeout is None else timedelta(seconds=timeout))
    yield Launched(rank, world, place, make_mesh(pp=pp, ep=ep, device_type=kind))
    dist.destroy_process_group()


def _device(name: str) -> torch.device:
    try:
        return torch.device(name)
    except RuntimeError as error:  # an unknown name
        raise ValueError(f"device must be one of this machine, got {name!r}") from error
