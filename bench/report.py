"""Turns pytest-benchmark's JSON into tables and pictures, and into the README's table.

    python bench/report.py build/bench.json                          read it, in build/bench/
    python bench/report.py build/bench.json --results bench/results --readme README.md
                                                                     publish it

Writes `<results>/<machine>/`: results.json (without single durations), report.md, speedup.png,
bandwidth.png. The README's table stands between `<!-- bench:begin -->` and `<!-- bench:end -->`.
"""

import argparse
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import EngFormatter

from targets import (
    CPU_TARGETS,
    GPU_HOST_OF_SGD,
    GPU_LARGE_SGD,
    GPU_SHARE_OF_COPY,
    GPU_TARGETS,
    MEMORY_BEYOND_RESULT_MB,
)

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
STOCK_SGD = ("for-loop", "foreach", "fused")
TITLES = {
    "cross_entropy": "CrossEntropyLoss",
    "linear_cross_entropy": "LinearCrossEntropyLoss",
    "sgd": "SGD",
}
VARIANTS = {
    "cross_entropy": ("fastopt", "eager", "compile", "liger", "quack", "flash-attn"),
    "linear_cross_entropy": (
        *("fastopt", "eager", "compile", "composed", "chunked", "chunked 512", "products"),
    ),
    "sgd": ("fastopt", *STOCK_SGD, "compile"),
    "training": ("fastopt", "eager", "fastopt alone", "eager alone"),
}
NAMES = {  # others are called what they are
    "eager": "torch",
    "compile": "torch.compile",
    "composed": "linear + fastopt's loss",
    "chunked": "torch's chunks",
    "chunked 512": "torch's chunks of 512",
    "products": "matrix products alone",
}
COLOURS = {
    "fastopt": "#d9480f",
    "eager": "#495057",
    "for-loop": "#495057",
    "foreach": "#868e96",
    "fused": "#1c7ed6",
    "compile": "#2b8a3e",
    "best of torch": "#1c7ed6",
    "composed": "#e8590c",
    "chunked": "#1c7ed6",
    "chunked 512": "#74c0fc",
    "products": "#868e96",
    "liger": "#9c36b5",
    "quack": "#f08c00",
    "flash-attn": "#0b7285",
}
TARGET_COLOUR = "#e03131"


@dataclass(frozen=True)
class Entry:
    """One variant of one case."""

    median: float  # seconds
    iqr: float  # seconds, between the quartiles of the rounds
    info: dict  # what `record` noted; None where a value was not finite or not measurable

    @property
    def right(self) -> bool:
        """Whether the result is the answer at all: a kernel that skips its work is no rival."""
        errors = [self.info.get(e, 0.0) for e in ("loss_error", "grad_error", "param_error")]
        return all(error is not None and error < 0.05 for error in errors)


class Results:
    def __init__(self, raw: dict):
        self.machine: dict = raw["machine_info"]
        self.commit: dict = raw["commit_info"]
        self.date: str = raw["datetime"][:10]
        self.cases: dict[str, dict[str, dict[str, Entry]]] = {op: {} for op in VARIANTS}
        for row in raw["benchmarks"]:
            info, stats = row["extra_info"], row["stats"]
            case = self.cases[info["op"]].setdefault(row["group"], {})
            case[info["variant"]] = Entry(stats["median"], stats["iqr"], info)

    def variants(self, op: str) -> list[str]:
        """Those that were measured, in the order of VARIANTS."""
        return [v for v in VARIANTS[op] if any(v in case for case in self.cases[op].values())]

    def targets(self, op: str, name: str) -> dict[str, float]:
        """What stock's time / fastopt's time must be at least, for each baseline."""
        if "gpu" not in self.machine:
            return CPU_TARGETS.get(name, {})
        return GPU_TARGETS[op]

    @property
    def slug(self) -> str:
        """The kind of machine, as a folder name: cpu-amd-epyc-2c-avx2, gpu-nvidia-h200-triton."""
        if "gpu" in self.machine:
            gpu = re.findall(r"[a-z0-9]+", self.machine["gpu"].lower())
            return "-".join(["gpu", *gpu, str(self.machine["kernels"])])
        name = re.sub(
            r"\((R|TM)\)|@.*|\bCPU\b|\d+-Core Processor|Processor", "", self.machine["cpu"]
        )
        words = re.findall(r"[a-z0-9]+", name.lower())
        level = self.machine["torch_simd"].lower()
        return "-".join(["cpu", *words, f"{self.machine['cores']}c", level])

    @property
    def copy_gb_per_s(self) -> float:
        entries = (
            entry for op in self.cases.values() for case in op.values() for entry in case.values()
        )
        return next(entries).info["copy_gb_per_s"]

    @property
    def provenance(self) -> str:
        m = self.machine
        commit = self.commit["id"][:12] + (
            " with uncommitted changes" if self.commit["dirty"] else ""
        )
        if "gpu" in m:
            where = (
                f"{m['gpu']}, {m['multiprocessors']} multiprocessors, {m['gpu_memory_gb']} GB, "
                f"CUDA {m['cuda']}, Triton {m['triton']}, fastopt's kernels {m['kernels']}"
            )
        else:
            where = (
                f"{m['cpu']}, {m['threads']} threads on {m['cores']} cores, {m['memory_gb']} GB, "
                f"torch's SIMD level {m['torch_simd']}"
            )
        return (
            f"{where}, copy bandwidth {self.copy_gb_per_s:.1f} GB/s "
            f"(read + write); {m['system']}, Python {m['python']}, torch {m['torch']}, "
            f"fastopt {m['fastopt']} at commit {commit}; {self.date}; `{m['command']}`"
        )


def ratio(case: dict[str, Entry], baseline: str) -> float | None:
    """The baseline's median time / fastopt's median time."""
    if baseline == "best of torch":
        times = [case[v].median for v in STOCK_SGD if v in case and case[v].right]
        return min(times) / case["fastopt"].median if times else None
    return case[baseline].median / case["fastopt"].median if baseline in case else None


# --- Tables ---------------------------------------------------------------------------------------


def table(head: list[str], rows: list[list[str]]) -> str:
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, rule, *rows]) + "\n"


def in_three_digits(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def in_time(seconds: float) -> str:
    ms = 1e3 * seconds
    return f"{in_three_digits(ms)} ms" if ms >= 1 else f"{in_three_digits(1e3 * ms)} µs"


def in_times(value: float | None) -> str:
    return "" if value is None else f"{value:.1f} x" if value >= 9.95 else f"{value:.2f} x"


def in_power(value: float | None) -> str:
    return "not finite" if value is None else "0" if value == 0 else f"{value:.1e}"


def speed_table(variants: list[str], cases: dict[str, dict[str, Entry]]) -> str:
    others = variants[1:]
    head = ["", *(f"{NAMES.get(v, v)}, median (spread)" for v in variants)]
    head += [f"{NAMES.get(v, v)} / fastopt" for v in others]
    rows = []
    for name, case in cases.items():
        times = [
            f"{in_time(case[v].median)} (±{50 * case[v].iqr / case[v].median:.0f} %)"
            + ("" if case[v].right else ", **wrong**")
            if v in case
            else ""
            for v in variants
        ]
        rows.append([name, *times, *(in_times(ratio(case, v)) for v in others)])
    return table(head, rows)


def training_table(cases: dict[str, dict[str, Entry]], head: str) -> str:
    """A step with each pair of lines, and what of it the lines are: their time by themselves."""
    rows = []
    for name, case in cases.items():
        times = [case[variant].median for variant in VARIANTS["training"]]
        whole, alone = times[:2], times[2:]
        row = [name, *map(in_time, whole), in_times(whole[1] / whole[0])]
        row += [*map(in_time, alone), in_times(alone[1] / alone[0])]
        shares = (f"{100 * a / w:.0f} %" for a, w in zip(alone, whole, strict=True))
        rows.append([*row, ", ".join(shares)])
    pair = ["fastopt", "torch", "torch / fastopt"]
    lines = [f"the two lines: {words}" for words in (*pair, "share of the step, fastopt, torch")]
    return table([head, *pair, *lines], rows)


def bandwidth_table(variants: list[str], cases: dict[str, dict[str, Entry]]) -> str:
    """What must be moved, how fast it was moved, and the memory taken on top of the inputs."""
    head = ["", "must move, MB", "fastopt, GB/s", "share of copy"]
    head += [f"{NAMES.get(v, v)}, peak MB" for v in variants]
    on_gpu = any("launches" in case["fastopt"].info for case in cases.values())
    head += [f"{NAMES.get(v, v)}, launches" for v in variants] if on_gpu else []
    on_host = any("host_us" in case["fastopt"].info for case in cases.values())
    head += [f"{NAMES.get(v, v)}, host us" for v in variants] if on_host else []
    rows = []
    for name, case in cases.items():
        info = case["fastopt"].info
        memory = [case[v].info["peak_mb"] if v in case else None for v in variants]
        row = [name, in_three_digits(info["bytes_moved"] / 1e6), in_three_digits(info["gb_per_s"])]
        row += [f"{100 * info['share_of_copy']:.0f} %"]
        row += ["" if mb is None else f"{mb:.1f}" for mb in memory]
        if on_gpu:
            row += [str(case[v].info["launches"]) if v in case else "" for v in variants]
        if on_host:
            row += [f"{case[v].info['host_us']:.0f}" if v in case else "" for v in variants]
        rows.append(row)
    return table(head, rows)


def accuracy_table(variants: list[str], cases: dict[str, dict[str, Entry]]) -> str:
    """Errors against float64, fastopt's beside that of each of torch's implementations."""
    errors = {
        "loss_error": "loss",
        "grad_error": "gradient, worst element",
        "element_error": "gradient, median element",
        "param_error": "parameters, worst element",
    }
    rows = []
    for name, case in cases.items():
        for error, meaning in errors.items():
            if error in case["fastopt"].info:
                cells = [
                    in_power(case[v].info[error]) if v in case and error in case[v].info else ""
                    for v in variants
                ]
                rows.append([f"{name}: {meaning}", *cells])
    return table(["", *(NAMES.get(variant, variant) for variant in variants)], rows)


def halves(cases: dict[str, dict[str, Entry]]) -> dict[str, dict[str, Entry]]:
    kinds = ("bfloat16", "float16")
    return {name: case for name, case in cases.items() if case["fastopt"].info["dtype"] in kinds}


def share_of_copy_target(name: str, info: dict) -> float | None:
    if info["op"] == "sgd":
        return GPU_SHARE_OF_COPY["sgd"] if name in GPU_LARGE_SGD else None
    if info["dtype"] == "bfloat16" and info.get("classes", 0) >= 4096:
        return GPU_SHARE_OF_COPY.get(info["mode"])
    return None


def target_table(results: Results) -> str:
    rows = []
    for op, cases in results.cases.items():
        for case_name, case in cases.items():
            for baseline, floor in results.targets(op, case_name).items():
                measured = ratio(case, baseline)
                if measured is None:
                    continue
                verdict = "reached" if measured >= floor else "**not reached**"
                name = NAMES.get(baseline, baseline)
                rows.append([case_name, name, f"{floor:g} x", in_times(measured), verdict])
            share = share_of_copy_target(case_name, case["fastopt"].info)
            if "gpu" in results.machine and share is not None:
                reached = case["fastopt"].info["share_of_copy"]
                verdict = "reached" if reached >= share else "**not reached**"
                percent = [f"{100 * value:.0f} %" for value in (share, reached)]
                rows.append([case_name, "copy bandwidth", *percent, verdict])
            if op == "sgd" and "gpu" in results.machine and "fused" in case:
                host = case["fused"].info["host_us"] / case["fastopt"].info["host_us"]
                verdict = "reached" if host >= GPU_HOST_OF_SGD else "**not reached**"
                times = [in_times(GPU_HOST_OF_SGD), in_times(host)]
                rows.append([case_name, "fused, on the host", *times, verdict])
    return table(["", "against", "at least", "measured", ""], rows)


def memory_table(results: Results) -> str:
    rows = []
    for case_name, case in (pair for op in results.cases.values() for pair in op.items()):
        info = case["fastopt"].info
        if info["peak_mb"] is None or "result_mb" not in info:
            continue
        beyond = info["peak_mb"] - info["result_mb"]
        allowed = info.get("allowed_mb", MEMORY_BEYOND_RESULT_MB)
        verdict = "reached" if beyond <= allowed else "**not reached**"
        cells = (f"{mb:.1f}" for mb in (info["result_mb"], max(beyond, 0), allowed))
        rows.append([case_name, *cells, verdict])
    return table(["", "result, MB", "beyond it, MB", "at most", ""], rows)


TIME_NOTE = """\
Medians of interleaved rounds in one process; the spread is half the distance between the quartiles.
Ratios above 1 mean that fastopt is faster. **wrong** marks a result that is not finite or is more
than 5 % away from float64's.
"""
STEP_TITLE = "Whole training steps"
STEP_NOTE = """\
A step is zero_grad, forward, loss, backward and the optimizer's step. `The two lines` are the loss,
forward and backward to the logits, and the optimizer's step by themselves.
"""
LIMIT_NOTE = """\
What the task must move at least (cross-entropy: logits and targets read once, gradient written
once; the linear one: input and weight read once, their gradients written once; SGD: parameter,
gradient and buffer read, parameter and buffer written), divided by the time.
Peak memory is what a call adds to the resident memory of the process, its result included.
"""
ERROR_NOTE = """\
On the same inputs, relative: the loss's; the gradient's (or the parameters') worst element's to the
largest element; the gradient's median element's to itself. Smaller is better.
"""


def report(results: Results) -> str:
    m = results.machine
    parts = [f"# Benchmarks on {m.get('gpu') or m['cpu'] + ', ' + str(m['cores']) + ' cores'}\n"]
    parts += [results.provenance + ".\n", TIME_NOTE]
    if results.cases["training"]:
        steps = training_table(results.cases["training"], "a whole training step")
        parts += [f"## {STEP_TITLE}\n", STEP_NOTE, steps]
    parts.append("![Speed-up of every case](speedup.png)\n")
    for op, title in TITLES.items():
        if results.cases[op]:
            parts += [f"## {title}: time\n", speed_table(results.variants(op), results.cases[op])]
    parts += ["## Targets\n", target_table(results)]
    parts += ["## Distance from the physical limit\n", LIMIT_NOTE]
    parts.append("![Achieved bandwidth](bandwidth.png)\n")
    for op, title in TITLES.items():
        if results.cases[op]:
            parts += [f"### {title}\n", bandwidth_table(results.variants(op), results.cases[op])]
    parts += ["### Memory of fastopt beyond its result\n", memory_table(results)]
    parts += ["## Half precision: error against float64\n", ERROR_NOTE]
    for op in TITLES:
        if halves(results.cases[op]):
            parts.append(accuracy_table(results.variants(op), halves(results.cases[op])))
    parts.append("## Every dtype: error against float64\n")
    for op in TITLES:
        if results.cases[op]:
            parts.append(accuracy_table(results.variants(op), results.cases[op]))
    return "\n".join(parts)


def readme_table(results: Results, folder: Path) -> str:
    rows = []
    for op, title in TITLES.items():
        stock = VARIANTS[op][1]
        for name, case in results.cases[op].items():
            if name not in CPU_TARGETS or stock not in case:
                continue
            times = [in_time(case[v].median) for v in ("fastopt", stock)]
            other = "best of torch" if op == "sgd" else "compile"
            rows.append(
                [
                    f"{title}, {name}",
                    *times,
                    in_times(ratio(case, stock)),
                    in_times(ratio(case, other)),
                ]
            )
    head = [
        "",
        "fastopt",
        "torch",
        "torch / fastopt",
        "torch.compile (SGD: torch's best) / fastopt",
    ]
    steps = results.cases["training"]
    first = f"{training_table(steps, STEP_TITLE)}\n" if steps else ""
    return f"{first}{table(head, rows)}\nMeasured on {results.provenance}. [All figures]({folder}/report.md)."


# --- Pictures -------------------------------------------------------------------------------------


def draw_speedup(results: Results, path: Path) -> None:
    """Two bars per case, on a logarithmic axis on which 1 is 'as fast as torch'."""
    shown = {
        "cross_entropy": ("eager", "compile"),
        "linear_cross_entropy": ("eager", "chunked"),
        "sgd": ("for-loop", "best of torch"),
    }
    ops = [op for op in shown if results.cases[op]]
    heights = [len(results.cases[op]) + 1 for op in ops]
    figure = Figure(figsize=(9, 0.5 * sum(heights) + 1.2), layout="constrained")
    panels = figure.subplots(len(ops), height_ratios=heights, sharex=True, squeeze=False)
    highest, lowest = 2.0, 0.9
    for axes, op in zip(panels[:, 0], ops, strict=True):
        for row, (name, case) in enumerate(results.cases[op].items()):
            for baseline, y in zip(shown[op], (row - 0.2, row + 0.2), strict=True):
                value = ratio(case, baseline)
                if value is None:
                    continue
                target = results.targets(op, name).get(baseline, 1)
                axes.barh(y, value - 1, left=1, height=0.38, color=COLOURS[baseline])
                if target != 1:
                    axes.plot([target] * 2, [y - 0.19, y + 0.19], color="white", lw=3.4)
                    axes.plot([target] * 2, [y - 0.19, y + 0.19], color=TARGET_COLOUR, lw=1.8)
                axes.annotate(
                    in_times(value),
                    (max(value, target, 1), y),
                    xytext=(5, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=7.5,
                )
                highest, lowest = max(highest, value, target), min(lowest, value)
        axes.set_title(TITLES[op], loc="left", fontsize=11, fontweight="bold")
        axes.set_yticks(range(len(results.cases[op])), list(results.cases[op]), fontsize=8.5)
        axes.set_ylim(len(results.cases[op]) - 0.4, -0.6)
        axes.axvline(1, color="black", lw=1)
        axes.grid(axis="x", alpha=0.25)
        axes.set_axisbelow(True)
        axes.tick_params(axis="y", length=0)
        axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_xscale("log")
    axes.set_xlim(lowest * 0.95, highest * 1.3)
    ticks = [
        tick for tick in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if lowest <= tick <= highest
    ]
    axes.set_xticks(ticks, [f"{tick:g} x" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("time of torch / time of fastopt (to the right of 1: fastopt is faster)")

    legend = {"eager": "torch's default", "compile": "torch.compile"}
    if "linear_cross_entropy" in ops:
        legend["chunked"] = "torch's chunks"
    if "sgd" in ops:
        legend["best of torch"] = "best of torch's three SGDs"
    handles = [Patch(color=COLOURS[key]) for key in legend]
    handles.append(Line2D([], [], color=TARGET_COLOUR, lw=1.8))
    figure.legend(
        handles,
        [*legend.values(), "target"],
        loc="outside upper center",
        ncols=len(handles),
        frameon=False,
    )
    figure.savefig(path, dpi=140)


def draw_bandwidth(results: Results, path: Path) -> None:
    """A roofline: bandwidth achieved over the bytes that the task must move."""
    ops = [op for op in TITLES if results.cases[op]]
    figure = Figure(figsize=(5.5 * len(ops), 4.8), layout="constrained")
    panels = figure.subplots(1, len(ops), sharey=True, squeeze=False)[0]
    for panel, op in zip(panels, ops, strict=True):
        for variant in results.variants(op):
            entries = [case[variant] for case in results.cases[op].values() if variant in case]
            panel.scatter(
                [entry.info["bytes_moved"] for entry in entries],
                [entry.info["gb_per_s"] for entry in entries],
                s=58 if variant == "fastopt" else 30,
                marker="o" if variant == "fastopt" else "D",
                color=COLOURS[variant],
                alpha=0.85,
                label=NAMES.get(variant, variant),
                zorder=3 if variant == "fastopt" else 2,
            )
        panel.axhline(results.copy_gb_per_s, color="black", lw=1, ls="--")
        panel.annotate(
            f"copy in memory, {results.copy_gb_per_s:.0f} GB/s",
            (0.02, results.copy_gb_per_s),
            xycoords=("axes fraction", "data"),
            xytext=(0, 4),
            textcoords="offset points",
            fontsize=8.5,
        )
        panel.set(xscale="log", yscale="log", title=TITLES[op], xlabel="bytes the task must move")
        panel.grid(alpha=0.25)
        panel.legend(loc="lower right", frameon=False)
        panel.spines[["top", "right"]].set_visible(False)
        panel.xaxis.set_major_formatter(EngFormatter("B"))
    panels[0].set_ylabel("bytes / time, GB/s")
    figure.savefig(path, dpi=140)


# --- Files ----------------------------------------------------------------------------------------


def slim(raw: dict) -> dict:
    """The JSON without single durations, and without what names one machine or one folder."""
    kept = ("median", "iqr", "min", "max", "rounds")
    commit = {key: raw["commit_info"][key] for key in ("id", "time", "dirty")}
    return {
        "machine_info": raw["machine_info"],
        "commit_info": commit,
        "datetime": raw["datetime"],
        "benchmarks": [
            {
                "group": row["group"],
                "stats": {key: row["stats"][key] for key in kept},
                "extra_info": {
                    key: None if isinstance(value, float) and not math.isfinite(value) else value
                    for key, value in row["extra_info"].items()
                },
            }
            for row in raw["benchmarks"]
        ],
    }


def replace_between_markers(text: str, new: str) -> str:
    if BEGIN not in text or END not in text:
        raise SystemExit(f"the README has no {BEGIN} ... {END}")
    return text[: text.index(BEGIN) + len(BEGIN)] + f"\n{new}\n" + text[text.index(END) :]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "json", type=Path, nargs="+", help="written by pytest --benchmark-json, in one or more runs"
    )
    parser.add_argument("--results", type=Path, default=Path("build/bench"), help="where to write")
    parser.add_argument("--readme", type=Path, help="a README whose table to replace")
    options = parser.parse_args()

    raw, *more = (slim(json.loads(path.read_text())) for path in options.json)
    commands = [each["machine_info"]["command"] for each in (raw, *more)]
    raw["machine_info"]["command"] = "; ".join(dict.fromkeys(commands))
    for other in more:
        raw["benchmarks"] += other["benchmarks"]
    results = Results(raw)
    folder = options.results / results.slug
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(raw, indent=1) + "\n")
    (folder / "report.md").write_text(report(results))
    draw_speedup(results, folder / "speedup.png")
    draw_bandwidth(results, folder / "bandwidth.png")
    if options.readme:
        text = options.readme.read_text()
        options.readme.write_text(replace_between_markers(text, readme_table(results, folder)))

    print(target_table(results))
    print(f"More in {folder}/: report.md, speedup.png, bandwidth.png, results.json")


if __name__ == "__main__":
    main()
