"""Plots of measurements on a GPU.

python bench/pictures.py [--results bench/results/gpu.jsonl] [--out docs]
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from k2kernels.testing.bench import OURS
from k2kernels.train.plots import BLUE, INK, MUTED, new_figure, save, style

HERE = Path(__file__).parent
PEER_COLORS = {
    "FlashMLA": "#c2410c",
    "FlashInfer": "#15803d",
    "torch.compile": "#7c3aed",
    "torch sdpa": "#656d76",
    "split 512": "#5ba3f0",
}
GEMM_COLORS = {  # and ours in blue
    "DeepGEMM": "#c2410c",
    "torch scaled_mm": "#15803d",
    "torch bf16": "#656d76",
    "quantize + k2kernels": "#5ba3f0",
}
CACHES = {"bf16": "bfloat16 cache", "656": "656-byte cache"}


class Point(NamedTuple):
    """One line of mla_decode, its shape taken apart."""

    batch: int
    length: int  # x 1024
    s_q: int
    heads: int
    cache: str
    line: dict[str, Any]


def draw(results: Path, out: Path) -> list[Path]:
    """Draws the plots for which `results` has lines; returns their paths."""
    lines = [json.loads(text) for text in results.read_text().splitlines()] if results.exists() else []
    out.mkdir(parents=True, exist_ok=True)
    points, layers = _points(lines), _layers(lines)
    drawn = []
    if layers:
        drawn.append(out / "fp8_gemm.png")
        plot_fp8_gemm(drawn[-1], layers)
    if stages := _stages(lines):
        drawn.append(out / "moe_layer.png")
        plot_moe_layer(drawn[-1], stages)
    for heads in sorted({point.heads for point in points}):
        drawn.append(out / f"mla_decode_{heads}_heads.png")
        plot_mla_decode(drawn[-1], [point for point in points if point.heads == heads])
    return drawn


def plot_mla_decode(path: Path, points: Sequence[Point]) -> None:
    """Bandwidth over batch and length, a panel for each kind of cache and number of query tokens.

    The dashed line is the roofline: the bytes over the time that the machine's measured copy or matrix product, the
    slower of both, takes.
    """
    caches = [cache for cache in CACHES if any(p.cache == cache for p in points)]
    queries = sorted({p.s_q for p in points})
    figure, panels = new_figure(len(queries), len(caches))
    top = max(_roof(p.line) for p in points) / 1e3
    for s_q, row in zip(queries, panels):
        for cache, axes in zip(caches, row):
            _panel(axes, [p for p in points if (p.s_q, p.cache) == (s_q, cache)], s_q, cache)
            axes.set_ylim(0, 1.08 * top)
    pairs = [pair for row in panels for axes in row for pair in zip(*axes.get_legend_handles_labels())]
    handles = {label: handle for handle, label in pairs}
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=8, frameon=False, labelcolor=INK)
    save(figure, path)


def _panel(axes, points: Sequence[Point], s_q: int, cache: str) -> None:
    title = f"{CACHES[cache]}, {s_q} query token{'s' if s_q > 1 else ''}"
    line = points[-1].line if points else None
    where = "not measured" if line is None else "mla_decode, {heads} heads; {device}, {date}, commit {commit}".format(
        heads=points[-1].heads, **line
    )  # fmt: skip
    style(axes, title, where, "tokens in the cache of each sequence", "TB/s")
    places: dict[tuple[int, int], float] = {}
    batches = sorted({p.batch for p in points})
    for batch in batches:
        lengths = sorted({p.length for p in points if p.batch == batch})
        first = max(places.values(), default=-1.6) + 1.6
        places.update({(batch, length): first + i for i, length in enumerate(lengths)})
        axes.text(
            first + (len(lengths) - 1) / 2, 0.97, f"batch {batch}", transform=axes.get_xaxis_transform(),
            ha="center", va="top", color=MUTED, fontsize=9,
        )  # fmt: skip
    axes.set_xticks(list(places.values()), [f"{length}k" for _, length in places])

    roof = {(p.batch, p.length): _roof(p.line) / 1e3 for p in points}
    whos = sorted({p.line["who"] for p in points}, key=lambda who: (who != OURS, who))
    for batch in batches:  # no line between batches
        first = batch == batches[0]
        group = [key for key in places if key[0] == batch]
        axes.plot(
            [places[key] for key in group], [roof[key] for key in group], color=INK, linestyle=(0, (4, 3)),
            linewidth=1.2, label="roof" if first else None,
        )  # fmt: skip
        for who in whos:
            rates = {(p.batch, p.length): p.line["gb_per_s"] / 1e3 for p in points if p.line["who"] == who}
            seen = [key for key in group if key in rates]
            axes.plot(
                [places[key] for key in seen], [rates[key] for key in seen], marker="o", markersize=4,
                color=BLUE if who == OURS else PEER_COLORS.get(who, MUTED), linewidth=2.2 if who == OURS else 1.2,
                label=who if first else None, zorder=3 if who == OURS else 2,
            )  # fmt: skip


Layers = dict[str, dict[str, dict[int, dict[str, Any]]]]  # name -> who -> rows -> line


def plot_fp8_gemm(path: Path, layers: Layers) -> None:
    """The share of the FP8 product's lower bound over rows, a panel per layer; peers have the same bound.

    The bound is the longer of the times for bytes and FLOPs, at the measured rates of a large copy and a large FP8
    product.
    """
    columns = 2
    figure, panels = new_figure(-(-len(layers) // columns), columns)
    flat = [axes for row in panels for axes in row]
    for axes, (name, whos) in zip(flat, layers.items()):
        ours = whos[OURS]
        line = list(ours.values())[-1]
        style(axes, name, "fp8_gemm; {device}, {date}, commit {commit}".format(**line), "rows", "share of the roofline")
        floors = {rows: line["us"] * line["roofline"] for rows, line in ours.items()}
        for who, lines in sorted(whos.items(), key=lambda item: (item[0] != OURS, item[0])):
            rows = sorted(set(lines) & set(floors))
            axes.plot(
                rows, [floors[m] / lines[m]["us"] for m in rows], marker="o", markersize=4, label=who,
                color=BLUE if who == OURS else GEMM_COLORS.get(who, MUTED), linewidth=2.2 if who == OURS else 1.2,
                zorder=3 if who == OURS else 2,
            )  # fmt: skip
        axes.set_xscale("log", base=2)
        axes.set_xticks(sorted(floors), [str(m) for m in sorted(floors)])
        axes.minorticks_off()
        axes.set_ylim(0, 1.05)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    for axes in flat[len(layers) :]:
        axes.set_axis_off()
    pairs = [pair for axes in flat for pair in zip(*axes.get_legend_handles_labels())]
    handles = {label: handle for handle, label in pairs}
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=8, frameon=False, labelcolor=INK)
    save(figure, path)


def _layers(lines: Sequence[dict[str, Any]]) -> Layers:
    """The latest lines of fp8_gemm on the device measured last, for layers with a line of ours."""
    lines = [line for line in lines if line["op"] == "fp8_gemm"]
    layers: Layers = {}
    for line in lines:
        match = re.fullmatch(r"(.+) M=(\d+)", line["shape"])
        if match and line["device"] == lines[-1]["device"]:
            layers.setdefault(match[1], {}).setdefault(line["who"], {})[int(match[2])] = line
    return {name: whos for name, whos in layers.items() if OURS in whos}


STAGE_COLORS = {
    "route": "#656d76",
    "dispatch": "#15803d",
    "gate_up": BLUE,
    "swiglu": "#c2410c",
    "down": "#5ba3f0",
    "combine": "#7c3aed",
}


def plot_moe_layer(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    """The share of each step in the time of a layer of experts, over tokens, for bfloat16 and FP8 experts.

    Each bar is labelled with the sum of its steps in microseconds, each part with its share of the roofline.
    """
    figure, (panels,) = new_figure(1, 2)
    for axes, kind in zip(panels, ("bf16", "fp8")):
        found: dict[int, dict[str, dict[str, Any]]] = {}
        for line in lines:
            tokens, _, of, stage = line["shape"].split()
            if of == kind:
                found.setdefault(int(tokens), {})[stage] = line
        where = "{device}, {date}, commit {commit}".format(**lines[-1]) if found else "not measured"
        style(
            axes,
            f"{kind} experts, one of eight ranks of Kimi-K2",
            where,
            "tokens",
            "share of the time; in it, of the roof",
        )
        axes.set_xticks(range(len(found)), [f"{tokens:,}" for tokens in sorted(found)])
        axes.set_ylim(0, 1.08)
        for place, tokens in enumerate(sorted(found)):
            stages = found[tokens]
            total, bottom = sum(line["us"] for line in stages.values()), 0.0
            axes.text(place, 1.02, f"{total:,.0f} µs", ha="center", color=INK, fontsize=9)
            for stage, color in STAGE_COLORS.items():
                if stage not in stages:
                    continue
                share = stages[stage]["us"] / total
                axes.bar(place, share, 0.7, bottom, color=color, label=stage if place == 0 else None)
                if share > 0.04:
                    roof = f"{stages[stage]['roofline']:.0%}"
                    axes.text(place, bottom + share / 2, roof, ha="center", va="center", color="white", fontsize=8)
                bottom += share
    handles = {label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels())}
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=6, frameon=False, labelcolor=INK)
    save(figure, path)


def _stages(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Our latest line of each step of a layer, on the device measured last."""
    lines = [line for line in lines if line["op"] == "moe_stage" and line["who"] == OURS]
    latest = {line["shape"]: line for line in lines if line["device"] == lines[-1]["device"]}
    return list(latest.values())


def _roof(line: dict[str, Any]) -> float:
    """GB/s at the lower bound of the case."""
    return line["gb_per_s"] / line["roofline"]


def _points(lines: Sequence[dict[str, Any]]) -> list[Point]:
    """The latest line of each shape and body, on the device measured last."""
    lines = [line for line in lines if line["op"] == "mla_decode"]
    latest = {(line["shape"], line["who"]): line for line in lines if line["device"] == lines[-1]["device"]}
    points = []
    for (shape, _), line in latest.items():
        if match := re.fullmatch(r"(\d+)x(\d+)k q(\d+) h(\d+) (\w+)", shape):
            *sizes, cache = match.groups()
            points.append(Point(*map(int, sizes), cache, line))
    return points


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=HERE / "results" / "gpu.jsonl")
    parser.add_argument("--out", type=Path, default=HERE.parent / "docs")
    options = parser.parse_args()
    drawn = draw(options.results, options.out)
    print("\n".join(map(str, drawn)) or f"no lines to draw in {options.results}")


if __name__ == "__main__":
    main()
