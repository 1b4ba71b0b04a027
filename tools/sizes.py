"""Refuse files above 1 MB, which belong to DVC and not to git: python -m tools.sizes FILE [FILE ...]"""

import sys
from pathlib import Path

LIMIT = 1_000_000  # bytes


def main() -> None:
    """Print a line per file that is too large, and exit with 1 if there is one."""
    large = [path for name in sys.argv[1:] if (path := Path(name)).is_file() and path.stat().st_size > LIMIT]
    for path in large:
        print(
            f"error: {path}: has {path.stat().st_size / 1e6:.1f} MB, and git takes 1: dvc add {path}", file=sys.stderr
        )
    sys.exit(bool(large))


if __name__ == "__main__":
    main()
