import copy

import pytest
import torch
from torch import nn

from k2kernels.optim import Muon, rules
from k2kernels.testing.compare import check_close

QUINTIC = [(3.4445, -4.7750, 2.0315)] * 5


def parameters(*shapes, dtype=torch.float32):
    return [nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]


def set_grads(params, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)


def orthogonalised(x):
    """Five quintic steps, from the SVD."""
    u, s, vh = torch.linalg.svd(x.double(), full_matrices=False)
    s = s / s.norm(dim=-1, keepdim=True).clamp_min(1e-300)
    for a, b, c in QUINTIC:
        s = a * s + b * s**3 + c * s**5
    return (u * s[..., None, :]) @ vh


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("dtype, budget", [(torch.float64, 1e-11), (torch.float32, 2e-5), (torch.bfloat16, 0.04)])
def test_a_trajectory_is_that_of_the_formula(nesterov, dtype, budget):
    params = parameters((6, 10), (10, 6), (8, 8), (3, 4, 12), dtype=dtype)
    want, average = [p.detach().double() for p in params], [torch.zeros(p.shape, dtype=torch.float64) for p in params]
    optimizer = Muon(params, 0.05, weight_decay=0.3, momentum=0.8, nesterov=nesterov, rms_scale=0.4)
    for step in range(5):
        set_grads(params, step)
        for i, p in enumerate(params):
            g = p.grad.double()
            average[i] = 0.8 * average[i] + 0.2 * g
            direction = 0.8 * average[i] + 0.2 * g if nesterov else average[i]
            want[i] = (1 - 0.05 * 0.3) * want[i] - 0.05 * 0.4 * max(p.shape[-2:]) ** 0.5 * orthogonalised(direction)
        optimizer.step()
    for p, w, m in zip(params, want, average):
        check_close(p, w, budget=budget, name="parameter")
        check_close(optimizer.state[p]["momentum_buffer"], m, budget=1e-6, name="momentum")


@pytest.mark.parametrize("nesterov", [True, False])
def test_a_trajectory_is_that_of_torch_muon(nesterov):
    """torch iterates in bfloat16, so the paths part by its rounding: less than 2 % of the way after 10 steps."""
    params = parameters((48, 64), (64, 48), (32, 96), (64, 64))
    theirs = [nn.Parameter(p.detach().clone()) for p in params]
    start = [p.detach().clone() for p in params]
    options = dict(lr=0.02, weight_decay=0.1, momentum=0.95, nesterov=nesterov)
    ours = Muon(params, **options)
    torch_muon = torch.optim.Muon(theirs, adjust_lr_fn="match_rms_adamw", **options)
    for step in range(10):
        set_grads(params, step)
        set_grads(theirs, step)
        ours.step()
        torch_muon.step()
    for p, q, s in zip(params, theirs, start):
        assert (p - q).norm() < 0.02 * (q - s).norm()
        assert (p - s).norm() > 0.5  # it went somewhere


@pytest.mark.parametrize("max_elements", [1, 60, 500, 10**6])
def test_results_do_not_depend_on_how_matrices_are_batched(max_elements):
    shapes = [(6, 10), (10, 6), (5, 6, 10), (6, 10), (2, 6, 10), (7, 7)]
    together = parameters(*shapes)
    alone = [nn.Parameter(p.detach().clone()) for p in together]
    optimizer = Muon(together, 0.02, max_elements=max_elements)
    singles = [Muon([p], 0.02) for p in alone]
    for step in range(3):
        set_grads(together, step)
        for p, q in zip(together, alone):
            q.grad = p.grad.clone()
        for o in (optimizer, *singles):
            o.step()
    for p, q in zip(together, alone):
        assert torch.equal(p, q)  # on one thread: several may cut a product differently alone than in a batch


@pytest.mark.parametrize("max_elements, calls", [(1, 8), (120, 5), (10**6, 1)])
def test_memory_is_bounded_by_what_is_orthogonalised_together(monkeypatch, max_elements, calls):
    params = parameters((6, 10), (5, 6, 10), (6, 10), (6, 10))
    sizes = []

    def spy(weights, *lists, **options):
        sizes.append(sum(w.numel() for w in weights))

    optimizer = Muon(params, 0.1, max_elements=max_elements)
    set_grads(params, 0)
    monkeypatch.setattr(rules, "muon_update", spy)
    optimizer.step()
    assert sum(sizes) == 8 * 60 and max(sizes) <= max(max_elements, 60)
    assert len(sizes) == calls


def test_a_stack_is_its_matrices():
    (stack,) = parameters((4, 6, 10))
    matrices = [nn.Parameter(m.detach().clone()) for m in stack]
    set_grads([stack], 0)
    for m, g in zip(matrices, stack.grad):
        m.grad = g.clone()
    Muon([stack], 0.1).step()
    Muon(matrices, 0.1).step()
    torch.testing.assert_close(stack.detach(), torch.stack([m.detach() for m in matrices]), rtol=0, atol=1e-6)


def test_a_parameter_without_gradient_is_left_alone():
    first, second = parameters((4, 6), (4, 6))
    optimizer = Muon([first, second], 0.1)
    set_grads([first, second], 0)
    optimizer.step()
    before, momentum = second.detach().clone(), optimizer.state[second]["momentum_buffer"].clone()
    second.grad = None
    moved = first.detach().clone()
    optimizer.step()
    assert not torch.equal(first, moved)
    assert torch.equal(second, before) and torch.equal(optimizer.state[second]["momentum_buffer"], momentum)
    (fresh,) = parameters((4, 6))
    optimizer = Muon([fresh], 0.1)
    optimizer.step()
    assert not optimizer.state[fresh]


def test_zero_gradient_gives_zero_update():
    (p,) = parameters((4, 6))
    before = p.detach().clone()
    p.grad = torch.zeros(4, 6)
    Muon([p], 0.1, weight_decay=0.0).step()
    assert torch.equal(p, before)


@pytest.mark.parametrize("scale", [1e-20, 1e-9, 1e10])
def test_size_of_the_gradient_does_not_matter(scale):
    p, q = parameters((6, 10), (6, 10))
    q.data.copy_(p.data)
    set_grads([p], 0)
    q.grad = p.grad * scale
    Muon([p], 0.1).step()
    Muon([q], 0.1).step()
    torch.testing.assert_close(p, q, rtol=0, atol=1e-5)


def test_a_bad_gradient_spoils_its_own_matrix_only():
    params = parameters((6, 10), (6, 10), (3, 6, 10))
    set_grads(params, 0)
    params[1].grad[2, 3] = torch.nan
    params[2].grad[1, 0, 0] = torch.inf
    Muon(params, 0.1).step()
    assert params[0].isfinite().all() and params[1].isnan().all()
    assert params[2][1].isnan().all() and params[2][[0, 2]].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("momentum_dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_not_changed_and_momentum_is_its_own(dtype, nesterov, momentum_dtype):
    params = parameters((6, 10), (6, 10), (10, 4), dtype=dtype)
    optimizer = Muon(params, 0.1, nesterov=nesterov, momentum_dtype=momentum_dtype)
    average = [torch.zeros(p.shape) for p in params]
    for step in range(3):
        set_grads(params, step)
        before = [p.grad.clone() for p in params]
        optimizer.step()
        for i, (p, g) in enumerate(zip(params, before)):
            assert torch.equal(p.grad, g)
            average[i] = torch.lerp(average[i], g.float(), 1 - 0.95)
            # A momentum that aliased the update or the gradient would have norm 1, or be the gradient.
            got = optimizer.state[p]["momentum_buffer"]
            assert got.dtype == momentum_dtype and got.data_ptr() != p.grad.data_ptr()
            torch.testing.assert_close(got.float(), average[i], rtol=0.02, atol=0.02 if step else 0.005)


def test_half_precision_parameters_are_rounded_once():
    p, wide = parameters((6, 10), (6, 10))
    p.data = p.data.bfloat16()
    wide.data.copy_(p.data)
    set_grads([p], 0)
    wide.grad = p.grad.float()
    Muon([p], 0.1).step()
    Muon([wide], 0.1).step()
    assert torch.equal(p, wide.bfloat16())


def test_mixed_precision_parameters_of_one_shape():
    first, half = parameters((6, 10), (6, 10))
    half.data = half.data.bfloat16()
    before = half.detach().clone()
    set_grads([first, half], 0)
    Muon([first, half], 0.1).step()
    assert half.dtype == torch.bfloat16 and not torch.equal(half, before)


def test_schedulers_closure_and_groups():
    first, second = parameters((4, 6), (4, 6))
    optimizer = Muon([dict(params=[("first", first)], lr=0.1), dict(params=[("second", second)])], 0.2)
    assert [g["lr"] for g in optimizer.param_groups] == [0.1, 0.2]
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0 if step == 0 else 1.0)
    before = first.detach().clone()

    def closure():
        optimizer.zero_grad()
        loss = (first * second).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == (before * second).sum()
    assert torch.equal(first, before)  # the scheduler says lr 0
    scheduler.step()
    optimizer.step(closure)
    assert not torch.equal(first, before)
    assert [g["lr"] for g in optimizer.param_groups] == [0.1, 0.2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("momentum_dtype", [torch.float32, torch.bfloat16])
def test_resume_is_exact_to_the_bit(dtype, momentum_dtype, tmp_path):
    params = parameters((6, 10), (3, 4, 5), dtype=dtype)
    optimizer = Muon(params, 0.05, momentum_dtype=momentum_dtype)
    for step in range(3):
        set_grads(params, step)
        optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    resumed = [nn.Parameter(p.detach().clone()) for p in params]
    other = Muon(resumed, 0.05, momentum_dtype=momentum_dtype)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for step in range(3, 6):
        for ps, o in ((params, optimizer), (resumed, other)):
            set_grads(ps, step)
            o.step()
    for p, q in zip(params, resumed):
        assert torch.equal(p, q)
        ours, theirs = optimizer.state[p]["momentum_buffer"], other.state[q]["momentum_buffer"]
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)


def test_a_state_dict_that_does_not_fit_is_refused():
    params = parameters((4, 6), (4, 6))
    optimizer = Muon([("a", params[0]), ("b", params[1])], 0.1)
    set_grads(params, 0)
    optimizer.step()
    state = optimizer.state_dict()
    fresh = parameters((4, 6), (4, 6))
    for other, message in [
        (Muon([("a", fresh[0])], 0.1), "number of parameters of group 0 must be 1, got 2"),
        (Muon([("a", fresh[0]), ("c", fresh[1])], 0.1), "parameter names of group 0 must be c, got b"),
        (Muon([("a", fresh[0]), ("b", parameters((6, 4))[0])], 0.1), r"momentum_buffer of b must be \(\(6, 4\)"),
        (Muon([("a", fresh[0]), ("b", fresh[1])], 0.1, momentum_dtype=torch.bfloat16), "momentum_buffer of a must be"),
    ]:
        before = copy.deepcopy(other.state_dict())
        with pytest.raises(ValueError, match="Muon.load_state_dict: " + message):
            other.load_state_dict(state)
        assert other.state_dict() == before
    group = state["param_groups"][0]
    without = {key: value for key, value in group.items() if key != "momentum"}
    for bad, message in [
        (
            {"state": state["state"], "param_groups": [without]},
            r"options of group 0 must be \['lr', 'momentum', .*, got",
        ),
        (
            {"state": state["state"], "param_groups": [{**group, "momentum": 1.5}]},
            r"Muon: momentum must be in \[0, 1\)",
        ),
        ({"state": state["state"]}, r"state_dict must be what state_dict\(\) returned, got \['state'\]"),
        (None, r"state_dict must be what state_dict\(\) returned, got NoneType"),
    ]:
        other = Muon([("a", fresh[0]), ("b", fresh[1])], 0.1)
        before = copy.deepcopy(other.state_dict())
        with pytest.raises(ValueError, match=message):
            other.load_state_dict(bad)
        assert other.state_dict() == before
    state["state"][1] = {"exp_avg": torch.zeros(4, 6)}
    with pytest.raises(ValueError, match=r"state of b must be \['momentum_buffer'\], got \['exp_avg'\]"):
        Muon([("a", fresh[0]), ("b", fresh[1])], 0.1).load_state_dict(state)


@pytest.mark.parametrize("unscale", [True, False])
def test_grad_scaler(unscale):
    """A step with overflow leaves no trace; the others see the gradients without the scale."""
    p, q = parameters((4, 6), (4, 6))
    q.data.copy_(p.data)
    optimizer, plain = Muon([p], 0.1), Muon([q], 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=100)
    for step in range(4):
        set_grads([q], step)
        overflow = step == 1
        p.grad = q.grad * scaler.get_scale()
        if overflow:
            p.grad[0, 0] = torch.inf
        # The scaler hands out its scale only once a loss has been scaled.
        scaler.scale(torch.zeros(()))
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        if not overflow:
            plain.step()
    assert scaler.get_scale() == 512.0
    assert torch.equal(p, q)
    assert torch.equal(optimizer.state[p]["momentum_buffer"], plain.state[q]["momentum_buffer"])


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(lr=-1.0), "lr must be finite and at least 0, got -1.0"),
        (dict(weight_decay=float("nan")), "weight_decay must be finite and at least 0, got nan"),
        (dict(momentum=1.0), r"momentum must be in \[0, 1\), got 1.0"),
        (dict(momentum_dtype=torch.float16), "momentum_dtype must be float32 or bfloat16, got torch.float16"),
        (dict(iterate_dtype="fp16"), "iterate_dtype must be None or one of .*, got 'fp16'"),
        (dict(max_elements=0), "max_elements must be an int of at least 1, got 0"),
        (dict(steps=0), r"steps must be an int in 1 .. 100, got 0"),
        (dict(schedule="cubic"), "schedule must be one of 'quintic', 'polar_express', got 'cubic'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        Muon(parameters((4, 6)), **{"lr": 0.1, **options})


@pytest.mark.parametrize("name", ["lr", "weight_decay", "momentum", "rms_scale", "nesterov"])
def test_options_of_the_wrong_type(name):
    with pytest.raises(TypeError, match=f"^Muon: {name} must be .*, got 'much'"):
        Muon(parameters((4, 6)), **{"lr": 0.1, name: "much"})


def test_bad_parameters_and_gradients():
    with pytest.raises(ValueError, match=r"Muon: bias must be a matrix .*, got \[6\]; MuonClip sends such"):
        Muon([("weight", parameters((4, 6))[0]), ("bias", parameters((6,))[0])], 0.1)
    with pytest.raises(TypeError, match="Muon: complex parameters are not supported"):
        Muon([nn.Parameter(torch.zeros(2, 2, dtype=torch.complex64))], 0.1)
    first, second = parameters((4, 6), (4, 6))
    before = first.detach().clone()
    set_grads([first, second], 0)
    second.grad = second.grad.to_sparse()
    with pytest.raises(TypeError, match=r"Muon: gradients must be dense, got torch.sparse_coo for \[4, 6\]"):
        Muon([first, second], 0.1).step()
    assert torch.equal(first, before)
