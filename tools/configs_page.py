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

1. **Nothing invented.** The number of experts is never assumed. A config without one is refused: a dense model of the
   family, a draft head, or an incomplete config. Other missing keys have the defaults of the type's config class. The
   keys of a nested config (`text_config`, ...) have precedence over the keys around it.
2. **Nothing dropped.** A key that some engine reads as routing is followed, is refused, or causes one warning.
3. **Nothing without a source.** A type without a source, or with a router that a `RouterSpec` cannot express, is
   refused by name.

A model type is found by `model_type`; where `model_type` is missing or unknown, by the class in `architectures`; for an
inner config without a type, by the composite type around it.
"""
_DIFFERS = """
## Where engines read a key differently

Each row is a routing key of a model type that engines read differently. moegate follows the code in the last column. An
empty cell: nothing is known of the engine, mostly because the engine has no code for the type. The published code is
the model's own.
"""
_KEYS = """
## Model types
"""
_WRAPPERS = """
## Composite types

The inner config has the type below unless it states another.
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
