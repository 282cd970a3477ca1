"""The Triton kernels, one file per op. Importing one of them imports triton; fastopt does so when a
GPU tensor asks for it."""
