"""`moegate models`: the catalog."""

from __future__ import annotations

import dataclasses
from fnmatch import fnmatchcase
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from moegate import catalog
from moegate.catalog import Model
from moegate.cli.output import complain, console, new_table, print_json
from moegate.spec import RouterSpec

_SCORES = {"softmax": "softmax", "sigmoid": "sigmoid", "sqrtsoftplus": "√softplus", "identity": "logit"}
_NARROW = 100  # columns of a console; below, very long names are folded


def models(
    pattern: Annotated[
        str | None,
        typer.Argument(help="Only models with this in a name; \\* and ? work as in file names.", metavar="PATTERN"),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print a list of objects with every field of the spec.")
    ] = False,
) -> None:
    """List the catalog's models and what their routers compute."""
    found = [model for model in catalog.models() if pattern is None or _matches(model, pattern)]
    if not found:
        complain(f"no model matches {pattern!r}; `moegate models` lists all {len(catalog.names())} names")
        raise typer.Exit(1)
    if as_json:
        print_json([_row(model) for model in found])
    else:
        _print_table(found, console(), notes=pattern is not None)


def describe(spec: RouterSpec) -> str:
    """The spec in a short phrase: "sigmoid + bias, 4 of 8 groups, renorm x2.5"."""
    late = {"softmax_of_selected": "softmax of the chosen", "sigmoid_of_selected": "sigmoid of the chosen"}
    score = late.get(spec.weights_from, _SCORES[spec.scoring_func])
    if spec.correction_bias == "logit":
        score = f"logit + bias, {score}"
    elif spec.correction_bias == "score":
        score = f"{score} + bias"
    parts = [
        "ids by token" if spec.hash_routing else "",
        "input norm" if spec.input_norm_eps is not None else "",
        "linear bias" if spec.linear_bias else "",
        f"logits x{spec.logit_multiplier:.4g}" if spec.logit_multiplier != 1 else "",
        f"soft cap {spec.logit_softcapping:g}" if spec.logit_softcapping is not None else "",
        score,
        _groups(spec) if spec.n_group > 1 else "",
        _factors(spec),
    ]
    return ", ".join(part for part in parts if part)


def _groups(spec: RouterSpec) -> str:
    if spec.select_per_group:
        return f"{spec.top_k // spec.n_group} of each of {spec.n_group} groups"
    ranked = f" by their best {spec.group_score_top_j}" if spec.group_score == "topj_sum" else ""
    return f"{spec.topk_group} of {spec.n_group} groups{ranked}"


def _factors(spec: RouterSpec) -> str:
    factors = [
        "renorm" if spec.renormalize else "",
        f"x{spec.routed_scaling_factor:g}" if spec.routed_scaling_factor != 1 else "",
        "x expert's scale" if spec.per_expert_scale else "",
        "x global scale" if spec.global_scale else "",
    ]
    return " ".join(factor for factor in factors if factor)


def _matches(model: Model, pattern: str) -> bool:
    pattern = pattern.lower()
    if not any(wildcard in pattern for wildcard in "*?["):
        pattern = f"*{pattern}*"
    return any(fnmatchcase(name, pattern) for name in (model.name, *model.also))


def _row(model: Model) -> dict[str, Any]:
    return {
        "name": model.name,
        "also": list(model.also),
        **dataclasses.asdict(model.spec),
        "source": model.source,
        "semantics_source": model.semantics_source,
        "semantics_note": model.semantics_note,
        "note": model.note,
    }


def _print_table(found: list[Model], out: Console, notes: bool) -> None:
    table = new_table()
    table.add_column("model", max_width=26 if out.width < _NARROW else None, overflow="fold")
    for name in ("K", "N", "k"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("router", overflow="fold")
    table.add_column("type", no_wrap=True)
    for model in found:
        spec = model.spec
        names = Text(model.name, style="cyan").append("".join(f"\n  {name}" for name in model.also), style="dim")
        experts = str(spec.num_experts)
        experts += f"\n+{spec.num_zero_experts}z" if spec.num_zero_experts else ""
        experts += f"\n+{spec.num_shared_gates}s" if spec.num_shared_gates else ""
        dtype = {"bfloat16": "bf16", "float32": "fp32"}[spec.logits_dtype]
        table.add_row(names, str(spec.hidden_size), experts, str(spec.top_k), describe(spec), dtype)
    out.print(table)
    out.print()
    if notes:
        for model in found:
            if model.note:
                out.print(Text(f"{model.name}: ", style="cyan").append(model.note, style="default"))
    routers = "1 router" if len(found) == 1 else f"{len(found)} routers"
    legend = (
        f"{routers}. K: hidden size; N: experts, +z: zero experts, +s: shared gates; k: experts of a token; "
        "type: of the logits. Indented names share the router above."
    )
    out.print(Text(legend, style="dim"))
