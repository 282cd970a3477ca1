"""What became slower than a baseline, of fastopt's own figures: torch's are not ours to keep.

    python tools/regressions.py baseline/ build/bench-cuda-*.json

The baseline's files have the same names. Exits with 1 where a median is more than 15 % above its
baseline's. Cases that only one side has are named and fail nothing; a file without a baseline does.
"""

import argparse
import json
import sys
from pathlib import Path

ALLOWED = 1.15  # medians of a quiet GPU repeat within a few percent


def medians(path: Path) -> dict[str, float]:
    """Seconds of every case of fastopt."""
    return {
        f"{row['extra_info']['op']}, {row['group']}": row["stats"]["median"]
        for row in json.loads(path.read_text())["benchmarks"]
        if row["extra_info"]["variant"] == "fastopt"
    }


def compare(before: dict[str, float], now: dict[str, float]) -> tuple[list[str], bool]:
    """A line for each case, and whether all of those on both sides are fast enough."""
    lines, good = [], True
    for case in sorted(before.keys() | now.keys()):
        if case not in before or case not in now:
            lines.append(f"{case}: only in the {'new figures' if case in now else 'baseline'}")
            continue
        ratio = now[case] / before[case]
        slower = ratio > ALLOWED
        good = good and not slower
        verdict = "SLOWER" if slower else "ok"
        lines.append(f"{case}: {now[case] * 1e6:.1f} us, {ratio:.2f} x the baseline: {verdict}")
    return lines, good


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("baseline", type=Path)
    parser.add_argument("files", type=Path, nargs="+")
    options = parser.parse_args(arguments)
    good = True
    for path in options.files:
        lines, fast_enough = compare(medians(options.baseline / path.name), medians(path))
        print(f"== {path.name}", *lines, sep="\n")
        good = good and fast_enough
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
