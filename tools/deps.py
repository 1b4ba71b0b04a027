"""Write into dvc.yaml the modules that each stage imports: python -m tools.deps. `--check` only reports stale lists."""

import re
import sys
from pathlib import Path

import yaml

from ddpm.runtime.imports import stage_files

GRAPH = Path("dvc.yaml")


def refreshed(text: str, root: Path) -> str:
    """The text of dvc.yaml with each stage's deps set to the modules that it imports; all else byte for byte.

    A line whose module stays keeps its comment. The modules are sorted, at the place of the first one that was listed,
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
        wanted = [lines[ours[m]] if m in ours else f"      - {m}\n" for m in stage_files(stage, root)]
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
