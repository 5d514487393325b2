import pytest
import torch

import k2kernels

# Round robin, depth first and two random schedules, on both chips.
SCHEDULES = [("sm_80", 0), ("sm_90a", 1), ("sm_80", 2), ("sm_90a", 3)]


@pytest.mark.parametrize("arch, seed", SCHEDULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(3, 2100), (2, 2, 33), (1, 1), (0, 8)])
def test_kernel_divides_by_the_largest(shape, dtype, arch, seed):
    x = torch.randn(shape).to(dtype)
    want = (x.double() / x.double().abs().amax(-1, keepdim=True)).float().to(dtype)
    wide = torch.full((*shape[:-1], shape[-1] + 3), torch.nan, dtype=dtype)  # what lies beyond a row must not be read
    wide[..., : shape[-1]] = x
    before = k2kernels.launch_count("scale_rows")
    with k2kernels.emulated(arch, seed=seed):
        got, strided = k2kernels.scale_rows(x), k2kernels.scale_rows(wide[..., : shape[-1]])
    assert k2kernels.launch_count("scale_rows") - before == (2 if x.numel() else 0)
    assert torch.equal(got, want) and torch.equal(strided, want)
