"""The switch, and when moegate stands aside."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import vllm.plugins
from vllm import envs
from vllm.model_executor import custom_op
from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

from moegate.integrations.engines import Engine
from moegate.integrations.vllm import register, registration, signatures

BOTH = {"GateLinear": "MoegateGateLinear", "MoERunner": "MoegateRunner"}
NONE: dict[str, str] = {}


class Notes(logging.Handler):
    def __init__(self, records: list[logging.LogRecord]) -> None:
        super().__init__()
        self.records = records

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


class Registry:
    """vLLM's registry of replaced classes, for one test, and what moegate logs meanwhile."""

    def __init__(self) -> None:
        self.classes: dict[str, type] = {}
        self.records: list[logging.LogRecord] = []

    @property
    def names(self) -> dict[str, str]:
        return {name: kind.__name__ for name, kind in self.classes.items()}


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[Registry]:
    found = Registry()
    monkeypatch.setattr(custom_op, "op_registry_oot", found.classes)
    monkeypatch.setattr(envs, "environment_variables", dict(envs.environment_variables))
    monkeypatch.setattr(vllm.plugins, "plugins_loaded", False)
    handler = Notes(found.records)
    registration.logger.addHandler(handler)
    yield found
    registration.logger.removeHandler(handler)


@pytest.mark.parametrize(
    ("environment", "names"),
    [
        ({"MOEGATE": "1"}, BOTH),
        ({"VLLM_PLUGINS": "moegate"}, BOTH),
        ({"VLLM_PLUGINS": "other, moegate"}, BOTH),
        ({}, NONE),
        ({"MOEGATE": "0"}, NONE),
        ({"VLLM_PLUGINS": "other"}, NONE),
    ],
)
def test_the_switch(
    environment: dict[str, str], names: dict[str, str], registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two calls, as vLLM may make them; its registry refuses a second class of one name."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    before = set(envs.environment_variables)
    register()
    register()
    assert registry.names == names
    assert not registry.records
    assert set(envs.environment_variables) - before == ({"MOEGATE", "MOEGATE_LOGITS"} if names else set())


@pytest.mark.parametrize(("plugins", "names"), [(None, BOTH), ("moegate", BOTH), ("", NONE), ("other", NONE)])
def test_through_the_loader_of_vllm(
    plugins: str | None, names: dict[str, str], registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With MOEGATE=1, vLLM's own list of plugins still decides which ones it calls."""
    monkeypatch.setenv("MOEGATE", "1")
    if plugins is not None:
        monkeypatch.setenv("VLLM_PLUGINS", plugins)
    vllm.plugins.load_general_plugins()
    assert registry.names == names


def other_version(patch: pytest.MonkeyPatch, version: str) -> str:
    patch.setattr(Engine, "installed", lambda self: version)
    return f"vLLM {version} is outside of the range 0.26 to 0.33"


def other_parameter(patch: pytest.MonkeyPatch) -> str:
    patch.setattr(
        BaseRouter,
        "_compute_routing",
        lambda self, hidden_states, router_logits, indices_type, input_ids, more: None,
    )
    return f"BaseRouter._compute_routing of {BaseRouter.__module__} has another parameter, more"


def missing_parameter(patch: pytest.MonkeyPatch) -> str:
    patch.setattr(MoERunner, "__init__", lambda self, layer_name, moe_config, routed_experts: None)
    return f"MoERunner.__init__ of {MoERunner.__module__} has no parameter router"


def missing_method(patch: pytest.MonkeyPatch) -> str:
    patch.delattr(MoERunner, "do_naive_dispatch_combine")
    return f"{MoERunner.__module__} has no MoERunner.do_naive_dispatch_combine"


def other_plugin(patch: pytest.MonkeyPatch) -> str:
    patch.setitem(custom_op.op_registry_oot, "GateLinear", int)
    return "another plugin has replaced GateLinear"


def unknown_logits(patch: pytest.MonkeyPatch) -> str:
    patch.setenv("MOEGATE_LOGITS", "float16")
    return "MOEGATE_LOGITS = 'float16'; allowed: 'engine' and 'float32'"


def fault(patch: pytest.MonkeyPatch) -> str:
    patch.setattr(signatures, "why_not", lambda found: 1 / 0)
    return "its registration failed"


@pytest.mark.parametrize(
    "change",
    [
        lambda patch: other_version(patch, "0.25.9"),
        lambda patch: other_version(patch, "0.34.0"),
        other_parameter,
        missing_parameter,
        missing_method,
        other_plugin,
        unknown_logits,
        fault,
    ],
)
def test_standing_aside(change: Any, registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    """One warning, no exception, and no class of moegate."""
    monkeypatch.setenv("MOEGATE", "1")
    reason = change(monkeypatch)
    register()
    assert [(record.levelname, record.getMessage()) for record in registry.records] == [
        ("WARNING", f"moegate stands aside: {reason}")
    ]
    assert not [name for name in registry.names.values() if "Moegate" in name]


@pytest.mark.parametrize("is_on", [True, False])
def test_the_compile_cache_knows_the_switch(is_on: bool, registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM looks a compiled graph up by these factors before it traces anything."""
    if is_on:
        monkeypatch.setenv("MOEGATE", "1")
    before = envs.compile_factors()
    register()
    assert (envs.compile_factors() != before) == is_on


def run(program: Path, code: str, **environment: str) -> str:
    """What a program prints."""
    program.write_text(code, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, program], capture_output=True, text=True, env=os.environ | environment, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_off_costs_nothing(tmp_path: Path) -> None:
    output = run(
        tmp_path / "program.py",
        """
import sys, time, vllm.plugins
before, start = set(sys.modules), time.perf_counter()
from moegate.integrations.vllm import register
register()
print(time.perf_counter() - start, sum(name.split(".")[0] in ("vllm", "torch") for name in set(sys.modules) - before))
""",
    )
    seconds, modules = output.split()
    assert float(seconds) < 0.2
    assert modules == "0"


def test_other_processes(tmp_path: Path) -> None:
    """As vLLM's workers: a fork has the classes already, a spawned process registers them itself. CUDA stays unused."""
    output = run(
        tmp_path / "program.py",
        """
import multiprocessing
from moegate.integrations.vllm import register

def work():
    register()
    import torch
    from vllm.model_executor.custom_op import op_registry_oot
    print(*sorted(op_registry_oot), torch.cuda.is_initialized(), flush=True)

if __name__ == "__main__":
    register()
    for method in ("fork", "spawn"):
        process = multiprocessing.get_context(method).Process(target=work)
        process.start()
        process.join()
        assert process.exitcode == 0
""",
        MOEGATE="1",
    )
    assert output.splitlines() == ["GateLinear MoERunner False"] * 2
