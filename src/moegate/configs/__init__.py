"""Reads a Hugging Face config.json into the fields of a RouterSpec, as a dict; `moegate.spec` defines the fields."""
