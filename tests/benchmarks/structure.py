"""Counts what makes the package easy or hard to maintain: sizes, upward imports, names with several meanings, code for several processes.

    python -m tests.benchmarks.structure [ROOT]

ROOT is a folder with a ``ddpmctl`` package (this repository). Builds of the network are counted in a real run of one epoch.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from tests.test_layers import ORDER, violations

BUILDS = """
import sys
from ddpmctl.registry import NETWORKS
inner, built = NETWORKS.get, []
def get(name):
    network = inner(name)
    def build(*arguments):
        import torch
        built.append(torch.get_default_device().type)
        return network(*arguments)
    return build
NETWORKS.get = get
def show(event):
    print("network builds before the first step:", ", ".join(built))
    raise SystemExit
if sys.argv[1] == "old":
    from ddpmctl.engine.trainer import Trainer
else:
    from ddpmctl.training.trainer import Trainer
seen = Trainer.step
def step(trainer):
    if len(trainer.images) > 8:
        show(None)
    return seen(trainer)
Trainer.step = step
sys.argv = ["ddpmctl", "train", "--epochs", "1", "--scenes", "4", "--width", "8", "--timesteps", "4", "--batch-size", "4", "--runs-dir", sys.argv[2]]
from ddpmctl.cli.app import main
main()
"""


def modules(root: Path) -> Iterator[tuple[Path, ast.Module, int]]:
    """Yield each file of the package, its syntax tree and its number of lines."""
    for file in sorted((root / "ddpmctl").rglob("*.py")):
        text = file.read_text(encoding="utf-8")
        yield file.relative_to(root / "ddpmctl"), ast.parse(text), len(text.splitlines())


def main() -> None:
    """Print the figures."""
    root = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parents[2]).resolve()
    found = list(modules(root))
    folders: dict[str, int] = defaultdict(int)
    classes: list[tuple[int, str]] = []
    names: dict[str, list[str]] = defaultdict(list)
    files: dict[str, list[str]] = defaultdict(list)
    for file, tree, lines in found:
        folders[file.parts[0] if len(file.parts) > 1 else "(top)"] += lines
        files[file.name].append(str(file))
        for node in tree.body:
            if isinstance(node, ast.ClassDef):
                classes.append(((node.end_lineno or 0) - node.lineno + 1, f"{file}: {node.name}"))
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
                names[node.name].append(str(file))
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and re.fullmatch(r"[A-Z]\w*[a-z]\w*", node.targets[0].id):
                names[node.targets[0].id].append(str(file))
    print(f"lines of the package: {sum(folders.values())}")
    print("lines by folder: " + ", ".join(f"{name} {count}" for name, count in sorted(folders.items(), key=lambda item: -item[1])))
    longest = sorted(((lines, str(file)) for file, _, lines in found), reverse=True)[:3]
    print("longest files: " + ", ".join(f"{file} {lines}" for lines, file in longest))
    in_training = sorted(((lines, str(file)) for file, _, lines in found if file.parts[0] == "training"), reverse=True)
    print("files of training/: " + ", ".join(f"{Path(file).stem} {lines}" for lines, file in in_training))
    print("longest classes: " + ", ".join(f"{name} {lines}" for lines, name in sorted(classes, reverse=True)[:3]))
    # A command and the function of the engine that it is named after do not count: typer wants the command's name.
    several = {name: places for name, places in names.items() if len(places) > 1}
    print("public names in several files: " + ("; ".join(f"{name} ({', '.join(places)})" for name, places in sorted(several.items())) or "none"))
    apart = {name: places for name, places in files.items() if len(places) > 1 and name != "__init__.py" and not all("cli" in p for p in places)}
    print("file names in several folders: " + ("; ".join(", ".join(places) for places in apart.values()) or "none"))
    if {part for parts in ORDER for part in parts} >= {file.parts[0].removesuffix(".py") for file, _, _ in found}:
        upward = [line for line in violations(root / "ddpmctl") if " imports ddpmctl." in line]
        print(f"imports that run upwards: {len(upward)}" + "".join(f"\n  {line}" for line in upward))
    single = re.compile(r"\bis_single\b|(?:ranks|job)\.alone\b")
    places = {
        str(file): count
        for file, _, _ in found
        if (count := len(single.findall((root / "ddpmctl" / file).read_text(encoding="utf-8")))) and file.parts[0] != "distributed"
    }
    print(f"tests for a single process outside of distributed/: {sum(places.values())} {places or ''}")
    for document in [root / "README.md", *sorted((root / "docs").glob("*.md"))]:
        print(f"{document.relative_to(root)}: {document.stat().st_size} bytes")
    with tempfile.TemporaryDirectory() as runs:
        kind = "old" if (root / "ddpmctl" / "engine").is_dir() else "new"
        environment = {**os.environ, "PYTHONPATH": str(root)}
        done = subprocess.run([sys.executable, "-c", BUILDS, kind, runs], cwd=root, env=environment, capture_output=True, text=True, check=False, timeout=300)
        print(done.stdout.strip() or done.stderr[-2000:])


if __name__ == "__main__":
    main()
