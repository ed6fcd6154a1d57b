"""`moegate tune` with a stand-in for the measurement: stopped, killed, resumed, and finished."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from command_line import refused
from machines import forget

from moegate import __version__, get_spec
from moegate.choice import costs
from moegate.choice.candidates import ROUTER_GEMM
from moegate.choice.tables import read, user_file
from moegate.cli.tune import run
from moegate.machine import Machine
from moegate.measure.tune import MODELS, TOKENS, Tuning
from moegate.problem import default_weight_dtype, problem_of
from moegate.spec import RouterSpec

GPU = Machine("GPU X", (9, 0), 100, 3000.0)
MADE = {name: "x" for name in ("date", "command", "moegate_commit", "torch", "cuda", "flashinfer", "driver")}
MADE["moegate"] = __version__


CASES = [(model, tokens) for model in MODELS for tokens in TOKENS]
SPECS = [(get_spec(model), tokens) for model, tokens in CASES]


def measured(spec: RouterSpec, tokens: int) -> dict[str, dict[str, Any]]:
    return {
        "predecessor alone": {"us": 2.2},
        "cuda:router_gemm+select": {"us": 3.0 + tokens / 8, "ok": True},
        "cuda:router_gemm+select, not frozen": {"us": 4.0 + tokens / 8, "ok": True},
        "torch:mm+ops": {"ok": False, "problems": ["ids"]},
        "flashinfer:cublas+fused_topk_deepseek": {"absent": "FlashInfer is not installed"},
    }


class Stopping:
    """A measurement that is interrupted after a number of cases."""

    def __init__(self, after: int) -> None:
        self.after = after
        self.seen: list[tuple[RouterSpec, int]] = []

    def __call__(self, spec: RouterSpec, tokens: int) -> dict[str, dict[str, Any]]:
        if len(self.seen) == self.after:
            raise KeyboardInterrupt
        self.seen.append((spec, tokens))
        return measured(spec, tokens)


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    forget()
    yield tmp_path
    forget()


def test_the_models_are_in_the_catalog_and_differ() -> None:
    assert len({get_spec(model) for model in MODELS}) == len(MODELS)


def test_stopped_resumed_and_finished(capsys: pytest.CaptureFixture[str]) -> None:
    path = user_file("GPU X")
    first = Stopping(after=5)
    with pytest.raises(typer.Exit) as stopped:
        run(Tuning(path, GPU, MADE), first)
    assert stopped.value.exit_code == 130
    said = capsys.readouterr().err
    assert f"stopped with 5 of {len(CASES)} rows measured; the same command goes on" in said
    assert not path.exists(), "gates would read an unfinished table"

    second = Stopping(after=10**6)
    run(Tuning(path, GPU, MADE), second)
    assert "going on after 5 of" in capsys.readouterr().err
    assert first.seen + second.seen == SPECS
    assert [file.name for file in path.parent.iterdir()] == ["gpu-x.json"]
    table = read(path)
    assert [(row.model, row.tokens) for row in table.rows] == CASES
    assert table.rows[0].us == {"cuda:router_gemm+select": 3.125}
    assert table.rows[0].us_not_frozen == {"cuda:router_gemm+select": 4.125}
    assert table.rows[0].left_out == {
        "torch:mm+ops": "its result was wrong",
        "flashinfer:cublas+fused_topk_deepseek": "FlashInfer is not installed",
    }
    here = dataclasses.replace(GPU, device=torch.device("cpu"))
    problem = problem_of(here, get_spec(MODELS[1]), torch.bfloat16)
    cost = costs.expected(problem, ROUTER_GEMM, 16)
    assert cost == (5.0, "measured on this GPU X")


def test_a_whole_table_is_measured_anew(capsys: pytest.CaptureFixture[str]) -> None:
    path = user_file("GPU X")
    for _ in range(2):
        everything = Stopping(after=10**6)
        run(Tuning(path, GPU, MADE), everything)
        assert everything.seen == SPECS


def test_models_that_are_named_are_measured_too_and_stay_when_the_rest_goes_on_without_them() -> None:
    path = user_file("GPU X")
    flint = get_spec("flint")
    own = Stopping(after=len(TOKENS) + 3)
    with pytest.raises(typer.Exit):
        run(Tuning(path, GPU, MADE, {"my/flint": flint, "my/twin": get_spec(MODELS[0])}), own)
    assert own.seen == [*((flint, tokens) for tokens in TOKENS), *SPECS[:3]]  # not the twin, a spec of MODELS
    run(Tuning(path, GPU, MADE), Stopping(after=10**6))
    problem = problem_of(dataclasses.replace(GPU, device=torch.device("cpu")), flint, default_weight_dtype(flint))
    assert costs.expected(problem, ROUTER_GEMM, 16) == (5.0, "measured on this GPU X")


@pytest.mark.parametrize(("name", "value"), [("torch", "3.0"), ("moegate_commit", "y")])
def test_an_unfinished_table_of_other_versions_is_named(name: str, value: str) -> None:
    path = user_file("GPU X")
    with pytest.raises(typer.Exit):
        run(Tuning(path, GPU, MADE), Stopping(after=2))
    with pytest.raises(ValueError, match=rf"{path}\.partial was begun with another {name}; remove it"):
        Tuning(path, GPU, {**MADE, name: value})


KILLED = """
import sys, time
from pathlib import Path
import test_tune
from moegate.measure.tune import Tuning
def measure(spec, tokens):
    print(tokens, flush=True)
    time.sleep(0.01)
    return test_tune.measured(spec, tokens)
for row in Tuning(Path(sys.argv[1]), test_tune.GPU, test_tune.MADE).run(measure):
    pass
"""


def test_killed_at_any_time_it_leaves_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    code = f"import sys; sys.path[:0] = {[str(Path(__file__).parent), *sys.path]!r}\n" + KILLED
    with subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for _ in range(7):
            process.stdout.readline()
        process.kill()
    tuning = Tuning(path, GPU, MADE)
    assert len(CASES) - len(tuning.missing()) >= 6
    rest = Stopping(after=10**6)
    run(tuning, rest)
    assert len(rest.seen) < len(CASES)
    assert [(row.model, row.tokens) for row in read(path).rows] == CASES


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_a_line_says_what_is_missing() -> None:
    assert "moegate tune needs an NVIDIA GPU" in refused("tune")
