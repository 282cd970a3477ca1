"""Triton kernels, one file an op; imported when first used."""
