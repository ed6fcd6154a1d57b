"""`moegate explain`: which kernels run, the time to expect, on what evidence, and why no others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from moegate.cli.explain_source import kernels_of, print_kernels
from moegate.cli.output import MAX_TOKENS, console, errors_in_one_line, new_table, print_json

if TYPE_CHECKING:
    from moegate.choice import Explanation, Plan
    from moegate.machine import Machine

_COUNTS = "1,4,16,64,4096"
_NAME_WIDTH, _WIDE = 20, 120  # of a column of names; of a console in which no name needs to be broken
_NARROW = 76  # of a console in which tables would cut times off, or leave sentences a word a line

_Source = Annotated[
    str,
    typer.Argument(
        help="A name of `moegate models`, or a folder with a config.json, or a file of it.", metavar="SOURCE"
    ),
]
_Tokens = Annotated[str, typer.Option(help="Numbers of tokens.", metavar="M,M,...")]
_Device = Annotated[
    str | None,
    typer.Option(
        help="cpu, cuda, cuda:1, ..., or a GPU that need not be here, such as sm_103 or 'RTX 5090'; unless given, "
        "the GPU if there is one.",
        metavar="D",
    ),
]
_Installed = Annotated[
    str | None,
    typer.Option(
        help="As if this were installed: flashinfer==0.6.8. A GPU that is not here has none otherwise.",
        metavar="PACKAGE==VERSION",
    ),
]
_Policy = Annotated[str, typer.Option(help="measured or sglang.", metavar="P")]
_Backend = Annotated[str | None, typer.Option(help="Only this one: torch, cuda or flashinfer.", metavar="BACKEND")]
_Frozen = Annotated[
    bool,
    typer.Option(
        "--frozen/--not-frozen", help="The gate's weight is declared constant, as a checkpoint's is, or may change."
    ),
]
_SourceToo = Annotated[
    bool,
    typer.Option("--source", help="Also the kernels: how they are launched, their registers, the text of each."),
]
_AsJson = Annotated[bool, typer.Option("--json", help="Print a list, one object a number of tokens.")]


def explain(
    source: _Source,
    tokens: _Tokens = _COUNTS,
    device: _Device = None,
    installed: _Installed = None,
    policy: _Policy = "measured",
    backend: _Backend = None,
    frozen: _Frozen = True,
    source_too: _SourceToo = False,
    as_json: _AsJson = False,
) -> None:
    """Show which kernels run for a model's router, the time to expect, and why no others.

    A machine without a GPU can be asked about one. Nothing is routed, but where a plan for this machine would run
    FlashInfer, that is tried. Times are microseconds in a CUDA graph behind another kernel.
    """
    with errors_in_one_line():
        from moegate import choice
        from moegate.choice.dispatch import proven_plan
        from moegate.cli.inputs import load_spec
        from moegate.problem import default_weight_dtype, problem_of

        counts = numbers("--tokens", tokens)
        title, spec = load_spec(source)
        machine = _machine(device, installed)
        is_pretended = machine.device is None or installed is not None
        problem = problem_of(machine, spec, default_weight_dtype(spec), frozen=frozen)
        plan = (choice.Plan if is_pretended else proven_plan)(problem, policy, backend)
        found = [choice.explain(plan, count) for count in counts]
        kernels = kernels_of(plan, counts) if source_too else None
    if as_json:
        print_json([each.as_dict() | ({} if kernels is None else {"kernels": kernels[each.tokens]}) for each in found])
        return
    _print(title, plan, found, console())
    if kernels is not None:
        print_kernels(kernels, machine, console())


def numbers(option: str, text: str) -> list[int]:
    """The whole numbers of a list such as "1,4,16", each once.

    Raises:
        ValueError: It is none.
    """
    words = [word.strip() for word in text.split(",")]
    if not all(word.isascii() and word.isdigit() and int(word) <= MAX_TOKENS for word in words):
        raise ValueError(
            f"{option}: got {text!r}; allowed: numbers up to {MAX_TOKENS} with commas between them, as in {_COUNTS}"
        )
    return list(dict.fromkeys(map(int, words)))


def _machine(device: str | None, installed: str | None) -> Machine:
    from moegate.choice.chips import suggestions
    from moegate.choice.machines import CHIPS, described_machine, machine_of, with_installed
    from moegate.cli.machine import pick_device

    machine = None if device is None else described_machine(device)
    if machine is None:
        try:
            machine = machine_of(pick_device(device))
        except ValueError as error:
            chips = ", ".join(f"sm_{number}" for number in sorted(CHIPS))
            like = [] if device is None else suggestions(device)
            names = " or ".join(map(repr, like or ["H100", "RTX 5090"]))
            named = f"did you mean {names}?" if like else f"or its name, such as {names}"
            raise ValueError(f"{error}; or a GPU that need not be here: {chips}; {named}") from None
    if installed is None:
        return machine
    pretended = with_installed(machine, installed)
    if machine.capability is None:
        raise ValueError(f"--installed: allowed with an NVIDIA GPU; {machine.name} runs none of FlashInfer's kernels")
    return pretended


def _print(title: str, plan: Plan, found: list[Explanation], out: Console) -> None:
    spec, machine = plan.problem.spec, plan.problem.machine
    shape = f"  {spec.hidden_size} → {spec.num_gate_rows}, top {spec.top_k}"
    out.print(Text(title, style="bold cyan").append(shape, style="not bold default"), soft_wrap=True)
    facts = f", compute capability {machine.capability[0]}.{machine.capability[1]}" if machine.capability else ""
    out.print(f"device    {machine.name}{facts}", soft_wrap=True)
    if machine.capability is not None:
        flashinfer = "no FlashInfer" if machine.flashinfer is None else f"FlashInfer {machine.flashinfer}"
        out.print(f"installed {flashinfer}", soft_wrap=True)
    out.print(f"gate      {'frozen' if plan.problem.frozen else 'not frozen'}")
    out.print(f"policy    {plan.policy if plan.backend is None else f'backend {plan.backend}'}")
    for note, counts in _by_tokens(found, lambda row: row.notes).items():
        out.print(Text(f"note      M = {counts}: ", style="yellow").append(str(note)), soft_wrap=True)
    out.print()
    if out.width < _NARROW:
        for row in found:
            out.print(str(row))
            out.print()
        return
    _print_found(found, out)
    _print_rejected(found, out)


def _print_found(found: list[Explanation], out: Console) -> None:
    table = _new_table(out)
    table.add_column("tokens", justify="right", no_wrap=True)
    table.add_column("backend", no_wrap=True)
    table.add_column("kernel", no_wrap=True)
    table.add_column("µs", justify="right", no_wrap=True)
    table.add_column("evidence", ratio=1, overflow="fold")
    table.add_column("why", ratio=1, overflow="fold")
    for row in found:
        kernel = _in_width_of(out, row.kernel)
        table.add_row(str(row.tokens), row.backend, kernel, _time(row.expected_us), row.evidence, row.why)
    out.print(table)
    out.print()


def _print_rejected(found: list[Explanation], out: Console) -> None:
    """Every candidate that does not run, each reason once, with the numbers of tokens that it holds for."""
    table = _new_table(out)
    table.add_column("not these", no_wrap=True)
    table.add_column("tokens", justify="right", max_width=16)
    table.add_column("µs", justify="right", no_wrap=True)
    table.add_column("because", ratio=1, overflow="fold")
    rows = _by_tokens(found, lambda row: [(r.backend, r.kernel, r.reason) for r in row.rejected])
    times = {
        (row.tokens, rejected.backend, rejected.kernel): rejected.expected_us
        for row in found
        for rejected in row.rejected
    }
    for (backend, kernel, reason), counts in sorted(rows.items()):
        us = [times.get((int(count), backend, kernel)) for count in counts.split(", ")]
        shown = ""
        if any(value is not None for value in us):  # each beside its number of tokens
            counts, shown = counts.replace(", ", "\n"), "\n".join(_time(value) for value in us)
        table.add_row(_in_width_of(out, f"{backend} {kernel}"), counts, shown, reason)
    out.print(table)
    out.print()


def _new_table(out: Console) -> Table:
    """On a narrow console as wide as this, so that the columns of sentences share what the others leave."""
    table = new_table()
    table.expand = out.width < _WIDE
    return table


def _in_width_of(out: Console, name: str) -> str:
    """A kernel's name; on a narrow console its lines end with its plus signs."""
    return name.replace("+", "+\n") if out.width < _WIDE and len(name) > _NAME_WIDTH else name


def _by_tokens(found: list[Explanation], items: Any) -> dict[Any, str]:
    """Each item, once, with the numbers of tokens at which it is there."""
    counts: dict[Any, list[str]] = {}
    for row in found:
        for item in items(row):
            counts.setdefault(item, []).append(str(row.tokens))
    return {item: ", ".join(where) for item, where in counts.items()}


def _time(us: float | None) -> str:
    return "-" if us is None else f"{us:.2f}"
