"""The choice of tokens of an engine's requests."""

import math

import pytest
import torch

from k2kernels.engine import Sampling
from k2kernels.engine.sampling import Place, choose, uniform

P = [0.05, 0.5, 0.15, 0.3]  # of four tokens


def frequencies(logits, new=(), count=1000, **options):
    """Of draws at numbers that fill [0, 1) evenly; each row by itself gets the same token."""
    sampling = Sampling(**{"temperature": 1.0, **options})
    places = [Place(sampling, list(new), (k + 0.5) / count) for k in range(count)]
    rows = torch.tensor(logits, dtype=torch.float64).expand(count, -1)
    tokens = [choice.token for choice in choose(rows, places)]
    for k in range(0, count, 251):
        assert choose(rows[:1], places[k : k + 1])[0].token == tokens[k]
    return torch.tensor(tokens).bincount(minlength=len(logits)) / count


def normalised(weights):
    return torch.tensor(weights, dtype=torch.float64) / sum(weights)


@pytest.mark.parametrize(
    "options, kept",
    [
        (dict(), P),
        (dict(temperature=0.5), [p**2 for p in P]),
        (dict(top_k=2), [0, 0.5, 0, 0.3]),
        (dict(top_k=9, top_p=1.0), P),
        (dict(top_p=0.5), [0, 1, 0, 0]),
        (dict(top_p=0.6), [0, 0.5, 0, 0.3]),
        (dict(top_k=3, top_p=0.6), [0, 0.5, 0, 0.3]),  # of what top_k left
        (dict(top_p=0.95), [0, 0.5, 0.15, 0.3]),
        (dict(top_p=5e-324), [0, 1, 0, 0]),  # which rounds to 0 times the sum of what top_k left
        (dict(top_p=5e-324, top_k=1, min_p=1.0), [0, 1, 0, 0]),
        (dict(min_p=0.31), [0, 0.5, 0, 0.3]),
        (dict(min_p=0.29), [0, 0.5, 0.15, 0.3]),
        (dict(temperature=0.5, min_p=0.31), [0, 0.25, 0, 0.09]),  # temperature comes before
        (dict(top_k=1), [0, 1, 0, 0]),
        (dict(temperature=0.0), [0, 1, 0, 0]),
        (dict(temperature=1e-300), [0, 1, 0, 0]),
        (dict(logit_bias={2: math.log(4)}), [0.05, 0.5, 0.6, 0.3]),
        (dict(temperature=0.5, logit_bias={2: math.log(4)}), [0.05**2, 0.5**2, 0.6**2, 0.3**2]),  # before temperature
        (dict(temperature=0.0, logit_bias={2: math.log(4)}), [0, 0, 1, 0]),
        (dict(new=[1, 3, 1], presence_penalty=math.log(2)), [0.05, 0.25, 0.15, 0.15]),
        (dict(new=[1, 3, 1], frequency_penalty=math.log(2)), [0.05, 0.125, 0.15, 0.15]),
        (
            dict(new=[1, 1], presence_penalty=0.5, frequency_penalty=-1.0, logit_bias={1: 0.25, 0: -50.0}),
            [0, 0.5 * math.exp(2 - 0.5 + 0.25), 0.15, 0.3],
        ),
    ],
    ids=str,
)
def test_frequencies(options, kept):
    got = frequencies([math.log(p) + 3 for p in P], **options)
    torch.testing.assert_close(got.double(), normalised(kept), atol=2.2e-3, rtol=0)


def test_rows_do_not_affect_each_other():
    """Rows with all kinds of options, alone and together."""
    logits = torch.randn(40, 50, generator=torch.Generator().manual_seed(0)) * 3
    kinds = [
        dict(), dict(temperature=1.0), dict(temperature=2.0, top_k=5), dict(temperature=0.7, top_p=0.8),
        dict(temperature=1.0, presence_penalty=2.0), dict(logprobs=3), dict(temperature=1.5, min_p=0.1, logprobs=0),
    ]  # fmt: skip
    places = [Place(Sampling(**kinds[i % 7]), [1, 2, 3], uniform(0, 0, i)) for i in range(40)]
    together = choose(logits, places)
    assert together == [choose(logits[i : i + 1], places[i : i + 1])[0] for i in range(40)]
    assert together[5].logprobs.top[0] == (together[5].token, together[5].logprobs.logprob)
    broken = logits.clone()
    broken[3, 7], broken[8, 7], broken[9] = torch.nan, torch.inf, -torch.inf
    got = choose(broken, places)
    assert [i for i, choice in enumerate(got) if not choice.finite] == [3, 8, 9]
    assert [c for c in got if c.finite] == [c for i, c in enumerate(together) if i not in (3, 8, 9)]
    most, every = float(torch.finfo(torch.float32).max), range(50)
    places[4] = places[4]._replace(sampling=Sampling(presence_penalty=-most, frequency_penalty=-most, temperature=1.0))
    places[5] = places[5]._replace(sampling=Sampling(logit_bias=dict.fromkeys(every, -most), frequency_penalty=most))
    got = choose(logits, places)
    assert [i for i, choice in enumerate(got) if not choice.finite] == [4]  # infinity; -most stays finite
    assert [c for i, c in enumerate(got) if i not in (4, 5)] == [c for i, c in enumerate(together) if i not in (4, 5)]


def test_numbers_are_even_and_all_different():
    numbers = torch.tensor([uniform(seed, index, position) for seed in range(10) for index in range(10)
                            for position in range(20)], dtype=torch.float64)  # fmt: skip
    assert len(numbers.unique()) == 2000 and numbers.min() >= 0 and numbers.max() < 1
    assert (numbers.sort().values - (torch.arange(2000) + 0.5) / 2000).abs().max() < 0.04  # Kolmogorov, p = 0.003
    assert uniform(3, 1, 2) == uniform(3, 1, 2)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(max_new_tokens=0), "max_new_tokens must be an int >= 1, got 0"),
        (dict(temperature=-1.0), "temperature must be 0 or more, got -1.0"),
        (dict(temperature=float("nan")), "temperature must be finite, got nan"),
        (dict(top_k=0), "top_k must be an int >= 1, got 0"),
        (dict(top_p=0.0), "top_p must be above 0 and at most 1, got 0.0"),
        (dict(min_p=1.5), "min_p must be from 0 to 1, got 1.5"),
        (dict(seed=-1), "seed must be an int >= 0, got -1"),
        (dict(logprobs=True), "logprobs must be an int >= 0, got True"),
        (dict(presence_penalty="much"), "presence_penalty must be a number, got str"),
        (dict(logit_bias={"a": 1}), "logit_bias must be a mapping from ints to numbers"),
        (dict(logit_bias={3: math.inf}), r"logit_bias\[3\] must be finite, got inf"),
        (dict(logit_bias={3: -1e39}), r"logit_bias\[3\] must be within \+-3.4028235e\+38, .* got -1e\+39"),
        (dict(temperature=1e39), "temperature must be within .*float32 can hold, got 1e\\+39"),
        (dict(presence_penalty=-1e39), "presence_penalty must be within"),
        (dict(frequency_penalty=10**400), "frequency_penalty must be within .*, got 10000"),
        (dict(eos_token_ids=5), "eos_token_ids must be a list of ints, got 5"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises((TypeError, ValueError), match=f"Sampling: {message}"):
        Sampling(**options)
