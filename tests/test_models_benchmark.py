"""benchmarks/models/run.py in its smallest setting: what it writes is whole, and becomes a table."""

import importlib.util
import json

import pytest
import torch

from benchmarks import tables
from tests.tree import ROOT

SCRIPT = ROOT / "benchmarks/models/run.py"


@pytest.fixture
def script(monkeypatch):
    """The script as a module, in the process of the tests."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    spec = importlib.util.spec_from_file_location("models_run", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_model_is_measured_in_every_way(script, tmp_path):
    out = tmp_path / "models.json"
    assert script.main(["--quick", "--seconds", "0.01", "--threads", "1", "--json", str(out)]) == 0
    document = json.loads(out.read_text())
    modes = {(result["model"].split()[0], result["mode"].split(",")[0]) for result in document["results"]}
    expected = {("LSTM", "train"), ("LSTM", "inference"), ("LSTM", "one token at a time"), ("Transformer", "train"),
                ("Transformer", "inference")}  # fmt: skip
    if importlib.util.find_spec("transformers") is not None:
        expected |= {("BERT", "train"), ("BERT", "inference")}
        expected |= {("LLaMA-style", "train"), ("LLaMA-style", "greedy decode")}
    assert modes == expected and document["quick"] and document["machine"]["threads"] == 1
    for result in document["results"]:
        ways = result["candidates"]
        assert {"eager fp32", "eager bf16", "llmkernels fp32", "llmkernels bf16"} <= set(ways)
        assert all(way["per_second"] > 0.0 and way["peak_mb"] > 0.0 for way in ways.values())
        fastest = min(("eager fp32", "eager bf16"), key=lambda name: ways[name]["median"])
        assert result["best_eager"] == fastest
        assert ways["eager fp32"]["error"] == 0.0 and ways["llmkernels fp32"]["error"] < 2e-4
        assert set(result["ratios"]) == {name for name in ways if name.startswith("llmkernels")}
        assert result["bound"] is None or result["bound"] >= 1.0
    lines = tables.table(document).splitlines()
    assert len(lines) == 4 + len(document["results"]) and all(line.count("|") == 12 for line in lines[2:])


@pytest.mark.parametrize(
    "arguments, message",
    (
        (["--threads", "0"], "--threads is 0"),
        (["--only", "nonesuch"], "no model has 'nonesuch' in its name"),
        (["--json", "/nowhere/out.json"], "--json: no folder /nowhere"),
    ),
)
def test_wrong_arguments(script, arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        script.main(["--quick", *arguments])
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_a_wrong_answer_gets_no_time(script, monkeypatch):
    case = next(case for case in script.cases(script.QUICK) if case.mode.startswith("inference"))
    runners = dict(case.runners())
    answer = runners["llmkernels bf16"].answer
    runners["llmkernels bf16"].answer = lambda: 1.1 * answer()
    monkeypatch.setattr(script.Case, "runners", lambda self: iter(runners.items()))
    with pytest.raises(AssertionError, match="llmkernels bf16"):
        script.measure(case, 0.01)
