"""MuonClip over the ranks of a mesh: every matrix has an owner, which has its momentum and computes its update."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from k2kernels._backend import UnsupportedError
from k2kernels.model.moe import Moe
from k2kernels.optim.base import check_parameters
from k2kernels.optim.muonclip import MuonClip as OneProcess
from k2kernels.optim.routing import check_matched
from k2kernels.optim.rules import Matrices, Member, Step
from k2kernels.parallel.layout import Layout
from k2kernels.parallel.owners import Kind, Part, Round, Traffic, assign, cut, held, overlap, rounds, traffic

# How the ranks hold a parameter.
REPLICA = "replica"  # whole, on every rank of the mesh
SHARD = "shard"  # Shard(0) over the mesh
LOCAL = "local"  # whole matrices, those of this rank
ELEMENTWISE = "elementwise"  # a DTensor in any other way: for AdamW


class MuonClip(OneProcess):
    """`k2kernels.optim.MuonClip` with its matrices distributed over the ranks of a mesh; its `mesh=` makes this one.

    Args:
        model_or_named_parameters, lr, **options: as in `k2kernels.optim.MuonClip`; capturable must not be True.
        mesh: the ranks that share the parameters, each with its own tokens: a `Layout` or its mesh (see `make_mesh`),
            of which they are all ranks of "dp" and "ep"; or a DeviceMesh of one dimension. With pipeline stages ("pp")
            pass the former: then all stages skip the same steps.
        local: glob patterns of the names of plain parameters that every rank has for itself: experts. Those of `Moe`
            layers with an `exchange` are found, and stacks of matrices as DTensors need no pattern.
        bucket_elements: the elements of an owner in one exchange of gradients and weights, or one matrix. Beside the
            memory of `max_elements`, a step takes at most ten times as many elements of the parameters' dtype.

    Parameters may be

    - plain tensors, equal on all ranks, with gradients that are averaged already (DistributedDataParallel);
    - DTensors of `fully_shard` over `mesh`, Shard(0), with even or uneven shards;
    - stacks [E, m, n] as DTensors over any mesh, Shard(0) or replicated in each dimension: whole matrices, which stay
      where they are. A rank may have none of a stack.

    AdamW's parameters may be DTensors in any placement but Partial. All others are refused by name.

    Each matrix (each block of a matrix that `splits` cuts) has one owner: the costs m n min(m, n), the largest first,
    go to the rank with the least so far. The owner has its momentum and, of half-precision parameters, the float32
    master weights. In a step shards of gradients are sent to the owners, with those of the weights where there are no
    masters; replicas send nothing. The owners compute whole matrices by the same code as one process, and send the new
    weights back. Exchanges go in buckets; those of one bucket run while matrices of another are computed. AdamW's
    states have the placement of their parameters.

    Given the same gradients, weights are those of one process to the bit (on a CPU with one thread), and replicas stay
    equal to the bit. Gradients differ from those of one process by rounding, which Newton-Schulz amplifies.

    One all-reduce (MAX) in every step takes the largest logits of QK-Clip, overflow, and which parameters have a
    gradient, over the ranks; the host waits for it. `last_clip` shows the maxima of all ranks, +inf for NaN. A shard
    without a gradient counts as zeros where another rank has one. Where overflow is checked (`skip_non_finite`, or a
    GradScaler) and there are pipeline stages, one more all-reduce, of one number, makes all of these skip a step that
    one of them skips. A GradScaler's own scale is not exchanged: over ranks take torch's ShardedGradScaler.

    `state_dict` and `load_state_dict` are collective: every rank must call them. Momenta and masters are DTensors
    there, so that torch.distributed.checkpoint (`get_state_dict`, `set_state_dict`) saves one copy and loads it at any
    world size, also into `k2kernels.optim.MuonClip` and from it. The state of plain parameters of `local` is of this
    rank alone; torch.distributed.checkpoint would take one rank's for all.

    All gradients must be of one loss: those of experts that are computed from the tokens of all ranks are W times too
    large beside means over W ranks. Memory, beside parameter and gradient, in bytes per element of a matrix with an
    owner: those of `Muon`, divided by the number of ranks. copy.deepcopy is not supported.

    Raises:
        ValueError: on construction, for what `k2kernels.optim.MuonClip` raises, and by name for DTensors in placements
            that are not served and parameters of FSDP1; in a step, for replicas with a gradient on some ranks only.
        TypeError: for a mesh that is no DeviceMesh, and gradients in another dtype than their parameters.
        UnsupportedError: for capturable=True, and `add_param_group` after construction.
    """

    _over_ranks = True

    def __init__(
        self,
        model_or_named_parameters: nn.Module | Iterable[tuple[str, Tensor]],
        lr: float,
        *,
        mesh: DeviceMesh | Layout,
        local: Sequence[str] = (),
        bucket_elements: int = 2**25,
        **options: Any,
    ):
        if not isinstance(mesh, (DeviceMesh, Layout)):
            raise TypeError(f"MuonClip: mesh must be a DeviceMesh or a Layout, got {mesh!r}; make_mesh makes one")
        stages = None
        if isinstance(mesh, Layout) or "ep" in (mesh.mesh_dim_names or ()):
            layout = Layout.of(mesh)
            mesh, stages = layout.flat, layout.pp
        if mesh.ndim != 1:
            raise ValueError(
                f"MuonClip: mesh must have one dimension, got {mesh.ndim}; pass the one over which parameters are "
                "shared, as mesh['dp'], or a flattened one"
            )
        if not isinstance(bucket_elements, int) or bucket_elements < 1:
            raise ValueError(f"MuonClip: bucket_elements must be an int of at least 1, got {bucket_elements!r}")
        if isinstance(local, str):
            raise TypeError(f"MuonClip: local must be a list of patterns, got {local!r}")
        if options.get("capturable"):
            raise UnsupportedError("MuonClip: capturable must not be True over ranks: the host reads the maxima of all")
        if not isinstance(model_or_named_parameters, nn.Module):
            model_or_named_parameters = list(model_or_named_parameters)
        self.mesh, self.bucket_elements = mesh, bucket_elements
        self._ranks, self._rank, self._group = mesh.size(), mesh.get_local_rank(), mesh.get_group()
        self._pipeline = None if stages is None or stages.size() == 1 else stages.get_group()
        self._local = tuple(local)
        self._local_names = _experts_of_ranks(model_or_named_parameters)
        self._held: dict[Tensor, str] = {}  # how the ranks hold a parameter
        self._names: dict[Tensor, str] = {}
        self._planned = False
        super().__init__(model_or_named_parameters, lr, **options)
        if self._local:
            check_matched("local", dict.fromkeys(self._local), [(name, None) for name in self._names.values()])
        self._planned = True
        self._check_methods()
        self._read_here = None
        if self._clipper is not None:
            self._read_here, self._clipper.read = self._clipper.read, self._maxima_of_all
        self._maxima: dict[Any, Tensor] = {}
        self._present: dict[Tensor, bool] = {}  # has a gradient, on any rank
        self._written: dict[Tensor, bool] = {}  # since the last step, on any rank
        self._plan()
        self._create_state()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Raises UnsupportedError: the owners are chosen once."""
        if self._planned:
            raise UnsupportedError(
                "MuonClip.add_param_group: owners are chosen on construction; pass all parameters then"
            )
        super().add_param_group(param_group)

    # ---- which parameters, where

    def _check_parameters(self, named: Iterable[tuple[str, Tensor]]) -> None:
        for name, p in named:
            if p in self._held:
                continue
            check_parameters("MuonClip", [(name, _here(p))])  # complex; FSDP1
            self._held[p], self._names[p] = self._how_held(name, p), name

    def _how_held(self, name: str, p: Tensor) -> str:
        if not isinstance(p, DTensor):
            check_parameters("MuonClip", [(name, p)])
            is_local = name in self._local_names or any(fnmatchcase(name, pattern) for pattern in self._local)
            return LOCAL if is_local else REPLICA
        if any(placement.is_partial() for placement in p.placements):
            raise ValueError(f"MuonClip: {name} must be replicated or sharded, got {p.placements}")
        # fully_shard over one dimension of what is sharded over another gives a private kind of Shard.
        if p.ndim == 3 and all(placement.is_replicate() or placement.dim == 0 for placement in p.placements):
            return LOCAL
        if p.device_mesh.ndim == 1 and p.device_mesh.mesh.tolist() == self.mesh.mesh.tolist():
            if p.placements[0].is_replicate():
                return REPLICA
            first, end = held(p.shape[0], self._ranks, self._rank)
            if tuple(p.placements) == (Shard(0),) and tuple(_here(p).shape) == (end - first, *p.shape[1:]):
                return SHARD
        return ELEMENTWISE

    def _check_methods(self) -> None:
        scaled = {q for t in (self._clipper.targets if self._clipper else ()) for q in t.query + t.key}
        for group in self.param_groups:
            for p in group["params"]:
                if self._held[p] == ELEMENTWISE and (group["method"] == "muon" or p in scaled):
                    raise ValueError(
                        f"MuonClip: {self._names[p]} {list(p.shape)} must be whole on every rank, Shard(0) of a matrix "
                        f"over the {self._ranks} ranks of `mesh`, or a stack that is sharded by whole matrices, got "
                        f"{p.placements} over {p.device_mesh}; shard it so (fully_shard(mesh=mesh)), or give it to "
                        "AdamW (rules=)"
                    )

    def _plan(self) -> None:
        """Chooses the owners."""
        muon = self.param_groups[0]
        self._numbers = {p: i for i, p in enumerate(muon["params"])}
        self._owned = [p for p in muon["params"] if self._held[p] in (REPLICA, SHARD)]
        self._kinds = plan(
            {self._numbers[p]: _Sizes(p, self._rule(muon).row_splits.get(p), self._has_master(p)) for p in self._owned},
            {self._numbers[p] for p in self._owned if self._held[p] == SHARD},
            self._ranks,
            self.bucket_elements,
        )
        # Per parameter: its parts with their owners, in the order of rows; and where one lies in its owner's state.
        self._parts: dict[int, list[tuple[Part, int]]] = {self._numbers[p]: [] for p in self._owned}
        for kind in self._kinds:
            for part, owner in zip(kind.parts, kind.owners):
                self._parts[part.parameter].append((part, owner))
        self._offsets: dict[Part, int] = {}
        self._rows: dict[int, int] = {}  # that this rank owns
        for number, parts in self._parts.items():
            parts.sort()
            ends = [0] * self._ranks
            for part, owner in parts:
                self._offsets[part] = ends[owner]
                ends[owner] += part.rows
            self._rows[number] = ends[self._rank]

    def owner_of(self, name: str) -> list[int]:
        """The ranks that own the matrices (or blocks) of a parameter, in the order of its rows; none of one that stays
        on its rank, or of AdamW."""
        number = next((self._numbers[p] for p in self._owned if self._names[p] == name), None)
        return [owner for _, owner in self._parts.get(number, [])]

    def _create_state(self) -> None:
        """State that is missing, so that all ranks, and every run, have the same entries."""
        averages = {} if self._clipper is None else self._clipper.state()
        for group in self.param_groups:
            for p in group["params"]:
                if not p.requires_grad:
                    continue
                state, here, specs = self.state[p], _here(p).detach(), self._rule(group).state(p)
                if p in self._numbers and self._numbers[p] in self._rows:
                    new = here.new_empty(self._rows[self._numbers[p]], p.shape[-1])
                    masters = torch.zeros_like(new, dtype=torch.float32)  # the first step takes over the parameter
                else:
                    new, masters = here, here.float() if self._has_master(p) else here
                for key, (_, dtype) in specs.items():
                    if key not in state:
                        empty = torch.zeros((), dtype=dtype) if key == "step" else torch.zeros_like(new, dtype=dtype)
                        state[key] = empty
                if self._has_master(p) and "master" not in state:
                    state["master"] = masters.clone()
                for key, (shape, dtype) in averages.get(p, {}).items():
                    state.setdefault(key, torch.ones(shape, dtype=dtype, device=here.device))

    # ---- a step

    def _captures(self) -> bool:
        return False

    def _gradients(self) -> list[Tensor]:
        return [_here(g) for g in super()._gradients()]

    def _check_grads(self) -> None:
        super()._check_grads()
        for p, name in self._names.items():
            if p.grad is None:
                continue
            if isinstance(p, DTensor) and tuple(p.grad.placements) != tuple(p.placements):
                raise ValueError(f"MuonClip: the gradient of {name} must be {p.placements}, got {p.grad.placements}")
            if p.grad.dtype != p.dtype:
                raise TypeError(f"MuonClip: the gradient of {name} must be {p.dtype}, got {p.grad.dtype}")

    def _overflow(self) -> Tensor | None:
        """The MAX over the ranks: overflow, gradients that are there or not, weights that were written, and maxima."""
        here = super()._overflow()
        params = list(self._names)
        has = [p.grad is not None for p in params]
        written = [self._has_master(p) and self._version(p) != self._versions.get(p) for p in params]
        device = self._device_of(self.param_groups[0])
        flags = [here is not None and bool(here), *has, *(not x for x in has), *written]
        maxima = self._read_here() if self._read_here is not None else {}
        packed = [torch.tensor(flags, dtype=torch.float64, device=device)]
        packed += [s.detach().to(device, torch.float64).flatten() for s in maxima.values()]
        # A MAX of NaN depends on the order; +inf is not clipped either.
        flat = torch.cat(packed).nan_to_num(torch.inf, torch.inf, -torch.inf)
        dist.all_reduce(flat, dist.ReduceOp.MAX, group=self._group)
        flags, *reduced = flat.split([t.numel() for t in packed])
        self._maxima = {
            layer: new.to(old.device, old.dtype).view_as(old) for (layer, old), new in zip(maxima.items(), reduced)
        }
        checked = self._skip_non_finite or getattr(self, "found_inf", None) is not None
        if checked and self._pipeline is not None:
            dist.all_reduce(flags[:1], dist.ReduceOp.MAX, group=self._pipeline)  # a view of flags
        overflow, *flags = flags.tolist()
        has_any, lacks_any, written_any = (flags[i * len(params) :][: len(params)] for i in range(3))
        partly = []
        for i, p in enumerate(params):
            if self._held[p] in (REPLICA, SHARD):
                self._present[p], self._written[p] = bool(has_any[i]), bool(written_any[i])
                if self._held[p] == REPLICA and has_any[i] and lacks_any[i]:
                    partly.append(self._names[p])
            else:
                self._present[p], self._written[p] = has[i], written[i]
        if partly:
            raise ValueError(
                f"MuonClip: {', '.join(partly[:5])} must have an averaged gradient on every rank, got one on some only"
            )
        return torch.tensor(bool(overflow)) if checked else None

    def _maxima_of_all(self) -> Mapping[Any, Tensor]:
        return self._maxima

    def _version(self, p: Tensor) -> tuple[int, int, int]:
        here = _here(p)  # writes to a DTensor count in it, those to its part there
        return p._version, here.data_ptr(), here._version

    def _end(self) -> None:
        self._versions = {p: self._version(p) for p in self._names if self._has_master(p)}

    def _update(self, group: dict[str, Any], step: Step) -> None:
        rule = self._rule(group)
        if group["method"] == "adamw":
            return rule.update(group, self._members(group), step)
        exchanges = [(_Sharded if kind.sharded else _Replicated)(self, kind, group, step) for kind in self._kinds]
        for exchange in exchanges:
            exchange.begin()
        for p in group["params"]:
            if self._held[p] == LOCAL and self._present[p]:
                rule.apply(group, rule.matrices(self._member(p), step.row_scales, p), step)
        for exchange in exchanges:
            exchange.run()
        for p in self._owned:
            step.row_scales.pop(p, None)

    def _members(self, group: dict[str, Any]) -> list[Member]:
        return [self._member(p) for p in group["params"] if self._present[p]]

    def _member(self, p: Tensor) -> Member:
        """What this rank has of a parameter, as a plain tensor with its gradient; its master is up to date."""
        here = _here(p).detach()
        here.grad = self._grad(p)
        master = self.state[p].get("master")
        if master is not None and self._written[p]:
            _take_over(master, here)
        return Member(here, self.state[p])

    def _grad(self, p: Tensor) -> Tensor:
        return torch.zeros_like(_here(p)) if p.grad is None else _here(p.grad)

    def _scale_remaining_rows(self, step: Step) -> None:
        for p, factors in step.row_scales.items():
            here, master = _here(p).detach(), self.state.get(p, {}).get("master")
            if self._held[p] == SHARD:
                first, end = held(p.shape[0], self._ranks, self._rank)
                factors = factors[first:end]
            if master is not None and self._written[p]:
                _take_over(master, here)
            weight = here if master is None else master
            weight.mul_(factors.reshape(-1, *[1] * (p.ndim - 1)))
            if weight is not here:
                here.copy_(weight)

    # ---- state

    def state_dict(self) -> dict[str, Any]:
        """As in any torch optimizer, with DTensors for what is distributed. Collective."""
        result = super().state_dict()
        numbers = [i for group in result["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        states = {}
        for i, p in zip(numbers, params):
            if i in result["state"]:
                states[i] = {key: self._to_save(p, key, value) for key, value in result["state"][i].items()}
        return {**result, "state": states}

    @torch.no_grad()
    def _to_save(self, p: Tensor, key: str, value: Any) -> Any:
        if key not in ("momentum_buffer", "master", "exp_avg", "exp_avg_sq"):
            return value
        if p in self._numbers and self._numbers[p] in self._rows:
            mesh, placements, value = self.mesh, [Shard(0)], self._from_owners(p, value)
        elif isinstance(p, DTensor):
            mesh, placements = p.device_mesh, p.placements
        else:
            return value
        stride = torch.empty(p.shape, device="meta").stride()
        return DTensor.from_local(value, mesh, placements, run_check=False, shape=p.shape, stride=stride)

    def _load_checked(self, state_dict: dict[str, Any]) -> None:
        states = {}
        for saved, group in zip(state_dict["param_groups"], self.param_groups):
            for i, p in zip(saved["params"], group["params"]):
                if i in state_dict["state"]:
                    entries = state_dict["state"][i].items()
                    states[i] = {key: self._to_load(p, key, value) for key, value in entries}
        super()._load_checked({**state_dict, "state": states})
        self._create_state()

    @torch.no_grad()
    def _to_load(self, p: Tensor, key: str, value: Any) -> Any:
        if key not in ("momentum_buffer", "master", "exp_avg", "exp_avg_sq"):
            return _whole(value)
        if p in self._numbers and self._numbers[p] in self._rows:
            return self._to_owners(p, value)
        if not isinstance(p, DTensor):
            return _whole(value)
        if not isinstance(value, DTensor):
            return distribute_tensor(value.to(p.device), p.device_mesh, p.placements, src_data_rank=None).to_local()
        return value.redistribute(p.device_mesh, p.placements).to_local()

    def _check_surplus_master(self, name: str, p: Tensor, master: Tensor) -> None:
        super()._check_surplus_master(name, _whole(p.detach()), _whole(master))

    def _from_owners(self, p: Tensor, rows: Tensor) -> Tensor:
        """Rows of this rank's parts -> this rank's shard of all, under Shard(0)."""
        parts, pieces = self._parts[self._numbers[p]], [[] for _ in range(self._ranks)]
        counts = [0] * self._ranks
        for part, owner in parts:
            for rank in range(self._ranks):
                first, end = overlap(part, p.shape, self._ranks, rank)
                if owner == self._rank:
                    begin = self._offsets[part] - part.first
                    pieces[rank].append(rows[begin + first : begin + end])
                if rank == self._rank:
                    counts[owner] += (end - first) * part.columns
        arrived = self.exchange(pieces, counts, rows).wait()
        first, end = held(p.shape[0], self._ranks, self._rank)
        result = rows.new_empty(end - first, *p.shape[1:])
        flat, offset = result.view(-1, p.shape[-1]), first * (p.shape[1] if p.ndim == 3 else 1)
        for part, owner in parts:
            first, end = overlap(part, p.shape, self._ranks, self._rank)
            flat[first - offset : end - offset] = arrived[owner].take(end - first, part.columns)
        return result

    def _to_owners(self, p: Tensor, value: Tensor) -> Tensor:
        """The opposite, from shards of this mesh or a whole tensor."""
        parts = self._parts[self._numbers[p]]
        mine = [part for part, owner in parts if owner == self._rank]
        if not (
            isinstance(value, DTensor)
            and value.device_mesh.ndim == 1
            and value.device_mesh.mesh.tolist() == self.mesh.mesh.tolist()
            and tuple(value.placements) == (Shard(0),)
        ):
            flat = _whole(value).reshape(-1, p.shape[-1])
            pieces = [flat[part.first : part.first + part.rows] for part in mine]
            return torch.cat(pieces) if pieces else flat[:0]
        flat = value.to_local().reshape(-1, p.shape[-1])
        offset = held(p.shape[0], self._ranks, self._rank)[0] * (p.shape[1] if p.ndim == 3 else 1)
        pieces, counts = [[] for _ in range(self._ranks)], [0] * self._ranks
        for part, owner in parts:
            first, end = overlap(part, p.shape, self._ranks, self._rank)
            pieces[owner].append(flat[first - offset : end - offset])
            for rank in range(self._ranks) if owner == self._rank else ():
                first, end = overlap(part, p.shape, self._ranks, rank)
                counts[rank] += (end - first) * part.columns
        arrived = self.exchange(pieces, counts, flat).wait()
        rows = [
            arrived[rank].take(end - first, part.columns)
            for part in mine
            for rank in range(self._ranks)
            for first, end in [overlap(part, p.shape, self._ranks, rank)]
        ]
        return torch.cat(rows) if rows else flat[:0]

    # ---- exchange

    def exchange(self, pieces: list[list[Tensor]], counts: list[int], like: Tensor) -> Exchanged:
        """Sends lists of tensors to the ranks, and receives `counts` elements from each; all in the dtype of `like`."""
        sizes = [sum(t.numel() for t in some) for some in pieces]
        flat = [t.reshape(-1) for some in pieces for t in some]
        send = torch.cat(flat) if flat else like.new_empty(0)
        receive = like.new_empty(sum(counts))
        # As bytes: not every library has every dtype.
        width = like.element_size()
        work = dist.all_to_all_single(
            receive.view(torch.uint8),
            send.view(torch.uint8),
            [count * width for count in counts],
            [size * width for size in sizes],
            group=self._group,
            async_op=True,
        )
        return Exchanged(work, send, receive, counts)


class Exchanged(NamedTuple):
    """An exchange under way."""

    work: Any
    send: Tensor  # kept until it has been sent
    receive: Tensor
    counts: list[int]

    def wait(self) -> list[Arrived]:
        """What came from each rank."""
        self.work.wait()
        return [Arrived(flat) for flat in self.receive.split(self.counts)]


class Arrived:
    """Elements from one rank, taken in the order in which they were sent."""

    def __init__(self, flat: Tensor):
        self.flat, self.taken = flat, 0

    def take(self, rows: int, columns: int) -> Tensor:
        begin, self.taken = self.taken, self.taken + rows * columns
        return self.flat[begin : self.taken].view(rows, columns)


class _Exchange:
    """One step of the matrices of one kind."""

    def __init__(self, optimizer: MuonClip, kind: Kind, group: dict[str, Any], step: Step):
        self.optimizer, self.kind, self.group, self.step = optimizer, kind, group, step
        self.rank, self.ranks = optimizer._rank, optimizer._ranks
        self.params = group["params"]
        # A parameter without a gradient takes part if its rows are scaled. All ranks decide alike.
        self.active = {i for i in kind.shapes if self.grad(i) or self.params[i] in step.row_scales}
        every = rounds(kind.parts, kind.owners, self.ranks, kind.limit)
        every = [[[part for part in parts if part.parameter in self.active] for parts in one] for one in every]
        self.rounds = [one for one in every if any(one)]

    def grad(self, number: int) -> bool:
        """Whether there is a gradient."""
        return self.optimizer._present[self.params[number]]

    def weight(self, number: int) -> bool:
        """Whether the owner needs the weight, beside the master."""
        p = self.params[number]
        return not self.optimizer._has_master(p) or self.optimizer._written[p]

    def overlap(self, part: Part, rank: int) -> tuple[int, int]:
        return overlap(part, self.kind.shapes[part.parameter], self.ranks, rank)

    def begin(self) -> None:
        """Starts the first exchange."""

    def update(self, parts: list[Part], weights: list[Tensor | None], grads: list[Tensor | None]) -> None:
        """Updates whole matrices of this rank: `weights` in place, where they are not None, and the masters."""
        matrices, optimizer = [], self.optimizer
        for part, w, g in zip(parts, weights, grads):
            p = self.params[part.parameter]
            state, first = optimizer.state[p], optimizer._offsets[part]
            momentum, master = (
                None if state.get(key) is None else state[key][first : first + part.rows]
                for key in ("momentum_buffer", "master")
            )
            if master is not None and optimizer._written[p]:
                _take_over(master, w)
            scale = self.step.row_scales.get(p)
            scale = None if scale is None else scale[part.first : part.first + part.rows]
            weight, copy = (w, None) if master is None else (master, w)
            if g is None:
                weight.mul_(scale[:, None])
                if copy is not None:
                    copy.copy_(weight)
                continue
            whole = Matrices(weight, g, momentum, copy, scale)
            matrices.append(Matrices(*(None if t is None else t.unsqueeze(0) for t in whole)))
        optimizer._rule(self.group).apply(self.group, matrices, self.step)


class _Sharded(_Exchange):
    """Of DTensors: gradients to the owners, weights back."""

    pending: Exchanged | None = None

    def begin(self) -> None:
        if self.rounds:
            self.pending = self.gather(self.rounds[0])

    def run(self) -> None:
        back = None
        for i, one in enumerate(self.rounds):
            arrived = self.pending.wait()
            self.pending = self.gather(self.rounds[i + 1]) if i + 1 < len(self.rounds) else None
            weights, grads = self.assemble(one[self.rank], arrived)
            self.update(one[self.rank], weights, grads)
            if back is not None:
                self.store(*back)
            back = one, self.scatter(one, weights)
        if back is not None:
            self.store(*back)

    def shards(self, part: Part) -> tuple[Tensor, Tensor]:
        """This rank's rows of a part: of the parameter and of the gradient."""
        p = self.params[part.parameter]
        first, end = self.overlap(part, self.rank)
        begin = held(p.shape[0], self.ranks, self.rank)[0]
        return tuple(t[first - begin : end - begin] for t in (_here(p).detach(), self.optimizer._grad(p)))

    def gather(self, one: Round) -> Exchanged:
        pieces: list[list[Tensor]] = [[] for _ in range(self.ranks)]
        for owner, parts in enumerate(one):
            for part in parts:
                weight, grad = self.shards(part)
                pieces[owner] += [grad] if self.grad(part.parameter) else []
                pieces[owner] += [weight] if self.weight(part.parameter) else []
        counts = [0] * self.ranks
        for part in one[self.rank]:
            both = self.grad(part.parameter) + self.weight(part.parameter)
            for rank in range(self.ranks):
                first, end = self.overlap(part, rank)
                counts[rank] += (end - first) * part.columns * both
        return self.optimizer.exchange(pieces, counts, self.like())

    def like(self) -> Tensor:
        return _here(self.params[self.kind.parts[0].parameter]).detach()

    def assemble(self, parts: list[Part], arrived: list[Arrived]) -> tuple[list[Tensor], list[Tensor | None]]:
        weights, grads = [], []
        for part in parts:
            g, w = [], []
            for rank in range(self.ranks):
                first, end = self.overlap(part, rank)
                for pieces, sent in ((g, self.grad(part.parameter)), (w, self.weight(part.parameter))):
                    if sent:
                        pieces.append(arrived[rank].take(end - first, part.columns))
            grads.append(torch.cat(g) if g else None)
            weights.append(torch.cat(w) if w else self.like().new_empty(part.rows, part.columns))
        return weights, grads

    def scatter(self, one: Round, weights: list[Tensor]) -> Exchanged:
        pieces: list[list[Tensor]] = [[] for _ in range(self.ranks)]
        for part, w in zip(one[self.rank], weights):
            for rank in range(self.ranks):
                first, end = self.overlap(part, rank)
                pieces[rank].append(w[first - part.first : end - part.first])
        counts = [0] * self.ranks
        for owner, parts in enumerate(one):
            for part in parts:
                first, end = self.overlap(part, self.rank)
                counts[owner] += (end - first) * part.columns
        return self.optimizer.exchange(pieces, counts, self.like())

    def store(self, one: Round, exchanged: Exchanged) -> None:
        for parts, arrived in zip(one, exchanged.wait()):
            for part in parts:
                shard, _ = self.shards(part)
                shard.copy_(arrived.take(*shard.shape))


class _Replicated(_Exchange):
    """Of copies: each owner broadcasts its new weights."""

    def run(self) -> None:
        sent: list[tuple[list[Part], Tensor | None, Any]] = []
        for one in self.rounds:
            mine = one[self.rank]
            grads = [
                self.rows(self.optimizer._grad(self.params[part.parameter]), part)
                if self.grad(part.parameter)
                else None
                for part in mine
            ]
            self.update(mine, [self.rows(_here(self.params[part.parameter]).detach(), part) for part in mine], grads)
            self.store(sent)
            sent = [self.broadcast(owner, parts) for owner, parts in enumerate(one) if parts]
        self.store(sent)

    def rows(self, t: Tensor, part: Part) -> Tensor:
        """The rows of a part, as a view."""
        if t.ndim == 2:
            return t[part.first : part.first + part.rows]
        matrix, first = divmod(part.first, t.shape[1])
        return t[matrix, first : first + part.rows]

    def broadcast(self, owner: int, parts: list[Part]) -> tuple[int, list[Part], Tensor, Any]:
        views = [self.rows(_here(self.params[part.parameter]).detach(), part) for part in parts]
        if len(views) == 1 and views[0].is_contiguous():
            buffer = views[0]
        elif owner == self.rank:
            buffer = torch.cat([view.reshape(-1) for view in views])
        else:
            buffer = views[0].new_empty(sum(part.elements for part in parts))
        as_bytes = buffer.view(torch.uint8)
        group = self.optimizer._group
        return owner, parts, buffer, dist.broadcast(as_bytes, group=group, group_src=owner, async_op=True)

    def store(self, sent: list[tuple[int, list[Part], Tensor, Any]]) -> None:
        for owner, parts, buffer, work in sent:
            work.wait()
            if owner == self.rank:
                continue
            arrived = Arrived(buffer.view(-1))
            for part in parts:
                view, new = self.rows(_here(self.params[part.parameter]).detach(), part), None
                new = arrived.take(part.rows, part.columns)
                if new.data_ptr() != view.data_ptr():
                    view.copy_(new)


class _Sizes(NamedTuple):
    """What the plan needs of a parameter."""

    parameter: Tensor
    rows: Sequence[int] | None  # of its blocks
    has_master: bool


def plan(parameters: Mapping[int, _Sizes], sharded: set[int], ranks: int, bucket_elements: int) -> list[Kind]:
    """The owners of all matrices, and what is exchanged together: parameters of one dtype, sharded or replicated."""
    parts = {i: cut(i, p.shape, rows) for i, (p, rows, _) in parameters.items()}
    flat = [part for some in parts.values() for part in some]
    owners = dict(zip(flat, assign([part.cost for part in flat], ranks)))
    kinds: dict[tuple[bool, torch.dtype], list[int]] = {}
    for i, (p, _, _) in parameters.items():
        kinds.setdefault((i in sharded, p.dtype), []).append(i)
    result = []
    for (is_sharded, dtype), numbers in kinds.items():
        some = [part for i in numbers for part in parts[i]]
        if some:
            shapes = {i: tuple(parameters[i].parameter.shape) for i in numbers}
            weights = not parameters[numbers[0]].has_master
            # Every rank receives what all the others own.
            limit = bucket_elements if is_sharded else max(1, bucket_elements // ranks)
            mine = [owners[part] for part in some]
            result.append(Kind(shapes, some, mine, is_sharded, dtype.itemsize, weights, limit))
    return result


def muon_traffic(
    model: nn.Module,
    ranks: int,
    *,
    sharded: bool = True,
    local: Sequence[str] = ("*.mlp.experts.*",),
    bucket_elements: int = 2**25,
    **options: Any,
) -> list[Traffic]:
    """What each rank sends and receives in a step of `MuonClip` over `ranks` ranks, computed without any.

    Args:
        model: as it is on one process; it may be on the meta device.
        sharded: by `fully_shard`; else each rank has all of it.
        local: patterns of the names that stay on their rank.
        bucket_elements, options: as in `MuonClip`.

    Returns:
        A Traffic for each rank: the number of collectives, and bytes sent and received, the all-reduce included.
    """
    optimizer = OneProcess(model, 0.0, **{"qk_clip": None, **options})
    group, rule = optimizer.param_groups[0], optimizer._rule(optimizer.param_groups[0])
    here = [any(fnmatchcase(name, pattern) for pattern in local) for name in group["param_names"]]
    sizes = {
        i: _Sizes(p, rule.row_splits.get(p), optimizer._has_master(p))
        for i, p in enumerate(group["params"])
        if not here[i]
    }
    kinds = plan(sizes, set(sizes) if sharded else set(), ranks, bucket_elements)
    heads = [m.qk_clip_spec()["num_heads"] for m in model.modules() if hasattr(m, "qk_clip_spec")]
    packed = 8 * (1 + 3 * sum(len(g["params"]) for g in optimizer.param_groups) + sum(heads))
    totals = [Traffic(1, packed, packed)] * ranks
    for kind in kinds:
        totals = [a.plus(*b) for a, b in zip(totals, traffic(kind, ranks))]
    return totals


def _experts_of_ranks(model: Any) -> set[str]:
    """The names of experts that are distributed over ranks."""
    if not isinstance(model, nn.Module):
        return set()
    names = set()
    for path, module in model.named_modules():
        if isinstance(module, Moe) and getattr(module.exchange, "world_size", 1) > 1:
            names |= {f"{path}.experts.{name}".removeprefix(".") for name, _ in module.experts.named_parameters()}
    return names


def _here(t: Tensor) -> Tensor:
    """What this rank has of a tensor."""
    return t.to_local() if isinstance(t, DTensor) else t


def _whole(t: Any) -> Any:
    return t.full_tensor() if isinstance(t, DTensor) else t


def _take_over(master: Tensor, weight: Tensor) -> None:
    """Where a weight that was written differs from its master, the weight counts."""
    master.copy_(torch.where(master.to(weight.dtype) == weight, master, weight))
