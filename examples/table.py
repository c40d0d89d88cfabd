"""Write the table of examples/README.md from the JSON files that the examples left in examples/results."""

import json
import sys
from pathlib import Path

from common import RESULTS, number

EXAMPLES = {
    "lstm_language_model": "an LSTM writes Python; state carried through training and sampling",
    "transformer_language_model": "Transformers of 2 and 6 layers write Python; a cache of keys and values",
    "self_attention_from_scratch": "attention as textbooks write it: untouched, and three lines replaced",
    "bert_classifier": "BERT sorts customers' questions into intents; then in int8",
    "lstm_text_classifier": "an LSTM sorts lines of code by module; packed, recurrent dropout",
    "digits_classifier": "a dense network reads digits; then with int8 weights and activations",
    "llama_chat_decode": "a LLaMA-style model trains and generates in fp32, bf16, int8 and int4",
    "seq2seq_translation": "an encoder-decoder writes dates and numbers in words, and back",
    "sentence_search": "a sentence encoder finds the docstring for a question; then in int8",
}
BEGIN, END = "<!-- results -->", "<!-- end of results -->"


def lines() -> list[str]:
    """The table's lines, an example's rows together; examples that were not run are left out."""
    found = ["| example | measured | PyTorch | llmkernels | | where slower, why |", "|---|---|---|---|---|---|"]
    machines = set()
    for name in EXAMPLES:
        for path in sorted(RESULTS.glob(f"{name}*.json")):
            document = json.loads(path.read_text())
            facts = document["machine"]
            machines.add(f"{facts['cpu']} ({facts['isa']}), {document['config']['threads']} threads, "
                         f"torch {facts['torch']}, {facts['date']}")  # fmt: skip
            for index, row in enumerate(document["rows"]):
                title = f"[{document['name']}]({name}.py)" if index == 0 else ""
                ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}x"
                slower = row["slower"] if row["ratio"] is not None and row["ratio"] < 1.0 else None
                values = (number(row["plain"]), number(row["fast"]), ratio, slower or "")
                found.append(f"| {title} | {row['name']} ({row['unit']}) | {' | '.join(values)} |")
    return [*sorted(machines), "", *found]


def main() -> int:
    path = Path(__file__).with_name("README.md")
    text = path.read_text()
    before, rest = text.split(BEGIN)
    path.write_text(before + BEGIN + "\n" + "\n".join(lines()) + "\n" + END + rest.split(END)[1])
    return 0


if __name__ == "__main__":
    sys.exit(main())
