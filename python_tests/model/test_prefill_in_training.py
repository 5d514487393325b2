"""Training with the kernels of mla_prefill, emulated: losses, and the maxima that QK-clip gets from them."""

import contextlib

import pytest
import torch
import torch.nn.functional as F

import k2kernels as k
from k2kernels.model import K2Config, K2Model, attention
from k2kernels.optim import MuonClip, QKClip

STEPS, BATCH, LENGTH, VOCABULARY = 20, 1, 48, 64
THRESHOLD = 4.0  # which logits exceed on the way
SMALL = dict(
    vocab_size=VOCABULARY,
    hidden_size=64,
    num_hidden_layers=2,
    first_k_dense_replace=2,
    intermediate_size=96,
    num_attention_heads=2,
    q_lora_rank=48,
    kv_lora_rank=48,
    qk_nope_head_dim=128,  # these three have kernels
    qk_rope_head_dim=64,
    v_head_dim=128,
    max_position_embeddings=LENGTH,
    initializer_range=0.08,
)


def train(around=contextlib.nullcontext):
    """Losses and largest logits [steps, layers, heads] of a run whose passes are made inside `around()`."""
    torch.manual_seed(0)
    model = K2Model(K2Config(**SMALL)).bfloat16().train()
    optimizer = MuonClip(model, 5e-2, adamw=dict(lr=1e-2), qk_clip=QKClip(THRESHOLD), master_weights=True)
    ids = torch.randint(VOCABULARY, (BATCH, LENGTH), generator=torch.Generator().manual_seed(1))
    losses, peaks = [], []
    for _ in range(STEPS):
        with around():
            logits = model(ids)[:, :-1]
            loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
            loss.backward()
        losses.append(float(loss.detach()))
        peaks.append(torch.stack(list(model.max_logits().values())))
        optimizer.step()
        optimizer.zero_grad()
        model.reset_max_logits()
    return torch.tensor(losses), torch.stack(peaks)


@pytest.fixture(scope="module")
def reference():
    return train()


@pytest.fixture(scope="module")
def spread(reference):
    """How far a run departs if attention's results are off by at most a unit in the last place of bfloat16, which is
    what the kernels' rounding of probabilities can add to the reference's one rounding: the largest of three runs."""
    original, runs = attention.mla_prefill, []
    for seed in range(3):
        noise = torch.Generator().manual_seed(seed)

        def noisy(*args, noise=noise, **options):
            result = original(*args, **options)
            factor = 1 + 2.0**-7 * (torch.rand(result.out.shape, generator=noise) - 0.5)
            return result._replace(out=(result.out * factor).to(result.out.dtype))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(attention, "mla_prefill", noisy)
            runs.append(train())
    losses = torch.stack([(losses - reference[0]).abs() for losses, _ in runs])
    peaks = torch.stack([((peaks - reference[1]) / reference[1]).abs().amax((1, 2)) for _, peaks in runs])
    return losses.amax(0).cummax(0).values, peaks.amax(0).cummax(0).values


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_losses_and_maxima_follow_those_of_the_reference(arch, reference, spread):
    before = k.launch_count("mla_prefill"), k.launch_count("mla_prefill_backward")
    losses, peaks = train(lambda: k.emulated(arch))
    assert k.launch_count("mla_prefill") == before[0] + 2 * STEPS
    assert k.launch_count("mla_prefill_backward") > before[1] + 2 * STEPS
    assert reference[0][-1] < reference[0][0] / 2, "nothing was learned"
    # The first layer of the first step has equal inputs: its maxima differ by the order of sums of 192 products.
    torch.testing.assert_close(peaks[0, 0], reference[1][0, 0], rtol=192 * 2.0**-24, atol=0)
    of_losses, of_peaks = spread
    assert ((losses - reference[0]).abs() <= 3 * of_losses).all(), (losses - reference[0]).abs() / of_losses
    relative = ((peaks - reference[1]) / reference[1]).abs().amax((1, 2))
    assert (relative <= 3 * of_peaks).all(), relative / of_peaks
    assert (reference[1] > THRESHOLD).any(), "QK-clip had nothing to do"


def test_activations_kept_for_the_backward():
    """Per token: q, keys and values as projected, one rotary key for all heads, the output and its log-sum-exps."""
    model = K2Model(K2Config(**SMALL)).bfloat16().train()
    heads, tokens = SMALL["num_attention_heads"], BATCH * LENGTH
    kept, original = {}, attention.mla_prefill

    def counted(*args, **options):
        def keep(x):
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes() if x.dtype != torch.int32 else 0
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            return original(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "mla_prefill", counted)
        model(torch.randint(VOCABULARY, (BATCH, LENGTH)))
    # The rotary key is a view of what the cache's row is made of: rotation makes it new, 64 wide.
    per_token = heads * (2 * (192 + 256 + 128) + 4) + 2 * 64
    assert sum(kept.values()) == SMALL["num_hidden_layers"] * tokens * per_token
