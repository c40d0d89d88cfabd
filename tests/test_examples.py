"""Every example in a small setting: what it claims is checked, and its bad input is one line and exit status 2."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "examples"
# Steps, and how far the loss has fallen by then.
SMALL = {
    "lstm_language_model": (24, 0.9),
    "transformer_language_model": (6, 0.95),
    "self_attention_from_scratch": (8, 0.95),
    "bert_classifier": (60, 0.7),
    "lstm_text_classifier": (200, 0.95),
    "digits_classifier": (150, 0.2),
    "llama_chat_decode": (8, 0.9),
    "seq2seq_translation": (20, 0.8),
    "sentence_search": (12, 1.0),
}
MORE = {"seq2seq_translation": ("--questions", "12")}
# What the same weights must give both ways.
SAME = {
    "transformer_language_model": "same_text",
    "llama_chat_decode": "same_text",
    "seq2seq_translation": "same_answers",
    "sentence_search": "same_ranking",
}
FLOORS = {"digits_classifier": 0.9, "lstm_text_classifier": 0.25, "bert_classifier": 0.3}  # held-out accuracy


def run(name: str, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(FOLDER / f"{name}.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=500)


@pytest.mark.parametrize("name", SMALL)
def test_both_ways_agree(name, tmp_path):
    steps, fallen = SMALL[name]
    done = run(name, "--steps", str(steps), "--out", str(tmp_path), *MORE.get(name, ()))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = sorted(tmp_path.glob("*.json"))
    assert found and all(path.with_suffix(".png").stat().st_size > 1000 for path in found)
    for path in found:
        document = json.loads(path.read_text())
        assert document["name"].startswith(name) and document["agreement"]["agrees"]
        losses = document["losses"]
        assert len(losses["PyTorch"]) == len(losses["llmkernels"]) == steps
        assert min(losses["llmkernels"][-3:]) < fallen * losses["llmkernels"][0]
        rows = {row["name"]: row for row in document["rows"]}
        accuracy = rows.get("held-out accuracy")
        if name in FLOORS:
            assert min(accuracy["plain"], accuracy["fast"]) > FLOORS[name]
        assert name not in SAME or document["facts"][SAME[name]] is True
        if name == "sentence_search":  # the nearest of all, in integers too
            assert document["facts"]["same_nearest_int8"] and document["facts"]["same_nearest_w8a8"]
        for row in rows.values():
            assert row["plain"] >= 0.0 and row["fast"] >= 0.0
            if row["ratio"] is None and row["unit"] in ("share", "nats"):
                assert abs(row["plain"] - row["fast"]) < 0.05, row


@pytest.mark.parametrize(
    "name, arguments, message",
    [
        ("lstm_language_model", ("--text", "nowhere.txt"), "--text: cannot read nowhere.txt"),
        ("transformer_language_model", ("--text", "empty.txt"), "empty.txt has 0 bytes, expected at least"),
        ("lstm_language_model", ("--device", "cuda"), "--device cuda: no CUDA device"),
        ("bert_classifier", ("--model", "."), "--model: . has no config.json"),
        ("sentence_search", ("--model", "nowhere"), "--model: nowhere has no config.json"),
        ("digits_classifier", ("--steps", "1"), "--steps is 1, expected at least 4"),
        ("seq2seq_translation", ("--text", "empty.txt"), "makes its own questions"),
        ("seq2seq_translation", ("--questions", "0"), "--questions is 0, expected at least 1"),
    ],
)
def test_bad_input_is_one_line_and_status_two(name, arguments, message, tmp_path, monkeypatch):
    import torch

    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").touch()
    done = run(name, *arguments)
    assert done.returncode == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
