"""Runs cases on several ranks: one process each, over gloo, started once for all cases.

    python ranks.py MODULES RANK WORLD_SIZE FOLDER

The cases are the functions check_* of the modules, which commas separate; each is called on every
rank, in order. What a rank found it writes into FOLDER: the first failure ends it, as the others may
wait for it.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import fastopt
from child import HANGS_AFTER_S

TESTS = Path(__file__).resolve().parent
FASTOPT = Path(fastopt.__file__).resolve().parents[1]
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "FASTOPT_ALWAYS": "1",
    "PYTHONPATH": os.pathsep.join(
        filter(None, [str(FASTOPT), str(TESTS), os.environ.get("PYTHONPATH")])
    ),
}
# A rank that waits this long for another waits for nothing.
COLLECTIVE_S = HANGS_AFTER_S / 4


def run(modules: str, world_size: int, folder: Path) -> list[dict[str, str]]:
    """What each rank found, by case: "" or a traceback."""
    command = [sys.executable, str(TESTS / "ranks.py"), modules]
    children = [
        subprocess.Popen(
            [*command, str(rank), str(world_size), str(folder)],
            env=os.environ | ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world_size)
    ]
    try:
        said = [child.communicate(timeout=HANGS_AFTER_S)[0] for child in children]
    except subprocess.TimeoutExpired:
        said = ["a rank hangs"] * world_size
    finally:
        for child in children:
            child.kill()
    found = []
    for rank, words in enumerate(said):
        path = folder / f"{rank}.json"
        found.append(json.loads(path.read_text()) if path.exists() else {"": words})
    return found


def cases(modules: str) -> list[tuple[str, str]]:
    """The module and name of each, without an import of what they need."""
    return [
        (module, name)
        for module in modules.split(",")
        for name in re.findall(
            r"^def (check_\w+)", (TESTS / f"{module}.py").read_text(), re.MULTILINE
        )
    ]


def main(modules: str, rank: str, world_size: str, folder: str) -> None:
    import torch
    import torch.distributed as dist

    import served  # noqa: F401 (before any call)

    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder) / "store"), int(world_size))
    dist.init_process_group(
        "gloo",
        store=store,
        rank=int(rank),
        world_size=int(world_size),
        timeout=timedelta(seconds=COLLECTIVE_S),
    )
    found: dict[str, str] = {}
    for module, name in cases(modules):
        torch.manual_seed(0)
        try:
            getattr(importlib.import_module(module), name)()
            found[name] = ""
        except Exception:
            found[name] = traceback.format_exc()
            break
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found))
    if not any(found.values()):
        dist.barrier()
        dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads may wait for a rank that failed


if __name__ == "__main__":
    main(*sys.argv[1:])
