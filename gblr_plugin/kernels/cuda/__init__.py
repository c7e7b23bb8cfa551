"""Kernels for CUDA devices, compiled with Triton."""
