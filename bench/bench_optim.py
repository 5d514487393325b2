"""A step of MuonClip and Muon against torch's optimizers on the parameters of the "tiny" model."""

import pytest
import torch
from torch import nn

from k2kernels.model import K2Config, K2Model
from k2kernels.optim import Muon, MuonClip


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
