"""Hidden states to logits: one file for each way to multiply."""
