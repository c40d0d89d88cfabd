"""The report of `llmkernels accelerate`: as lines, JSON, text and a page of HTML that needs no other file."""

import html
import json

from llmkernels import _html, machine
from llmkernels.accelerate.swap import original_class
from llmkernels.quantization.model import bytes_of
from llmkernels.quantization.report import bytes_text

_STYLE = """
body { font: 15px/1.45 sans-serif; margin: 2em auto; max-width: 80em; padding: 0 1em; color: #222; }
table { border-collapse: collapse; margin: 1.5em 0; }
caption { text-align: left; font-weight: bold; padding: 0.4em 0; }
th, td { text-align: left; vertical-align: top; padding: 0.25em 0.8em 0.25em 0; border-bottom: 1px solid #ddd; }
td { font-family: monospace; font-size: 13px; }
"""


def sentence(work) -> str:
    """What was loaded."""
    model = work.model
    weights = "random weights, since there are no others" if work.random else "its weights"
    count = sum(parameter.numel() for parameter in model.parameters())
    return (
        f"{work.args.model}: {type(model).__name__}, {count:,} parameters, {str(model.dtype).removeprefix('torch.')}, "
        f"{bytes_text(bytes_of(model))}, {weights}"
    )


def document(work, report, prompt: dict | None) -> dict:
    """All there is to say, in plain Python values."""
    model, out = work.model, work.args.out
    return {
        "machine": machine.facts(),
        "model": {
            "source": str(work.args.model),
            "class": original_class(model).__name__,
            "dtype": str(model.dtype).removeprefix("torch."),
            "random_weights": work.random,
            "bytes": bytes_of(model),
        },
        "accelerate": report.to_dict(),
        "prompt": prompt,
        "files": {}
        if out is None or not out.is_dir()
        else {path.name: path.stat().st_size for path in sorted(out.iterdir())},
        "seconds": {name: round(seconds, 3) for name, seconds in work.seconds.items()},
    }


def lines(document: dict) -> list[str]:
    """What the report of `accelerate` does not say."""
    found = []
    if (prompt := document["prompt"]) is not None:
        line = f"on the prompt, {prompt['tokens']} tokens: outputs are off by {prompt['error']:.1e} of their size"
        if "same" in prompt:
            line += f", the likeliest token is the same at {prompt['same']:.1%} of the places"
        if "loss" in prompt:
            line += ", loss {:.4f} -> {:.4f} nats per token".format(*prompt["loss"])
        found.append(line)
    if document["files"]:
        sizes = ", ".join(f"{name} {bytes_text(count)}" for name, count in document["files"].items())
        found.append(f"files: {sizes}")
    found.append("seconds: " + ", ".join(f"{name} {seconds:.1f}" for name, seconds in document["seconds"].items()))
    return found


def _facts(document: dict) -> list[tuple[str, str]]:
    model, facts = document["model"], document["machine"]
    weights = "random" if model["random_weights"] else "those of the folder"
    return [
        ("model", f"{model['source']}: {model['class']}"),
        ("weights", f"{weights}, {model['dtype']}, {bytes_text(model['bytes'])} now"),
        ("machine", f"{facts['cpu']}, {facts['isa'] or 'no compiled kernels'}, GPU: {facts['gpu'] or 'none'}"),
        ("software", f"llmkernels {facts['llmkernels']}, torch {facts['torch']}, Python {facts['python']}"),
        ("date", facts["date"]),
    ]


def as_json(document: dict, report) -> str:
    return json.dumps(document, indent=1) + "\n"


def as_text(document: dict, report) -> str:
    facts = "\n".join(f"{name}: {value}" for name, value in _facts(document))
    parts = [facts, str(report), "\n".join(lines(document))]
    return "\n\n".join(parts) + "\n"


def as_html(document: dict, report) -> str:
    title = f"{document['model']['class']}, accelerated" + (" and quantized" if report.quantization is not None else "")
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        _html.table("", ("", ""), _facts(document)),
        report._repr_html_(),
        *(f"<p>{html.escape(line)}</p>" for line in lines(document)),
    ]
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{_STYLE}</style>'
    return f"<!doctype html>\n<html><head>{head}</head><body>\n" + "\n".join(parts) + "\n</body></html>\n"


WRITERS = {".html": as_html, ".json": as_json, ".txt": as_text}
