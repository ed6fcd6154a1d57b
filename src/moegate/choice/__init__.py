"""Which kernels run: facts about the problem and the machine -> candidates -> a plan for every number of tokens.

facts.py       what the choice depends on          candidates.py  the ways to route, and what each supports
policies.py    measured, sglang, a forced backend  plan.py        the choice at every M, explained
tables.py      files of measured times             costs.py       the time to expect, and on what evidence
planned.py     a plan made to run                  chips.py      NVIDIA's chips by name
"""

from moegate.choice.plan import Explanation, Plan, Rejected

__all__ = ["Explanation", "Plan", "Rejected"]
