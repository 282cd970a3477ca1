"""fastopt/sgd/table.py and csrc/host/sgd_table.h declare the same: names, places, sizes, numbers."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Iterator
from pathlib import Path

import torch

from fastopt.sgd import table

ROOT = Path(__file__).parents[1]
STRUCTS = [
    *(table.SgdGroup, table.SgdRow, table.SgdSpan, table.SgdTable, table.SgdPython, table.SgdLaunch)
]
NUMBERS = {
    "SgdElement": table.ELEMENTS,
    "SgdSource": table.SOURCES,
    "SgdServed": {"none": table.NOT_SERVED, "float64": table.FLOAT64_SERVED, "all": table.SERVED},
    "SgdVerdict": {
        "kReady": table.READY,
        "kNoGradient": table.NO_GRADIENT,
        "kNeedsBuffer": table.NEEDS_BUFFER,
        "kTorch": table.TORCH,
        "kOverlapping": table.OVERLAPPING,
    },
    "SgdOption": {
        "k" + name.title().replace("_", ""): place for place, name in enumerate(table.OPTIONS)
    },
}


def claims() -> Iterator[str]:
    """What Python takes for true, in C++."""
    for struct in STRUCTS:
        of = struct.__name__
        yield f"sizeof({of}) == {ctypes.sizeof(struct)}"
        for name, *_ in struct._fields_:
            field = getattr(struct, name)
            yield f"offsetof({of}, {name}) == {field.offset}"
            yield f"sizeof({of}::{name}) == {field.size}"
    for enum, numbers in NUMBERS.items():
        for name, number in numbers.items():
            yield f"int({enum}::{str(name).removeprefix('torch.')}) == {number}"


def test_cpp_declares_the_same(tmp_path: Path) -> None:
    source = tmp_path / "claims.cpp"
    lines = [f'static_assert({claim}, "");' for claim in claims()]
    assert len(lines) > 80
    start = ["#include <cstddef>", '#include "host/sgd_table.h"', "using namespace fastopt;"]
    source.write_text("\n".join(start + lines))
    command = ["g++", "-std=c++17", "-fsyntax-only", "-Icsrc", str(source)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_options_are_torchs_in_its_order() -> None:
    defaults = torch.optim.SGD([torch.ones(1)], lr=0.1).defaults
    assert [name for name in defaults if name != "differentiable"] == list(table.NAMES)


def test_options_are_packed_as_declared() -> None:
    lr = torch.tensor(0.1, dtype=torch.float64)
    on_device = table.Groups((lr, 0.5, 0.25, 2, True, 0, None, None), lr.device).structs[0]
    assert on_device.options[0].address == lr.data_ptr()
    assert [on_device.options[place].value for place in (1, 2, 3)] == [0.5, 0.25, 2.0]
    assert list(on_device.source) == [table.SOURCES[torch.float64], 0, 0, 0]
    flags = on_device.nesterov, on_device.maximize, on_device.has_momentum
    assert (*flags, on_device.served) == (True, False, True, table.SERVED)
    known, refused = table.Groups((lr, 0, 0, 1e39, 0, 1, None, None, *["0.1"] * 8)).structs
    assert known.options[0].value == lr.item() and not any(known.source)
    flags = known.nesterov, known.maximize, known.has_momentum
    assert (*flags, known.served) == (False, True, False, table.FLOAT64_SERVED)
    assert bytes(refused) == bytes(ctypes.sizeof(table.SgdGroup))


def test_replaced_options_are_packed_as_new_ones() -> None:
    first = (0.1, 0.9, 0, 1e-4, False, False, None, None)
    others = {
        "lr": [0.2, 0.0, -0.1, 1, 1e39, float("inf"), float("nan"), torch.tensor(0.3), True, "0.1"],
        "momentum": [0.95, 0.0, 1e39, True],
        "dampening": [0.5, 1e39],
        "weight_decay": [0.1, 0.0],
        "nesterov": [True, "yes"],
        "maximize": [True],
    }
    all_options = [
        first[:place] + (value,) + first[place + 1 :]
        for place, name in enumerate(table.NAMES)
        for value in others.get(name, [])
    ]
    for old in (first, *all_options):
        for new in all_options:
            for before, after in ((old, new), (first + old, first + new), (old, first + new)):
                groups = table.Groups(before).replaced(after)
                right = table.Groups(after)
                for name in ("packed", "count", "momenta", "any_momentum", "all_momentum"):
                    assert getattr(groups, name) == getattr(right, name), (name, before, after)
                assert groups.holds(after) == right.holds(after)
                assert groups.address == groups.packed.buffer_info()[0]
