"""A text that `llmkernels accelerate` compares a whole model on, by the tokenizer of the model's folder."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmkernels.cli import UsageError
from llmkernels.quantization.checkpoints import hugging_face


class Prompt:
    """The tokens of a text, and what the model made of them before anything was done to it."""

    def __init__(self, folder: Path, model: nn.Module, text: str):
        """Raises: UsageError: there is no tokenizer, no token, or the model cannot run on them."""
        self.inputs = _inputs(folder, model, text)
        self.before = self._run(model)

    def _run(self, model: nn.Module) -> Tensor:
        try:
            with torch.no_grad():
                result = model(**self.inputs)
        except Exception as error:  # a model may raise anything on tokens that are not its own
            raise UsageError(f"--prompt: the model cannot run on it: {hugging_face.first_line(error)}") from error
        return (result["logits"] if "logits" in result else result[0]).float()

    def compare(self, model: nn.Module) -> dict:
        """What the model makes of the tokens now, beside what it made of them before.

        `error` is |now - before| / |before| of the logits (without a head: of the last hidden states); `same` the share
        of places with the same likeliest token; `loss` in nats per token, (before, now), of a causal model.
        """
        now = self._run(model)
        ids = self.inputs["input_ids"]
        found = {"tokens": ids.numel(), "error": float((now - self.before).norm() / self.before.norm())}
        if now.shape[-1] != getattr(model.config, "vocab_size", None):
            return found
        found["same"] = float((now.argmax(-1) == self.before.argmax(-1)).float().mean())
        if "labels" in self.inputs and ids.shape[1] > 1:
            loss = lambda logits: float(F.cross_entropy(logits[0, :-1], ids[0, 1:]))
            found["loss"] = loss(self.before), loss(now)
        return found


def _inputs(folder: Path, model: nn.Module, text: str) -> dict[str, Tensor]:
    try:
        tokenizer = hugging_face.transformers().AutoTokenizer.from_pretrained(folder, local_files_only=True)
        inputs = dict(tokenizer(text, return_tensors="pt"))
    except Exception as error:  # a folder may have none, or one of another library
        raise UsageError(
            f"--prompt: {folder} has no tokenizer that can be read: {hugging_face.first_line(error)}"
        ) from error
    inputs = {name: inputs[name].to(model.device) for name in ("input_ids", "attention_mask") if name in inputs}
    if not inputs["input_ids"].numel():
        raise UsageError("--prompt: the text has no token")
    longest = getattr(model.config, "max_position_embeddings", None)
    if isinstance(longest, int) and inputs["input_ids"].shape[1] > longest:
        raise UsageError(f"--prompt: the text has {inputs['input_ids'].shape[1]} tokens, expected {longest} at most")
    if getattr(model.config, "is_encoder_decoder", False):
        return inputs | {"decoder_input_ids": inputs["input_ids"]}
    names = hugging_face.transformers().models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    causal = type(model).__name__ in names.values()
    return inputs | ({"labels": inputs["input_ids"]} if causal else {})
