"""The chart of a benchmark run: how many times faster than the best peer."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def draw(results: list, title: str, path: Path) -> None:
    """One bar for each case and backend of ours (not the plain-PyTorch one); 1 is the best peer."""
    bars = [
        (f"{result.case}  {result.mode}  (best peer: {result.best_peer})", name, value)
        for result in results
        for name, value in result.ratios.items()
        if name != "torch"
    ]
    longest = max((len(f"{label}  {name}") for label, name, _ in bars), default=0)
    # Inches: six for the bars, and what a label's letters take.
    figure, axes = plt.subplots(figsize=(6 + 0.08 * longest, 1.2 + 0.32 * max(len(bars), 1)), layout="constrained")
    colors = ["#2ca02c" if value >= 1.0 else "#d62728" for _, _, value in bars]
    drawn = axes.barh([f"{label}  {name}" for label, name, _ in bars], [value for _, _, value in bars], color=colors)
    axes.bar_label(drawn, fmt="%.2fx", padding=3)
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set(xlabel="times faster than the best peer in the same run", title=title)
    axes.invert_yaxis()
    figure.savefig(path, dpi=110)
    plt.close(figure)
