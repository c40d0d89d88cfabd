"""The picture of a demo: loss curves, how far they differ, tokens per second."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def draw(result: dict, path: Path) -> None:
    """Draw the `result` that the demo writes as JSON: a row of panels for each model."""
    models = result["models"]
    figure, rows = plt.subplots(
        len(models), 3, figsize=(14, 4 * len(models)), width_ratios=(5, 4, 2), layout="constrained", squeeze=False
    )
    for panels, (name, part) in zip(rows, models.items(), strict=True):
        _draw_row(panels, name, part)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _draw_row(panels, name: str, part: dict) -> None:
    curves, apart, speed = panels
    eager, fast, other = (part["losses"][name] for name in ("eager", "accelerated", "eager, other order"))
    steps = range(1, len(eager) + 1)
    curves.plot(steps, eager, color="#777777", linewidth=4, alpha=0.5, label="eager PyTorch")
    curves.plot(steps, fast, color="#d62728", linewidth=1.2, label="accelerated")
    curves.set(xlabel="step", ylabel="training loss (nats per byte)", title=f"{name}: same seed, same data")
    curves.legend()
    tiny = 1e-9  # a logarithmic axis cannot show zero
    for color, curve, label in (("#d62728", fast, "accelerated"), ("#777777", other, "eager, other order")):
        difference = [abs(a - b) + tiny for a, b in zip(eager, curve, strict=True)]
        apart.semilogy(steps, difference, color=color, label=label)
    apart.axhline(part["agreement"]["allowed"], color="black", linestyle=":", label="allowed")
    apart.set(xlabel="step", ylabel="difference from eager", title="how far the curves are apart")
    apart.legend(fontsize="small")
    tokens = part["tokens_per_second"]
    bars = speed.bar(("eager", "accelerated"), (tokens["eager"], tokens["accelerated"]), color=("#999999", "#d62728"))
    speed.bar_label(bars, fmt="{:,.0f}")
    speed.set(ylabel="tokens per second", title=f"{part['speedup']['median']:.2f}x")
