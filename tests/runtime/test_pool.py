"""A function that is applied to many files on all cores."""

import multiprocessing
import os
import time
from pathlib import Path

import pytest

from ddpm.data.decode import digest_file
from ddpm.errors import UserError
from ddpm.runtime import pool
from ddpm.runtime.pool import in_parallel


@pytest.mark.process
def test_results_keep_the_order_of_the_files_on_any_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = []
    for i in range(23):
        paths.append(str(tmp_path / f"{i}.png"))
        Path(paths[-1]).write_bytes(bytes([i]) * (200_000 if i % 3 == 0 else 1))  # some take longer
    expected = [digest_file(path) for path in paths]
    for cores in (1, 3):
        monkeypatch.setattr(pool, "_cores", lambda cores=cores: cores)
        chunks = list(in_parallel(digest_file, paths, 4, "test"))
        assert [len(chunk) for chunk in chunks] == [4, 4, 4, 4, 4, 3]
        assert [digest for chunk in chunks for digest in chunk] == expected


@pytest.mark.process
def test_a_file_that_cannot_be_read_is_reported_by_name(tmp_path: Path) -> None:
    gone = tmp_path / "gone.png"
    with pytest.raises(UserError, match=f"{gone}: No such file"):
        list(in_parallel(digest_file, [str(gone)], 4, "test"))


def _kill_self(path: str) -> None:
    os.kill(os.getpid(), 9)


@pytest.mark.process
def test_a_killed_process_is_reported_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="was killed, most likely because memory ran out"):
        list(in_parallel(_kill_self, [str(tmp_path)], 1, "test"))


def _first_then_sleep(path: str) -> None:
    if Path(path).name != "0":
        time.sleep(60)


@pytest.mark.process
def test_closing_ends_the_processes_at_once(tmp_path: Path) -> None:
    before = set(multiprocessing.active_children())
    chunks = in_parallel(_first_then_sleep, [str(i) for i in range(9)], 1, "test")
    assert next(chunks) == [None]
    start = time.monotonic()
    chunks.close()
    assert time.monotonic() - start < 5
    assert set(multiprocessing.active_children()) <= before
