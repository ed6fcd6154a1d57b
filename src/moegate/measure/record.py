"""Records: one JSON file a part, rewritten after every row, so that an interrupted run can be resumed."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import uuid
from pathlib import Path
from typing import Any

import torch

from moegate._version import __version__
from moegate.flashinfer import limits
from moegate.json_file import read_json
from moegate.measure.names import RecordRow, check_words
from moegate.whole_file import replacing

KEY = ("part", "model", "tokens", "way")


class Record:
    """The rows of one part in DIR/PART.json, each with the id of the run that measured it."""

    def __init__(self, folder: Path, part: str, run: dict[str, Any]) -> None:
        self.part = part
        self.path = folder / f"{part}.json"
        self.run = run
        content = read_json(self.path, "the record") if self.path.exists() else {}
        self.runs: list[dict[str, Any]] = content.get("runs", [])
        self.rows: list[RecordRow] = content.get("rows", [])
        check_words(self.path, self.rows)
        self._keys = {self._key(row) for row in self.rows}

    def has(self, model: str, tokens: int, way: str) -> bool:
        """True if this or an earlier run has measured the case."""
        return (self.part, model, tokens, way) in self._keys

    def add(self, model: str, tokens: int, way: str, content: dict[str, Any]) -> None:
        """Adds a row and writes the file."""
        row = {"part": self.part, "model": model, "tokens": tokens, "way": way, "run": self.run["id"], **content}
        self.rows.append(row)
        self._keys.add(self._key(row))
        if all(run["id"] != self.run["id"] for run in self.runs):
            self.runs.append(self.run)
        self._write()

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self.path) as new:
            new.write_text(json.dumps({"runs": self.runs, "rows": self.rows}, indent=1) + "\n", encoding="utf-8")

    @staticmethod
    def _key(row: RecordRow) -> tuple[Any, ...]:
        return tuple(row[name] for name in KEY)


def describe_run(command: str) -> dict[str, Any]:
    """The machine, the versions and the command of a run."""
    run: dict[str, Any] = {
        "id": uuid.uuid4().hex[:8],
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        "moegate": __version__,
        "moegate_commit": commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "flashinfer": limits.installed_version() or "absent",
        "transformers": version("transformers"),
        "gpu": None,
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        run |= {"gpu": properties.name, "sm_count": properties.multi_processor_count, "driver": _driver()}
    return run


def version(package: str) -> str:
    """The installed version, or "absent"."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def commit() -> str:
    """The commit of moegate: MOEGATE_COMMIT, for a copy without history; else the HEAD of git."""
    return os.environ.get("MOEGATE_COMMIT") or _output(["git", "rev-parse", "--short=12", "HEAD"])


def _driver() -> str:
    return _output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]).partition("\n")[0]


def _output(command: list[str]) -> str:
    folder = Path(__file__).parent
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True, cwd=folder)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip()
