"""Triton kernels, one file or folder an op, imported when first used; and the loop of
linear_cross_entropy, which needs no Triton."""
