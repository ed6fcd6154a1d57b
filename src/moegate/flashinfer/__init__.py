"""FlashInfer's router kernels, through its public API: for those who want them, never the default.

They leave ties and NaN undefined and change a token's bits with the number of tokens. Nothing of FlashInfer is imported
before it is asked for.
"""
