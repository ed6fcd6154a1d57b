"""Cost tables for tests, made of given times; `shipped` in conftest.py replaces the package's tables by them."""

from __future__ import annotations

import dataclasses

import torch
from machines import pretended

from moegate import __version__, get_spec
from moegate.choice.tables import Row, Table, shape_of
from moegate.machine import Machine
from moegate.problem import Problem, problem_of

DECODE, CUBLAS, OPS = "cuda:router_gemm+select", "cuda:cublas+select", "torch:mm+ops"
MADE = {name: "x" for name in ("date", "command", "moegate_commit", "torch", "cuda", "flashinfer", "driver")}
MADE["moegate"] = __version__
NAMES = {"glm_4_5_air": "glm-4.5-air", "laguna_xs_2_1": "laguna-xs-2.1", "qwen3_5_35b_a3b": "qwen3.5-35b-a3b"}
GPU = Machine("GPU X", (9, 0), 100, 3000.0)


def problem(model: str = "deepseek-v3", machine: Machine = GPU) -> Problem:
    return problem_of(machine, get_spec(model), torch.bfloat16)


def a_table(gpu: Machine = GPU, not_frozen: dict[str, float] | None = None, **us: dict[int, dict[str, float]]) -> Table:
    """A table of times by model (with _ for -) and number of tokens; `not_frozen` goes into every row."""
    rows = [
        Row(model, shape_of(problem(NAMES.get(model, model.replace("_", "-")))), tokens, times, {}, not_frozen or {})
        for model, by_tokens in us.items()
        for tokens, times in by_tokens.items()
    ]
    return Table(gpu, dict(MADE), tuple(rows))


HERE = dataclasses.replace(pretended((9, 0), None), name="GPU X", num_sms=100)
