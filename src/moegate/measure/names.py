"""Names in measurements that a report tells apart; without PyTorch, which a report does not need."""

DEFAULT = "moegate"
"""A frozen gate with the default plan."""
SAFE = "moegate, not frozen"
TRANSFORMERS = "Transformers' router"
FLOOR = "floor"
PREDECESSOR = "predecessor alone"
