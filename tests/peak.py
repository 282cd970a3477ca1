"""What a process holds at most, for programs of their own (child.py)."""

from __future__ import annotations

from collections.abc import Callable

# glibc keeps freed blocks below a threshold that grows by itself; fixed and small, every large
# block comes from the system and goes back, so that the peak is what was really held at once.
PEAK_ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def status(key: str) -> int:
    """Bytes, of what Linux tells of this process: VmRSS: or VmHWM:."""
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def peak_beyond_inputs(run: Callable[[], object]) -> int:
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the high-water mark starts again from here
    before = status("VmRSS:")
    kept = run()  # what it returns lives until the mark was read
    peak = status("VmHWM:") - before
    del kept
    return peak
