"""Look into a folder of images: report how prepare_data would read it, and print the command for it.

python -m tools.folder <folder>
"""

import re
import shlex
import sys
from pathlib import Path

from ddpm.data.folders import read_folder
from ddpm.errors import UserError

TEST_FRACTION = 0.1  # as in conf/dataset/folder.yaml


def override(path: str) -> str:
    """The text after `-S` for a path with any characters: quoted for Hydra, and the result quoted for the shell."""
    if re.fullmatch(r"[A-Za-z0-9/_.-]+", path):
        return f"dataset.path={path}"
    escaped = re.sub(r"\$\{", r"\\${", re.sub(r'(\\*)"', r'\1\1\\"', path))
    escaped = re.sub(r"(\\+)$", r"\1\1", escaped)
    return shlex.quote(f'dataset.path="{escaped}"')


def main() -> None:
    """Print the layout of the folder and the command that trains on it, or what has to be fixed first."""
    if len(sys.argv) != 2:
        sys.exit("usage: python -m tools.folder <folder>")
    folder = Path(sys.argv[1])
    try:
        read_folder(folder, TEST_FRACTION)
    except UserError as fault:
        sys.exit("\n".join(f"error: {line}" for line in str(fault).splitlines()))
    inside = folder.absolute() == Path("data/raw").absolute()
    path = "" if inside else f" -S {override(str(folder.absolute()))}"
    print(f"dvc exp run -S dataset=folder -S +experiment=short{path}")


if __name__ == "__main__":
    main()
