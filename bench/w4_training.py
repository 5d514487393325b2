"""Trains the tiny Kimi-K2 in bfloat16 with plain experts and for 4-bit ones, from the same weights on the same text.

It plots the curves.

    python bench/w4_training.py [--steps 100] [--batch-size 4] [--seeds 0] [--results FILE] [--picture FILE]

Appends one JSON line per run. With --draw nothing is trained: the plot is made from the recorded lines.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from fp8_training import HERE, commit_now, running_mean, train

from k2kernels.train.plots import BLUE, INK, ORANGE, new_figure, save, style
from k2kernels.train.trainer import TrainOptions

RUNS = {None: ("bfloat16", INK), "int4": ("INT4 experts", BLUE), "mxfp4": ("MXFP4 experts", ORANGE)}


def draw(lines: Sequence[dict[str, Any]], path: Path) -> None:
    """Running means of the loss over steps, one line for each run, and their differences from bfloat16's."""
    last = lines[-1]
    figure, ((curves, ratios),) = new_figure(columns=2)
    seeds = sorted({line["seed"] for line in lines})
    what = f"{last['config']} Kimi-K2, {last['optimizer']}, {len(seeds)} seed{'s' if len(seeds) > 1 else ''}"
    where = f"{last['device']}, {last['date']}, commit {last['commit']}"
    style(curves, "Training for 4-bit experts", f"{what}; {where}", "step", "loss, nats per token (running mean)")
    style(ratios, "4-bit experts beside bfloat16", "same seed: same weights, same text", "step", "difference, %")
    smooth = {(line["seed"], line["w4"]): running_mean(line["losses"]) for line in lines}
    for (seed, kind), mean in smooth.items():
        label, color = RUNS[kind]
        curves.plot(mean, color=color, linewidth=1.2, label=label if seed == seeds[0] else None)
        if kind and (seed, None) in smooth:
            pairs = zip(mean, smooth[seed, None])
            ratios.plot(
                [100 * (w4 / plain - 1) for w4, plain in pairs],
                color=color,
                linewidth=1.2,
                label=f"{label}, seed {seed}",
            )
    ratios.axhline(0, color=INK, linewidth=0.8)
    for axes in (curves, ratios):
        axes.legend(frameon=False, labelcolor=INK, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    save(figure, path)


def summary(lines: Sequence[dict[str, Any]]) -> str:
    """The figures quoted in docs/training.md."""
    plain = {line["seed"]: line for line in lines if line["w4"] is None}
    rows = []
    for line in lines:
        text = f"{RUNS[line['w4']][0]}, seed {line['seed']}: end loss {line['end_loss']:.3f}"
        if line["w4"] and line["seed"] in plain:
            text += f" ({line['end_loss'] / plain[line['seed']]['end_loss'] - 1:+.2%})"
        rows.append(f"{text}, held out {line['held_out_bits_per_byte']:.3f} bits/byte; {line['train_seconds']} s")
    return "\n".join(rows)


def latest(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines with the commit and options of the last."""
    same = ("commit", "config", "optimizer", "steps", "batch_size", "length")
    return [line for line in lines if all(line[key] == lines[-1][key] for key in same)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, default=HERE / "results" / "w4_training.jsonl")
    parser.add_argument("--picture", type=Path, default=HERE.parent / "docs" / "w4_training.png")
    parser.add_argument("--draw", action="store_true", help="only draw what was measured")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    commit = commit_now()
    sizes = dict(steps=options.steps, batch_size=options.batch_size, dtype="bfloat16")
    for seed in options.seeds if not options.draw else ():
        for kind in RUNS:
            line = train(TrainOptions(**sizes, seed=seed, w4=kind), commit)
            with open(options.results, "a") as file:
                file.write(json.dumps(line) + "\n")
    lines = latest([json.loads(text) for text in options.results.read_text().splitlines()])
    draw(lines, options.picture)
    print(summary(lines), f"drawn: {options.picture}", sep="\n")


if __name__ == "__main__":
    main()
