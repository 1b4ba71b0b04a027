"""Write into dvc.yaml the modules that each stage imports: python -m tools.deps. `--check` only reports stale lists."""

import ast
import re
import sys
from pathlib import Path

import yaml

GRAPH = Path("dvc.yaml")
PACKAGES = ("ddpm", "stages")


def closure(module: str, root: Path, seen: set[str] | None = None) -> set[str]:
    """The files of the project that a module imports anywhere in its text, directly or not, itself included.

    Packages' own files are left out: `__init__.py` holds at most a docstring.

    Args:
        module: dotted name, such as `stages.train`.
        root: the folder that holds `ddpm/` and `stages/`.
    """
    seen = set() if seen is None else seen
    path = module.replace(".", "/") + ".py"
    if path in seen or not (root / path).exists():
        return seen
    seen.add(path)
    for node in ast.walk(ast.parse((root / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for name in node.names:
                closure(name.name, root, seen)
        elif isinstance(node, ast.ImportFrom):
            above = module.split(".")[: -node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for imported in (base, *(f"{base}.{name.name}" for name in node.names)):
                closure(imported, root, seen)
    return {path for path in seen if path.split("/")[0] in PACKAGES}


def refreshed(text: str, root: Path) -> str:
    """The text of dvc.yaml with the modules of each stage's deps as they are imported; all else byte for byte.

    A line whose module stays keeps its comment. Modules come sorted, at the place of the first one that was listed,
    or else at the end of the list.
    """
    for stage in yaml.safe_load(text)["stages"]:
        block = re.search(
            rf"^  {re.escape(stage)}:\n"
            r"(?:(?!  ?\S).*\n)*?"  # not past the stage's own lines
            r"    deps:\n((?:(?: *\n)*      .*\n)+)",
            text,
            re.MULTILINE,
        )
        if block is None:
            raise SystemExit(f"error: dvc.yaml: stages.{stage} has no list `deps:` in the style of the others")
        lines = block[1].splitlines(keepends=True)
        ours = {match[1]: n for n, line in enumerate(lines) if (match := re.match(r" +- ((?:ddpm|stages)/\S+)", line))}
        first = min(ours.values(), default=len(lines))
        kept = [line for n, line in enumerate(lines) if n not in ours.values()]
        wanted = [lines[ours[m]] if m in ours else f"      - {m}\n" for m in sorted(closure(f"stages.{stage}", root))]
        text = text[: block.start(1)] + "".join([*kept[:first], *wanted, *kept[first:]]) + text[block.end(1) :]
    return text


def main() -> None:
    """Rewrite dvc.yaml where it is stale, or exit with 1 and say so."""
    text = GRAPH.read_text(encoding="utf-8")
    new = refreshed(text, Path())
    if new == text:
        return
    if "--check" in sys.argv[1:]:
        raise SystemExit("error: dvc.yaml: the deps of a stage are not the modules that it imports: run make deps")
    GRAPH.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
