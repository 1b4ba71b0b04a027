"""Output files, written whole or not at all."""

from pathlib import Path


def write_file(path: str | Path, content: bytes | memoryview) -> None:
    """Write beside `path` and rename into place, so that a reader sees the file of before or the new one.

    A link at `path`, such as DVC sets into its cache, is replaced: nothing is ever written through it. The folder is
    made.

    Raises:
        OSError: the disk is full or read-only; the error names the file.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        error.filename = str(path)  # a failed write does not know its file
        raise
