"""The switch: in processes of their own, as SGLang's are."""

from __future__ import annotations

import pytest
from sglang_process import in_another_process

LOAD = """
import logging, sys
logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
{before}
from sglang.srt.plugins import load_plugins
load_plugins()
"""
# What a process routes with, after `load_plugins()`.
SHOW = """
from sglang.srt.layers.moe import topk
from sglang.srt.models import deepseek_v2, kimi_k3
is_hooked = hasattr(deepseek_v2.MoEGate.forward, "__wrapped__")
print("TopK", topk.TopK.__name__, deepseek_v2.TopK is topk.TopK, "MoEGate", is_hooked)
import torch
print("CUDA", torch.cuda.is_initialized())
"""
LAYERS = """
import torch
from sglang.srt.runtime_context import get_context
from sglang_layers import GROUPED, gate_of, hidden_of, top_k_of
with get_context().override_server_args(), torch.inference_mode():
    gates = [gate_of() for _ in range(3)]
    layers = [(gate, top_k_of(gate.e_score_correction_bias, layer_id=i, **GROUPED)) for i, gate in enumerate(gates)]
    layers[1][1].topk_config.custom_routing_function = lambda hidden_states, gating_output, topk, renormalize: (
        gating_output[:, :topk].float(), torch.zeros(len(gating_output), topk, dtype=torch.int32))
    for _ in range(3):
        print("pass")
        for gate, top_k in layers:
            top_k(hidden_of(2), gate(hidden_of(2)))
"""
OURS = "TopK MoegateTopK True MoEGate True"
THEIRS = "TopK TopK True MoEGate False"


def loaded(then: str, *, before: str = "", **environment: str) -> str:
    return in_another_process(LOAD.format(before=before) + then, **environment)


@pytest.mark.parametrize(
    ("environment", "is_on"),
    [
        ({}, False),
        ({"MOEGATE": "0"}, False),
        ({"SGLANG_PLUGINS": "other"}, False),
        ({"MOEGATE": "1"}, True),
        ({"SGLANG_PLUGINS": "moegate"}, True),
        ({"SGLANG_PLUGINS": "other, moegate"}, True),
        ({"MOEGATE": "1", "SGLANG_PLUGINS": "other"}, False),
    ],
    ids=str,
)
def test_the_two_variables(environment: dict[str, str], is_on: bool) -> None:
    show = "print('hooks', 'moegate.integrations.sglang.hooks' in sys.modules)\n" + SHOW
    printed = loaded(show, **environment)
    assert (OURS if is_on else THEIRS) in printed
    assert f"hooks {is_on}" in printed  # off, nothing that imports SGLang's model code is imported
    assert "CUDA False" in printed
    assert "WARNING moegate" not in printed


def test_off_changes_no_result() -> None:
    route = """
with get_context().override_server_args(), torch.inference_mode():
    gate = gate_of()
    top_k = top_k_of(gate.e_score_correction_bias, **GROUPED)
    logits = gate(hidden_of(2))
    output = top_k(hidden_of(2), logits)
    print("plain", logits.__dict__, sorted(output.topk_ids[0].tolist()), "moegate" in str(type(top_k)))
"""
    imports = "\n".join(LAYERS.splitlines()[:4])
    printed = loaded(imports + route)
    assert "plain {} [" in printed
    assert "] False" in printed


def test_one_line_says_what_is_routed() -> None:
    lines = loaded(LAYERS, MOEGATE="1").splitlines()
    wanted = "INFO moegate: moegate routes 2 of 3 MoE layers; 1 left: a routing function of the model's own"
    assert lines.count(wanted) == 1
    passes = [index for index, line in enumerate(lines) if line == "pass"]
    assert passes[1] < lines.index(wanted) < passes[2]
    assert not [line for line in lines if "not in place" in line]


def test_the_line_is_seen_with_sglangs_own_logging() -> None:
    logging = """
from types import SimpleNamespace
from sglang.srt.utils.common import configure_logger
configure_logger(SimpleNamespace(log_level="info"), prefix=" TP0")
"""
    assert "TP0] moegate routes 2 of 3 MoE layers" in loaded(logging + LAYERS, MOEGATE="1")


def test_registering_twice_hooks_once() -> None:
    twice = """
from moegate.integrations.sglang import register
register()
from sglang.srt.plugins.hook_registry import HookRegistry
HookRegistry.apply_hooks()
print("hooks", {target.rsplit(".", 1)[1]: len(hooks) for target, hooks in HookRegistry._hooks.items()})
"""
    printed = loaded(twice + SHOW, MOEGATE="1")
    assert "hooks {'TopK': 1, 'forward': 1, 'load_model': 1}" in printed
    assert OURS in printed
    assert "Multiple" not in printed


ASIDE = {
    "version": (
        "from moegate.integrations import engines\nobject.__setattr__(engines.SGLANG, 'newest', '0.5.22')\n"
        "object.__setattr__(engines.SGLANG, 'oldest', '0.5.20')",
        "SGLang 0.5.23 is outside of the range 0.5.20 to 0.5.22",
    ),
    "parameters": (
        "from sglang.srt.models.deepseek_v2 import MoEGate\nMoEGate.forward = lambda self, hidden_states, more: None",
        "<lambda> has other parameters",
    ),
    "field": (
        "from dataclasses import make_dataclass\nfrom sglang.srt.layers.moe import topk\n"
        "topk.TopKConfig = make_dataclass('TopKConfig', [('temperature', float, 1.0)], bases=(topk.TopKConfig,))",
        "TopKConfig has other fields: temperature",
    ),
    "gone": (
        "from sglang.srt.layers.moe import topk\ndel topk.fused_shared_expert_weight",
        "ImportError: cannot import name 'fused_shared_expert_weight'",
    ),
}


@pytest.mark.parametrize("name", ASIDE)
def test_stands_aside_with_one_warning(name: str) -> None:
    before, reason = ASIDE[name]
    printed = loaded(
        "from sglang.srt.layers.moe import topk\nprint('TopK', topk.TopK.__name__)", before=before, MOEGATE="1"
    )
    assert "TopK TopK" in printed
    (warning,) = [line for line in printed.splitlines() if line.startswith("WARNING moegate")]
    assert warning.startswith(f"WARNING moegate: moegate leaves all routers to SGLang: {reason}")
    assert "Executed general plugin: moegate" in printed


def test_a_wrong_variable_is_told() -> None:
    printed = loaded(SHOW, MOEGATE="1", MOEGATE_LOGITS="float64")
    assert "leaves all routers to SGLang: ValueError: MOEGATE_LOGITS = 'float64'" in printed
    assert THEIRS in printed


HOOKS = {
    "MoEGate": ("sglang.srt.models.deepseek_v2.MoEGate.forward", "top_k(hidden_of(1), torch.zeros(1, 64))"),
    "TopK": ("sglang.srt.layers.moe.topk.TopK", "gate_of()(hidden_of(1))"),
}


@pytest.mark.parametrize("how", ["first forward", "load"])
@pytest.mark.parametrize("name", HOOKS)
def test_a_hook_that_is_not_in_place_is_told(name: str, how: str) -> None:
    """SGLang only logs a hook that it fails to apply."""
    target, call = HOOKS[name]
    before = f"""
from sglang.srt.plugins.hook_registry import HookRegistry
apply = HookRegistry._apply_target.__func__
def fails_once(cls, target, hooks):
    if target == {target!r}:
        raise AttributeError(target)
    apply(cls, target, hooks)
HookRegistry._apply_target = classmethod(fails_once)
"""
    load = """
from types import SimpleNamespace
from moegate.integrations.sglang.hooks import after_load
after_load(None, SimpleNamespace(model=torch.nn.Module()))
"""
    forward = f"""
with get_context().override_server_args(), torch.inference_mode():
    top_k = top_k_of(None)
    {call}
    {call}
"""
    imports = "\n".join(LAYERS.splitlines()[:4])
    printed = loaded(imports + (load if how == "load" else forward), before=before, MOEGATE="1")
    warnings = [line for line in printed.splitlines() if line.startswith("WARNING moegate")]
    assert warnings == [f"WARNING moegate: moegate asked SGLang for hooks that are not in place: {target}"]


def test_a_loaded_model_tells_its_layers_without_a_top_k() -> None:
    load = """
from types import SimpleNamespace
import torch
from sglang.srt.layers.moe.hash_topk import HashTopK
from sglang.srt.model_executor.model_runner import ModelRunner
from moegate.integrations.sglang.report import REPORT
model = torch.nn.ModuleDict({"mlp": torch.nn.Module()})
hashed = HashTopK.__new__(HashTopK)
torch.nn.Module.__init__(hashed)
model["mlp"].topk = hashed
hooks = [cell.cell_contents for cell in ModelRunner.load_model.__closure__]
(hook,) = [hook for hook in hooks if hook.__module__.startswith("moegate")]
hook(None, SimpleNamespace(model=model))
REPORT.tell()
"""
    assert "INFO moegate: moegate routes 0 of 1 MoE layers; 1 left: hash routing" in loaded(load, MOEGATE="1")


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_processes(method: str) -> None:
    """SGLang's workers are spawned and load the plugins themselves; forked ones have them already."""
    code = f"""
import multiprocessing
import sglang_worker
context = multiprocessing.get_context({method!r})
worker = context.Process(target=sglang_worker.show)
worker.start()
worker.join()
print("exit", worker.exitcode)
"""
    printed = loaded(code, MOEGATE="1")
    assert f"in the worker: {OURS}" in printed
    assert "exit 0" in printed
