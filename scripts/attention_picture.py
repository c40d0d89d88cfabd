"""docs/attention-options.svg: which keys each option lets a query see. `python scripts/attention_picture.py`

Nothing is drawn by hand: every panel is a call of the function with equal scores and an identity matrix as v, whose
outputs are the weights.
"""

import dataclasses
import itertools
from pathlib import Path

import matplotlib
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import Rectangle

from llmkernels import functional, use_backend

PICTURE = Path(__file__).resolve().parent.parent / "docs/attention-options.svg"
SEEN, NEW, SINK, NOTHING, GRID = "#0072b2", "#009e73", "#e69f00", "#f3dcd4", "#c8c8c8"


@dataclasses.dataclass
class Panel:
    """`weights` `[S, T]`; what is more than those is None."""

    title: str
    note: str
    weights: torch.Tensor
    new: torch.Tensor | None = None  # [T]: keys that were appended
    beyond: torch.Tensor | None = None  # [S, T]: places of a cache that no query of the row may look at
    sink: bool = False


def _attend(rows: int, keys: int, **options) -> torch.Tensor:
    q, k, v = torch.zeros(1, rows, 4), torch.zeros(1, keys, 4), torch.eye(keys)[None]
    return functional.scaled_dot_product_attention(q, k, v, **options)[0]


def _varlen() -> torch.Tensor:
    lengths = [torch.tensor(ends, dtype=torch.int32) for ends in ((0, 3, 4, 8), (0, 5, 7, 12))]
    q, k, v = torch.zeros(8, 1, 4), torch.zeros(12, 1, 4), torch.eye(12)[:, None]
    return functional.attention_varlen(q, k, v, *lengths, 4, 5, causal="bottom_right")[:, 0]


def _cache() -> Panel:
    """Two sequences of four queries each, that append as many keys to 6 and to 2."""
    room, lengths = 12, torch.tensor([6, 2], dtype=torch.int32)
    k_cache, v_cache = torch.zeros(2, room, 1, 4), torch.zeros(2, room, 1, room)
    v_cache[:, :, 0] = torch.eye(room)
    v = torch.stack([torch.eye(room)[n : n + 4, None] for n in lengths.tolist()])
    weights = functional.attention_kvcache(
        torch.zeros(2, 4, 1, 4), k_cache, v_cache, k=torch.zeros(2, 4, 1, 4), v=v, cache_seqlens=lengths,
        causal="bottom_right",
    )[:, :, 0]  # fmt: skip
    places = torch.arange(room).expand(2, 4, room)
    start = lengths[:, None, None]
    return Panel(
        "attention_kvcache, causal=\"bottom_right\"",
        "cache_seqlens=[6, 2], then 4 keys (green) are appended",
        weights.flatten(0, 1),
        ((places >= start) & (places < start + 4)).flatten(0, 1),
        (places >= start + 4).flatten(0, 1),
    )  # fmt: skip


def panels() -> list[Panel]:
    """What the picture shows, row by row."""
    padding = torch.arange(8) < 6
    torch.manual_seed(1)
    return [
        Panel("no option", "every query sees every key", _attend(8, 12)),
        Panel("is_causal=True, causal=\"top_left\"", "query i sees keys 0 to i", _attend(8, 12, is_causal=True)),
        Panel("causal=\"bottom_right\"", "the last query sees all keys", _attend(8, 12, causal="bottom_right")),
        Panel("causal=\"bottom_right\", S > T", "rows without keys give 0", _attend(8, 5, causal="bottom_right")),
        Panel("window=(3, 1)", "bottom-right: 3 keys before, 1 after", _attend(8, 12, window=(3, 1))),
        Panel("window=(3, -1), causal=\"top_left\"", "causal closes the right side",
              _attend(8, 12, window=(3, -1), causal="top_left")),
        Panel("attn_mask (a padding), is_causal=True", "both hold",
              _attend(8, 8, attn_mask=padding, is_causal=True)),
        Panel("dropout_p=0.3", "an element is dropped or scaled", _attend(8, 12, dropout_p=0.3)),
        Panel("alibi_slopes", "a bias, by distance (bottom-right)", _attend(8, 12, alibi_slopes=torch.full((1,), 0.4))),
        Panel("sinks, window=(3, 0)", "a score that has no value (orange)",
              _attend(8, 12, window=(3, 0), sinks=torch.zeros(1)), sink=True),
        Panel("attention_varlen, causal=\"bottom_right\"", "3 packed sequences", _varlen()),
        _cache(),
    ]  # fmt: skip


def _cells(panel: Panel) -> list[list[tuple[str, float] | None]]:
    """(color, opacity) of each place, None where nothing is seen."""
    shaded = panel.title.startswith("alibi")
    rows = []
    for i, weights in enumerate(panel.weights.tolist()):
        if not any(weights):
            rows.append([(NOTHING, 1.0)] * len(weights))
            continue
        colors = [NEW if panel.new is not None and panel.new[i, j] else SEEN for j in range(len(weights))]
        opacity = [round(weight / max(weights), 2) if shaded else 1.0 for weight in weights]
        rows.append(
            [(color, alpha) if weight else None for color, alpha, weight in zip(colors, opacity, weights, strict=True)]
        )
    return rows


def _draw(axes, panel: Panel) -> None:
    rows, keys = panel.weights.shape
    for i, cells in enumerate(_cells(panel)):
        first = 0
        for cell, run in itertools.groupby(cells):  # few shapes make a small file
            count = len(list(run))
            if cell is not None:
                axes.add_patch(Rectangle((first, i), count, 1, facecolor=cell[0], alpha=cell[1], linewidth=0))
            first += count
    lines = {"color": GRID, "linewidth": 0.6}
    axes.hlines(range(rows + 1), 0, keys, **lines)
    axes.vlines(range(keys + 1), 0, rows, **lines)
    if panel.beyond is not None:
        axes.plot(*(panel.beyond.nonzero().flip(1) + 0.5).T.tolist(), "x", color="#aaaaaa", markersize=4)
    if panel.sink:
        axes.add_patch(Rectangle((-1.6, 0), 1, rows, facecolor=SINK, linewidth=0))
        axes.hlines(range(rows + 1), -1.6, -0.6, **lines)
    axes.set(xlim=(-1.9 if panel.sink else -0.1, keys + 0.1), ylim=(rows + 0.1, -0.1), aspect="equal")
    axes.set_xticks([0.5, keys - 0.5], ["0", str(keys - 1)])
    axes.set_yticks([0.5, rows - 0.5], ["0", str(rows - 1)])
    axes.tick_params(length=0, labelsize=8)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_title(panel.title, fontsize=10, fontweight="bold", pad=18)
    axes.text(0.5, 1.02, panel.note, transform=axes.transAxes, ha="center", va="bottom", fontsize=9, color="#444444")


def main() -> None:
    # Text stays text, and the file depends on nothing but the panels.
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "attention", "font.family": "sans-serif"})
    with use_backend("torch"):
        found = panels()
    figure, grid = plt.subplots(3, 4, figsize=(16, 10), layout="constrained")
    for axes, panel in zip(grid.flat, found, strict=True):
        _draw(axes, panel)
    for axes in grid[:, 0]:
        axes.set_ylabel("query")
    for axes in grid[-1]:
        axes.set_xlabel("key")
    figure.savefig(PICTURE, metadata={"Date": None})
    plt.close(figure)
    print(PICTURE.relative_to(Path.cwd()) if PICTURE.is_relative_to(Path.cwd()) else PICTURE)


if __name__ == "__main__":
    main()
