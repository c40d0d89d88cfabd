"""Write the tables of results in README.md and docs/*.md from the committed measurements: `make tables`.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; NAME is the path of a measurement under
benchmarks/results/ without .json. tests/test_docs.py checks that pages and measurements agree.
"""

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/results"
PEERS = ("torch eager", "torch.compile", "ONNX Runtime")
TABLE = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def _milliseconds(value: float) -> str:
    return f"{value:.2f}" if value >= 0.1 else f"{value * 1e3:.1f} us"


def table(document: dict) -> str:
    """The measurements of `llmkernels bench --json` in Markdown: the fastest of our backends beside its peers."""
    facts = document["machine"]
    where = (
        facts["gpu"] if facts["device"] == "cuda" else f"{facts['cpu']} ({facts['isa']}), {facts['threads']} thread(s)"
    )
    cache = "cold" if facts["cold"] else "warm"
    results = document["results"]
    names = {name for result in results for name in result["candidates"] if name not in result["ratios"]}
    named = names <= set(PEERS)  # else each case has peers of its own, of which the best is shown
    peers = PEERS if named else ("best peer",)
    work = any(result.get("flops") for result in results)
    last = "GFLOP/s" if work else "of copy speed"
    lines = [
        f"{facts['date']}, {where}, torch {facts['torch']}, {cache} caches; ms unless said, medians.",
        "",
        f"| case | | backend | ours | {' | '.join(peers)} | times the best peer | {last} |",
        "|---" * (6 + len(peers)) + "|",
    ]
    for result in results:
        times = {name: value["median"] for name, value in result["candidates"].items()}
        ours, best = min(result["ratios"], key=lambda name: times[name]), result["best_peer"]
        shown = [_milliseconds(times[name]) if name in times else "-" for name in PEERS]
        shown = shown if named else [f"{_milliseconds(times[best])} {best}"]
        row = (result["case"], result["mode"], ours, _milliseconds(times[ours]), *shown)
        lines.append(f"| {' | '.join(row)} | **{result['ratios'][ours]:.2f}x** | {_rate(result, times[ours], work)} |")
    return "\n".join(lines)


def _rate(result: dict, milliseconds: float, work: bool) -> str:
    if work:
        return f"{result['flops'] / milliseconds / 1e6:.0f}" if result.get("flops") else "-"
    return f"{result['copy_ms'] / milliseconds:.0%}" if result["copy_ms"] else "-"


def filled(text: str) -> str:
    """`text` with every table made anew."""

    def replacement(found: re.Match) -> str:
        return found[1] + table(json.loads((RESULTS / f"{found[2]}.json").read_text())) + "\n" + found[3]

    return TABLE.sub(replacement, text)


def pages() -> list[Path]:
    """The pages that may have tables."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def main() -> int:
    for page in pages():
        page.write_text(filled(page.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
