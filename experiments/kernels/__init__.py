"""The CUDA kernels of mamba-ssm and causal-conv1d: how they are built here, and whether their numbers are right."""
