"""The time of kernels on a GPU, in CUDA graphs and in a chain, with every result held against float64."""
