"""A dense network reads digits: 128 ReLU units and a softmax, on the images of scikit-learn; then in int8.

With llmkernels the loss is one pass over the logits; after training, `quantize` turns both layers to int8 weights with
int8 activations (W8A8).
"""

import copy
import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import llmkernels
from common import Study, main, size
from llmkernels import functional
from llmkernels.cli import UsageError

BATCH = 128


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
        self.loss = F.cross_entropy

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


def prepare(model: Model) -> str:
    model.loss = functional.cross_entropy
    return "the loss is functional.cross_entropy; the layers are torch's until they are quantized"


def run(args, console) -> int:
    if args.text is not None:
        raise UsageError("--text: this example reads images of digits, expected none")
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UsageError("scikit-learn is not installed, which has the images: pip install scikit-learn") from error
    digits = load_digits()
    images, labels = torch.tensor(digits.data, dtype=torch.float32) / 16.0, torch.tensor(digits.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(args.seed))
    images, labels = images[order], labels[order]
    cut = len(labels) * 4 // 5

    def batch(step: int) -> tuple[Tensor, Tensor]:
        chosen = torch.randint(cut, (BATCH,), generator=torch.Generator().manual_seed(step))
        return images[chosen], labels[chosen]

    study = Study("digits_classifier", args, console, Model().to(args.device), prepare)
    loss = lambda run, images, labels: run.model.loss(run.model(images), labels)
    study.train(batch, loss, items=BATCH, unit="images", rate=5e-3,
                slower="a step takes half a millisecond, nearly all of it calls")  # fmt: skip
    shown, known = images[cut:].to(args.device), labels[cut:].to(args.device)
    right = lambda model: float((model(shown).argmax(1) == known).float().mean())
    study.value("held-out accuracy", "share", right)
    small = copy.deepcopy(study.fast).eval()
    console.print(llmkernels.quantize(small, "w8a8", skip=()))
    with torch.no_grad():
        study.compare("held-out accuracy, fp32 and W8A8", "share", right(study.plain), right(small))
    study.compare("weights, fp32 and W8A8", "MB", size(study.plain), size(small), smaller=True)
    study.time("reading, fp32 and W8A8", "images", len(known), lambda: study.plain(shown), lambda: small(shown),
               slower="layers of 64 x 128 and 128 x 10 are too small to gain from int8")  # fmt: skip
    return study.finish()


if __name__ == "__main__":
    sys.exit(main(run, __doc__, steps=300))
