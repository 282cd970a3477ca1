"""A small language model that learns this file byte by byte, its parameters sharded by FSDP2 and tensor
parallelism, its head by classes: fastopt's loss takes the sharded logits, its SGD steps on the shards.

    torchrun --nproc-per-node 2 examples/train_sharded.py    # tensor parallel; 4: FSDP2 x TP
    python examples/train_sharded.py                         # one process, the same losses
"""

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import fastopt

CONTEXT, WIDTH, BATCH = 8, 32, 64


class Model(nn.Module):
    """The next byte from the last ones."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, WIDTH)
        self.up = nn.Linear(CONTEXT * WIDTH, 4 * WIDTH)
        self.down = nn.Linear(4 * WIDTH, 2 * WIDTH)
        self.head = nn.Linear(2 * WIDTH, 256)

    def forward(self, context: Tensor) -> Tensor:
        return self.head(self.down(self.up(self.embedding(context).flatten(1)).tanh()).tanh())


def shard(model: nn.Module) -> tuple[int, int]:
    """Over all ranks: pairs of them share the classes and the wide layers, the pairs the rest.
    Returns which part of a batch this rank takes, and of how many."""
    size = dist.get_world_size()
    tensor_parallel = 2 if size % 2 == 0 else 1
    shape = (size // tensor_parallel, tensor_parallel)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("data", "tensor"))
    plan = {
        "up": ColwiseParallel(),
        "down": RowwiseParallel(),
        "head": ColwiseParallel(output_layouts=Shard(-1), use_local_output=False),
    }
    parallelize_module(model, mesh["tensor"], plan)
    fully_shard(model, mesh=mesh["data"])
    return mesh["data"].get_local_rank(), shape[0]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=200)
    steps = parser.parse_args().steps
    torch.manual_seed(0)
    model = Model()
    part, parts = 0, 1
    if "RANK" in os.environ:  # started by torchrun
        dist.init_process_group("gloo")
        part, parts = shard(model)
    optimizer = fastopt.SGD(model.parameters(), lr=0.1, momentum=0.9)
    text = torch.tensor(list(Path(__file__).read_bytes()))
    windows = text.unfold(0, CONTEXT + 1, 1)
    for step in range(1, steps + 1):
        batch = windows[torch.randint(len(windows), (BATCH,))][part::parts]
        loss = fastopt.cross_entropy(model(batch[:, :-1]), batch[:, -1])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0:
            if isinstance(loss, DTensor):
                loss = loss.full_tensor()
            loss = loss.detach()
            if dist.is_initialized():
                dist.all_reduce(loss)
                loss /= dist.get_world_size()
            if not dist.is_initialized() or dist.get_rank() == 0:
                print(f"step {step:4d}  loss {loss.item():.3f}", flush=True)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
