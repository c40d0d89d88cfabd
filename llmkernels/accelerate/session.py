"""One run of `accelerate` over a model."""

from collections.abc import Callable

import torch
from torch import nn

from llmkernels import registry
from llmkernels.accelerate import residual, swap, timing, whole
from llmkernels.accelerate.candidate import Candidate, at_home, device_of, parameter_dtype, tensors_of
from llmkernels.accelerate.conversion import Conversion
from llmkernels.accelerate.huggingface import has_pretrained
from llmkernels.accelerate.kinds import recognise
from llmkernels.accelerate.report import Entry, Memory, Report
from llmkernels.accelerate.select import Selection
from llmkernels.accelerate.snapshot import Snapshot, bytes_kept
from llmkernels.accelerate.trials import CANNOT_RUN
from llmkernels.accelerate.verify import Verifier
from llmkernels.quantization.model import bytes_of


class Session:
    """What is asked for, and what is known on the way: the report, verifications, what modules are given."""

    def __init__(
        self, model: nn.Module, backend: str | None, include, exclude, conversion: Conversion, *, verify: bool,
        benchmark: bool,
    ):  # fmt: skip
        self.model, self.backend, self.conversion = model, backend, conversion
        self.selection = Selection(model, include, exclude)
        self.verifier = Verifier(backend)
        self.verify, self.benchmark = verify, benchmark
        self.report = Report(model=model)
        self.captured: dict[int, tuple] = {}
        self._speeds: dict[tuple, float] = {}

    def run(self, example_inputs) -> Report:
        call = None if example_inputs is None else whole.as_call(example_inputs)
        start, bytes_before = Snapshot(self.model), bytes_of(self.model)
        original = None
        if call is not None and self.conversion.dtype is not None:
            original, _ = whole.run(self.model, call)
        to_quantize = self.conversion.to_quantize()
        self.conversion.cast()
        before = self._replace(None if call is None else self.conversion.cast_inputs(call), to_quantize)
        if call is None or self._agrees(before, original or before, call, start):
            self._quantize(start, original or before, call)
        self.report.memory = Memory(bytes_before, bytes_of(self.model), bytes_kept(self.model))
        return self.report

    def _replace(self, call, to_quantize: set[int]) -> whole.Outcome | None:
        """Swap what is to be swapped, with an entry for all that is recognised. Returns the outcome before that."""
        homes = _homes(self.model)
        found = {}
        for module in self.model.modules():
            with at_home(*homes[id(module)]):
                unknown = isinstance(module, swap.Accelerated) or id(module) in to_quantize
                found[id(module)] = None if unknown else recognise(module)
        before = None
        if call is not None:
            watched = [m for m in self.model.modules() if found[id(m)] is not None and found[id(m)][0]]
            before, self.captured = whole.run(self.model, call, watched)
        covered: set[int] = set()
        for path, module in self.model.named_modules():
            if isinstance(module, swap.Accelerated):
                name = swap.original_class(module).__name__
                covered |= _covered(module, module._llmkernels[0])
                self.report.entries.append(Entry(path, name, True, "swapped before", replacement="swapped before"))
            elif found[id(module)] is not None and id(module) not in covered:
                with at_home(*homes[id(module)]):
                    self.report.entries.append(self._consider(path, module, *found[id(module)], covered))
        self._fuse_sums(homes)
        if has_pretrained(self.model):
            from llmkernels.accelerate.huggingface import settings

            self.report.entries += settings.apply(self)
        return before

    def _fuse_sums(self, homes) -> None:
        """Swap layers for the sums before norms that are swapped by now."""
        for path, module in self.model.named_modules():
            candidate = None if isinstance(module, swap.Accelerated) else residual.recognise(module)
            if candidate is not None:
                with at_home(*homes[id(module)]):
                    entry = self._consider(path, module, [candidate], "", set())
                if CANNOT_RUN not in entry.detail:  # a layer of another structure, whose parts are swapped
                    self.report.entries.append(entry)

    def _agrees(self, before: whole.Outcome, original: whole.Outcome, call, start: Snapshot) -> bool:
        """Whether the whole model does, in its own dtype and in the one that it is cast to; if not, all is undone."""
        with self.conversion.as_it_was():
            agrees, sentence = whole.compare(original, whole.run(self.model, call)[0])
        dtype, scheme = self.conversion.names()
        if dtype is not None:
            after, _ = whole.run(self.model, self.conversion.cast_inputs(call))
            also, cast_sentence = whole.compare(before, after)
            agrees, sentence = agrees and also, f"as it was, {sentence}; in {dtype}, {cast_sentence}"
            self.report.lost[dtype] = whole.error(original, after)
        self.report.whole = sentence
        if not agrees:
            start.come_back()
            names = " and ".join(filter(None, (dtype, scheme)))
            self.report.lost = {}
            self.report.whole = f"{sentence}; nothing was swapped{f', nor is it in {names}' if names else ''}"
            self.report.entries = [_taken_back(entry) for entry in self.report.entries]
        return agrees

    def _quantize(self, start: Snapshot, original: whole.Outcome | None, call) -> None:
        dtype, scheme = self.conversion.names()
        self.report.dtype = dtype
        if scheme is None:
            return
        self.conversion.quantize()
        self.report.quantization = self.conversion.report
        if call is not None:
            after, _ = whole.run(self.model, self.conversion.cast_inputs(call), gradients=False)
            self.report.lost[scheme] = whole.error(original, after)
        if not self.conversion.keeps_weights:
            start.forget_originals()

    def _consider(self, path: str, module: nn.Module, found: list[Candidate], why: str, covered: set[int]) -> Entry:
        name = type(module).__name__
        if found and (reason := self.selection.why_not(module)) is not None:
            return Entry(path, name, False, reason)
        reasons = [] if found else [why]
        for candidate in found:
            runs, refusal = self.runs_on(candidate.op, _example(module, candidate))
            error = speed = None
            if refusal is None and (self.verify or len(found) > 1):
                refusal, error = self.verifier.verify(module, candidate, self.captured.get(id(module)))
            if refusal is not None:
                reasons.append(refusal)
                if CANNOT_RUN in refusal and candidate.trials is None:  # nor could it beside the others
                    break
                continue
            if self.benchmark:
                speed = self._speed(module, candidate)
                if (refusal := timing.refusal(speed)) is not None:
                    return Entry(path, name, False, refusal, error, speed=speed)
            covered |= _covered(module, candidate.run)
            swap.swap(module, candidate.run, self.backend)
            detail = f"{candidate.description} on {runs}"
            return Entry(path, name, True, detail, error, candidate.description, runs, speed)
        return Entry(path, name, False, "; ".join(dict.fromkeys(reasons)))

    def _speed(self, module: nn.Module, candidate: Candidate) -> float:
        key = (candidate.description, candidate.alike(module)) if candidate.alike is not None else (id(module),)
        given = self.captured.get(id(module))
        return self.measured(key, lambda: timing.speed(module, candidate, given, self.backend))

    def measured(self, key: tuple, measure: Callable[[], float]) -> float:
        """What was measured for modules that are alike, or what `measure` finds."""
        if key not in self._speeds:
            self._speeds[key] = measure()
        return self._speeds[key]

    def runs_on(self, op: str, tensors: tuple) -> tuple[str, str | None]:
        """The backend that would run `op`, and None; or why there is nothing to gain."""
        explained = registry.explain_call(op, tensors, self.backend)
        if explained.chosen is None:
            return "", f"backend {self.backend!r} cannot run it: {explained.reasons[self.backend]}"
        if explained.chosen == "torch" and registry.forced_backend(self.backend) is None:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in explained.reasons.items() if reason)
            return "", f"nothing faster than plain PyTorch runs it here ({reasons or f'no kernel of {op}'})"
        return explained.chosen, None


def _covered(module: nn.Module, run: Callable) -> set[int]:
    return {id(getattr(module, child)) for child in getattr(run, "covers", ())}


def _taken_back(entry: Entry) -> Entry:
    if not entry.swapped or entry.detail == "swapped before":
        return entry
    return Entry(entry.path, entry.module, False, "the whole model disagrees", entry.error, speed=entry.speed)


def _example(module: nn.Module, candidate: Candidate) -> tuple:
    if candidate.example is not None:
        return candidate.example(module)
    example = torch.empty((1, *candidate.normalized_shape), dtype=parameter_dtype(module), device=device_of(module))
    return (*[example] * 3, None, None, None)


def _homes(model: nn.Module) -> dict[int, tuple[torch.dtype, torch.device]]:
    """Dtype and device of each module; of one without tensors those of what it is in."""
    homes: dict[int, tuple[torch.dtype, torch.device]] = {}

    def visit(module: nn.Module, outer: tuple[torch.dtype, torch.device]) -> None:
        if id(module) in homes:
            return
        with at_home(*outer):
            own = (parameter_dtype(module), device_of(module)) if tensors_of(module) else outer
        homes[id(module)] = own
        for child in module.children():
            visit(child, own)

    visit(model, (torch.float32, torch.device("cpu")))
    return homes
