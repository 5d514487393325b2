"""A step of MuonClip and Muon against torch's optimizers: on a CPU on the parameters of the "tiny" model, on a GPU on
those of a layer as large as Moonlight-16B-A3B's."""

from collections.abc import Callable

import pytest
import torch
from bench_newton_schulz import flops
from torch import Tensor, nn

from k2kernels.model import K2Config, K2Model
from k2kernels.optim import Muon, MuonClip
from k2kernels.testing.bench import Case


@pytest.fixture(scope="module")
def parts():
    """The tiny model, its matrices one by one, and the rest, all with gradients."""
    torch.manual_seed(0)
    model = K2Model(K2Config.preset("tiny")).float()
    muon, adamw = (group["params"] for group in MuonClip(model, 1e-3).param_groups)
    matrices = [nn.Parameter(m.detach().clone()) for p in muon for m in (p if p.ndim == 3 else [p])]
    rest = [nn.Parameter(p.detach().clone()) for p in adamw]
    for p in (*model.parameters(), *matrices, *rest):
        p.grad = torch.randn_like(p)
    return model, matrices, rest


@pytest.mark.benchmark(group="optimizer step, all parameters")
@pytest.mark.parametrize("who", ["MuonClip", "torch.optim.Muon + AdamW", "torch.optim.AdamW"])
def test_all_parameters(benchmark, parts, who):
    model, matrices, rest = parts
    if who == "MuonClip":
        benchmark(MuonClip(model, 1e-3).step)
        return
    if who == "torch.optim.AdamW":
        optimizers = [torch.optim.AdamW([*matrices, *rest], 1e-3)]
    else:
        muon = torch.optim.Muon(matrices, 1e-3, adjust_lr_fn="match_rms_adamw")
        optimizers = [muon, torch.optim.AdamW(rest, 1e-3)]
    benchmark(lambda: [optimizer.step() for optimizer in optimizers])


@pytest.mark.benchmark(group="optimizer step, matrices only")
@pytest.mark.parametrize("who", ["Muon", "torch.optim.Muon"])
def test_matrices(benchmark, parts, who):
    _, matrices, _ = parts
    if who == "Muon":
        benchmark(Muon(matrices, 1e-3).step)
    else:
        benchmark(torch.optim.Muon(matrices, 1e-3, adjust_lr_fn="match_rms_adamw").step)


# On a GPU

MOONLIGHT = {  # a layer: name -> shape, and the rows that are orthogonalised apart
    "q_proj": ((16 * 192, 2048), 16),
    "kv_a_proj_with_mqa": ((576, 2048), (512, 64)),
    "kv_b_proj": ((16 * 256, 512), 32),
    "o_proj": ((2048, 2048), None),
    "gate": ((64, 2048), None),
    "experts.gate_up_proj": ((64, 2 * 1408, 2048), 2),
    "experts.down_proj": ((64, 2048, 1408), None),
    "shared.gate_up_proj": ((2 * 2816, 2048), 2),
    "shared.down_proj": ((2048, 2816), None),
}


def matrices() -> list[tuple[int, int, int]]:
    """(how many, m, n) of the layer."""
    found = []
    for (*stack, rows, columns), cut in MOONLIGHT.values():
        blocks = cut if isinstance(cut, tuple) else (rows // (cut or 1),) * (cut or 1)
        found += [((stack or [1])[0], block, columns) for block in blocks]
    return found


def gpu_cases() -> list[Case]:
    elements = sum(count * m * n for count, m, n in matrices())

    def make(device: torch.device) -> tuple[Tensor, ...]:
        """Parameters, then their gradients."""
        shapes = [shape for shape, _ in MOONLIGHT.values()] * 2
        return tuple(torch.randn(shape, device=device) for shape in shapes)

    def k2kernels(named: list[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        splits = {name: cut for name, (_, cut) in MOONLIGHT.items() if cut}
        return MuonClip(named, 1e-3, qk_clip=None, splits=splits, rules={"gate": "muon"})

    def torch_muon(named: list[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        """Muon of each matrix, without cutting projections into parts."""
        ps = []
        for _, p in named:
            for i in range(len(p) if p.ndim == 3 else 1):
                part = nn.Parameter(p.detach()[i] if p.ndim == 3 else p.detach())
                part.grad = p.grad[i] if p.ndim == 3 else p.grad
                ps.append(part)
        return torch.optim.Muon(ps, 1e-3, adjust_lr_fn="match_rms_adamw")

    def adamw(named: list[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for _, p in named], 1e-3, fused=True)

    return [
        Case(
            op="muon_update",
            shape="a layer of Moonlight",
            bytes=elements * 4 * (1 + 2 + 2),  # the gradient read, momentum and weight read and written
            flops=sum(count * flops(m, n) for count, m, n in matrices()),
            make=make,
            bodies={"k2kernels": step(k2kernels), "torch.optim": step(torch_muon), "fused AdamW": step(adamw)},
        )
    ]


def step(make: Callable[[list[tuple[str, nn.Parameter]]], torch.optim.Optimizer]) -> Callable[..., None]:
    """A step on a set of parameters and gradients; the optimizer is made once per set."""
    optimizers: dict[int, torch.optim.Optimizer] = {}

    def body(*tensors: Tensor) -> None:
        key = tensors[0].data_ptr()
        if key not in optimizers:
            half = len(tensors) // 2
            named = [(name, nn.Parameter(t)) for name, t in zip(MOONLIGHT, tensors[:half])]
            for (_, p), grad in zip(named, tensors[half:]):
                p.grad = grad
            optimizers[key] = make(named)
        optimizers[key].step()

    return body
