"""AdamW, Muon and MuonClip on the tiny K2, on a CPU: equal steps, several seeds, one JSON line per run.

    python bench/optimizers.py [EXPERIMENT ...] [--seeds 0 1 2] [--threads 1]     runs what is not yet recorded
    python bench/optimizers.py --draw                                          the pictures in docs/ from the lines

Experiments:
    rates    learning rates of AdamW and of Muon, on a seed that no other experiment uses: the best are taken below
    equal    AdamW, Muon without clip and MuonClip (tau 30) at their best rates
    clip     QK-clip's threshold and its variants at a rate so high that logits explode without it
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from fp8_training import device_name

from k2kernels.optim import MuonClip, QKClip
from k2kernels.train.plots import BLUE, INK, MUTED, ORANGE, new_figure, save, style
from k2kernels.train.trainer import Trainer, TrainOptions

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "optimizers.jsonl"
STEPS, BATCH, LENGTH = 400, 8, 128
EVERY = 10  # steps between the points of a recorded curve
RATE_SEED = 100
ADAMW_RATES = (1e-3, 2e-3, 3e-3, 5e-3, 1e-2)
MUON_RATES = (0.0025, 0.005, 0.01, 0.02, 0.04)
HOT_RATE = 0.02  # of experiment "clip": at Muon's best rate no logit reaches 30 in so few steps


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way to train. `clip` makes the settings of QK-clip; None: AdamW alone, or Muon without clip."""

    name: str
    optimizer: str  # "adamw" or "muon"
    lr: float
    clip: Callable[[], QKClip] | None = None


def falling(step: int) -> float:
    """tau from 100 to 30, linearly over the first half of the run."""
    return max(30.0, 100.0 - 70.0 * step / (STEPS / 2))


CLIPS: dict[str, Callable[[], QKClip]] = {
    "tau 100": lambda: QKClip(threshold=100.0),
    "tau 30": lambda: QKClip(threshold=30.0),
    "tau 100 to 30": lambda: QKClip(threshold=falling),
    "tau 30, smooth": lambda: QKClip(threshold=30.0, smoothing=0.9),
    "tau 30, smooth literal": lambda: QKClip(threshold=30.0, mode="smooth_literal"),
}


class Run(Trainer):
    """A training run with a variant's optimizer."""

    def __init__(self, variant: Variant, seed: int, out: Path):
        self.variant = variant
        rates = dict(lr=variant.lr) if variant.optimizer == "muon" else dict(adamw_lr=variant.lr)
        optimizer = "muonclip" if variant.clip else variant.optimizer
        options = TrainOptions(steps=STEPS, batch_size=BATCH, length=LENGTH, seed=seed, optimizer=optimizer, **rates)
        super().__init__(options, out, save_every=STEPS)

    def make_optimizer(self) -> torch.optim.Optimizer:
        optimizer = super().make_optimizer()
        if self.variant.clip is None:
            return optimizer
        adamw = dict(lr=self.options.adamw_lr, betas=(0.9, 0.95), weight_decay=0.1)
        return MuonClip(self.model, self.options.lr, adamw=adamw, qk_clip=self.variant.clip())


def plan(experiment: str, seeds: list[int], lines: list[dict[str, Any]]) -> Iterator[tuple[Variant, int]]:
    """The runs of an experiment."""
    if experiment == "rates":
        for optimizer, rates in (("adamw", ADAMW_RATES), ("muon", MUON_RATES)):
            for lr in rates:
                yield Variant(f"{optimizer} {lr:g}", optimizer, lr), RATE_SEED
        return
    adamw, muon = (best_rate(lines, optimizer) for optimizer in ("adamw", "muon"))
    if experiment == "equal":
        variants = [
            Variant("AdamW", "adamw", adamw),
            Variant("Muon", "muon", muon),
            Variant("MuonClip", "muon", muon, CLIPS["tau 30"]),
        ]
    else:
        variants = [Variant("no clip", "muon", HOT_RATE)]
        variants += [Variant(name, "muon", HOT_RATE, clip) for name, clip in CLIPS.items()]
    for seed, variant in itertools.product(seeds, variants):
        yield variant, seed


def best_rate(lines: list[dict[str, Any]], optimizer: str) -> float:
    """The rate of the least loss on the held-out text among those of experiment "rates"."""
    tried = [line for line in lines if line["experiment"] == "rates" and line["optimizer"] == optimizer]
    if not tried:
        raise SystemExit(f"{RESULTS}: no rates of {optimizer}: run experiment `rates` first")
    return min(tried, key=lambda line: line["held_out_bits_per_byte"])["lr"]


def run(experiment: str, variant: Variant, seed: int) -> dict[str, Any]:
    """Trains once and returns the line to record."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as out:
        training = Run(variant, seed, Path(out) / "run")
        rows = list(training.run())
    points = [row for row in rows if row.step % EVERY == 0]
    return {
        "command": f"python bench/optimizers.py {experiment}",
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
        "device": device_name(),
        "torch": torch.__version__,
        "experiment": experiment,
        "variant": variant.name,
        "optimizer": variant.optimizer,
        "lr": variant.lr,
        "seed": seed,
        "steps": STEPS,
        "tokens_per_step": BATCH * LENGTH,
        "held_out_bits_per_byte": round(rows[-1].valid, 4),
        "max_logit_peak": round(max(row.max_logit for row in rows), 2),
        "max_logit_end": round(rows[-1].max_logit, 2),
        "clips": sum(row.clipped_heads for row in rows),
        "seconds": round(time.perf_counter() - started, 1),
        "at_steps": [row.step for row in points],
        # each point is the mean since the last one
        "bits_per_byte": [round(mean(r.bits_per_byte for r in rows[p.step - EVERY : p.step]), 4) for p in points],
        "max_logit": [round(max(r.max_logit for r in rows[p.step - EVERY : p.step]), 2) for p in points],
        "valid": [[row.step, round(row.valid, 4)] for row in rows if row.valid is not None],
    }


def commit() -> str:
    """The commit, with "-dirty" if files other than results and plots, which runs change, differ from it."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], capture_output=True, text=True, check=True, cwd=HERE.parent).stdout

    changed = git("status", "--porcelain", "--", ".", ":!bench/results", ":!docs")
    return git("describe", "--always").strip() + ("-dirty" if changed else "")


def recorded() -> list[dict[str, Any]]:
    return [json.loads(text) for text in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


# ---- pictures


def draw(lines: list[dict[str, Any]], out: Path) -> list[Path]:
    """Draws the plots for which there are results."""
    out.mkdir(parents=True, exist_ok=True)
    drawn = []
    if any(line["experiment"] == "equal" for line in lines):
        drawn.append(out / "optimizers.png")
        _draw_equal(drawn[-1], [line for line in lines if line["experiment"] == "equal"])
    if any(line["experiment"] == "clip" for line in lines):
        drawn.append(out / "qk_clip.png")
        _draw_clip(drawn[-1], [line for line in lines if line["experiment"] == "clip"])
    return drawn


def _draw_equal(path: Path, lines: list[dict[str, Any]]) -> None:
    figure, ((loss, logits),) = new_figure(1, 2)
    style(loss, "Training loss at equal steps", _subtitle(lines), "step", "bits / byte")
    style(logits, "Largest attention logit of any head", "QK-clip's threshold is 30", "step", "max logit")
    for variant, color in (("AdamW", MUTED), ("Muon", ORANGE), ("MuonClip", BLUE)):
        runs = [line for line in lines if line["variant"] == variant]
        held = [line["held_out_bits_per_byte"] for line in runs]
        label = f"{variant}: held out {mean(held):.3f} ({min(held):.3f} to {max(held):.3f})"
        _band(loss, runs, "bits_per_byte", color, label)
        clips = f" ({sum(line['clips'] for line in runs)} clips)" if variant == "MuonClip" else ""
        _band(logits, runs, "max_logit", color, variant + clips)
    first = [line["bits_per_byte"][2] for line in lines]
    loss.set_ylim(min(min(line["bits_per_byte"]) for line in lines) - 0.1, max(first))
    logits.axhline(30, color=BLUE, linestyle=(0, (4, 3)), linewidth=1.1)
    logits.set_ylim(bottom=0)
    for axes in (loss, logits):
        axes.legend(frameon=False, labelcolor=INK, fontsize=9)
    save(figure, path)


def _draw_clip(path: Path, lines: list[dict[str, Any]]) -> None:
    import matplotlib

    figure, ((logits, loss),) = new_figure(1, 2)
    style(logits, "Largest attention logit of any head", _subtitle(lines), "step", "max logit")
    style(loss, "Held-out text, at the end", "one mark a seed", "bits / byte", "")
    names = ["no clip", *CLIPS]
    colors = [ORANGE, *(matplotlib.colormaps["viridis"](0.9 * i / len(CLIPS)) for i in range(len(CLIPS)))]
    for row, (name, color) in enumerate(zip(names, colors)):
        runs = [line for line in lines if line["variant"] == name]
        _band(logits, runs, "max_logit", color, name)
        loss.scatter([line["held_out_bits_per_byte"] for line in runs], [row] * len(runs), color=color, zorder=3)
    for tau in (30, 100):
        logits.axhline(tau, color=MUTED, linestyle=(0, (4, 3)), linewidth=1)
    logits.set_ylim(0, 1.05 * max(max(line["max_logit"]) for line in lines))
    logits.legend(frameon=False, labelcolor=INK, fontsize=9)
    loss.set_yticks(range(len(names)), names)
    loss.invert_yaxis()
    save(figure, path)


def _band(axes, runs: list[dict[str, Any]], what: str, color, label: str) -> None:
    """The mean and the range over seeds."""
    if not runs:
        return
    steps, curves = runs[0]["at_steps"], list(zip(*(run[what] for run in runs)))
    axes.fill_between(steps, [min(c) for c in curves], [max(c) for c in curves], color=color, alpha=0.18, linewidth=0)
    axes.plot(steps, [mean(c) for c in curves], color=color, linewidth=1.7, label=label)


def _subtitle(lines: list[dict[str, Any]]) -> str:
    seeds = len({line["seed"] for line in lines})
    rates = ", ".join(sorted({f"{line['optimizer']} lr {line['lr']:g}" for line in lines}))
    return f"tiny K2, {lines[0]['tokens_per_step']} tokens a step; mean and range of {seeds} seeds; {rates}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, usage="%(prog)s [EXPERIMENT ...]"
    )
    parser.add_argument("experiments", nargs="*", choices=["rates", "equal", "clip", []], metavar="EXPERIMENT")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--draw", action="store_true", help="only draw")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if not options.draw:
        for experiment in options.experiments or ["rates", "equal", "clip"]:
            for variant, seed in list(plan(experiment, options.seeds, recorded())):
                key = experiment, variant.name, variant.lr, seed
                if any((x["experiment"], x["variant"], x["lr"], x["seed"]) == key for x in recorded()):
                    continue
                line = run(experiment, variant, seed)
                with open(RESULTS, "a") as file:
                    file.write(json.dumps(line) + "\n")
                shown = {name: line[name] for name in ("held_out_bits_per_byte", "max_logit_peak", "clips", "seconds")}
                print(experiment, variant.name, seed, shown, flush=True)
    print("\n".join(map(str, draw(recorded(), HERE.parent / "docs"))))


if __name__ == "__main__":
    main()
