"""The picture of a demo: loss curves, how far they differ, tokens per second."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def draw(result: dict, path: Path) -> None:
    """Draw the `result` that the demo writes as JSON."""
    figure, (curves, apart, speed) = plt.subplots(1, 3, figsize=(14, 4), width_ratios=(5, 4, 2), layout="constrained")
    eager, fast, other = (result["losses"][name] for name in ("eager", "accelerated", "eager, other thread count"))
    steps = range(1, len(eager) + 1)
    curves.plot(steps, eager, color="#777777", linewidth=4, alpha=0.5, label="eager PyTorch")
    curves.plot(steps, fast, color="#d62728", linewidth=1.2, label="accelerated")
    curves.set(xlabel="step", ylabel="training loss (nats per byte)", title="same seed, same data")
    curves.legend()
    tiny = 1e-9  # a logarithmic axis cannot show zero
    apart.semilogy(
        steps, [abs(a - b) + tiny for a, b in zip(eager, fast, strict=True)], color="#d62728", label="accelerated"
    )
    apart.semilogy(
        steps,
        [abs(a - b) + tiny for a, b in zip(eager, other, strict=True)],
        color="#777777",
        label="eager, other threads",
    )
    apart.axhline(result["agreement"]["allowed"], color="black", linestyle=":", label="allowed")
    apart.set(xlabel="step", ylabel="difference from eager", title="how far the curves are apart")
    apart.legend(fontsize="small")
    tokens = result["tokens_per_second"]
    bars = speed.bar(("eager", "accelerated"), (tokens["eager"], tokens["accelerated"]), color=("#999999", "#d62728"))
    speed.bar_label(bars, fmt="{:,.0f}")
    speed.set(ylabel="tokens per second", title=f"{result['speedup']['median']:.2f}x")
    figure.savefig(path, dpi=120)
    plt.close(figure)
