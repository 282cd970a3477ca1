"""Triton kernels, one file or folder an op; imported when first used."""
