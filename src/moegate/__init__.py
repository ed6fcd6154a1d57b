"""moegate: the router of every mixture-of-experts model. Hidden states in, expert ids and weights out."""

from moegate import catalog
from moegate.catalog import get_spec
from moegate.functional import route, router_gemm, select
from moegate.gate import Gate
from moegate.routing import Routing
from moegate.spec import RouterSpec

__version__ = "0.1.0"

__all__ = ["Gate", "RouterSpec", "Routing", "__version__", "catalog", "get_spec", "route", "router_gemm", "select"]
