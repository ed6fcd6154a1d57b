"""Times of routers on a GPU, in CUDA graphs and in a chain, with every result compared with float64."""
