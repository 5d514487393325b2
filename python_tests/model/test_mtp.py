import pytest
import tiny
import torch
import torch.nn.functional as F

PROMPT = torch.arange(3 * 20).view(3, 20) * 11 % 256


def drafting(noise):
    """A model whose MTP layers guess right, but for noise.

    No attention or feed-forward layer adds anything, so that a token depends on the last one alone, and the MTP layers
    pass the embedding of the next token on.
    """
    model = tiny.model("kimi", num_nextn_predict_layers=2)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            experts = layer.mlp.experts if hasattr(layer.mlp, "experts") else None
            for part in [layer.mlp.shared_experts, experts] if experts else [layer.mlp]:
                (part.down_proj if part is experts else part.down_proj.weight).zero_()
        for layer in model.mtp_layers:
            for norm in (layer.enorm, layer.hnorm):
                norm.weight.fill_(1)
            layer.shared_head["norm"].weight.copy_(model.model.norm.weight)
            layer.eh_proj.weight.normal_(std=noise)[:, :96] += torch.eye(96)
    return model


def passes(model, *args, **kwargs):
    """The result of `generate`, and how many passes of the main model it took."""
    calls = []
    hook = model.model.norm.register_forward_hook(lambda *_: calls.append(1))
    result = model.generate(*args, **kwargs)
    hook.remove()
    return result, len(calls)


@pytest.mark.parametrize("layers", [1, 2])
def test_speculation_gives_the_greedy_tokens(layers):
    """Random drafts, hence mostly wrong ones; three rows, each with its own pace."""
    model = tiny.model("deepseek", num_nextn_predict_layers=layers, vocab_size=12)
    prompt = PROMPT % 12
    want = model.generate(prompt, max_new_tokens=60, eos_token_ids=[])
    got, count = passes(model, prompt, max_new_tokens=60, eos_token_ids=[], speculative=True)
    assert torch.equal(got, want)
    assert count <= 60


@pytest.mark.parametrize("noise, fewest, most", [(0.0, 14, 14), (0.02, 15, 35)])
def test_right_drafts_save_passes(noise, fewest, most):
    """1 pass gives the first token; with two right drafts each, 13 more give the other 39."""
    model = drafting(noise)
    want = model.generate(PROMPT, max_new_tokens=40, eos_token_ids=[])
    assert len(set(want[0, 20:].tolist())) > 3
    got, count = passes(model, PROMPT, max_new_tokens=40, eos_token_ids=[], speculative=True)
    assert torch.equal(got, want)
    assert fewest <= count <= most
    plain, count = passes(model, PROMPT, max_new_tokens=40, eos_token_ids=[])
    assert count == 40 and torch.equal(plain, want)


def test_drafts_are_those_of_the_whole_text():
    """However many drafts were accepted or rejected before: the cache of the MTP layer holds what it would without."""
    model = tiny.model("kimi", num_nextn_predict_layers=1, vocab_size=12)
    heads = []  # logits, in turn, of a pass of the main model and of the draft after it
    hook = model.lm_head.register_forward_hook(lambda module, args, out: heads.append(out))
    text = model.generate(PROMPT[:1] % 12, max_new_tokens=40, eos_token_ids=[], speculative=True)
    hook.remove()
    with torch.no_grad():
        (logits,) = model.mtp_logits(text, model(text, return_hidden=True)[1])
    known, accepted = 21, []  # tokens when the first draft is made
    for drafted, verified in zip(heads[1::2], heads[2::2]):
        if known >= 58:
            break
        torch.testing.assert_close(drafted[0], logits[0, known - 2], atol=1e-4, rtol=1e-4)
        accepted.append(bool(drafted.argmax() == verified[0, 0].argmax()))
        known += 1 + accepted[-1]
    assert 0 < sum(accepted) < len(accepted)


def test_different_lengths_stops_and_columns():
    model = drafting(0.02)
    mask = torch.ones(3, 20, dtype=torch.int64)
    mask[0, :15] = mask[2, :1] = 0
    options = dict(max_new_tokens=30, attention_mask=mask)
    free = model.generate(PROMPT, eos_token_ids=[], **options)
    for stops in ([], [int(free[1, 31])], [int(free[0, 25]), int(free[2, 28])]):
        want = model.generate(PROMPT, eos_token_ids=stops, **options)
        columns = []
        got = model.generate(PROMPT, eos_token_ids=stops, speculative=True, on_token=columns.append, **options)
        assert torch.equal(got, want)
        assert torch.equal(torch.stack(columns, dim=1), want[:, 20:])


def test_up_to_the_end_of_the_context():
    model = drafting(0.0)
    model.config.max_position_embeddings = 40
    got = model.generate(PROMPT, max_new_tokens=20, eos_token_ids=[], speculative=True)
    assert torch.equal(got, model.generate(PROMPT, max_new_tokens=20, eos_token_ids=[]))


def test_mtp_layers_learn_with_the_model():
    model = tiny.model("kimi", num_nextn_predict_layers=2).train()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    losses = []
    for _ in range(10):
        logits, hidden = model(PROMPT, return_hidden=True)
        first, second = model.mtp_logits(PROMPT, hidden)
        parts = [(logits, 1), (first, 2), (second, 3)]
        loss = [F.cross_entropy(x[:, :-1].flatten(0, 1), PROMPT[:, k:].flatten()) for x, k in parts]
        losses.append([float(part.detach()) for part in loss])
        sum(loss).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(after < before - 1.5 for before, after in zip(losses[0], losses[-1]))
    assert list(model.expert_load()) == [1, 2, 3, 4, 5] and model.expert_load()[5].sum() == 10 * 3 * 18 * 2


def test_the_main_model_ignores_its_mtp_layers():
    model = tiny.model("kimi", num_nextn_predict_layers=1)
    before = model(PROMPT)
    with torch.no_grad():
        for parameter in model.mtp_layers[0].parameters():
            parameter.zero_()
    assert torch.equal(model(PROMPT), before)


def test_bad_arguments():
    model = tiny.model("kimi", num_nextn_predict_layers=1)
    with pytest.raises(ValueError, match=r"temperature must be 0 with speculative=True \(greedy\), got 0.7"):
        model.generate(PROMPT, max_new_tokens=4, speculative=True, temperature=0.7)
    with pytest.raises(ValueError, match="input_ids must have more than 1 tokens, got 1"):
        model.mtp_logits(PROMPT[:, :1], torch.zeros(3, 1, 96))
    with pytest.raises(ValueError, match="num_nextn_predict_layers above 0, got 0"):
        tiny.model().mtp_logits(PROMPT, torch.zeros(3, 20, 96))
    with pytest.raises(ValueError, match="mtp_logits: input_ids must be 0 to 255, got 1277"):
        model.mtp_logits(PROMPT + 1024, torch.zeros(3, 20, 96))
    for hidden, got in ((torch.zeros(1, 20, 96), r"\[1, 20, 96\] float32"), (None, "NoneType")):
        with pytest.raises((TypeError, ValueError), match=f"mtp_logits: hidden must be .*, got {got}"):
            model.mtp_logits(PROMPT, hidden)
