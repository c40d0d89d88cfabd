"""Write the tables of results in README.md from the committed measurements: `make tables`.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; NAME is the path of a measurement under
benchmarks/results/ without .json. tests/test_docs.py checks that README and measurements agree.
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
    lines = [
        f"{facts['date']}, {where}, torch {facts['torch']}, {cache} caches; ms unless said, medians.",
        "",
        f"| case | | backend | ours | {' | '.join(PEERS)} | times the best peer | of copy speed |",
        "|---" * (6 + len(PEERS)) + "|",
    ]
    for result in document["results"]:
        times = {name: value["median"] for name, value in result["candidates"].items()}
        ours = min(result["ratios"], key=lambda name: times[name])
        peers = [_milliseconds(times[name]) if name in times else "-" for name in PEERS]
        copy = f"{result['copy_ms'] / times[ours]:.0%}" if result["copy_ms"] else "-"
        row = (result["case"], result["mode"], ours, _milliseconds(times[ours]), *peers)
        lines.append(f"| {' | '.join(row)} | **{result['ratios'][ours]:.2f}x** | {copy} |")
    return "\n".join(lines)


def filled(text: str) -> str:
    """`text` with every table made anew."""

    def replacement(found: re.Match) -> str:
        return found[1] + table(json.loads((RESULTS / f"{found[2]}.json").read_text())) + "\n" + found[3]

    return TABLE.sub(replacement, text)


def main() -> int:
    readme = ROOT / "README.md"
    readme.write_text(filled(readme.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
