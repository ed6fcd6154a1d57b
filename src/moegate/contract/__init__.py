"""docs/contract.md as code: the float64 reference, the error bounds, and the check of a routing."""
