"""The ranks that train or serve one model: a mesh with named dimensions, and the collectives of a step over it."""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from k2kernels.model.moe import Experts
from k2kernels.parallel.split import Split

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

DIMENSIONS = ("pp", "dp", "ep")
BUCKET_BYTES = 1 << 26  # of gradients that are reduced in one message


def make_mesh(*, pp: int = 1, dp: int | None = None, ep: int = 1, device_type: str | None = None) -> DeviceMesh:
    """A mesh of all ranks of torch.distributed, with the dimensions "pp", "dp" and "ep"; call it on every rank.

    Args:
        pp: pipeline stages.
        dp: replicas of each expert; None: what is left of the world size.
        ep: ranks that share the experts of a layer. They are neighbours: ranks 0 to ep - 1, and so on.
        device_type: "cpu" or "cuda"; None: "cuda" if there is a GPU.

    Raises:
        ValueError: the sizes do not give the world size.
    """
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    world = dist.get_world_size()
    if dp is None:
        dp = world // (pp * ep)
    if pp * dp * ep != world:
        raise ValueError(f"make_mesh: pp * dp * ep must be the world size {world}, got {pp} * {dp} * {ep}")
    device_type = device_type or ("cuda" if torch.cuda.is_available() else "cpu")
    return init_device_mesh(device_type, (pp, dp, ep), mesh_dim_names=DIMENSIONS)


class Layout:
    """Owns the process groups of a model over ranks, and everything that must be exchanged once per step.

    Every rank has all weights but the experts', which are shared out over the ranks of "ep"; the ranks of "dp" hold the
    same experts. All methods are collective: every rank of "dp" and "ep" calls them, in the same order.

    With several pipeline stages ("pp") each stage has its own part of the model (see `Pipeline`), and all this is of
    the ranks of one stage. `clip_grad_norm_`, whose norm is that of all stages, and `check_replicas`, whose errors are
    all stages', are called by every rank of the mesh.

    A step of training, with copies that stay equal to the bit:

        layout = Layout(make_mesh(ep=2))
        model = K2Model.from_pretrained(path, mesh=layout).train()
        expert_parallel(model, layout, max_tokens=4096, gradients="mean")
        ...
        loss.backward()
        layout.reduce_gradients(model)
        layout.reduce_statistics(model)
        optimizer.step()
        model.update_router_bias(1e-3)

    Args:
        mesh: with the dimensions "ep" and, if experts have replicas, "dp" (see `make_mesh`); or a process group, whose
            ranks are "ep". A dimension "pp" has this rank's place in its pipeline.

    Attributes: mesh; ep, dp, pp: its dimensions (dp and pp may be None); flat: a mesh of one dimension, the ranks of ep
    and dp, which share all weights but the experts' (for `fully_shard`, and optimizers over ranks); group: theirs;
    world_size: their number; writes: whether this rank writes what all save.

    Raises:
        ValueError: the mesh has no dimension "ep", or dimensions of other names.
    """

    def __init__(self, mesh: DeviceMesh | ProcessGroup, *, device_type: str | None = None):
        from torch.distributed.device_mesh import DeviceMesh

        if not isinstance(mesh, DeviceMesh):
            device_type = device_type or ("cuda" if torch.cuda.is_available() and "nccl" in _backends(mesh) else "cpu")
            mesh = DeviceMesh.from_group(mesh, device_type, mesh_dim_names=("ep",))
        names = mesh.mesh_dim_names or ()
        if "ep" not in names or not set(names) <= set(DIMENSIONS):
            raise ValueError(
                f"Layout: mesh must have a dimension 'ep', and may have 'dp' and 'pp', got "
                f"{list(names) or 'no names'}; see k2kernels.parallel.make_mesh"
            )
        self.mesh = mesh
        self.ep = mesh["ep"]
        self.dp = mesh["dp"] if "dp" in names else None
        self.pp = mesh["pp"] if "pp" in names else None
        replicas = 1 if self.dp is None else self.dp.size()
        if replicas == 1:
            self.flat = self.ep
        else:
            self.flat = self.dp if self.ep.size() == 1 else mesh["dp", "ep"]._flatten("dp_ep")
        self.group = self.flat.get_group()
        self.world_size = replicas * self.ep.size()
        self.writes = self.group.rank() == 0

    @classmethod
    def of(cls, ranks: Layout | DeviceMesh | ProcessGroup, *, device_type: str | None = None) -> Layout:
        """The Layout of any of the three."""
        return ranks if isinstance(ranks, Layout) else cls(ranks, device_type=device_type)

    def __deepcopy__(self, memo: dict) -> Layout:
        return self  # a copied model is on the same ranks

    def another_ep(self) -> ProcessGroup:
        """A new process group of the ranks of "ep". Only these call this."""
        import torch.distributed as dist

        group = self.ep.get_group()
        ranks, backend = dist.get_process_group_ranks(group), dist.get_backend(group)
        return dist.new_group(ranks, backend=backend, use_local_synchronization=True)

    # ---- weights

    def shard_experts(self, model: nn.Module) -> None:
        """Keeps this rank's experts of each `Moe`: parameters of the same names, DTensors with Shard(0) over "ep".

        Every rank must have the same weights, or meta tensors. The model then knows that its maxima and expert counts
        are those of one rank (see `reduce_statistics`), and DistributedDataParallel leaves experts and statistics
        alone.

        Raises:
            ValueError: the number of experts is not a multiple of the ranks of "ep", or they are sharded already.
        """
        from torch.distributed.tensor import DTensor, Shard
        from torch.nn.parallel import DistributedDataParallel

        ranks, stacks = self.ep.size(), {}
        for path, experts in model.named_modules():
            if not isinstance(experts, Experts):
                continue
            if experts.ranks is not None:
                raise ValueError("Layout.shard_experts: model must have all experts, got one whose experts are sharded")
            for name, weight in experts.named_parameters(recurse=False):
                if len(weight) % ranks:
                    raise ValueError(
                        f"Layout.shard_experts: the number of experts must be a multiple of the {ranks} ranks of 'ep', "
                        f"got {len(weight)}; the ranks that fit are {_divisors(len(weight))}"
                    )
                stacks[f"{path}.{name}" if path else name] = experts, name, weight
        for experts, name, weight in stacks.values() if ranks > 1 else ():
            split = Split(len(weight), ranks, self.ep.get_local_rank())
            part = weight.detach()[split.first_expert :][: split.num_local_experts].clone()
            part = DTensor.from_local(part, self.ep, [Shard(0)], run_check=False)
            setattr(experts, name, nn.Parameter(part, requires_grad=weight.requires_grad))
            experts.ranks, experts.first_expert = self, split.first_expert
        for module in model.modules() if self.world_size > 1 else ():
            if hasattr(module, "statistics_reduced"):  # a K2Model
                module.ranks = self
        ours = {name for name, _ in model.named_buffers() if name.endswith((".max_logit", ".expert_counts"))}
        ours |= set(stacks) if ranks > 1 else set()
        ours |= set(getattr(model, "_ddp_params_and_buffers_to_ignore", ()))
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, sorted(ours))

    # ---- once per step

    @torch.no_grad()
    def reduce_statistics(self, model: nn.Module) -> None:
        """Makes a model's maxima of logits the largest of all ranks, NaN being +inf, and its expert counts their sums.

        One all-reduce each, of all layers. Call it once per optimizer step, before `step` and `update_router_bias`,
        which raises ValueError otherwise: copies would differ. See `max_logits` for the former.
        """
        from torch.distributed import ReduceOp

        buffers = dict(model.named_buffers())
        maxima = [b for name, b in buffers.items() if name.endswith("max_logit")]
        counts = [b for name, b in buffers.items() if name.endswith("expert_counts")]
        self._all_reduce(maxima, ReduceOp.MAX)
        self._all_reduce(counts, ReduceOp.SUM)
        for module in model.modules():
            if hasattr(module, "statistics_reduced"):
                module.statistics_reduced = True

    def max_logits(self, model: Any) -> Callable[[], dict[int, Tensor]]:
        """For `QKClip(max_logits=)` of `k2kernels.optim.MuonClip`, which does not work over ranks itself: a function
        that returns the model's maxima, and raises ValueError if `reduce_statistics` has not made them those of all."""

        def read() -> dict[int, Tensor]:
            model.check_statistics("max_logits")
            return model.max_logits()

        return read

    def sums(self, values: Sequence[float]) -> list[float]:
        """The sums of some numbers over the ranks, in float64."""
        import torch.distributed as dist

        packed = torch.tensor(values, dtype=torch.float64, device=self._device())
        dist.all_reduce(packed, group=self.group)
        return packed.tolist()

    @torch.no_grad()
    def reduce_gradients(self, model: nn.Module) -> None:
        """Adds up the gradients over the ranks that share a weight; with gradients="mean" of `expert_parallel`, and
        after `parallelize`, then divides them, so that all are means over the ranks' losses. A gradient that some ranks
        lack is zero there; one that all lack stays None.

        Takes the place of DistributedDataParallel, and does what neither that nor `fully_shard(ignored_params=)` does:
        the experts' over "dp". Gradients of parameters that `fully_shard` has sharded, among them all of `parallelize`
        with fsdp, are left alone. Half-precision gradients are added up in float32.
        """
        import torch.distributed as dist

        sharded = _sharded_experts(model)
        mean = any(getattr(m, "gradients", None) == "mean" for m in model.modules())
        ours = [p for p in model.parameters() if p.requires_grad and (id(p) in sharded or not _is_sharded(p))]
        if not ours:
            return
        present = torch.tensor([p.grad is not None for p in ours], dtype=torch.int32, device=self._device())
        dist.all_reduce(present, dist.ReduceOp.MAX, group=self.group)
        parameters = [p for p, some in zip(ours, present.tolist()) if some]
        for p in parameters:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        experts = [_local(p.grad) for p in parameters if id(p) in sharded]
        dense = [_local(p.grad) for p in parameters if id(p) not in sharded]
        self._sum_in_buckets(dense, self.group, self.world_size if mean else 1)
        if self.dp is not None and self.dp.size() > 1:
            self._sum_in_buckets(experts, self.dp.get_group(), self.dp.size() if mean else 1)

    @torch.no_grad()
    def clip_grad_norm_(self, parameters: Iterable[Tensor], max_norm: float, norm_type: float = 2.0) -> Tensor:
        """`torch.nn.utils.clip_grad_norm_`, which cannot mix whole parameters and DTensors: the norm is that of the
        gradients of all experts and of each other parameter once, in all pipeline stages.

        Call it after the gradients have been reduced. Returns the norm, the same on every rank.
        """
        grads = [p.grad for p in parameters if p.grad is not None]
        groups: dict[Any, list[Tensor]] = {}
        for grad in grads:
            groups.setdefault((grad.device_mesh, grad.placements) if _is_sharded(grad) else None, []).append(grad)
        norms = [torch.nn.utils.get_total_norm(group, norm_type) for group in groups.values()]
        norms = [norm.full_tensor() if _is_sharded(norm) else norm for norm in norms]
        device = norms[0].device if norms else self._device()
        total = torch.linalg.vector_norm(
            torch.stack([n.to(device) for n in norms] or [torch.zeros((), device=device)]), norm_type
        )
        if self._stages() > 1:
            every = [torch.zeros((), dtype=torch.float64, device=self._device()) for _ in range(self._stages())]
            torch.distributed.all_gather(every, total.to(every[0]), group=self.pp.get_group())
            total = torch.linalg.vector_norm(torch.stack(every), norm_type).to(total)
        factor = (max_norm / (total + 1e-6)).clamp(max=1.0)
        for grad in grads:
            local = _local(grad)
            local.mul_(factor.to(local.device))
        return total

    @torch.no_grad()
    def check_replicas(self, model: nn.Module) -> None:
        """Raises on every rank if a tensor of the model that ranks share is not the same, to the bit.

        Reads every weight once. Statistics of a step (maxima, expert counts) are left out.

        Raises:
            ValueError: names the tensors and the ranks.
        """
        import torch.distributed as dist

        experts = _sharded_experts(model)
        tensors = model.state_dict(keep_vars=True)
        tensors = {name: t for name, t in tensors.items() if id(t) in experts or not _is_sharded(t)}
        names = list(tensors)
        sums = torch.tensor([_checksum(_local(t)) for t in tensors.values()], dtype=torch.int64, device=self._device())
        every = sums.new_empty(self.world_size, len(names))
        dist.all_gather_into_tensor(every.view(-1), sums, group=self.group)
        every = every.cpu()
        ranks, shards = dist.get_process_group_ranks(self.group), self.ep.size()
        faults = []
        for i, name in enumerate(names):
            apart = shards if id(tensors[name]) in experts else 1  # ranks between those that hold the same
            differ = [ranks[r] for r in range(self.world_size) if every[r, i] != every[r % apart, i]]
            if differ:
                faults.append(f"{name} (ranks {differ})")
        if self._stages() > 1:
            stages: list[list[str]] = [[] for _ in range(self._stages())]
            dist.all_gather_object(stages, faults, group=self.pp.get_group())
            faults = [fault for stage in stages for fault in stage]
        if faults:
            more = f" and {len(faults) - 5} more" if len(faults) > 5 else ""
            raise ValueError(
                f"Layout.check_replicas: copies must be the same on all ranks, but {', '.join(faults[:5])}{more} "
                "differ; every rank must start from the same weights, and call reduce_gradients and reduce_statistics "
                "before each step"
            )

    # ---- files

    @contextlib.contextmanager
    def together(self, what: str) -> Iterator[None]:
        """A block without collectives: an error that one rank raises in it is raised on every rank."""
        error = None
        try:
            yield
        except Exception as caught:
            error = caught
        self.agree(what, error)

    def agree(self, what: str, error: Exception | None) -> None:
        """Raises `error` here, and on ranks without one a RuntimeError that says what another rank raised."""
        import torch.distributed as dist

        seen: list[str | None] = [None] * self.world_size
        dist.all_gather_object(seen, None if error is None else f"{type(error).__name__}: {error}", group=self.group)
        if error is not None:
            raise error
        ranks = dist.get_process_group_ranks(self.group)
        for rank, text in zip(ranks, seen):
            if text is not None:
                raise RuntimeError(f"{what}: rank {rank} raised {text}")

    def writer(self, make: Callable[[], Any]) -> RankWriter:
        """A checkpoint's writer for all ranks; `make` makes the one of the rank that writes."""
        return RankWriter(self, make)

    def gather(self, value: Any) -> list:
        """The values of all ranks, on every rank: small objects."""
        import torch.distributed as dist

        values = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def collect(self, tensor: Tensor, rows: list[tuple[int, int]], step: int) -> Iterator[Tensor]:
        """On the rank that writes: a DTensor's rows in order, `step` at a time in memory, one of replicas. Other ranks
        yield nothing and send theirs.

        Args:
            rows: the first row of each rank, and how many it has.
        """
        import torch.distributed as dist

        ranks, me = dist.get_process_group_ranks(self.group), self.group.rank()
        local, length = tensor.to_local().detach(), len(tensor)
        for first in range(0, length, step):
            end = min(first + step, length)
            whole = local.new_empty(end - first, *local.shape[1:]) if self.writes else None
            row = first
            while row < end:
                # The writing rank's own, or else the first that has the row.
                owner = next(r for r, (start, count) in enumerate(rows) if start <= row < start + count)
                start, count = rows[owner]
                stop = min(end, start + count)
                if owner == me:
                    part = local[row - start : stop - start]
                    if self.writes:
                        whole[row - first : stop - first] = part
                    else:
                        dist.send(part.contiguous().view(torch.uint8), ranks[0], group=self.group)
                elif self.writes:
                    dist.recv(whole[row - first : stop - first].view(torch.uint8), ranks[owner], group=self.group)
                row = stop
            if self.writes:
                yield whole

    # ---- inside

    def _stages(self) -> int:
        return 1 if self.pp is None else self.pp.size()

    def _device(self) -> torch.device:
        return torch.device("cuda", torch.cuda.current_device()) if self.mesh.device_type == "cuda" else "cpu"

    def _all_reduce(self, tensors: list[Tensor], op: Any) -> None:
        """All tensors, of one dtype, in one message."""
        import torch.distributed as dist

        if tensors and self.world_size > 1:
            packed = torch.cat([t.flatten() for t in tensors])
            if packed.is_floating_point():
                packed.nan_to_num_(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)  # a maximum may lose NaN
            dist.all_reduce(packed, op, group=self.group)
            for tensor, part in zip(tensors, packed.split([t.numel() for t in tensors])):
                tensor.copy_(part.view_as(tensor))

    def _sum_in_buckets(self, grads: list[Tensor], group: ProcessGroup, divisor: int) -> None:
        import torch.distributed as dist

        for bucket in _buckets(grads):
            packed = torch.cat([grad.flatten() for grad in bucket]) if len(bucket) > 1 else bucket[0].contiguous()
            if packed.dtype in (torch.bfloat16, torch.float16):
                packed = packed.float()  # rounded once, as by fully_shard
            dist.all_reduce(packed, group=group)
            if divisor > 1:
                packed /= divisor
            for grad, part in zip(bucket, packed.flatten().split([grad.numel() for grad in bucket])):
                grad.copy_(part.view_as(grad))


class RankWriter:
    """A checkpoint's writer that every rank has, and that writes on one.

    The writing rank keeps an error of its file system until the others wait for it too, in `experts` or at the end:
    then it is raised on every rank.
    """

    def __init__(self, layout: Layout, make: Callable[[], Any]):
        self.layout = layout
        self._make = make
        self._writer: Any = None
        self._error: Exception | None = None
        self._rows: dict[str, list[tuple[int, int]]] = {}  # of each rank

    def __enter__(self) -> RankWriter:
        if self.layout.writes:
            try:
                self._writer = self._make().__enter__()
            except Exception as error:
                self._error = error
        self._agree()
        return self

    def add(self, name: str, tensor: Tensor) -> None:
        self._try(lambda writer: writer.add(name, tensor))

    def write_text(self, name: str, text: str) -> None:
        self._try(lambda writer: writer.write_text(name, text))

    def share(self, rows: dict[str, tuple[int, int]]) -> None:
        """Tells all ranks the rows of each DTensor that are here: the first, and their number."""
        every = self.layout.gather(rows)
        self._rows = {name: [of_rank[name] for of_rank in every] for name in rows}

    def experts(self, name: str, stack: Tensor) -> Iterator[Tensor]:
        """On the rank that writes: each expert in order; they must be passed to `add` one by one."""
        for part in self.layout.collect(stack, self._rows[name], 1):
            yield part[0]
        self._agree()

    def whole(self, name: str, tensor: Tensor) -> Iterator[Tensor]:
        """On the rank that writes: the whole of another DTensor."""
        yield from self.layout.collect(tensor, self._rows[name], max(len(tensor), 1))

    def __exit__(self, kind: type | None, *rest: object) -> None:
        if self._writer is not None:
            writer, self._writer = self._writer, None
            try:
                writer.__exit__(kind, *rest)
            except Exception as error:
                self._error = error
        if kind is None:
            self._agree()

    def _try(self, call: Callable[[Any], None]) -> None:
        """Calls with the writer, on the rank that has one; after an error it is closed, and its files are removed."""
        if self._writer is None:
            return
        try:
            call(self._writer)
        except Exception as error:
            writer, self._writer, self._error = self._writer, None, error
            writer.__exit__(type(error), error, None)

    def _agree(self) -> None:
        self.layout.agree("save_pretrained", self._error)


def _buckets(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors of one dtype and device, of BUCKET_BYTES together or one alone."""
    kinds: dict[Any, list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    for same in kinds.values():
        bucket, size = [], 0
        for tensor in same:
            if bucket and size + tensor.nbytes > BUCKET_BYTES:
                yield bucket
                bucket, size = [], 0
            bucket.append(tensor)
            size += tensor.nbytes
        yield bucket


def _checksum(tensor: Tensor) -> int:
    """CRC-32 of a tensor's bytes."""
    return zlib.crc32(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())


def _is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "device_mesh")


def _sharded_experts(model: nn.Module) -> set[int]:
    """The ids of the parameters that `Layout.shard_experts` has shared out, and `fully_shard` has not sharded."""
    stacks = (m for m in model.modules() if isinstance(m, Experts) and m.ranks is not None)
    return {id(p) for m in stacks for p in m.parameters(recurse=False) if p.device_mesh == m.ranks.ep}


def _local(tensor: Tensor) -> Tensor:
    """What of a tensor is on this rank; shares its memory."""
    return tensor.to_local() if _is_sharded(tensor) else tensor


def _divisors(number: int) -> list[int]:
    return [d for d in range(2, number + 1) if number % d == 0]


def _backends(group: ProcessGroup) -> str:
    from torch.distributed import get_backend_config

    return str(get_backend_config(group))
