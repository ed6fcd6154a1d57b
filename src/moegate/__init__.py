"""moegate: the router of every mixture-of-experts model. Hidden states in, expert ids and weights out."""

from typing import TYPE_CHECKING

from moegate import catalog
from moegate._version import __version__
from moegate.catalog import get_spec
from moegate.spec import RouterSpec

if TYPE_CHECKING:
    from moegate.functional import route, router_gemm, select
    from moegate.gate import Gate
    from moegate.gate_linear import GateLinear
    from moegate.routing import Routing
    from moegate.top_k import TopK
else:
    # PyTorch is imported at the first use of a name below: the import takes over a second, and specs do not need it.
    _NEEDS_TORCH = {
        "Gate": "moegate.gate",
        "GateLinear": "moegate.gate_linear",
        "Routing": "moegate.routing",
        "TopK": "moegate.top_k",
        "route": "moegate.functional",
        "router_gemm": "moegate.functional",
        "select": "moegate.functional",
    }

    def __getattr__(name):
        if name not in _NEEDS_TORCH:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        return globals().setdefault(name, getattr(import_module(_NEEDS_TORCH[name]), name))

    def __dir__():
        return sorted({*globals(), *__all__})


__all__ = [
    "Gate",
    "GateLinear",
    "RouterSpec",
    "Routing",
    "TopK",
    "__version__",
    "catalog",
    "get_spec",
    "route",
    "router_gemm",
    "select",
]
