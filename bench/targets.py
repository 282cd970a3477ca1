"""The speed that was promised: for each case, stock's time / fastopt's time must be at least this.

The baselines are named as in the benchmarks; `best of torch` is the fastest of the for-loop,
foreach and fused. Measurements that fall short are reported, they never fail a run: a busy
machine is not a defect.
"""

CPU_TARGETS: dict[str, dict[str, float]] = {
    "float32 4096 x 32000": {"eager": 10, "compile": 3},
    "float32 1024 x 128256": {"eager": 10, "compile": 3},
    "bfloat16 4096 x 32000": {"eager": 6, "compile": 3},
    "float32 4096 x 32000, forward alone": {"eager": 8},
    "float32 8192 x 1000": {"eager": 5, "compile": 1.5},
    "float32 8192 x 1000, smoothing": {"eager": 5, "compile": 1.5},
    "float32 8192 x 1000, probabilities": {"eager": 3, "compile": 1.5},
    "float32 65536 x 10": {"eager": 8, "compile": 1.5},
    "float32 8 x 128256": {"eager": 6},
    "float32 8 x 21 x 256 x 256": {"eager": 3},
    "float32 2 x 150 x 256 x 256": {"eager": 6},
    "float32 4 x 10": {"eager": 0.95},
    "float32 16 x 10": {"eager": 0.95},
    "float32 32 x 10": {"eager": 0.95},
    "float32 128 x 10": {"eager": 1.3},
    "float32 4096 x 256 x 32000": {
        "eager": 1.35,
        "chunked": 1.6,
        "chunked 512": 1,
        "products": 0.8,
    },
    "float32 4096 x 256 x 32000, forward alone": {"eager": 1.4},
    "float32 4096 x 256 x 32000, 75 % ignored": {"chunked 512": 3},
    "float32 1024 x 512 x 128256": {"eager": 1.1},
    "bfloat16 4096 x 256 x 32000": {"chunked": 2.2},
    "float32 4 x 8 x 10": {"eager": 0.95},
    "float32 32 x 64 x 10": {"eager": 0.95},
    "float32 25M": {"for-loop": 4, "fused": 0.95},
    "float32 8 x 12.5M": {"for-loop": 4, "fused": 0.95},
    "float32 ResNet-50, 161 tensors": {"for-loop": 1.5, "best of torch": 1},
    "float32 1000 x 64": {"best of torch": 2.5},
    "float32 161 x 64": {"best of torch": 1.8},
    "float32 LeNet, 10 tensors": {"best of torch": 1},
}

# On GPUs the promise is a share of the copy bandwidth, for bfloat16 logits of 4096 classes and more:
# loss and gradient in at most 1.15 times what copying the logits takes, the loss alone at 90 %; SGD
# of large tensors at 90 %. And against every case's rivals:
GPU_SHARE_OF_COPY = {"full": 1 / 1.15, "forward": 0.9, "sgd": 0.9}
GPU_TARGETS: dict[str, dict[str, float]] = {
    "cross_entropy": {"eager": 1, "compile": 1.4, "liger": 1, "quack": 1, "flash-attn": 1},
    "sgd": {"for-loop": 1, "best of torch": 1},
}
GPU_HOST_OF_SGD = 2.0  # torch's fused step needs at least so many times the host's time
GPU_LARGE_SGD = ("float32 100M", "bfloat16 100M")

# Peak memory of a call beyond what it returns: the gradient, or nothing for a step of SGD. Linear
# cross-entropy may hold the logits of one chunk as well.
MEMORY_BEYOND_RESULT_MB = 1.0
