"""Published config.json files, cut to the keys that routing could depend on, each with its router.

They are in data/configs/*.json. `expected` has the RouterSpec fields other than the defaults, worked out from the code
of the models and of the engines, never from the reader's results. `refused` has words of the error. `warns` has
words of each warning; without `warns` there is no warning.
"""

from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import pytest

from moegate import RouterSpec

FOLDER = Path(__file__).parent / "data" / "configs"
ENTRIES: list[dict[str, Any]] = [
    entry for path in sorted(FOLDER.glob("*.json")) for entry in json.loads(path.read_text(encoding="utf-8"))
]
DEFAULTS = {field.name: field.default for field in dataclasses.fields(RouterSpec)}


def having(key: str) -> list[Any]:
    return [pytest.param(entry, id=entry["name"]) for entry in ENTRIES if key in entry]


def save(config: dict[str, Any], folder: Path) -> Path:
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.mark.parametrize("entry", having("expected"))
def test_a_published_config_gives_its_router(entry: dict[str, Any]) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        spec = RouterSpec.from_config(entry["config"])
    assert spec == RouterSpec(**entry["expected"])
    wanted = entry.get("warns", [])
    texts = [str(warning.message) for warning in caught]
    assert len(texts) == len(wanted), texts
    assert all(words in text for words, text in zip(wanted, texts, strict=True)), texts


@pytest.mark.parametrize("entry", having("expected"))
@pytest.mark.filterwarnings("ignore:moegate:RuntimeWarning")  # tested above
def test_a_folder_gives_what_the_dict_gives(entry: dict[str, Any], tmp_path: Path) -> None:
    spec = RouterSpec.from_config(save(entry["config"], tmp_path))
    assert spec == RouterSpec(**entry["expected"])
    assert RouterSpec.from_config(tmp_path / "config.json") == spec


@pytest.mark.parametrize("entry", having("refused"))
def test_a_config_without_a_router_is_refused(entry: dict[str, Any], tmp_path: Path) -> None:
    for config in (entry["config"], save(entry["config"], tmp_path)):
        with pytest.raises(ValueError, match=r"^config") as caught:
            RouterSpec.from_config(config)
        assert entry["refused"] in str(caught.value)


def test_every_entry_names_its_source_and_one_result() -> None:
    names = [entry["name"] for entry in ENTRIES]
    assert len(ENTRIES) > 100
    assert len(set(names)) == len(names)
    for entry in ENTRIES:
        assert entry["source"], entry["name"]
        assert ("expected" in entry) != ("refused" in entry), entry["name"]


def test_what_is_expected_is_no_default() -> None:
    """`expected` has no field with a default value: such a field would hide a reader that sets another one."""
    for entry in having("expected"):
        said = entry.values[0]["expected"]
        assert not {name for name, value in said.items() if value == DEFAULTS[name]}, entry.id
