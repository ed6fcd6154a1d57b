"""What a Hugging Face config.json says of its router, as plain fields; what they mean, `moegate.spec` knows."""
