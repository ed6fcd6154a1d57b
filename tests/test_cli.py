"""The command line: `models`, `check`, a broken backend, and the start of the program."""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from command_line import run
from machines import forget
from torch import Tensor

import moegate
from moegate import RouterSpec, Routing, catalog, noticing
from moegate.choice import candidates, plan, policies
from moegate.choice.candidates import TORCH, Candidate
from moegate.cli import check
from moegate.gemm.torch_mm import TORCH_MM, BoundMm, TorchMm
from moegate.halves import BoundGemm, Call, Logits
from moegate.problem import Problem
from moegate.selection.torch_ops import TORCH_OPS, BoundOps, TorchOps

# ---------------------------------------------------------------------------------------------------------------------
# models
# ---------------------------------------------------------------------------------------------------------------------


def test_models_lists_every_name() -> None:
    result = run("models")
    assert result.exit_code == 0
    listed = "".join(line[:26].strip() for line in result.stdout.splitlines())  # long names are folded
    assert [name for name in catalog.names() if name not in listed] == []
    assert "…" not in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80


def test_models_json_holds_the_whole_catalog() -> None:
    rows = json.loads(run("models", "--json").stdout)
    assert sorted(name for row in rows for name in (row["name"], *row["also"])) == catalog.names()
    fields = [field.name for field in dataclasses.fields(RouterSpec)]
    for row, model in zip(rows, catalog.models(), strict=True):
        assert RouterSpec(**{name: row[name] for name in fields}) == model.spec
        assert row["semantics_note"] == model.semantics_note
        assert (row["source"], row["semantics_source"], row["note"]) == (
            model.source,
            model.semantics_source,
            model.note,
        )


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("LongCat", ["longcat-flash"]),
        ("deepseek-r1", ["deepseek-v3"]),  # another name of the row
        ("gpt-oss-*", ["gpt-oss-20b", "gpt-oss-120b"]),
        ("oss-*", None),  # a glob must match the whole name
        ("no-such-model", None),
    ],
)
def test_models_pattern(pattern: str, names: list[str] | None) -> None:
    result = run("models", pattern, "--json")
    if names is None:
        assert (result.exit_code, result.stdout) == (1, "")
        assert pattern in result.stderr
    else:
        assert [row["name"] for row in json.loads(result.stdout)] == names


@pytest.mark.parametrize(
    ("name", "phrase"),
    [
        ("deepseek-v3", "sigmoid + bias, 4 of 8 groups, renorm x2.5"),
        ("deepseek-v4-flash-hash", "ids by token, √softplus, renorm x1.5"),
        ("gpt-oss-20b", "linear bias, softmax of the chosen"),
        ("kolibri-1", "logit + bias, sigmoid of the chosen"),
        ("gemma-4-26b-a4b", "input norm, softmax, renorm x expert's scale"),
        ("longcat-flash", "+256z"),
        ("inkling", "+2s"),
    ],
)
def test_models_says_what_a_router_does(name: str, phrase: str) -> None:
    assert phrase in run("models", name, columns=120).stdout


# ---------------------------------------------------------------------------------------------------------------------
# A broken backend, and check
# ---------------------------------------------------------------------------------------------------------------------


UseWays = Callable[..., None]


class Reversed(TorchOps):
    """A selection that returns the right experts, worst first."""

    def bind(self, problem: Problem, device: torch.device, gemm: BoundGemm | None) -> BoundOps:
        class Bound(BoundOps):
            def __call__(self, call: Call, logits: Logits) -> Routing:
                routing = super().__call__(call, logits)
                return routing._replace(topk_ids=routing.topk_ids.flip(-1), topk_weights=routing.topk_weights.flip(-1))

        return Bound(problem.spec)


class Rough(TorchMm):
    """A GEMM whose logits are slightly too large."""

    def bind(self, problem: Problem, device: torch.device) -> BoundMm:
        class Bound(BoundMm):
            def __call__(self, call: Call) -> Tensor:
                return super().__call__(call) * (1 + 2**-6)

        return Bound(problem)


class Raising(TorchMm):
    """A GEMM that raises."""

    def bind(self, problem: Problem, device: torch.device) -> BoundMm:
        raise RuntimeError("no kernel image\nis available")


class Picky(TorchMm):
    """A GEMM that supports nothing."""

    def unsupported(self, problem: Problem, num_tokens: int) -> str | None:
        return "needs an abacus"


@pytest.fixture
def use_candidates(monkeypatch: pytest.MonkeyPatch) -> Iterator[UseWays]:
    def use(*chosen: Candidate) -> None:
        backends = tuple(candidate.backend for candidate in chosen)
        for module in (candidates, policies):
            monkeypatch.setattr(module, "CANDIDATES", chosen)
        monkeypatch.setattr(candidates, "BACKENDS", backends)
        for module in (plan, noticing):
            monkeypatch.setattr(module, "BACKEND_NAMES", backends)
        monkeypatch.setattr(check, "MODELS", ("qwen3-30b-a3b", "openai-privacy-filter"))
        monkeypatch.setattr(check, "TOKENS", (1, 5))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
        forget()

    yield use
    forget()


def test_check_passes(use_candidates: UseWays) -> None:
    use_candidates(TORCH)
    assert "4 of 4 checks passed" in run("check").stdout
    result = run("check", "--json")
    facts = json.loads(result.stdout)
    assert result.exit_code == 0
    assert facts["machine"]["torch"] == torch.__version__
    assert facts["backends"] == [{"backend": "torch", "device": "cpu", "reason": None, "runs": True}]
    assert [(row["model"], row["tokens"], row["ok"], row["rows"]) for row in facts["checks"]] == [
        ("qwen3-30b-a3b", 1, True, 1),
        ("qwen3-30b-a3b", 5, True, 5),
        ("openai-privacy-filter", 1, True, 1),
        ("openai-privacy-filter", 5, True, 5),
    ]
    assert all(0 < row["share_of_bound"] <= 1 for row in facts["checks"])


@pytest.mark.parametrize(
    ("broken", "problem"),
    [
        (Candidate("reversed", TORCH_MM, Reversed()), "ids"),
        (Candidate("rough", Rough(), TORCH_OPS), "logits outside the bound"),
        (Candidate("raising", Raising(), TORCH_OPS), "RuntimeError: no kernel image is available"),
    ],
)
def test_check_finds_a_broken_backend(use_candidates: UseWays, broken: Candidate, problem: str) -> None:
    use_candidates(broken, TORCH)
    result = run("check", "--json")
    assert result.exit_code == 1
    for row in json.loads(result.stdout)["checks"]:
        assert row["ok"] == (row["backend"] == "torch")
        assert any(problem in found for found in row["problems"]) == (row["backend"] != "torch")
    result = run("check")
    assert result.exit_code == 1
    assert problem in result.stdout
    assert "4 of 8 checks" in result.stdout
    assert "4 of 8 checks" in result.stderr


def test_check_says_why_a_backend_does_not_run(use_candidates: UseWays) -> None:
    picky = Candidate("picky", Picky(), TORCH_OPS)
    use_candidates(picky, TORCH)
    result = run("check")
    assert result.exit_code == 0
    assert "picky on cpu: does not run: needs an abacus" in result.stdout
    use_candidates(picky)
    assert run("check").exit_code == 1


def test_route_reports_a_broken_contract(use_candidates: UseWays) -> None:
    use_candidates(Candidate("torch", TORCH_MM, Reversed()))
    result = run("route", "qwen3-30b-a3b", "--device", "cpu")
    assert result.exit_code == 1
    assert "BROKEN" in result.stdout
    assert result.stderr.startswith("moegate: the contract is broken: ")
    result = run("route", "qwen3-30b-a3b", "--device", "cpu", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["contract"]["ok"] is False


# ---------------------------------------------------------------------------------------------------------------------
# As a process
# ---------------------------------------------------------------------------------------------------------------------


def test_starts_without_torch() -> None:
    code = "import sys, moegate.cli as cli; cli.app(['models', 'longcat'], standalone_mode=False); "
    code += "sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_every_public_name_is_there() -> None:
    code = "import moegate; [getattr(moegate, name) for name in moegate.__all__]; assert 'Gate' in dir(moegate)"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = vars(moegate)["__getattr__"]("nothing")


def test_module_runs_and_a_closed_pipe_is_quiet() -> None:
    # `models --json` prints more than a pipe's buffer holds, so that the process does write into the closed pipe.
    command = [sys.executable, "-m", "moegate", "models", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == b"[\n"
        process.stdout.close()
        assert process.stderr.read() == b""


def test_version() -> None:
    done = subprocess.run([sys.executable, "-m", "moegate", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"moegate {moegate.__version__}\n"
