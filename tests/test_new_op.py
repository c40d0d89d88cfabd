"""`make new-op NAME=x`: the skeleton passes the battery as it is, and nothing is overwritten."""

from tests.tree import copy_tree, python


def test_the_skeleton_passes_its_tests(tmp_path):
    tree = copy_tree(tmp_path / "tree", compiled=True)
    script = ("scripts/new_op.py", "half_scaled")
    assert "now: make test OP=half_scaled" in python(*script, cwd=tree)
    out = python("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/ops", cwd=tree, OP="half_scaled")
    assert "failed" not in out and "half_scaled" in out
    out = python("-m", "llmkernels.cli", "check", "half_scaled", cwd=tree)
    assert "FAIL" not in out
    out = python("-m", "llmkernels.cli", "bench", "half_scaled", "--no-compile", "--seconds", "0.01", cwd=tree)
    assert "half_scaled-4096x1024" in out
    assert "half_scaled exists already" in python(*script, cwd=tree, expect=2)
    assert "expected lower-case words joined by _" in python("scripts/new_op.py", "Half-Scaled", cwd=tree, expect=2)
