"""The version of moegate, in a module that others can import without importing `moegate`."""

__version__ = "0.1.0"
