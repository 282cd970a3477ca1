"""bench/results/LEDGER.md lists every GPU kernel, and claims no run of another source."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COLUMNS = ["family", "kernel", "last run", "source", "commit", "device", "verdict"]


def sources(family: str, kernel: str) -> list[Path]:
    """The files that a kernel is compiled from."""
    op = "sgd" if kernel.startswith("sgd") else "cross_entropy"
    if family == "triton":
        return sorted((ROOT / "fastopt/kernels").glob(f"{op}*/*.py")) or [
            ROOT / f"fastopt/kernels/{op}.py"
        ]
    cuda, rules = ROOT / "csrc/cuda", ROOT / "csrc/rules"
    shared = {
        "sgd": [ROOT / "csrc/host/sgd_table.h"],
        "cross_entropy": [rules / "softmax.h", rules / "target.h"],
    }[op]
    shared += [cuda / "primitives.h", rules / "types.h", rules / f"{op}.h"]
    return sorted([*cuda.glob(f"{op}.*"), *cuda.glob(f"{op}/*"), *shared])


def source_hash(family: str, kernel: str) -> str:
    digest = hashlib.sha256()
    for path in sources(family, kernel):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def kernels() -> set[tuple[str, str]]:
    found = set()
    for path in (ROOT / "csrc/cuda").rglob("*.h"):
        text = re.sub(r"#define.*", "", path.read_text())
        names = re.findall(r"FASTOPT_KERNEL\s+void\s+(?:FASTOPT_BOUNDS\([^)]*\)\s*)?(\w+)", text)
        found |= {("cuda", name) for name in names}
    folder = ROOT / "fastopt/kernels"
    for path in folder.rglob("*.py"):
        names = re.findall(r"@triton\.jit.*\ndef (\w+_kernel)\(", path.read_text())
        op = path.relative_to(folder).with_suffix("").parts[0]
        found |= {("triton", f"{op}.{name}") for name in names}
    return found


def ledger() -> list[dict[str, str]]:
    lines = (ROOT / "bench/results/LEDGER.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line[:1] == "|"]
    assert rows[0] == COLUMNS
    return [dict(zip(COLUMNS, row, strict=True)) for row in rows[2:]]


def test_every_kernel_has_one_row() -> None:
    rows = [(row["family"], row["kernel"]) for row in ledger()]
    assert len(rows) == len(set(rows))
    assert set(rows) == kernels()
    assert {family for family, _ in rows} == {"cuda", "triton"}


def test_a_row_speaks_of_the_source_as_it_is() -> None:
    for row in ledger():
        assert row["verdict"], row
        if row["last run"] == "never":
            assert row["source"] == row["commit"] == row["device"] == "", row
            continue
        assert re.fullmatch(r"\d{4}-\d\d-\d\d", row["last run"]), row
        assert re.fullmatch(r"[0-9a-f]{7,40}", row["commit"]) and row["device"], row
        now = source_hash(row["family"], row["kernel"])
        assert row["source"] == now, f"{row['kernel']} has changed since: its source is {now} now"
