"""Which kernels run: candidates -> a plan for every number of tokens -> the dispatch of each call.

candidates.py  the ways to route: a GEMM and a selection   machines.py   the machine that is here, or described
policies.py    measured, sglang, a forced backend          plan.py       the choice at every M
tables.py      files of measured times                     costs.py      the time to expect, and on what evidence
dispatch.py    a plan made to run                          explain.py    what runs, and why no others
chips.py       NVIDIA's chips by name                      by_tokens.py  the spans of a plan, bound to kernels
"""

from moegate.choice.explain import Explanation, Rejected, explain, explain_half
from moegate.choice.plan import Plan

__all__ = ["Explanation", "Plan", "Rejected", "explain", "explain_half"]
