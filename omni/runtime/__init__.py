"""How requests run: compiled code, CUDA graphs, sampling, and blank requests to warm up with."""
