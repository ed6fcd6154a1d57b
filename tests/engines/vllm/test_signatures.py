"""What moegate relies on, in the Python files of vLLM's official wheels.

`python tools/vllm_sources.py FOLDER 0.26.0 0.33.0` fetches them; the variable MOEGATE_VLLM_SOURCES names FOLDER.
"""

from __future__ import annotations

import ast
import os
import re
from pathlib import Path

import pytest

from moegate.integrations.engines import VLLM
from moegate.integrations.vllm import adapter, signatures

VERSIONS = (f"{VLLM.oldest}.0", f"{VLLM.newest}.0")
RUNNER = f"{signatures.LAYERS}.runner.moe_runner"


@pytest.fixture(params=VERSIONS)
def sources(request: pytest.FixtureRequest) -> Path:
    folder = Path(os.environ.get("MOEGATE_VLLM_SOURCES", "MOEGATE_VLLM_SOURCES is not set"), request.param)
    assert folder.is_dir(), f"no {folder}; make it: {__doc__}"
    return folder


def body_of(sources: Path, module: str, name: str) -> ast.AST | None:
    """The class or function of this dotted name; None: there is none."""
    file = sources.joinpath(*module.split(".")).with_suffix(".py")
    node: ast.AST | None = ast.parse(file.read_text(encoding="utf-8")) if file.exists() else None
    for part in name.split("."):
        inside = getattr(node, "body", [])
        node = next((each for each in inside if getattr(each, "name", None) == part), None)
    return node


def parameters_of(sources: Path, module: str, name: str) -> tuple[str, ...] | None:
    node = body_of(sources, module, name)
    if not isinstance(node, ast.FunctionDef):
        return None
    return tuple(argument.arg for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs))


def test_all_that_is_relied_on_is_there(sources: Path) -> None:
    assert signatures.why_not(lambda module, name: parameters_of(sources, module, name)) is None


def test_the_parameters_of_routers_are_known(sources: Path) -> None:
    for path, known in adapter._KNOWN.items():
        module, _, name = path.rpartition(".")
        found = parameters_of(sources, module, f"{name}.__init__")
        if found is None:
            assert (name, sources.name) == ("CPURouter", "0.26.0"), f"{sources.name} has no {path}"
            continue
        assert not set(found) - {"self"} - known.parameters - adapter._COMMON


def test_the_names_of_routers_that_are_left(sources: Path) -> None:
    """A router that is renamed would be left for another reason, and a new one is to be looked at."""
    folder = sources.joinpath(*f"{signatures.LAYERS}.router".split("."))
    text = "\n".join(file.read_text(encoding="utf-8") for file in folder.glob("*.py"))
    found = set(re.findall(r"^class (\w+)\((?:BaseRouter|FusedMoERouter)\)", text, flags=re.MULTILINE)) - {"BaseRouter"}
    known = {path.rpartition(".")[2] for path in adapter._KNOWN} | set(adapter._LEFT)
    assert known - found <= {"CPURouter"}
    assert found <= known


@pytest.mark.parametrize(
    "text",
    [
        "router_logits, _ = self.gate(hidden_states)",
        "hidden_states, router_logits = self._maybe_dispatch(",
        "topk_weights, topk_ids = self.router.select_experts(",
        "topk_indices_dtype=self._quant_method.topk_indices_dtype",
        "if self.routed_experts.quant_method.is_monolithic:",
        "self._fse_fuse_gate = gate is not None and shared_expert_gate is not None",
        "layer = forward_context.no_compile_layers[layer_name]",
    ],
)
def test_the_way_of_the_logits(sources: Path, text: str) -> None:
    """From the gate to the selection, as the runner goes it."""
    file = sources.joinpath(*RUNNER.split(".")).with_suffix(".py")
    assert text in file.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("vllm.envs", "def compile_factors()"),
        ("vllm.envs", "for factor, getter in environment_variables.items():"),
        ("vllm.forward_context", "is_padding: torch.Tensor | None = None"),
        ("vllm.model_executor.layers.fused_moe.config", "num_logical_experts: int"),
        ("vllm.model_executor.custom_op", "op_registry_oot[layer_class_name]"),
        ("vllm.config", '"CompilationMode"'),
        ("vllm.model_executor.layers.linear", "self.return_bias = return_bias"),
        ("vllm.model_executor.layers.linear", "self.skip_bias_add = skip_bias_add"),
    ],
)
def test_names_elsewhere(sources: Path, module: str, text: str) -> None:
    file = sources.joinpath(*module.split("."))
    file = file / "__init__.py" if file.is_dir() else file.with_suffix(".py")
    assert text in file.read_text(encoding="utf-8")


def test_the_mask_of_padding_has_one_source() -> None:
    """The oldest version has none in its routers: there, rows of padding are routed like others."""
    folder = Path(os.environ.get("MOEGATE_VLLM_SOURCES", "MOEGATE_VLLM_SOURCES is not set"))
    module = f"{signatures.LAYERS}.router.fused_topk_router"
    found = [parameters_of(folder / version, module, "_get_padding_mask") for version in VERSIONS]
    assert found == [None, ("num_tokens",)]


def test_a_signature_that_differs_is_told(tmp_path: Path) -> None:
    """In a vLLM without anything, the first thing is named."""
    reason = signatures.why_not(lambda module, name: parameters_of(tmp_path, module, name))
    assert reason == "vllm.model_executor.custom_op has no PluggableLayer.register_oot"
