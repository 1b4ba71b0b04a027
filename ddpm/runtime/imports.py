"""Which files of this repository a stage is made of, read from their text: nothing is imported."""

import ast
import hashlib
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("ddpm", "stages")


def stage_files(stage: str, root: Path | None = None) -> list[str]:
    """The stage's script and every module that it imports, directly or not: sorted paths relative to the repository.

    Package files (`__init__.py`) hold at most a docstring and are left out. A stage without a script has no files.

    Args:
        root: the folder that holds `ddpm/` and `stages/`; None for this checkout's.
    """
    root = root or ROOT
    found: set[str] = set()
    pending = [f"stages.{stage}"]
    while pending:
        module = pending.pop()
        path = f"{module.replace('.', '/')}.py"
        if path not in found and (root / path).exists():
            found.add(path)
            pending += _imported(root / path)
    return sorted(found)


def _imported(path: Path) -> list[str]:
    """The names in a file's import statements, anywhere in it, that may be modules of this repository."""
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            names += [node.module, *(f"{node.module}.{name.name}" for name in node.names)]
        elif isinstance(node, ast.Import):
            names += [name.name for name in node.names]
    return [name for name in names if name.split(".")[0] in PACKAGES]


def code_of(stage: str) -> dict[str, str]:
    """The SHA-256 of each file of a stage, by its path."""
    return {path: hashlib.sha256((ROOT / path).read_bytes()).hexdigest() for path in stage_files(stage)}
