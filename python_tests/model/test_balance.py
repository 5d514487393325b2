import functools
import math

import pytest
import tiny
import torch
from torch.utils.checkpoint import checkpoint

from k2kernels.model import K2Config, K2Model

IDS = torch.arange(3 * 20).view(3, 20) * 7 % 256


def routers(model):
    return {index: layer.mlp.gate for index, layer in enumerate(model.model.layers) if hasattr(layer.mlp, "gate")}


def test_load_counts_every_choice_in_training_mode():
    model = tiny.model()
    model(IDS)
    assert list(model.expert_load()) == [1, 2, 3]
    assert not any(load.any() for load in model.expert_load().values())
    inputs = {}
    for index, gate in routers(model).items():
        gate.register_forward_hook(lambda m, args, out, index=index: inputs.__setitem__(index, out))
    model.train()(IDS)
    for index, load in model.expert_load().items():
        choice = (inputs[index].sigmoid() + routers(model)[index].e_score_correction_bias).topk(2).indices
        assert load.tolist() == choice.flatten().bincount(minlength=8).tolist()
    model(IDS[:1])
    assert all(load.sum() == (60 + 20) * 2 for load in model.expert_load().values())
    assert all(gate.expert_counts.dtype == torch.int64 for gate in routers(model).values())


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputation_is_not_counted(reentrant):
    model, plain = tiny.model().train(), tiny.model().train()
    plain.load_state_dict(model.state_dict())
    for layer in model.model.layers:
        layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=reentrant)
    for m in (model, plain):
        loss = m(IDS).square().mean()
        loss.backward()
    for x, y in ((model.expert_load(), plain.expert_load()), (model.max_logits(), plain.max_logits())):
        assert all(torch.equal(x[layer], y[layer]) for layer in x)
    for x, y in zip(model.parameters(), plain.parameters()):
        torch.testing.assert_close(x.grad, y.grad)


def test_sequence_loss_reaches_the_router_through_checkpointing():
    model, plain = tiny.model().train(), tiny.model().train()
    plain.load_state_dict(model.state_dict())
    for layer in model.model.layers:
        layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
    for m in (model, plain):
        (m(IDS).square().mean() + m.sequence_loss(0.1)).backward()
    for x, y in zip(model.parameters(), plain.parameters()):
        torch.testing.assert_close(x.grad, y.grad)


@pytest.mark.parametrize("checkpointing", ["none", "reentrant", "non-reentrant", "layers"])
def test_sequence_loss_is_part_of_the_backward_pass(checkpointing):
    """Over two micro-batches of which the mean is taken: gradients are those of a loss with the balance loss added."""
    model, plain = (tiny.model(num_nextn_predict_layers=1).double().train() for _ in range(2))
    plain.load_state_dict(model.state_dict())
    model.use_sequence_loss(3.0, scale=0.5)
    for layer in model.model.layers[:4]:
        if checkpointing == "layers":
            layer.checkpoints = True
        elif checkpointing != "none":
            layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=checkpointing == "reentrant")

    def loss(m, ids):
        logits, hidden = m(ids, return_hidden=True)
        return logits.square().mean() + m.mtp_logits(ids, hidden)[0].square().mean()

    gates, without = [gate.weight for gate in routers(plain).values()], 0
    for ids in IDS[:2].split(1):
        (loss(model, ids) / 2).backward()
        assert not model.sequence_loss(3.0).requires_grad  # it would be added twice
        out = loss(plain, ids) / 2
        without = without + torch.stack(torch.autograd.grad(out, gates, retain_graph=True))
        (out + plain.sequence_loss(3.0) / 2).backward()
    for x, y in zip(model.parameters(), plain.parameters()):
        torch.testing.assert_close(x.grad, y.grad, rtol=1e-10, atol=1e-14)
    for gate, grad in zip(gates, without):
        assert (gate.grad - grad).norm() > 1e-2 * grad.norm()
    assert not any(layer.balance for _, layer in model.use_sequence_loss(None)._moe_layers())
    with pytest.raises(ValueError, match="alpha must be at least 0"):
        model.use_sequence_loss(-1.0)


def test_sequence_loss_without_a_graph():
    """It raises where adding it would change nothing."""
    model = tiny.model().train()
    for layer in model.model.layers:
        layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=True)
    model(IDS)
    with pytest.raises(ValueError, match=r"must have a graph .* call K2Model\.use_sequence_loss"):
        model.sequence_loss(0.1)
    with torch.no_grad():
        assert model.sequence_loss(0.1) > 0


def test_update_moves_the_bias_against_the_load():
    model = tiny.model().train()
    model(IDS)
    before = {index: gate.e_score_correction_bias.clone() for index, gate in routers(model).items()}
    load = model.expert_load()
    model.update_router_bias(0.01)
    for index, gate in routers(model).items():
        want = before[index] + 0.01 * torch.sign(load[index].mean() - load[index]).float()
        torch.testing.assert_close(gate.e_score_correction_bias, want)
        assert not torch.equal(want, before[index])
    assert not any(load.any() for load in model.expert_load().values())
    assert "model.layers.1.mlp.gate.e_score_correction_bias" in model.state_dict()
    assert not any("expert_counts" in name for name in model.state_dict())


def test_updates_balance_the_load():
    model = K2Model(K2Config.preset("tiny")).train()
    with torch.no_grad():  # routers with favourites
        for gate in routers(model).values():
            gate.weight.normal_(std=0.3)
            gate.e_score_correction_bias[:3] = 0.3

    ids = torch.randint(0, 1024, (4, 128))

    def imbalance():
        with torch.no_grad():
            model(ids)
        return max(float(load.max() / load.mean()) for load in model.expert_load().values())

    before = imbalance()
    for step in range(60):
        model.update_router_bias(0.02 if step < 40 else 0.003)
        after = imbalance()
    assert before > 2 and after < 1.3, (before, after)


def test_sequence_loss():
    """alpha * mean over sequences of sum over experts of f P, written out (DeepSeek-V3, equations 17 to 20)."""
    model = tiny.model("deepseek").train()
    logits = {}
    for index, gate in routers(model).items():
        gate.register_forward_hook(lambda m, args, out, index=index: logits.__setitem__(index, out))
    model(IDS)
    want = 0.0
    for layer in logits.values():
        for sequence in layer.detach().double().sigmoid().view(3, 20, 16):
            taken = torch.zeros(16)
            for scores in sequence:
                taken[scores.topk(4).indices] += 1
            share = (sequence / sequence.sum(-1, keepdim=True)).mean(0)
            want += 0.01 * float((taken * 16 / (4 * 20) * share).sum()) / 3
    assert math.isclose(model.sequence_loss(0.01).item(), want, rel_tol=1e-5)
    model.config.aux_loss_alpha = 0.02
    assert math.isclose(model.sequence_loss().item(), 2 * want, rel_tol=1e-5)


def test_sequence_loss_needs_a_training_pass():
    model = tiny.model()
    model(IDS)
    with pytest.raises(ValueError, match="sequence_loss: a forward pass in training mode must come first"):
        model.sequence_loss(0.1)
    dense = tiny.model("kimi", first_k_dense_replace=4).train()
    dense(IDS)
    assert dense.sequence_loss(0.1) == 0 and dense.expert_load() == {}
