"""`moegate route`: runs a model's router and checks the result against the contract."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moegate.cli.output import MAX_TOKENS, check_out, complain, console, errors_in_one_line, print_json

if TYPE_CHECKING:
    from moegate.cli.inputs import Job
    from moegate.routing import Routing

_Source = Annotated[
    str, typer.Argument(help="A name of `moegate models`, or a checkpoint folder or file.", metavar="SOURCE")
]
_Layer = Annotated[
    str | None,
    typer.Option(help="The layer, or layers (3-8, or 3,5-7, or all); needed for a checkpoint folder.", metavar="L"),
]
_LogitsDtype = Annotated[
    str | None,
    typer.Option(help="float32 or bfloat16: round the logits so, whatever the model does.", metavar="DTYPE"),
]
_TopK = Annotated[int | None, typer.Option(help="Choose so many experts, whatever the model does.", min=1, metavar="K")]
_Hidden = Annotated[
    Path | None,
    typer.Option(
        help="A safetensors file with the hidden states, one 2-D tensor or one named hidden "
        "(and input_ids where the token ids choose). Without it they are random.",
        metavar="FILE",
    ),
]
_Tokens = Annotated[
    int | None, typer.Option(help="Random tokens; 64 of them unless given.", min=1, max=MAX_TOKENS, metavar="M")
]
_Seed = Annotated[int, typer.Option(help="Of everything random.", min=0, max=2**32, metavar="S")]
_Out = Annotated[Path | None, typer.Option(help="A safetensors file for ids, weights and logits.", metavar="FILE")]
_Device = Annotated[
    str | None, typer.Option(help="cpu, cuda, cuda:1, ...; unless given, the GPU if there is one.", metavar="D")
]
_AsJson = Annotated[bool, typer.Option("--json", help="Print one object; for several layers, a list.")]


def route(
    source: _Source,
    layer: _Layer = None,
    logits_dtype: _LogitsDtype = None,
    top_k: _TopK = None,
    hidden: _Hidden = None,
    tokens: _Tokens = None,
    seed: _Seed = 0,
    out: _Out = None,
    device: _Device = None,
    as_json: _AsJson = False,
) -> None:
    """Run a model's router: show the experts of tokens, the load, the error of the logits, and the time of a call.

    A named model gets random weights of realistic size; a checkpoint folder (config.json and safetensors) has its own.
    Several layers get a row each, and an object each in --json; their names are in --out. Tokens with NaN weights, such
    as those of NaN hidden states, are counted and left out of the load; the contract defines them, so they are no
    failure. Exit status: 1 if the result breaks the contract, 2 for wrong arguments.
    """
    with errors_in_one_line():
        from moegate.cli.inputs import DEFAULT_TOKENS, Inputs, change_of, load_jobs
        from moegate.cli.machine import pick_device
        from moegate.cli.route_layers import route_layers

        if out is not None:
            _check_out(out, hidden)
        if hidden is not None and tokens is not None:
            raise ValueError("--tokens: allowed without --hidden only, which has its own number of tokens")
        inputs = Inputs(hidden, DEFAULT_TOKENS if tokens is None else tokens, seed, pick_device(device))
        jobs = load_jobs(source, layer, inputs, change_of(logits_dtype, top_k))
        if out is not None:
            jobs.check_out(out)
        if len(jobs.layers) > 1:
            route_layers(jobs, out, as_json)
            return
        (job,) = jobs
        routing = job.gate(job.hidden, input_ids=job.input_ids, return_logits=True)
        if out is not None:
            _write(out, job, routing)
    _report(job, routing, out, as_json)


def _report(job: Job, routing: Routing, out: Path | None, as_json: bool) -> None:
    from moegate.cli.route_report import print_report, summarise

    summary = summarise(job, routing)
    if as_json:
        print_json(summary.as_dict() | {"out": None if out is None else str(out)})
    else:
        print_report(summary, console())
        if out is not None:
            console().print(f"written   {out}", soft_wrap=True)
    if not summary.comparison.ok:
        complain(f"the contract is broken: {'; '.join(summary.comparison.problems)}")
        raise typer.Exit(1)


def _check_out(out: Path, hidden: Path | None) -> None:
    from moegate.catalog.files import is_same

    check_out("--out", out)
    if hidden is not None and is_same(out, hidden):
        raise ValueError(f"--out: {out} is the file of --hidden; allowed: another file")


def _write(out: Path, job: Job, routing: Routing) -> None:
    import dataclasses
    import json

    from safetensors import SafetensorError
    from safetensors.torch import save_file

    from moegate._version import __version__
    from moegate.whole_file import replacing

    tensors = {name: part.contiguous() for name, part in routing._asdict().items() if part is not None}
    spec = json.dumps(dataclasses.asdict(job.gate.spec))
    try:
        with replacing(out) as new:
            save_file(tensors, new, metadata={"spec": spec, "source": job.title, "moegate": __version__})
    except (SafetensorError, OSError) as error:
        raise ValueError(f"--out: cannot write {out}: {error}") from None
