"""The demo: one small CNN, trained on real digits twice from the same seed.

Once with torch's loss and optimizer, once with the two lines swapped to fastopt's. Prints a table
and draws build/demo.png: both loss curves over one another, and the time of each phase of a step.

The two trainings take their steps in turns, and each begins every other turn, so that whatever
else the machine is doing slows both alike. Times are medians over the steps.

    python bench/train_digits.py
"""

import argparse
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from tqdm import tqdm

import fastopt

SEED, BATCH, WARM_UP = 0, 128, 20
LEARNING_RATE = 0.02
COLOURS = {"torch": "#495057", "fastopt": "#d9480f"}
PHASES = ("forward", "loss", "backward", "optimizer")


def torch_pair(net: nn.Module):
    criterion = torch.nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(net.parameters(), LEARNING_RATE, momentum=0.9)
    return criterion, optimizer


def fastopt_pair(net: nn.Module):
    criterion = fastopt.CrossEntropyLoss()
    optimizer = fastopt.SGD(net.parameters(), LEARNING_RATE, momentum=0.9)
    return criterion, optimizer


@dataclass
class Digits:
    """Scikit-learn's 1797 handwritten digits of 8 x 8 pixels; a fifth of each kind is the test."""

    train_images: Tensor  # (N, 1, 8, 8), mean 0 and standard deviation 1 over the training images
    test_images: Tensor
    train_labels: Tensor  # (N,)
    test_labels: Tensor

    @classmethod
    def load(cls) -> "Digits":
        images, labels = load_digits(return_X_y=True)
        parts = train_test_split(images, labels, test_size=0.2, stratify=labels, random_state=SEED)
        train_images, test_images, train_labels, test_labels = map(torch.from_numpy, parts)
        mean, std = train_images.mean(), train_images.std()
        train_images, test_images = (
            ((images - mean) / std).float().view(-1, 1, 8, 8)
            for images in (train_images, test_images)
        )
        return cls(train_images, test_images, train_labels, test_labels)

    def batches(self, epochs: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Shuffled, and each batch moved by up to a pixel, which is worth 1 % of accuracy."""
        random = torch.Generator().manual_seed(SEED)
        paper = self.train_images.min().item()
        for _ in range(epochs):
            order = torch.randperm(len(self.train_labels), generator=random)
            for rows in order.split(BATCH)[: len(order) // BATCH]:
                down, right = torch.randint(3, (2,), generator=random).tolist()
                padded = F.pad(self.train_images[rows], (1, 1, 1, 1), value=paper)
                yield padded[..., down : down + 8, right : right + 8], self.train_labels[rows]


def make_net() -> nn.Module:
    torch.manual_seed(SEED)
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(64, 64, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * 2 * 2, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )


@dataclass
class Training:
    name: str
    net: nn.Module
    criterion: nn.Module
    optimizer: torch.optim.Optimizer
    losses: list[float] = field(default_factory=list)
    seconds: dict[str, list[float]] = field(default_factory=lambda: {p: [] for p in PHASES})

    def step(self, images: Tensor, labels: Tensor) -> None:
        """One ordinary step, cut at the logits so that the loss can be timed by itself."""
        self.optimizer.zero_grad()
        clock = [time.perf_counter()]
        logits = self.net(images)
        clock.append(time.perf_counter())
        leaf = logits.detach().requires_grad_()
        loss = self.criterion(leaf, labels)
        loss.backward()
        clock.append(time.perf_counter())
        logits.backward(leaf.grad)
        clock.append(time.perf_counter())
        self.optimizer.step()
        clock.append(time.perf_counter())
        for phase, start, end in zip(PHASES, clock, clock[1:], strict=False):
            self.seconds[phase].append(end - start)
        self.losses.append(loss.item())

    def milliseconds(self, phase: str) -> float:
        return 1e3 * statistics.median(self.seconds[phase][WARM_UP:])

    @torch.no_grad()
    def predict(self, images: Tensor) -> Tensor:
        return self.net(images).argmax(1)


def train(digits: Digits, epochs: int) -> tuple[Training, Training]:
    trainings = tuple(
        Training(name, net, *pair(net))
        for name, pair, net in (
            ("torch", torch_pair, make_net()),
            ("fastopt", fastopt_pair, make_net()),
        )
    )
    stock, ours = trainings
    progress = tqdm(
        list(digits.batches(epochs)), desc="both, in turns", unit="step", mininterval=0.5
    )
    for number, (images, labels) in enumerate(progress):
        for training in (stock, ours) if number % 2 else (ours, stock):
            training.step(images, labels)
        losses = {training.name: f"{training.losses[-1]:.4f}" for training in trainings}
        progress.set_postfix(losses, refresh=False)
    return stock, ours


def last_epoch(losses: list[float], epochs: int) -> float:
    return statistics.mean(losses[-len(losses) // epochs :])


def accuracy(training: Training, digits: Digits) -> float:
    right = training.predict(digits.test_images) == digits.test_labels
    return right.double().mean().item()


def print_table(stock: Training, ours: Training, digits: Digits, epochs: int) -> None:
    rows = [("", "torch", "fastopt", "torch / fastopt")]
    final = [f"{last_epoch(each.losses, epochs):.6f}" for each in (stock, ours)]
    rows.append(("final loss (mean of the last epoch)", *final, ""))
    rows.append(
        ("test accuracy", *(f"{100 * accuracy(each, digits):.2f} %" for each in (stock, ours)), "")
    )
    for phase in ("loss", "optimizer"):
        times = [each.milliseconds(phase) for each in (stock, ours)]
        rows.append(
            (
                f"{phase}, ms per step" + (" (forward + backward)" if phase == "loss" else ""),
                *(f"{ms:.4f}" for ms in times),
                f"{times[0] / times[1]:.2f} x",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    print()
    for row in rows:
        cells = [row[0].ljust(widths[0])] + [
            cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)
        ]
        print("  ".join(cells))
    gap = max(abs(a - b) for a, b in zip(stock.losses, ours.losses, strict=True))
    print(f"\nlargest difference between the two loss curves: {gap:.1e}")


def draw(stock: Training, ours: Training, digits: Digits, path: Path) -> None:
    figure = Figure(figsize=(12, 7.6), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(1, 4.2))
    draw_digits(top, ours, digits)
    curves, times = bottom.subfigures(1, 2, width_ratios=(1.25, 1))
    draw_curves(curves, stock, ours)
    draw_times(times, stock, ours)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=130)


def draw_digits(figure, ours: Training, digits: Digits) -> None:
    """Test digits as the net trained with fastopt reads them: its mistakes first."""
    read = ours.predict(digits.test_images)
    wrong = (read != digits.test_labels).nonzero().flatten().tolist()
    right = (read == digits.test_labels).nonzero().flatten().tolist()
    figure.suptitle(
        f"Test digits, and what the net trained with fastopt reads "
        f"({len(right)} of {len(read)} right; mistakes in red)",
        fontsize=11,
    )
    for panel, row in zip(figure.subplots(1, 18), (wrong[:6] + right)[:18], strict=True):
        panel.imshow(digits.test_images[row, 0], cmap="gray_r")
        mistake = row in wrong
        text = f"{read[row]}, is {digits.test_labels[row]}" if mistake else f"{read[row]}"
        panel.set_title(text, fontsize=10, color="#e03131" if mistake else "#2b8a3e")
        panel.set_axis_off()


def draw_curves(figure, stock: Training, ours: Training) -> None:
    loss, gap = figure.subplots(2, 1, height_ratios=(3, 1), sharex=True)
    loss.plot(stock.losses, color=COLOURS["torch"], lw=5, alpha=0.4, label="torch")
    loss.plot(ours.losses, color=COLOURS["fastopt"], lw=1.1, label="fastopt")
    loss.set(yscale="log", ylabel="training loss", title="Same seed, same curve")
    loss.legend(frameon=False)
    difference = [abs(a - b) for a, b in zip(stock.losses, ours.losses, strict=True)]
    gap.plot(difference, color="#1c7ed6", lw=1)
    gap.set(ylabel="|difference|", xlabel="step")
    gap.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    gap.set_ylim(bottom=0)
    for panel in (loss, gap):
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)


def draw_times(figure, stock: Training, ours: Training) -> None:
    """A panel per phase, each with its own scale: the phases differ by a factor of a hundred."""
    figure.suptitle("Time per step, median, ms", fontsize=12)
    shown = {"loss": "loss\n(forward + backward)", "optimizer": "optimizer step"}
    shown |= {
        "forward": "net forward\n(the same code)",
        "backward": "net backward\n(the same code)",
    }
    for panel, (phase, title) in zip(figure.subplots(2, 2).flat, shown.items(), strict=True):
        times = [each.milliseconds(phase) for each in (stock, ours)]
        bars = panel.bar(["torch", "fastopt"], times, color=list(COLOURS.values()), width=0.62)
        panel.bar_label(bars, [f"{ms:.3f}" for ms in times], padding=2)
        panel.set_ylim(0, 1.3 * max(times))
        panel.set_yticks([])
        panel.spines[["top", "right", "left"]].set_visible(False)
        panel.set_title(title, fontsize=10)
        if phase in ("loss", "optimizer"):
            panel.annotate(
                f"{times[0] / times[1]:.2f} x",
                (0.5, 0.93),
                xycoords="axes fraction",
                ha="center",
                va="top",
                fontsize=13,
                fontweight="bold",
                color=COLOURS["fastopt"],
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--picture", type=Path, default=Path("build/demo.png"))
    options = parser.parse_args()

    digits = Digits.load()
    stock, ours = train(digits, options.epochs)
    print_table(stock, ours, digits, options.epochs)
    draw(stock, ours, digits, options.picture)
    print(f"picture: {options.picture}")


if __name__ == "__main__":
    main()
