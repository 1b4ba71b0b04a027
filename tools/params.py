"""Compose params.yaml from conf/, as `dvc exp run` does: python -m tools.params. `--check` only reports staleness."""

import sys
import tempfile
from pathlib import Path

from dvc.utils.hydra import compose_and_dump

PARAMS = Path("params.yaml")


def composed(conf: Path) -> str:
    """The text of params.yaml for the defaults of a configuration folder."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "params.yaml"
        compose_and_dump(str(out), str(conf.resolve()), None, "config", "", [])
        return out.read_text(encoding="utf-8")


def main() -> None:
    """Write params.yaml where it is stale, or exit with 1 and say so."""
    text = composed(Path("conf"))
    if PARAMS.exists() and PARAMS.read_text(encoding="utf-8") == text:
        return
    if "--check" in sys.argv[1:]:
        raise SystemExit("error: params.yaml: is not what conf/ composes: run make params")
    PARAMS.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
