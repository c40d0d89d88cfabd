"""`make new-op NAME=x`: a new op family whose tests pass, to be filled with the real thing.

The skeleton is y = x * scale on the torch backend. Its templates are the files in scripts/new_op/; CONTRIBUTING.md says
in which order to go on.
"""

import argparse
import re
import sys
from pathlib import Path

TEMPLATES = Path(__file__).with_name("new_op")
# template -> the file it becomes
FILES = {
    "op.py.txt": "llmkernels/ops/{name}/op.py",
    "reference.py.txt": "llmkernels/ops/{name}/reference.py",
    "cases.py.txt": "llmkernels/ops/{name}/cases.py",
    "bench.py.txt": "llmkernels/ops/{name}/bench.py",
    "header.h.txt": "csrc/ops/{name}/{name}.h",
    "test.py.txt": "tests/ops/test_{name}.py",
    "bench_op.py.txt": "benchmarks/ops/bench_{name}.py",
}


def filled(template: str, name: str) -> str:
    camel = "".join(word.capitalize() for word in name.split("_"))
    return (TEMPLATES / template).read_text().replace("__op__", name).replace("__Op__", camel)


def create(root: Path, name: str) -> list[str]:
    """Write the skeleton of `name` into the tree at `root`. Returns what was made and changed, a line each.

    Raises: ValueError, the name is no identifier or something of this name exists; nothing has been written then.
    """
    if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", name):
        raise ValueError(f"NAME is {name!r}, expected lower-case words joined by _, as in `make new-op NAME=swiglu`")
    paths = {template: root / path.format(name=name) for template, path in FILES.items()}
    package = root / "llmkernels/ops" / name
    existing = [path for path in (package, *paths.values()) if path.exists()]
    if existing:
        raise ValueError(f"{existing[0].relative_to(root)} exists already")
    for template, path in paths.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(filled(template, name))
    (package / "__init__.py").touch()
    functional = root / "llmkernels/functional.py"
    line = f"from llmkernels.ops.{name}.op import {name}\n"
    functional.write_text(functional.read_text().replace("\n__all__ = [", f'{line}\n__all__ = [\n    "{name}",', 1))
    with (root / "tests/coverage.toml").open("a") as coverage:
        coverage.write(filled("coverage.toml.txt", name))
    made = [f"made    {path.relative_to(root)}" for path in (package / "__init__.py", *paths.values())]
    return [*made, "changed llmkernels/functional.py", "changed tests/coverage.toml"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", default="")
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parent.parent, help="another checkout")
    args = parser.parse_args()
    try:
        print("\n".join(create(args.root, args.name)))
    except ValueError as error:
        print(f"new-op: {error}", file=sys.stderr)
        return 2
    print(f"now: make test OP={args.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
