"""The version of moegate, for modules below `moegate` itself, which imports them."""

__version__ = "0.1.0"
