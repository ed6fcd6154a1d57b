"""`moegate explain --source`: the kernels themselves, as they would be compiled and launched; no GPU is needed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.syntax import Syntax
from rich.text import Text

if TYPE_CHECKING:
    from moegate.choice import Plan
    from moegate.machine import Machine

Kernels = dict[int, list[dict[str, Any]]]
"""By number of tokens, the kernels in the order in which they run."""


def kernels_of(plan: Plan, counts: list[int]) -> Kernels:
    """What the plan's candidates launch; a text is compiled for its registers.

    Raises:
        ValueError: No NVIDIA GPU, or nothing to compile with.
    """
    from moegate.choice.chips import assumed_sms
    from moegate.cuda import jit
    from moegate.cuda.device import described_chip, unsupported

    problem, machine = plan.problem, plan.problem.machine
    reason = unsupported(machine) or jit.missing_compiler()
    if reason is not None or machine.capability is None:
        raise ValueError(f"--source: {reason}; allowed: --device with an NVIDIA GPU, which need not be here")
    chip = described_chip(machine.capability, machine.num_sms or assumed_sms(machine.capability))
    arch = jit.arch_of(machine.capability)
    found: Kernels = {}
    for count in counts:
        sources = plan.choice(count).candidate.sources(problem, chip, count) if count else []
        found[count] = [
            {**source._asdict(), **_use(source.text, source.kernel, arch), "num_sms": chip.num_sms}
            for source in sources
        ]
    return found


_uses: dict[tuple[str, str], dict[str, int]] = {}


def _use(text: str, kernel: str, arch: str) -> dict[str, Any]:
    """The registers of a thread, by ptxas; None where PTX is all that is compiled, and of a library."""
    from moegate.cuda import jit

    if text and (text, arch) not in _uses:
        _uses[text, arch] = {use.name: use.registers for use in jit.kernel_uses(text, arch)}
    return {"arch": arch, "registers": _uses.get((text, arch), {}).get(kernel)}


def print_kernels(kernels: Kernels, machine: Machine, out: Console) -> None:
    """For each number of tokens what is launched; then each text, once."""
    assumed = {each["num_sms"] for found in kernels.values() for each in found if machine.num_sms is None}
    for num_sms in assumed:
        out.print(f"The number of multiprocessors of {machine.name} is unknown; assumed: {num_sms}", highlight=False)
    for count, found in kernels.items():
        out.print(Text(f"{count} token{'s' * (count != 1)}", style="bold cyan"))
        if not found:
            out.print("  no kernel of moegate's: PyTorch's operations or FlashInfer, or nothing to compute")
        for each in found:
            out.print(Text(f"  {each['kernel']}", style="bold").append(_facts(each), style="not bold"), soft_wrap=True)
            out.print(f"    {each['plan']}", soft_wrap=True, highlight=False)
        out.print()
    texts = {each["text"]: each["header"] for found in kernels.values() for each in found if each["text"]}
    for text, header in texts.items():
        out.print(Text(f"The text that instantiates {header}", style="bold cyan"))
        if out.is_terminal:
            out.print(Syntax(text.rstrip(), "cpp", background_color="default", word_wrap=True))
        else:  # for a compiler, which wants the lines as they are
            out.print(text.rstrip(), soft_wrap=True, markup=False, highlight=False)
        out.print()


def _facts(kernel: dict[str, Any]) -> str:
    if not kernel["text"]:
        return ""
    registers = "registers by the driver" if kernel["registers"] is None else f"{kernel['registers']} registers"
    return (
        f"  {kernel['header']}, {kernel['arch']}: {registers}, {kernel['shared_bytes']} bytes of shared memory a block"
    )
