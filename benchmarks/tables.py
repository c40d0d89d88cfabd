"""Write the tables of results in README.md and docs/*.md from the committed measurements: `make tables`.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; NAME is the path of a measurement under
benchmarks/results/ without .json; where there is none yet, the page says so. tests/test_docs.py checks that pages and
measurements agree.
"""

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/results"
EAGER = ("eager fp32", "eager bf16")
PEERS = ("torch eager", "torch.compile", "ONNX Runtime")
TABLE = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def _milliseconds(value: float) -> str:
    return f"{value:.2f}" if value >= 0.1 else f"{value * 1e3:.1f} us"


def table(document: dict) -> str:
    """The measurements of `llmkernels bench --json` in Markdown: the fastest of our backends beside its peers."""
    if (other := OTHERS.get(document.get("table"))) is not None:
        return other(document)
    facts = document["machine"]
    where = (
        facts["gpu"] if facts["device"] == "cuda" else f"{facts['cpu']} ({facts['isa']}), {facts['threads']} thread(s)"
    )
    cache = "cold" if facts["cold"] else "warm"
    results = [result for result in document["results"] if result["ratios"]]  # none: no peer was right
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


def accuracy(document: dict) -> str:
    """The measurements of benchmarks/quantization.py in Markdown."""
    facts, config = document["machine"], document["config"]
    lines = [
        f"{facts['date']}, torch {facts['torch']}; {config['parameters']:,} parameters trained for {config['steps']}"
        f" steps; {config['held_out_bytes']:,} bytes held out.",
        "",
        "| | bits per weight | error of weights: normal | trained | of products: normal | trained | bits per byte | of"
        " fp32's | calibrated, of fp32's |",
        "|---" * 9 + "|",
    ]
    for result in document["results"]:
        row = [result["name"], f"{result['bits_per_weight']:.2f}"]
        for key in ("weight_error", "product_error"):
            row += [f"{result[key][data]:.2%}" if key in result else "-" for data in ("normal", "trained")]
        row.append(f"{result['bits_per_byte']:.4f}")
        for key in ("bits_per_byte_ratio", "bits_per_byte_ratio_calibrated"):
            row.append(f"{result[key] - 1.0:+.2%}" if key in result else "-")
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def models(document: dict) -> str:
    """The measurements of benchmarks/models/run.py in Markdown."""
    facts = document["machine"]
    lines = [
        f"{facts['date']}, {facts['cpu']} ({facts['isa']}), {facts['threads']} thread(s), torch {facts['torch']}; items"
        " per second (peak memory in MB), medians; the better of eager fp32 and bf16 in bold.",
        "",
        "| model | | eager fp32 | eager bf16 | ours fp32 | ours bf16 | quantized | times eager fp32 | times eager bf16 "
        "| bound | aim |",
        "|---" * 11 + "|",
    ]
    for result in document["results"]:
        found, best = result["candidates"], result["best_eager"]
        bold = lambda text, name, best=best: f"**{text}**" if name == best else text
        cell = lambda name, found=found: f"{found[name]['per_second']:,.0f} ({found[name]['peak_mb']:,.0f})"
        row = [result["model"], f"{result['mode']}, {result['unit']}"]
        row += [bold(cell(name), name) for name in EAGER]
        row += [cell("llmkernels fp32"), cell("llmkernels bf16")]
        schemes = [name for name in result["ratios"] if name.split()[-1] not in ("fp32", "bf16")]
        row.append(", ".join(f"{name.split()[-1]} {cell(name)}" for name in schemes) or "-")
        for peer in EAGER:
            times = (f"{name.split()[-1]} {ratios[peer]:.2f}x" for name, ratios in result["ratios"].items())
            row.append(bold(", ".join(times), peer))
        row.append("-" if result["bound"] is None else f"{result['bound']:.2f}x")
        lines.append(f"| {' | '.join(row)} | {result['goal']} |")
    return "\n".join(lines)


def sampling(document: dict) -> str:
    """The measurements of benchmarks/ops/bench_sample.py in Markdown."""
    facts, lines = document["machine"], []
    lines += [
        f"{facts['date']}, {facts['cpu']} ({facts['isa']}), {facts['threads']} thread(s), torch {facts['torch']};"
        f" {document['vocabulary']:,} logits a row, medians.",
        "",
        "| rows | dtype | options | ours | usual code | times faster |",
        "|---" * 6 + "|",
    ]
    for result in document["results"]:
        options = ", ".join(f"{name}={value}" for name, value in result["options"].items())
        ours, usual = (_milliseconds(result["candidates"][name]["median"]) for name in ("llmkernels", "usual"))
        row = (str(result["rows"]), result["dtype"], options, ours, usual, f"**{result['ratio']:.1f}x**")
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


OTHERS = {"accuracy": accuracy, "models": models, "sampling": sampling}


def _rate(result: dict, milliseconds: float, work: bool) -> str:
    if work:
        return f"{result['flops'] / milliseconds / 1e6:.0f}" if result.get("flops") else "-"
    return f"{result['copy_ms'] / milliseconds:.0%}" if result["copy_ms"] else "-"


def filled(text: str) -> str:
    """`text` with every table made anew."""

    def replacement(found: re.Match) -> str:
        path = RESULTS / f"{found[2]}.json"
        made = table(json.loads(path.read_text())) if path.is_file() else f"Not measured yet: {path.name}."
        return found[1] + made + "\n" + found[3]

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
