"""benchmarks/models/run.py in its smallest setting: what it writes is whole, and becomes a table."""

import importlib.util
import json
import subprocess
import sys

import pytest

from benchmarks import tables
from tests.tree import ROOT

SCRIPT = ROOT / "benchmarks/models/run.py"


def run(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(SCRIPT), "--quick", "--seconds", "0.01", "--threads", "1", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=500)


def test_every_model_is_measured_in_every_way(tmp_path):
    out = tmp_path / "models.json"
    done = run("--json", str(out))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
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


def test_wrong_arguments(tmp_path):
    for arguments, message in (
        (("--threads", "0"), "--threads is 0"),
        (("--only", "nonesuch"), "no model has 'nonesuch' in its name"),
        (("--json", str(tmp_path / "nowhere/out.json")), "--json: no folder"),
    ):
        done = run(*arguments)
        assert done.returncode == 2 and message in done.stderr


def test_a_wrong_answer_gets_no_time(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    spec = importlib.util.spec_from_file_location("models_run", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    case = next(case for case in script.cases(script.QUICK) if case.mode.startswith("inference"))
    runners = dict(case.runners())
    answer = runners["llmkernels bf16"].answer
    runners["llmkernels bf16"].answer = lambda: 1.1 * answer()
    monkeypatch.setattr(script.Case, "runners", lambda self: iter(runners.items()))
    with pytest.raises(AssertionError, match="llmkernels bf16"):
        script.measure(case, 0.01)
