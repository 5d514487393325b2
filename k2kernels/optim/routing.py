"""The update rule of each parameter, the reason, and the matrices it is cut into: decided once, by name and shape."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from torch import Tensor, nn

METHODS = ("muon", "adamw")

# Parameters of two axes or more in published models that are no hidden matrices, by name without ".weight". The first
# pattern that matches gives the reason.
_NAMES = {
    "bias": r"(^|[._])bias(_[uv])?$",  # of stacked experts; relative ones per head
    "embedding": r"(^|[._])(emb|embed|embeddings?|wte|wpe)([._]|$)",
    "table": r"(^|[._])(table|tokens?|rel_pos(_[hwt])?)$",  # learned rows that no matrix multiplies
    "output head": r"(^|[._])head$|(^|\.)(output(_layer|_projection)?|(final_|to_)?logits|scores?|unembed(ding)?)$"
    r"|(^|\.)classifier(\.|$)",
    "norm": r"norm\d*$|(^|[._])ln(_\w+)?$",  # of each head
    "adapter": r"(^|\.)(lora_(embedding_)?[abAB]|lokr_w\d(_[ab])?|hada_w\d_[ab])(\.|$)",  # factors of an update
    "decay": r"(^|\.)(A_logs?|log_A|time_(decay|first|faaaa|(mix|maa)_\w+))$",  # of a state: Mamba, RWKV
    "convolution": r"conv(\dd)?$",
}
_ROUTERS = ("gate", "router")


class Route(NamedTuple):
    """One row of the routing table."""

    name: str
    shape: tuple[int, ...]
    method: str  # "muon" or "adamw"
    reason: str


def route(
    parameters: Sequence[tuple[str, Tensor]],
    *,
    model: nn.Module | None = None,
    rules: Mapping[str, str] | None = None,
    router: str = "muon",
) -> list[Route]:
    """Assigns every parameter to Muon or AdamW.

    Muon gets matrices [m, n] and stacks of them [E, m, n]; AdamW gets vectors (norms, biases), single rows or columns,
    anything with more axes, and by name (`_NAMES`) stacked biases and norms, embeddings and other tables, output heads,
    low-rank adapters, decays of state-space models and convolutions.

    Args:
        parameters: (name, parameter) pairs.
        model: the module that has them, if any: embeddings and convolutions are then also found by module type.
        rules: glob pattern -> "muon" or "adamw"; the first that matches a name wins over everything else.
        router: the method of the matrix that scores experts.

    Raises:
        ValueError: for a rule that matches nothing, names no method, or sends to Muon what is not a matrix.
    """
    rules = _patterns("rules", rules)
    for pattern, method in [*rules.items(), ("router", router)]:
        if method not in METHODS:
            raise ValueError(f"MuonClip: rule {pattern!r} must be 'muon' or 'adamw', got {method!r}")
    check_matched("rules", rules, parameters)
    by_module = _by_module(model)
    table = []
    for name, parameter in parameters:
        pattern = first_match(name, rules)
        if pattern is not None:
            method, reason = rules[pattern], f"rule {pattern!r}"
            if method == "muon" and parameter.ndim not in (2, 3):
                raise ValueError(
                    f"MuonClip: rule {pattern!r} sends {name} to Muon, which takes [m, n] or [E, m, n], "
                    f"got {list(parameter.shape)}; send it to 'adamw'"
                )
        else:
            method, reason = by_module.get(name) or _by_name_and_shape(name, parameter, router)
        table.append(Route(name, tuple(parameter.shape), method, reason))
    return table


def row_splits(
    table: Sequence[Route],
    splits: Mapping[str, str | int | Sequence[int] | None] | None,
    *,
    known: Mapping[str, Sequence[int]],
    heads: Mapping[str, int],
) -> dict[str, tuple[int, ...]]:
    """The row blocks of fused matrices that are orthogonalised apart; a name that is missing is one matrix.

    Args:
        table: what `route` returned.
        splits: glob pattern -> "gate_up" (two equal blocks), "heads" (one per attention head), an int (that many
            equal blocks), a list of block sizes, or None (one matrix). The first that matches wins; by default
            "*gate_up_proj*" is cut into gate and up, and a latent projection into latent and rope rows.
        known: block sizes from the model.
        heads: number of heads of the projections whose rows are grouped by head.

    Raises:
        ValueError: for a pattern that matches nothing or a parameter of AdamW, or sizes that do not add up.
    """
    splits = _patterns("splits", splits)
    check_matched("splits", splits, [(row.name, None) for row in table])
    result = {}
    for row in table:
        pattern = first_match(row.name, splits)
        if pattern is None:
            if row.method != "muon":
                continue
            if row.name in known:
                result[row.name] = tuple(known[row.name])
            elif fnmatchcase(row.name, "*gate_up_proj*") and row.shape[-2] % 2 == 0:
                result[row.name] = (row.shape[-2] // 2,) * 2
            continue
        where = f"MuonClip: splits[{pattern!r}]"
        if row.method != "muon":
            raise ValueError(
                f"{where} matches {row.name}, which goes to AdamW ({row.reason}); make the pattern narrower"
            )
        if splits[pattern] is not None:
            result[row.name] = _block_sizes(splits[pattern], row, heads, where)
    return result


def _block_sizes(spec: str | int | Sequence[int], row: Route, heads: Mapping[str, int], where: str) -> tuple[int, ...]:
    """The row blocks of one matrix for an entry of `splits`; `where` names the entry in errors."""
    rows = row.shape[-2]
    if spec == "heads":
        if row.name not in heads:
            raise ValueError(f"{where}: the heads of {row.name} are not known; give the number of blocks instead")
        spec = heads[row.name]
    elif spec == "gate_up":
        spec = 2
    if isinstance(spec, int):
        if spec < 1 or rows % spec:
            raise ValueError(f"{where}: the {rows} rows of {row.name} do not divide into {spec} equal blocks")
        return (rows // spec,) * spec
    if isinstance(spec, str) or not all(isinstance(size, int) and size > 0 for size in spec):
        raise ValueError(
            f"{where} must be 'gate_up', 'heads', a number of blocks, a list of sizes or None, got {spec!r}"
        )
    if sum(spec) != rows:
        raise ValueError(f"{where}: block sizes of {row.name} must add up to {rows}, got {list(spec)}")
    return tuple(spec)


def first_match(name: str, patterns: Mapping[str, object]) -> str | None:
    """The first pattern that matches `name`."""
    return next((pattern for pattern in patterns if fnmatchcase(name, pattern)), None)


def check_matched(argument: str, patterns: Mapping[str, object], parameters: Sequence[tuple[str, object]]) -> None:
    """Raises ValueError naming the patterns that match no parameter."""
    unmatched = [p for p in patterns if not any(fnmatchcase(name, p) for name, _ in parameters)]
    if unmatched:
        raise ValueError(
            f"MuonClip: {argument} match no parameter: {', '.join(map(repr, unmatched))}; "
            "names are those of model.named_parameters()"
        )


def _patterns(argument: str, patterns: Mapping[str, Any] | None) -> dict[str, Any]:
    if not isinstance(patterns, (Mapping, type(None))):
        raise TypeError(f"MuonClip: {argument} must be a dict from patterns of names, or None, got {patterns!r}")
    return dict(patterns or {})


def _by_module(model: nn.Module | None) -> dict[str, tuple[str, str]]:
    found = {}
    for path, module in model.named_modules() if model is not None else ():
        embedding = isinstance(module, (nn.Embedding, nn.EmbeddingBag))
        reason = "embedding" if embedding else "convolution"
        if embedding or isinstance(module, nn.modules.conv._ConvNd):
            for name, _ in module.named_parameters(recurse=False):
                found[f"{path}.{name}" if path else name] = ("adamw", reason)
    return found


def _by_name_and_shape(name: str, parameter: Tensor, router: str) -> tuple[str, str]:
    path = name.split(".")
    module = path[-2] if len(path) > 1 else path[-1]
    if parameter.ndim < 2:
        return "adamw", "vector"
    if parameter.ndim > 3:
        return "adamw", "more than three axes"
    if min(parameter.shape[-2:]) == 1:
        return "adamw", "single row or column"
    for reason, pattern in _NAMES.items():
        if re.search(pattern, name.removesuffix(".weight")):
            return "adamw", reason
    if module in _ROUTERS:
        return router, "router"
    return "muon", "matrix" if parameter.ndim == 2 else "stacked matrices"
