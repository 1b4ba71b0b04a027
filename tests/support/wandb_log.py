"""Read the log that W&B has written of a run."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2


def records(path: Path) -> Iterator[Any]:
    """The records of a W&B log: LevelDB's format, after a header of seven bytes."""
    data, position, text = path.read_bytes(), 7, b""
    while position + 7 <= len(data):
        if (room := 32768 - position % 32768) < 7:
            position += room  # no header begins in the last bytes of a block
            continue
        length, kind = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6]
        text += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield wandb_internal_pb2.Record.FromString(text)
            text = b""


def values(items: Iterable[Any]) -> dict[str, Any]:
    """The values of a history, summary or config record by their names."""
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}
