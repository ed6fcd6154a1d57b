"""Every code block of documents and docstrings: Python runs, command lines are parsed, and run where that is quick.

A block is marked by the words behind its fence.

| words | meaning |
|---|---|
| `python` | runs here, after the blocks before it on the page |
| `sh` | each line is a command of moegate, make or Python, and is parsed; commands of moegate run here |
| `text` | output, a tree of files, a diagram: nothing runs |
| `python gpu`, `sh gpu` | needs a GPU; is parsed here, and counted as skipped |

Blocks run in a folder that has `path/to/checkpoint`, `path/to/DeepSeek-V3` (layers 3 to 8 of DeepSeek-V3's router),
`path/to/config.json`, `hidden.safetensors` and `path/to/Qwen3-30B-A3B`, a tiny model. Python finds two names: `path`,
the folder of the second checkpoint, and `hidden`, hidden states for it.
"""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import typer
from command_line import run
from documents import PAGES, ROOT, Block, all_blocks, blocks_of, shown, spans_of
from safetensors.torch import save_file

import moegate
from moegate.cli import app

BLOCKS = all_blocks()
LANGUAGES = ("python", "sh", "text")
COMMANDS: dict[str, Any] = getattr(typer.main.get_command(app), "commands")  # noqa: B009 # a Typer group's
MENTIONED = [
    pytest.param(span.target, id=f"{shown(page)}:{span.line} {span.target}")
    for page in PAGES
    for span in spans_of(page.read_text(encoding="utf-8"))
    if span.target.startswith("moegate ")
]


def of_language(language: str) -> list[Any]:
    return [pytest.param(block, id=str(block)) for block in BLOCKS if block.language == language]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the blocks run."""
    folder = tmp_path_factory.mktemp("blocks")
    spec = moegate.get_spec("deepseek-v3")
    weight = torch.randn(spec.num_experts, spec.hidden_size, generator=torch.Generator().manual_seed(0)).bfloat16()
    tensors: dict[str, torch.Tensor] = {}
    for layer in range(3, 9):
        gate = f"model.layers.{layer}.mlp.gate."
        tensors |= {gate + "weight": weight * 0.01, gate + "e_score_correction_bias": torch.zeros(spec.num_experts)}
    tensors["model.layers.3.my_router.weight"] = weight * 0.02
    config = {**moegate.catalog.get_model("deepseek-v3").config, "num_hidden_layers": 9, "torch_dtype": "bfloat16"}
    for name in ("checkpoint", "DeepSeek-V3"):
        checkpoint = folder / "path" / "to" / name
        checkpoint.mkdir(parents=True)
        (checkpoint / "config.json").write_text(json.dumps(config), encoding="utf-8")
        save_file(tensors, checkpoint / "model.safetensors")
    (folder / "path" / "to" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file({"hidden": torch.zeros(4, spec.hidden_size, dtype=torch.bfloat16)}, folder / "hidden.safetensors")
    tiny_models.tiny_model("qwen3_moe").save_pretrained(folder / "path" / "to" / "Qwen3-30B-A3B")
    return folder


def names(folder: Path) -> dict[str, Any]:
    """The names that a Python block can use."""
    hidden = torch.randn(4, moegate.get_spec("deepseek-v3").hidden_size, generator=torch.Generator().manual_seed(1))
    return {"path": folder / "path" / "to" / "DeepSeek-V3", "hidden": hidden.bfloat16()}


def execute(block: Block, namespace: dict[str, Any]) -> None:
    """Runs a block; tracebacks have the line numbers of the block's file."""
    exec(compile("\n" * (block.line - 1) + block.code, str(block.file), "exec"), namespace)


def commands_of(block: Block) -> list[list[str]]:
    """The words of each command line of a block."""
    lines = (shlex.split(line, comments=True) for line in block.code.splitlines())
    return [words for words in lines if words]


def check_command(words: list[str]) -> None:
    """Parses a command line without running it."""
    program, arguments = words[0], words[1:]
    if program == "moegate":
        check_moegate(arguments)
    elif program == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        asked = [word for word in arguments if "=" not in word]
        assert [word for word in asked if word not in targets] == [], f"no such target of the Makefile: {asked}"
    elif program in ("python", "python3", "pytest"):
        files = [word for word in arguments if word.endswith(".py")]
        assert [file for file in files if not (ROOT / file).is_file()] == []
    else:
        raise AssertionError(f"{shlex.join(words)}: allowed: moegate, make, python, pytest")


def check_moegate(arguments: list[str]) -> None:
    """Parses the words of a command of moegate; wrong words raise a `UsageError`."""
    name, *rest = arguments
    assert name in COMMANDS, f"no such command: {name}"
    COMMANDS[name].make_context(name, rest).close()


@pytest.mark.parametrize("block", [pytest.param(block, id=str(block)) for block in BLOCKS])
def test_every_block_says_what_it_is(block: Block) -> None:
    assert block.language in LANGUAGES
    assert not block.needs_gpu or block.language in ("python", "sh")


@pytest.mark.parametrize("block", of_language("python"))
def test_python_blocks_run(block: Block, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    compile(block.code, str(block), "exec")
    if block.needs_gpu and not torch.cuda.is_available():
        pytest.skip(f"{block} needs a GPU")
    namespace = names(folder)
    for other in BLOCKS:
        is_before = other.file == block.file and other.line <= block.line and other.language == "python"
        if is_before and (torch.cuda.is_available() or not other.needs_gpu):
            execute(other, namespace)


@pytest.mark.parametrize("block", of_language("sh"))
def test_command_lines_are_read(block: Block) -> None:
    assert commands_of(block)
    for words in commands_of(block):
        check_command(words)


@pytest.mark.parametrize("block", of_language("sh"))
def test_command_lines_of_moegate_run(block: Block, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if block.needs_gpu:
        pytest.skip(f"{block} needs a GPU and minutes: it is run by hand")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    for program, *arguments in commands_of(block):
        if program == "moegate":
            result = run(*arguments)
            assert result.exit_code == 0, result.output


@pytest.mark.parametrize("text", MENTIONED)
def test_commands_amid_the_text_exist(text: str) -> None:
    """The command and its options exist; a mention need not be a complete command line."""
    name, *rest = shlex.split(text)[1:]
    if name == "COMMAND":
        return
    options = {option for param in COMMANDS[name].params for option in param.opts} | {"--help"}
    assert {word for word in rest if word.startswith("-")} <= options


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("moegate route deepseek-v3 --token 4", "No such option"),
        ("moegate rout deepseek-v3", "no such command"),
        ("moegate route", "Missing parameter"),
        ("moegate tune --out", "requires an argument"),
        ("make no-such-target", "no such target"),
        ("python benchmarks/no_such_file.py", "no_such_file"),
        ("rm -rf /", "allowed: moegate"),
    ],
)
def test_a_wrong_command_line_is_found(code: str, error: str) -> None:
    (block,) = blocks_of(f"```sh\n{code}  # a comment\n```\n", ROOT / "page.md")
    with pytest.raises(Exception, match=error):
        check_command(*commands_of(block))


def test_a_python_block_that_fails_is_found_with_its_line(folder: Path) -> None:
    text = "Text.\n\n```python\nimport moegate\n\nmoegate.get_spec('no such model')\n```\n"
    (block,) = blocks_of(text, ROOT / "page.md")
    with pytest.raises(ValueError, match="no such model") as caught:
        execute(block, names(folder))
    lines = [(frame.frame.code.raw.co_filename, frame.lineno + 1) for frame in caught.traceback]
    assert (str(ROOT / "page.md"), 6) in lines


def test_a_block_with_an_unknown_mark_is_found() -> None:
    with pytest.raises(ValueError, match=r"page\.md:1: got 'slow'"):
        blocks_of("```python slow\n```\n", ROOT / "page.md")


@pytest.mark.parametrize("text", ["```\nfenced\n```\n", "Text.\n\n    indented\n", "```text gpu\n```\n"])
def test_a_block_that_does_not_say_what_it_is_is_found(text: str) -> None:
    (block,) = blocks_of(text, ROOT / "page.md")
    with pytest.raises(AssertionError):
        test_every_block_says_what_it_is(block)


def test_pages_and_docstrings_have_blocks() -> None:
    """The patterns above find something."""
    with_python = {block.file.name for block in BLOCKS if block.language == "python"}
    assert {"README.md", "docstring of get_spec"} <= with_python
    assert sum(block.language == "sh" for block in BLOCKS) >= 4
