"""docs/contract.md as code: the float64 reference, the error bounds, and the verdict on a routing."""
