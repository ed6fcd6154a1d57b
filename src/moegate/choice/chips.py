"""NVIDIA's chips by name: what a machine that is not here would be.

Compute capabilities: https://developer.nvidia.com/cuda-gpus and its page of legacy GPUs. Multiprocessors and memory
bandwidths: NVIDIA's data sheets and product pages of each chip, and its architecture white papers (Volta, Turing,
Ampere GA100 and GA102, Ada, Hopper, Blackwell RTX). What they leave open is None.
"""

from __future__ import annotations

import difflib
import re
from functools import cache
from typing import NamedTuple

Capability = tuple[int, int]


class Chip(NamedTuple):
    """One product."""

    name: str
    """NVIDIA's, less the company's."""
    capability: Capability
    num_sms: int | None
    """Multiprocessors."""
    bandwidth: float | None
    """Of the memory, in GB/s."""
    also: tuple[str, ...] = ()
    """Other names: the driver's, where it does not follow from `name`, and a computer's that has one such chip."""


_CHIPS = (
    Chip("V100", (7, 0), 80, 900),
    Chip("T4", (7, 5), 40, 320),
    Chip("RTX 2080 Ti", (7, 5), 68, 616),
    Chip("Quadro RTX 8000", (7, 5), 72, 672, ("RTX 8000",)),
    Chip("A100 80GB", (8, 0), 108, 2039, ("A100",)),
    Chip("A100 80GB PCIe", (8, 0), 108, 1935, ("A100 PCIe", "A100 PCIe 80GB")),
    Chip("A100 40GB", (8, 0), 108, 1555, ("A100 SXM4 40GB", "A100 PCIe 40GB", "A100 40GB PCIe")),
    Chip("A30", (8, 0), 56, 933),
    Chip("A40", (8, 6), 84, 696),
    Chip("A10", (8, 6), 72, 600),
    Chip("A10G", (8, 6), None, 600),
    Chip("A16", (8, 6), None, None),
    Chip("A2", (8, 6), 10, 200),
    Chip("RTX A6000", (8, 6), 84, 768, ("A6000",)),
    Chip("RTX A5000", (8, 6), 64, 768),
    Chip("RTX A4000", (8, 6), 48, 448),
    Chip("RTX 3090 Ti", (8, 6), 84, 1008),
    Chip("RTX 3090", (8, 6), 82, 936),
    Chip("RTX 3080 Ti", (8, 6), 80, 912),
    Chip("RTX 3080", (8, 6), 68, 760),
    Chip("RTX 3070", (8, 6), 46, 448),
    Chip("RTX 3060", (8, 6), 28, 360),
    Chip("Jetson AGX Orin", (8, 7), 16, 204.8, ("AGX Orin", "Jetson Orin", "Orin")),
    Chip("Jetson Orin NX", (8, 7), 8, 102.4, ("Orin NX",)),
    Chip("Jetson Orin Nano", (8, 7), 8, None, ("Orin Nano",)),
    Chip("L4", (8, 9), 58, 300),
    Chip("L40", (8, 9), 142, 864),
    Chip("L40S", (8, 9), 142, 864),
    Chip("RTX 6000 Ada", (8, 9), 142, 960),
    Chip("RTX 5000 Ada", (8, 9), 100, 576),
    Chip("RTX 4500 Ada", (8, 9), 60, 432),
    Chip("RTX 4000 Ada", (8, 9), 48, 360),
    Chip("RTX 4090", (8, 9), 128, 1008),
    Chip("RTX 4080 Super", (8, 9), 80, 736),
    Chip("RTX 4080", (8, 9), 76, 717),
    Chip("RTX 4070 Ti Super", (8, 9), 66, 672),
    Chip("RTX 4070 Ti", (8, 9), 60, 504),
    Chip("RTX 4070 Super", (8, 9), 56, 504),
    Chip("RTX 4070", (8, 9), 46, 504),
    Chip("RTX 4060 Ti", (8, 9), 34, 288),
    Chip("RTX 4060", (8, 9), 24, 272),
    Chip("H100 80GB HBM3", (9, 0), 132, 3350, ("H100",)),
    Chip("H100 PCIe", (9, 0), 114, 2000),
    Chip("H100 NVL", (9, 0), 132, 3900),
    Chip("H200", (9, 0), 132, 4800),
    Chip("H200 NVL", (9, 0), 132, 4800),
    Chip("H20", (9, 0), None, 4000),
    Chip("GH200", (9, 0), 132, 4000),
    Chip("GH200 144GB", (9, 0), 132, 4900, ("GH200 144G",)),
    Chip("B200", (10, 0), 148, 8000),
    Chip("GB200", (10, 0), 148, 8000),
    Chip("B300", (10, 3), None, 8000),
    Chip("GB300", (10, 3), None, 8000),
    Chip("Jetson Thor", (11, 0), 20, 273, ("Jetson AGX Thor", "AGX Thor", "Thor", "Jetson T5000", "T5000")),
    Chip("Jetson T4000", (11, 0), None, None, ("T4000",)),
    Chip("RTX PRO 6000 Blackwell", (12, 0), 188, 1792, ("RTX PRO 6000",)),
    Chip("RTX PRO 6000 Blackwell Server Edition", (12, 0), 188, 1597, ("RTX PRO 6000 Server",)),
    Chip("RTX PRO 5000 Blackwell", (12, 0), 110, 1344, ("RTX PRO 5000",)),
    Chip("RTX PRO 4500 Blackwell", (12, 0), 82, 896, ("RTX PRO 4500",)),
    Chip("RTX PRO 4000 Blackwell", (12, 0), 70, 672, ("RTX PRO 4000",)),
    Chip("RTX PRO 2000 Blackwell", (12, 0), None, None, ("RTX PRO 2000",)),
    Chip("RTX 5090", (12, 0), 170, 1792),
    Chip("RTX 5080", (12, 0), 84, 960),
    Chip("RTX 5070 Ti", (12, 0), 70, 896),
    Chip("RTX 5070", (12, 0), 48, 672),
    Chip("RTX 5060 Ti", (12, 0), 36, 448),
    Chip("RTX 5060", (12, 0), 30, 448),
    Chip("GB10", (12, 1), 48, 273, ("DGX Spark",)),
)
# What a name may have beside a chip's, in this order: the vendor, how it is built in, which memory, how much of it.
_VENDOR = re.compile(r"^(nvidia|geforce|tesla)+")
_BEHIND = (
    re.compile(r"(generation|workstationedition|maxqworkstationedition|gpu|superchip|tensorcore)$"),
    re.compile(r"(sxm\d?|hbm\d?e?)$"),
    re.compile(r"(8|12|16|20|24|32|40|48|64|80|94|96|120|128|141|144|180|186|192|279|288|480)gb?$"),
)


def chip(name: str) -> Chip | None:
    """The chip of a name, whatever its case, blanks, vendor and memory; None: not known."""
    plain = _plain(name)
    for endings in (_BEHIND[:1], _BEHIND[:2], _BEHIND):
        found = _by_name().get(_without(plain, endings))
        if found is not None:
            return found
    return None


def suggestions(name: str) -> list[str]:
    """Up to three names that are like one that is not known."""
    like = difflib.get_close_matches(_without(_plain(name), _BEHIND), _by_name(), n=3, cutoff=0.6)
    return list(dict.fromkeys(_by_name()[each].name for each in like))


def most_bandwidth(capability: Capability) -> float | None:
    """Of the memory, in GB/s, that no chip of a compute capability exceeds; None: of none is it known."""
    known = [each.bandwidth for each in _CHIPS if each.capability == capability and each.bandwidth is not None]
    return max(known, default=None)


def assumed_sms(capability: Capability) -> int:
    """The multiprocessors that no chip of a compute capability exceeds, or else of its major version, or any chip."""
    known = [(each.capability, each.num_sms) for each in _CHIPS if each.num_sms is not None]
    alike = [num_sms for of, num_sms in known if of == capability]
    of_major = [num_sms for of, num_sms in known if of[0] == capability[0]]
    return max(alike or of_major or [num_sms for _, num_sms in known])


@cache
def _by_name() -> dict[str, Chip]:
    return {_without(_plain(name), _BEHIND[:2]): each for each in _CHIPS for name in (each.name, *each.also)}


def _plain(name: str) -> str:
    return _VENDOR.sub("", re.sub(r"[^a-z0-9]", "", name.lower()))


def _without(name: str, endings: tuple[re.Pattern[str], ...]) -> str:
    """A name less all of these endings."""
    before = None
    while before != name:
        before = name
        for ending in endings:
            name = ending.sub("", name) or name
    return name
