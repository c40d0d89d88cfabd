"""What is written for people is true: the tables of results, the code in README, the names in the public surface."""

import html
import inspect
import re
import runpy

import pytest
import torch

import llmkernels
from benchmarks import tables
from llmkernels import functional, nn, registry
from tests.tree import ROOT

README = (ROOT / "README.md").read_text()


def test_tables_are_made_from_the_measurements():
    assert tables.TABLE.search(README), "README.md has no table of results"
    for page in tables.pages():
        assert tables.filled(page.read_text()) == page.read_text(), f"{page.name}: run `make tables`"


def test_python_code_in_readme_runs():
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 3
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})


def test_python_code_in_attention_md_runs():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/attention.md").read_text(), re.DOTALL)
    assert len(blocks) >= 3
    with llmkernels.use_backend("torch"):
        for block in blocks:
            exec(compile(block, "docs/attention.md", "exec"), {})


def test_python_code_in_accelerate_md_runs():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/accelerate.md").read_text(), re.DOTALL)
    assert len(blocks) == 5
    for block in blocks:
        exec(compile(block, "docs/accelerate.md", "exec"), {"__name__": "docs"})


def test_python_code_in_generation_md_runs():
    pytest.importorskip("transformers")
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/generation.md").read_text(), re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        exec(compile(block, "docs/generation.md", "exec"), {"__name__": "docs"})


def test_accelerate_md_explains_every_option_and_kind():
    page = (ROOT / "docs/accelerate.md").read_text()
    for option in inspect.signature(llmkernels.accelerate).parameters.values():
        assert option.kind is not option.KEYWORD_ONLY or f"{option.name}=" in page or f"`{option.name}`" in page
    for name in ("LayerNorm", "MultiheadAttention", "LSTMCell", "CrossEntropyLoss", "AttentionMaskInterface"):
        assert f"`{name}`" in page or name in page


def test_the_picture_of_attention_is_what_the_functions_do():
    """Every panel is there by its words; every option of attention is explained on the page."""
    script = runpy.run_path(str(ROOT / "scripts/attention_picture.py"))
    drawn = html.unescape((ROOT / "docs/attention-options.svg").read_text())
    with llmkernels.use_backend("torch"):
        panels = script["panels"]()
    assert all(panel.title in drawn and panel.note in drawn for panel in panels)
    page = (ROOT / "docs/attention.md").read_text()
    for name in ("scaled_dot_product_attention", "attention_varlen", "attention_kvcache", "merge_attention"):
        for option in inspect.signature(getattr(functional, name)).parameters.values():
            if option.kind is option.KEYWORD_ONLY and option.name not in ("k", "v", "backend"):
                assert f"`{option.name}" in page, f"docs/attention.md does not explain {name}'s {option.name}"


def test_every_op_and_module_is_in_readme():
    for name in (*registry.ops(), *functional.__all__, *nn.__all__):
        assert f"`{name}" in README or f".{name}" in README, f"README.md does not mention {name}"


@pytest.mark.parametrize(
    "module", (llmkernels, functional, nn, llmkernels.autograd), ids=lambda module: module.__name__
)
def test_public_names_exist_and_are_documented(module):
    for name in module.__all__:
        thing = getattr(module, name)
        assert thing.__doc__ and len(thing.__doc__) > 40, f"{module.__name__}.{name} has no docstring"


def test_functional_signatures_begin_like_torchs():
    for name in ("layer_norm", "rms_norm"):
        ours = list(inspect.signature(getattr(functional, name)).parameters.values())
        theirs = inspect.signature(getattr(torch.nn.functional, name)).parameters.values()
        for mine, other in zip(ours, theirs, strict=False):
            assert (mine.name, mine.default) == (other.name, other.default)
        assert all(mine.kind is mine.KEYWORD_ONLY for mine in ours[len(theirs) :])
