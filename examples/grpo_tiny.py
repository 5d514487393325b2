"""GRPO on a task that a program verifies: write four digits in ascending order. A CPU does it in minutes.

A model of 0.1 M parameters first learns from a few solved examples. Then each update draws 16 prompts and, with
`k2kernels.engine.Engine`, 16 answers to each. An answer gets 1 if it is right and 0 if not, and the model learns from
what is better than the other answers to the same prompt (`k2kernels.train.grpo`).

    python examples/grpo_tiny.py --out curve.jsonl

The lines have the accuracy on other prompts, before and after; and, of each update, the mean of the rewards; the KL
divergence to the model before GRPO, before the update (exactly 0 in update 0: equal weights, scored by the same pass);
the fraction of tokens that the last pass clipped; and `sampler_gap`, the largest difference between the
log-probabilities that the engine computed, token by token in latent space, and those of the pass for training.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path

import torch

from k2kernels.engine import Engine, Sampling
from k2kernels.model import K2Config, K2Model
from k2kernels.optim import MuonClip
from k2kernels.train.grpo import group_advantages, grpo_loss

DIGITS, EQUALS, END, VOCABULARY = 4, 10, 11, 12  # ids 0 to 9 are digits
PROMPTS, SAMPLES = 16, 16
PASSES = 2  # over the answers of an update
BETA = 0.02  # weight of the KL divergence to the model before GRPO
HELD_OUT = 13  # of the 10,000 prompts every 13th is for tests


def make_model() -> K2Model:
    config = K2Config(
        vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64,
        q_lora_rank=None, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=16,
        intermediate_size=128, moe_intermediate_size=64, first_k_dense_replace=1, n_routed_experts=4,
        num_experts_per_tok=2, n_group=1, topk_group=1, initializer_range=0.1, eos_token_id=END, dtype="float32",
    )  # fmt: skip
    return K2Model(config)


def split() -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts [N, 5] for training and for tests: four digits and the sign of equality."""
    numbers = torch.cartesian_prod(*[torch.arange(10)] * DIGITS)
    prompts = torch.cat([numbers, torch.full((len(numbers), 1), EQUALS)], dim=1)
    test = torch.arange(len(prompts)) % HELD_OUT == 0
    return prompts[~test], prompts[test]


def answers(prompts: torch.Tensor) -> torch.Tensor:
    return torch.cat([prompts[:, :DIGITS].sort().values, torch.full((len(prompts), 1), END)], dim=1)


def reward(prompt: list[int], tokens: list[int]) -> float:
    return float(tokens == [*sorted(prompt[:DIGITS]), END])


def draw(prompts: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    return prompts[torch.randint(len(prompts), (count,), generator=generator)]


def accuracy(engine: Engine, prompts: torch.Tensor) -> float:
    """Of the likeliest answers."""
    sampling = Sampling(max_new_tokens=DIGITS + 1)
    requests = [engine.submit(prompt, sampling=sampling) for prompt in prompts.tolist()]
    return sum(reward(request.prompt, request.result()[0]) for request in requests) / len(requests)


def update(model, reference, engine, optimizer, prompts: torch.Tensor, seed: int) -> dict[str, float]:
    """Samples, scores and learns once."""
    requests = []
    for number, prompt in enumerate(prompts.tolist()):
        one = seed * PROMPTS + number  # equal seeds would give all prompts the same random numbers
        sampling = Sampling(max_new_tokens=DIGITS + 1, temperature=1.0, seed=one, logprobs=0)
        requests.append(engine.submit(prompt, sampling=sampling, n=SAMPLES))
    samples = [sample for request in requests if request.result() for sample in request.samples]
    rewards = torch.tensor([reward(sample.request.prompt, sample.tokens) for sample in samples])
    advantages = group_advantages(rewards.view(PROMPTS, SAMPLES)).flatten()

    length = DIGITS + 1 + max(len(sample.tokens) for sample in samples)
    ids = torch.tensor([sample.ids + [END] * (length - len(sample.ids)) for sample in samples])
    places = torch.arange(1, length)  # of the tokens that have log-probabilities
    ends = torch.tensor([len(sample.ids) for sample in samples])
    mask = (places > DIGITS) & (places < ends[:, None])

    model.train()
    with torch.no_grad():
        old, of_reference = model.log_probs(ids), reference.log_probs(ids)
    losses = []
    for _ in range(PASSES):  # in the first one all ratios are 1
        losses.append(grpo_loss(model.log_probs(ids), old, advantages, mask, reference=of_reference, beta=BETA))
        optimizer.zero_grad()
        losses[-1].loss.backward()
        optimizer.step()
    model.eval()
    engine.forget()  # what it computed with the former weights
    drawn = torch.tensor([token.logprob for sample in samples for token in sample.logprobs])
    gap = (drawn - old[mask]).abs().max()
    return dict(
        reward=float(rewards.mean()),
        kl=float(losses[0].kl),
        clipped=round(float(losses[-1].clipped), 4),
        sampler_gap=float(gap),
    )


def main(arguments: list[str] | None = None) -> list[dict[str, float]]:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--warmup", type=int, default=20, help="steps on solved examples")
    add("--updates", type=int, default=100, help="of GRPO")
    add("--tests", type=int, default=200, help="prompts to measure the accuracy")
    add("--seed", type=int, default=0)
    add("--out", type=Path, help="file for lines of JSON")
    options = parser.parse_args(arguments)

    torch.manual_seed(options.seed)
    generator = torch.Generator().manual_seed(options.seed)
    model, (train, test) = make_model(), split()
    test = test[torch.randperm(len(test), generator=generator)[: options.tests]]
    optimizer = MuonClip(model, lr=0.01, adamw=dict(lr=3e-3), weight_decay=0.0)
    for _ in range(options.warmup):
        prompts = draw(train, 64, generator)
        loss = -model.log_probs(torch.cat([prompts, answers(prompts)], dim=1))[:, DIGITS:].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    engine = Engine(model, cache_tokens=64 * 256)
    reference = copy.deepcopy(model)
    optimizer = MuonClip(model, lr=0.001, adamw=dict(lr=3e-4), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda number: 1 - number / options.updates)
    started, rows = time.perf_counter(), []
    rows.append(dict(test_accuracy=accuracy(engine, test)))
    print("{test_accuracy:.1%} of {} tests right, after {} steps".format(len(test), options.warmup, **rows[0]))
    for number in range(options.updates):
        row = update(model, reference, engine, optimizer, draw(train, PROMPTS, generator), seed=number)
        schedule.step()
        rows.append(dict(update=number, **row, seconds=round(time.perf_counter() - started, 2)))
        if number % 10 == 0 or number == options.updates - 1:
            print("update {update}: reward {reward:.2f}, KL {kl:.4f}, {seconds:.0f} s".format(**rows[-1]), flush=True)
    rows.append(dict(test_accuracy=accuracy(engine, test)))
    print("after {} updates: {test_accuracy:.1%}".format(options.updates, **rows[-1]))
    if options.out:
        options.out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


if __name__ == "__main__":
    main()
