"""Prints docs/configs.md from the tables of model types: `python tools/configs_page.py > docs/configs.md`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from moegate.configs.model_types import ModelType, model_types, read_tables, wrappers

_ENGINES = ("published", "transformers", "vllm", "sglang", "others")
_NAMES = {
    "published": "the published code",
    "transformers": "Transformers",
    "vllm": "vLLM",
    "sglang": "SGLang",
    "others": "others",
}

_HEAD = """
# What a config.json means

Written by `python tools/configs_page.py` from the tables in `src/moegate/configs/types`, whose README says how to add
a model type. `RouterSpec.from_config` reads a config by three rules.

1. **Nothing invented.** The number of experts is never assumed. A config that does not state it is refused: a dense
   member of the family, a draft head, or a config that is not whole. Other keys that are missing have the value that
   the type's config class gives them. A nested config (`text_config`, ...) counts before the keys around it.
2. **Nothing dropped.** A key that some engine reads as routing is followed, is refused, or is warned of once.
3. **Nothing without a source.** A type that has none, or whose router a `RouterSpec` cannot say, is refused by name.

A model type is found by `model_type`; where that is missing or unknown, by the class in `architectures`; inside a
composite config without a type of its own, by the composite type.
"""
_DIFFERS = """
## Where engines read a key differently

Each row is a routing key of a model type for which the engines' code disagrees. moegate follows the reader in the last
column. An empty cell says nothing of an engine: most often, it has no code for the type. The published code is the
model's own.
"""
_KEYS = """
## Model types
"""
_WRAPPERS = """
## Composite types

The type of the inner config holds where that config states none.
"""
_REFUSED = """
## Refused types
"""


def page() -> str:
    """The whole page."""
    types = sorted(model_types().values(), key=lambda entry: entry.name.lower())
    lines = [_HEAD.strip(), "", _DIFFERS.strip(), ""]
    lines += _table(("Model type", "Key", *map(_NAMES.get, _ENGINES), "moegate follows"), _differences(types))
    lines += ["", _KEYS.strip(), "", *_table(("Model type", "Experts counted by", "Source"), map(_type, types))]
    inner = [(f"`{name}`", _inner(keys)) for name, keys in sorted(wrappers().items())]
    lines += ["", _WRAPPERS.strip(), "", *_table(("Composite type", "Where the router is"), inner)]
    tables = sorted(read_tables("refused").items())
    reasons = [(f"`{name}`", table["reason"], table["source"]) for name, table in tables]
    lines += ["", _REFUSED.strip(), "", *_table(("Model type", "Reason", "Source"), reasons)]
    return "\n".join(lines) + "\n"


def _differences(types: Iterable[ModelType]) -> Iterable[tuple[str, ...]]:
    for entry in types:
        for key, readers in entry.differs.items():
            cells = (readers.get(engine, "") for engine in _ENGINES)
            followed, comma, exception = readers["follows"].partition(",")
            yield f"`{entry.name}`", f"`{key}`", *cells, _NAMES[followed] + comma + exception


def _type(entry: ModelType) -> tuple[str, ...]:
    return f"`{entry.name}`", ", ".join(f"`{key}`" for key in entry.keys["num_experts"]), entry.source


def _inner(keys: dict[str, str]) -> str:
    return ", ".join(f"`{key}`: `{inner}`" for key, inner in keys.items())


def _table(columns: Sequence[str | None], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [[name or "" for name in columns], ["---"] * len(columns), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |" for cells in lines]


if __name__ == "__main__":
    print(page(), end="")
