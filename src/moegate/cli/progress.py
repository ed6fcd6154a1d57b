"""A progress bar for measurements, and the check for a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from moegate.cli.output import console, fail

INTERRUPTED = 130
"""The exit status of a measurement that was stopped: 128 + SIGINT, as in shells."""


def need_gpu(what: str) -> None:
    """Fails with one line unless PyTorch has an NVIDIA GPU on which the kernels run."""
    import torch

    from moegate.choice.machines import machine_of
    from moegate.cuda.device import unsupported

    if torch.version.cuda is None:
        fail(f"{what} needs an NVIDIA GPU and a PyTorch built for CUDA; this is PyTorch {torch.__version__}")
    if not torch.cuda.is_available():
        fail(f"{what} needs an NVIDIA GPU; PyTorch {torch.__version__} finds none")
    reason = unsupported(machine_of(torch.device("cuda", torch.cuda.current_device())))
    if reason is not None:
        fail(f"{what} needs the kernels for NVIDIA GPUs, which cannot run: {reason}")


@contextmanager
def progress_bar(first: str | None = "compiling") -> Iterator[Progress]:
    """A bar on stderr with the elapsed and the remaining time. Without a terminal: no bar; callers print lines.

    Args:
        first: The first of these lines, printed here, since the first step may be slow.
    """
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(elapsed_when_finished=False),
    )
    out = console(stderr=True)
    with Progress(*columns, console=out, speed_estimate_period=120, disable=not out.is_terminal) as bar:
        if bar.disable and first is not None:
            out.print(first, style="dim")
        yield bar
