"""The two pictures of a training run, and the style of all pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from k2kernels.model.files import replace_file

INK, MUTED, GRID = "#1f2328", "#656d76", "#d8dee4"
BLUE, ORANGE = "#0b62c4", "#c2410c"
LABEL = dict(textcoords="offset points", fontsize=9)


def new_figure(rows: int = 1, columns: int = 1):
    """A figure, and its axes [rows, columns]."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt.subplots(rows, columns, figsize=(8 * columns, 4.5 * rows), dpi=150, layout="constrained", squeeze=False)


def style(axes, title: str, subtitle: str, xlabel: str, ylabel: str) -> None:
    """Titles on the left, horizontal lines only, nothing that is not needed."""
    axes.set_title(f"{title}\n", loc="left", color=INK, fontsize=13, fontweight="bold")
    axes.text(0, 1.02, subtitle, transform=axes.transAxes, color=MUTED, fontsize=9.5)
    axes.set_xlabel(xlabel, color=MUTED)
    axes.set_ylabel(ylabel, color=MUTED)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=MUTED, length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(GRID)


def save(figure, path: Path) -> None:
    """Writes the picture whole or not at all."""
    import matplotlib.pyplot as plt

    replace_file(path, lambda file: figure.savefig(file, format="png"))
    plt.close(figure)


def plot_loss(
    path: Path,
    steps: Sequence[int],
    train: Sequence[float],
    valid: Sequence[tuple[int, float]],
    xz: float,
    title: str,
) -> None:
    """Bits per byte over steps: each training batch, their running mean, the held-out text, and xz -9e."""
    figure, ((axes,),) = new_figure()
    style(axes, "Bits per byte", title, "step", "bits / byte")
    total, weight, smooth = 0.0, 0.0, []
    for value in train:  # the first steps count by their own number, not as if all before had been like the first
        total, weight = 0.9 * total + value, 0.9 * weight + 1
        smooth.append(total / weight)
    axes.plot(steps, train, color=BLUE, alpha=0.25, linewidth=0.8)
    axes.plot(steps, smooth, color=BLUE, linewidth=1.8, label="training (running mean)")
    if valid:
        axes.plot(*zip(*valid), color=ORANGE, marker="o", markersize=4, linewidth=1.6, label="held-out text")
        axes.annotate(f"{valid[-1][1]:.2f}", valid[-1], xytext=(6, 6), color=ORANGE, fontweight="bold", **LABEL)
    axes.axhline(xz, color=MUTED, linestyle=(0, (4, 3)), linewidth=1.2, label=f"xz -9e: {xz:.2f}")
    low = min([xz, *train, *(v for _, v in valid)])
    axes.set_ylim(max(0, low - 0.25), min(8, max(smooth[: max(1, len(smooth) // 50)]) + 0.2))
    axes.legend(frameon=True, framealpha=1, edgecolor="none", labelcolor=INK, fontsize=9)
    save(figure, path)


def plot_max_logits(
    path: Path,
    steps: Sequence[int],
    layers: dict[int, Sequence[float]],
    threshold: float | None,
    title: str,
) -> None:
    """The largest attention logit of each layer over steps, and the threshold of QK-clip."""
    import matplotlib

    figure, ((axes,),) = new_figure()
    style(axes, "Largest attention logit per layer", title, "step", "max logit")
    colors = matplotlib.colormaps["viridis"]
    ends = []
    for index, (layer, values) in enumerate(sorted(layers.items())):
        color = colors(0.85 * index / max(1, len(layers) - 1))
        axes.plot(steps, values, color=color, linewidth=1.1)
        ends.append((values[-1], f"layer {layer}", color))
    if threshold is not None:
        axes.axhline(threshold, color=ORANGE, linestyle=(0, (4, 3)), linewidth=1.3)
        place = dict(xycoords=("axes fraction", "data"), xytext=(0, 4), color=ORANGE)
        box = dict(facecolor="white", edgecolor="none", alpha=0.85, pad=1)
        axes.annotate(f"QK-clip threshold {threshold:g}", (0.01, threshold), bbox=box, **place, **LABEL)
    top = max([threshold or 0, *(v for values in layers.values() for v in values if math.isfinite(v))])
    axes.set_ylim(0, 1.12 * top)
    last = -math.inf  # labels at the lines' ends, pushed apart so that they stay readable
    for value, label, color in sorted(ends, key=lambda end: end[0]):
        last = max(value, last + 0.045 * 1.12 * top)
        place = dict(xytext=(6, 0), va="center", annotation_clip=False)
        axes.annotate(label, (steps[-1], last), color=color, **place, **LABEL)
    save(figure, path)
