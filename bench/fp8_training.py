"""Trains the tiny Kimi-K2 with and without FP8 products, from the same weights on the same text, and plots both curves.

    python bench/fp8_training.py [--steps 200] [--seeds 0 1 2] [--results FILE] [--picture FILE]

Appends one JSON line per run. With --draw nothing is trained: the plot is made from the recorded lines.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from k2kernels.train.plots import BLUE, INK, ORANGE, new_figure, save, style
from k2kernels.train.trainer import Trainer, TrainOptions

HERE = Path(__file__).parent
LAST = 20  # steps, whose mean is the loss at the end
RUNS = {False: ("float32 products", BLUE), True: ("FP8 products", ORANGE)}


def train(options: TrainOptions, commit: str) -> dict[str, Any]:
    """The line of one run."""
    with tempfile.TemporaryDirectory() as out:
        trainer = Trainer(options, Path(out))
        started = time.perf_counter()
        for row in trainer.run():
            if row.step % 10 == 0:
                print(
                    f"fp8={options.fp8} w4={options.w4} seed {options.seed}, step {row.step}: loss {row.loss:.3f}",
                    flush=True,
                )
        seconds = time.perf_counter() - started
        rows = trainer.history
    return dict(
        command=" ".join(["python", *sys.argv]),
        commit=commit,
        date=datetime.date.today().isoformat(),
        device=device_name(),
        python=platform.python_version(),
        torch=torch.__version__,
        config=options.config,
        optimizer=options.optimizer,
        steps=options.steps,
        batch_size=options.batch_size,
        length=options.length,
        seed=options.seed,
        fp8=options.fp8,
        w4=options.w4,
        dtype=str(options.torch_dtype).removeprefix("torch."),
        held_out_bits_per_byte=round(rows[-1].valid, 4),
        end_loss=round(sum(row.loss for row in rows[-LAST:]) / LAST, 4),
        max_logit_end=round(rows[-1].max_logit, 2),
        train_seconds=round(seconds),
        losses=[round(row.loss, 4) for row in rows],
    )


def draw(lines: Sequence[dict[str, Any]], path: Path) -> None:
    """Running means of the loss over steps, one line for each run, those of the latest commit and options."""
    last = lines[-1]
    same = ("commit", "config", "optimizer", "steps", "batch_size", "length")
    lines = [line for line in lines if all(line[key] == last[key] for key in same)]
    figure, ((curves, ratios),) = new_figure(columns=2)
    seeds = sorted({line["seed"] for line in lines})
    what = f"{last['config']} Kimi-K2, {last['optimizer']}, {len(seeds)} seed{'s' if len(seeds) > 1 else ''}"
    where = f"{last['device']}, {last['date']}, commit {last['commit']}"
    style(curves, "Training with FP8 products", f"{what}; {where}", "step", "loss, nats per token (running mean)")
    smooth = {(line["seed"], line["fp8"]): running_mean(line["losses"]) for line in lines}
    for (seed, fp8), mean in smooth.items():
        label, color = RUNS[fp8]
        curves.plot(mean, color=color, linewidth=1.4, label=label if seed == seeds[0] else None)
    curves.legend(frameon=False, labelcolor=INK, fontsize=9)
    style(ratios, "FP8 beside float32", "same seed: same weights, same text", "step", "difference of the loss, %")
    for seed in seeds:
        if (seed, False) in smooth and (seed, True) in smooth:
            pairs = zip(smooth[seed, True], smooth[seed, False])
            ratios.plot([100 * (fp8 / plain - 1) for fp8, plain in pairs], linewidth=1.2, label=f"seed {seed}")
    ratios.axhline(0, color=INK, linewidth=0.8)
    ratios.legend(frameon=False, labelcolor=INK, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    save(figure, path)


def running_mean(values: Sequence[float]) -> list[float]:
    mean, means = values[0], []
    for value in values:
        mean += 0.1 * (value - mean)
        means.append(mean)
    return means


def summary(lines: Sequence[dict[str, Any]]) -> str:
    """The figures quoted in docs/training.md."""
    pairs = {line["seed"]: {} for line in lines}
    for line in lines:
        pairs[line["seed"]][line["fp8"]] = line
    rows = []
    for seed, pair in sorted(pairs.items()):
        if len(pair) == 2:
            plain, fp8 = pair[False], pair[True]
            rows.append(
                f"seed {seed}: end loss {plain['end_loss']:.3f} and with FP8 {fp8['end_loss']:.3f} "
                f"({fp8['end_loss'] / plain['end_loss'] - 1:+.2%}), held out {plain['held_out_bits_per_byte']:.3f} and "
                f"{fp8['held_out_bits_per_byte']:.3f} bits/byte; {plain['train_seconds']} and {fp8['train_seconds']} s"
            )
    return "\n".join(rows)


def device_name() -> str:
    names = [line.split(":", 1)[1].strip() for line in _cpuinfo() if line.startswith("model name")]
    return f"CPU, {torch.get_num_threads()} of {os.cpu_count()} cores, {names[0] if names else platform.machine()}"


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def commit_now() -> str:
    words = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(words, capture_output=True, text=True, check=True, cwd=HERE).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, default=HERE / "results" / "fp8_training.jsonl")
    parser.add_argument("--picture", type=Path, default=HERE.parent / "docs" / "fp8_training.png")
    parser.add_argument("--draw", action="store_true", help="only draw what was measured")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    commit = commit_now()  # before it changes
    for seed in options.seeds if not options.draw else ():
        for fp8 in RUNS:
            line = train(TrainOptions(steps=options.steps, batch_size=options.batch_size, seed=seed, fp8=fp8), commit)
            with open(options.results, "a") as file:
                file.write(json.dumps(line) + "\n")
    lines = [json.loads(text) for text in options.results.read_text().splitlines()]
    draw(lines, options.picture)
    print(summary(lines), f"drawn: {options.picture}", sep="\n")


if __name__ == "__main__":
    main()
