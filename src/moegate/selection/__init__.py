"""Logits to experts and weights: one file for each way to select."""
