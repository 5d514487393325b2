"""Two processes with packed 4-bit experts: each reads and keeps its own, and they save the files of the whole model."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
import torch.distributed as dist
from checkpoints import assert_same, read
from layout_checks import Reads, assert_parts, files, on_rank_0
from rank_scenarios import join

from k2kernels.model import K2Model
from k2kernels.model.convert import convert
from k2kernels.model.shards import scan
from k2kernels.parallel import Layout, expert_parallel, make_mesh

SIZES = dict(num_hidden_layers=3, hidden_size=128, moe_intermediate_size=96)


def w4_files(rank, world, folder):
    join(rank, world, folder)
    path = Path(folder)

    def make():
        torch.manual_seed(0)
        tiny.model("kimi", **SIZES).to(torch.bfloat16).save_pretrained(path / "plain")
        for kind in ("int4", "mxfp4"):
            convert(path / "plain", path / kind, kind, progress=False)

    on_rank_0(rank, make)
    ids = torch.arange(16).view(2, 8) * 5 + rank
    layout = Layout(make_mesh(ep=world, device_type="cpu"))
    for kind in ("int4", "mxfp4"):
        options = dict(progress=False, keep_quantized=True)
        whole = K2Model.from_pretrained(path / kind, **options)
        with Reads() as reads:
            model = K2Model.from_pretrained(path / kind, mesh=layout, **options)
        experts = sum(info.nbytes for name, info in scan(path / kind).items() if ".mlp.experts." in name)
        assert reads.experts * world == experts
        assert_parts(layout, model, whole)
        expert_parallel(model, layout.mesh, max_tokens=64, step_timeout=20.0)
        with torch.no_grad():
            got, want = model(ids), whole(ids)
        # The number of rows of a bfloat16 product on a CPU decides its order of summation.
        torch.testing.assert_close(got, want, rtol=0, atol=0.05 * float(want.abs().max()))
        model.save_pretrained(path / "again")
        if rank == 0:
            whole.save_pretrained(path / "want")
            assert files(path / "again") == files(path / "want")
            assert {n: x.shape for n, x in read(path / "again").items()} == {
                n: x.shape for n, x in read(path / kind).items()
            }
        dist.barrier()
    check_export(rank, path, layout)
    return "done"


def check_export(rank, path, layout):
    """In 4 bits from plain experts of both ranks: the files of one process; a fault of one rank is every rank's."""
    model = K2Model.from_pretrained(path / "plain", mesh=layout, progress=False)
    model.save_pretrained(path / "exported", format="int4")
    if rank == 0:
        K2Model.from_pretrained(path / "plain", progress=False).save_pretrained(path / "one", format="int4")
        assert files(path / "exported") == files(path / "one")
        assert_same(read(path / "one"), read(path / "int4"))
    if rank == 1:
        model.model.layers[1].mlp.experts.down_proj.to_local().detach()[0, 0, 0] = torch.inf
    with pytest.raises((ValueError, RuntimeError), match=r"down_proj must be finite, got NaN or infinity"):
        model.save_pretrained(path / "none", format="int4")
