"""The switch, and when moegate stands aside; each in a process of its own, since a registration lasts."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest

REGISTER = "from moegate.integrations.vllm import register\n"
SHOW = "from vllm.model_executor.custom_op import op_registry_oot\nprint('classes', sorted(op_registry_oot))\n"
BOTH = "classes ['GateLinear', 'MoERunner']"
NONE = "classes []"


def run(code: str, **environment: str) -> str:
    """What a program prints and logs."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MOEGATE")}
    # VLLM_LOGGING_LEVEL is left at its default, which is what a user sees.
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=clean | environment, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize(
    ("environment", "shown"),
    [
        ({"MOEGATE": "1"}, BOTH),
        ({"VLLM_PLUGINS": "moegate"}, BOTH),
        ({"VLLM_PLUGINS": "other, moegate"}, BOTH),
        ({}, NONE),
        ({"MOEGATE": "0"}, NONE),
        ({"VLLM_PLUGINS": "other"}, NONE),
    ],
)
def test_the_switch(environment: dict[str, str], shown: str) -> None:
    output = run(REGISTER + "register()\nregister()\n" + SHOW, **environment)
    assert shown in output
    assert "stands aside" not in output


@pytest.mark.parametrize(("plugins", "shown"), [(None, BOTH), ("moegate", BOTH), ("", NONE), ("other", NONE)])
def test_through_the_loader_of_vllm(plugins: str | None, shown: str) -> None:
    """With MOEGATE=1, vLLM's own list of plugins still decides which ones it calls."""
    code = "from vllm.plugins import load_general_plugins\nload_general_plugins()\nload_general_plugins()\n"
    environment = {} if plugins is None else {"VLLM_PLUGINS": plugins}
    assert shown in run(code + SHOW, MOEGATE="1", **environment)


def test_off_costs_nothing() -> None:
    code = (
        "import sys, time, vllm.plugins\nbefore = set(sys.modules)\nstart = time.perf_counter()\n"
        + REGISTER
        + "register()\nprint('seconds', time.perf_counter() - start)\n"
        "new = set(sys.modules) - before\nprint('vllm' if any(name.startswith('vllm') for name in new) else 'no vllm')\n"
    )
    output = run(code)
    assert "no vllm" in output
    assert float(output.split("seconds ")[1].split()[0]) < 0.2


def test_no_cuda_starts() -> None:
    output = run(REGISTER + "register()\nimport torch\nprint('started', torch.cuda.is_initialized())\n", MOEGATE="1")
    assert "started False" in output


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_another_process(method: str) -> None:
    """As vLLM's workers: a fork has the classes already, a spawned process registers them itself."""
    code = (
        REGISTER
        + "def work():\n    register()\n    from vllm.model_executor.custom_op import op_registry_oot\n"
        + "    print('classes', sorted(op_registry_oot))\n"
        + "if __name__ == '__main__':\n    import multiprocessing\n    register()\n"
        + f"    process = multiprocessing.get_context('{method}').Process(target=work)\n"
        + "    process.start(); process.join(); assert process.exitcode == 0\n"
    )
    assert BOTH in run_file(code)


def run_file(code: str) -> str:
    """A spawned process imports the main program again, so that it must be a file."""
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "program.py"
        program.write_text(code, encoding="utf-8")
        return run(f"import runpy\nrunpy.run_path({str(program)!r}, run_name='__main__')\n", MOEGATE="1")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            "import moegate.integrations.engines as e\ne.Engine.installed = lambda self: '0.25.9'\n",
            "vLLM 0.25.9 is outside of the tested range, 0.26 to 0.33",
        ),
        (
            "import moegate.integrations.engines as e\ne.Engine.installed = lambda self: '0.34.0'\n",
            "vLLM 0.34.0 is outside of the tested range, 0.26 to 0.33",
        ),
        (
            "from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter\n"
            "BaseRouter._compute_routing = lambda self, hidden_states, router_logits, indices_type, input_ids, more: 1\n",
            "BaseRouter._compute_routing of vllm.model_executor.layers.fused_moe.router.base_router"
            " has another parameter, more",
        ),
        (
            "from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner\n"
            "del MoERunner.do_naive_dispatch_combine\n",
            "vllm.model_executor.layers.fused_moe.runner.moe_runner has no MoERunner.do_naive_dispatch_combine",
        ),
        (
            "from vllm.model_executor.custom_op import PluggableLayer\n"
            "from vllm.model_executor.layers.fused_moe.router.gate_linear import GateLinear\n"
            "PluggableLayer.register_oot(name='GateLinear')(type('Mine', (GateLinear,), {}))\n",
            "another plugin has replaced GateLinear",
        ),
        ("import os\nos.environ['MOEGATE_LOGITS'] = 'float16'\n", "MOEGATE_LOGITS = 'float16'"),
        (
            "import moegate.integrations.vllm.signatures as s\ns.why_not = lambda found: 1 / 0\n",
            "its registration failed",
        ),
    ],
)
def test_standing_aside(change: str, reason: str) -> None:
    """One warning, no exception, and vLLM's class of the runner stays."""
    output = run(change + REGISTER + "register()\n" + SHOW, MOEGATE="1")
    warnings = [line for line in output.splitlines() if "moegate stands aside" in line]
    assert len(warnings) == 1
    assert warnings[0].startswith("WARNING")
    assert reason in warnings[0]
    assert "MoERunner" not in output.split("classes ")[1].splitlines()[0]


@pytest.mark.parametrize("environment", [{"MOEGATE": "1"}, {}])
def test_the_compile_cache_knows_the_switch(environment: Any) -> None:
    """vLLM looks a compiled graph up by these factors before it traces anything."""
    code = REGISTER + "from vllm import envs\nbefore = envs.compile_factors()\nregister()\n"
    code += "print('changed', envs.compile_factors() != before)\n"
    assert f"changed {bool(environment)}" in run(code, **environment)
