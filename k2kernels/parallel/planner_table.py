"""A plan as text: which layouts fit, and what the fullest rank of one holds."""

from __future__ import annotations

from k2kernels.model.capacity import KINDS, USABLE
from k2kernels.parallel.planner import GPUS, SHARDINGS, Holding, Item, Plan, exchange_of, fewest_gpus, slots_of
from k2kernels.parallel.traffic import served_bytes

BAR = 24  # characters of a full GPU


def table(plan: Plan) -> str:
    """The plan to print."""
    workload, train = plan.workload, plan.workload.mode == "train"
    name = plan.gpu.lower() if plan.gpu.lower() in GPUS else "GPU"
    kind = "training" if train else "serving"
    products = (", FP8 products" if train else ", FP8 weights") if workload.fp8 else ", bfloat16"
    products += f", experts in {KINDS[workload.w4]}" if workload.w4 else ""
    lines = [
        f"{plan.gpus} x {name}, {kind}{products}; {workload.tokens:,} tokens of a rank in one pass",
        f"{_gb(plan.gpu_bytes)} GB each, of which {_gb(plan.usable)} are planned with: the rest is left to the CUDA "
        "context, NCCL,",
        f"fragmentation and workspaces ({1 - USABLE:.0%}, an assumption).",
        "",
        *(_training(plan) if train else _serving(plan)),
        "",
        *_detail(plan),
    ]
    if not plan.fitting:
        fewest = fewest_gpus(plan)
        more = "none up to 16,384 do" if fewest is None else f"{fewest:,} would"
        lines += ["", f"No layout fits. Of powers of two{_stages(plan)}, {more}."]
    return "\n".join(line.rstrip() for line in lines)


def _training(plan: Plan) -> list[str]:
    head = "GB of the fullest rank with checkpointing by layer / without (*: fits)"
    if plan.chosen.layout.pp > 1:
        head += f", {plan.chosen.layout.pp} pipeline stages"
    lines = [head, f"{'ep':>5}{'edp':>6}" + "".join(f"{name:>22}" for name in SHARDINGS)]
    for ep in dict.fromkeys(holding.layout.ep for holding in plan.holdings):
        row = [holding for holding in plan.holdings if holding.layout.ep == ep]
        cells = (f"{_mark(plan, h.total)} / {_mark(plan, h.total_without)}" for h in row)
        lines.append(f"{ep:>5}{row[0].layout.edp:>6}" + "".join(f"{cell:>22}" for cell in cells))
    return lines + [f"  {name}: {text}" for name, text in SHARDINGS.items()]


def _serving(plan: Plan) -> list[str]:
    lines = [
        "Data-parallel attention: all but the experts is whole on every rank.",
        f"{'ep':>5}{'edp':>6}{'GB of a rank':>16}{'tokens of cache: a rank':>26}{'all ranks':>14}   (*: fits)",
    ]
    for holding in plan.holdings:
        layout, room = holding.layout, plan.cache_room(holding)
        cells = (f"{room:,}", f"{room * plan.gpus:,}") if room else ("-", "-")
        total = _mark(plan, holding.total)
        lines.append(f"{layout.ep:>5}{layout.edp:>6}{total:>16}{cells[0]:>26}{cells[1]:>14}")
    return lines


def _detail(plan: Plan) -> list[str]:
    holding, train = plan.chosen, plan.workload.mode == "train"
    layout = holding.layout
    where = f", rank of stage {holding.stage}" if layout.pp > 1 else ""
    sharding = f", {layout.sharding}" if train else ""
    lines = [f"pp {layout.pp}, edp {layout.edp}, ep {layout.ep}{sharding}{where}, GB:"]
    lines += [_line(plan, item) for item in holding.items]
    lines.append(_line(plan, Item("all", holding.total, all(item.counted for item in holding.items))))
    if train:
        lines.append(_line(plan, Item("without checkpointing", holding.total_without, False)))
    over = holding.total - plan.usable
    lines.append(f"  {_gb(over)} GB too much" if over > 0 else f"  {_gb(-over)} GB are left of {_gb(plan.usable)}")
    return lines + _notes(plan, holding)


def _notes(plan: Plan, holding: Holding) -> list[str]:
    layout, workload = holding.layout, plan.workload
    lines = []
    if layout.ep > 1:
        slots = slots_of(plan.config, layout, workload)
        lines += [
            f"  {slots:,} rows of experts a layer: {workload.load:g} times the mean, an assumption (`capacity` of "
            "expert_parallel)",
            f"  exchange by transport {exchange_of(layout, workload)!r}; nodes of {workload.gpus_per_node}",
        ]
        if workload.mode == "serve":
            dispatch, combine = (size / 1e3 for size in served_bytes(plan.config, layout.ep, workload.fp8))
            rows = "FP8" if workload.fp8 else "bfloat16"
            sent = f"dispatch sends {dispatch:.1f} KB in {rows}, combine {combine:.1f} KB"
            lines.append(f"  for a token and layer {sent} (estimate)")
    if workload.mode == "train":
        lines.append("  the optimizer's workspaces take the place of the activations, which are freed by then")
    if plan.config.num_nextn_predict_layers:
        lines.append("  of MTP layers the weights are included, activations and cache are not")
    return lines


def _line(plan: Plan, item: Item) -> str:
    share = item.bytes / plan.gpu_bytes
    bar = "#" * min(round(share * BAR), BAR) + (">" if share > 1 else "")
    counted = "counted" if item.counted else "estimate"
    return f"  {item.name:<22}{_gb(item.bytes):>9}  {counted:<9}{bar:<{BAR + 2}}{item.note}"


def _stages(plan: Plan) -> str:
    pp = plan.chosen.layout.pp
    return f" times {pp} stages" if pp > 1 else ""


def _mark(plan: Plan, size: int) -> str:
    return _gb(size) + ("*" if size <= plan.usable else " ")


def _gb(size: int) -> str:
    return f"{size / 1e9:,.1f}"


def serving_markdown(plans: list[tuple[str, Plan]]) -> str:
    """The table of docs/scale.md: what a rank holds without the cache, and the tokens of cache that all ranks have."""
    lines = ["| weights | GPUs | ep | GB of a rank | of which weights | tokens of cache, all ranks |"]
    lines.append("| --- | --- | ---: | ---: | ---: | ---: |")
    for name, plan in plans:
        holding, room = plan.chosen, plan.cache_room(plan.chosen)
        weights = next(item.bytes for item in holding.items if item.name == "weights")
        tokens = f"{room * plan.gpus:,}" if plan.fits(holding) else "does not fit"
        gpus = f"{plan.gpus} x {plan.gpu.upper()}"
        cells = (name, gpus, str(holding.layout.ep), _gb(holding.total), _gb(weights), tokens)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
