import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest

from ddpm.evaluation.cache import Cache, code_digest
from ddpm.runtime import processes

FACTS = {"features": "timm:x", "data": "abc", "rows": ["all", None]}


def array(seed=0):
    return np.random.default_rng(seed).standard_normal((50, 7)).astype(np.float32)


def never():
    raise AssertionError("computed again")


def test_a_kept_array_is_read_back_bit_for_bit(tmp_path):
    cache = Cache(tmp_path / "new")
    np.testing.assert_array_equal(cache.array(FACTS, array), array())
    again = Cache(tmp_path / "new").array(dict(reversed(FACTS.items())), never)
    np.testing.assert_array_equal(again, array())
    assert isinstance(again, np.memmap)
    assert not again.flags.writeable


@pytest.mark.parametrize("name", FACTS)
def test_any_other_fact_is_another_array(tmp_path, name):
    Cache(tmp_path).array(FACTS, array)
    np.testing.assert_array_equal(Cache(tmp_path).array(FACTS | {name: "other"}, lambda: array(1)), array(1))


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:-1],
        lambda data: data[:20],
        lambda data: data[:300] + b"x" + data[301:],
        lambda data: data[:-32] + bytes(32),
        lambda data: data + b"x",
    ],
)
def test_a_damaged_file_is_named_and_replaced(tmp_path, capsys, damage):
    Cache(tmp_path).array(FACTS, array)
    (path,) = tmp_path.iterdir()
    path.write_bytes(damage(path.read_bytes()))
    np.testing.assert_array_equal(Cache(tmp_path).array(FACTS, array), array())
    assert capsys.readouterr().err == f"{path}: damaged, computed again\n"
    np.testing.assert_array_equal(Cache(tmp_path).array(FACTS, never), array())
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_write_is_reported_in_one_line(tmp_path, capsys):
    (tmp_path / "file").touch()
    np.testing.assert_array_equal(Cache(tmp_path / "file").array(FACTS, array), array())
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert "not kept for later evaluations: " in line


def _write(folder: Path) -> None:
    for _ in range(30):
        for path in folder.glob("*.npy"):
            path.unlink(missing_ok=True)
        np.testing.assert_array_equal(Cache(folder).array(FACTS, array), array())


@pytest.mark.process
def test_runs_can_write_the_same_array_at_once(tmp_path):
    runs = [multiprocessing.get_context("fork").Process(target=_write, args=(tmp_path,)) for _ in range(3)]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    assert [run.exitcode for run in runs] == [0, 0, 0]
    assert len(list(tmp_path.iterdir())) <= 1


def test_all_processes_compute_if_one_misses_an_array(tmp_path, monkeypatch):
    """The processes share the work of an extraction, so none may start it alone."""
    Cache(tmp_path).array(FACTS, array)
    monkeypatch.setattr(processes, "any_process", lambda here: True)
    np.testing.assert_array_equal(Cache(tmp_path).array(FACTS, lambda: array(1)), array(1))


def test_the_digest_of_code_follows_its_text(tmp_path):
    paths = [tmp_path / "a.py", tmp_path / "b.py"]
    for path in paths:
        path.write_text("x = 1")
    before = code_digest(*map(os.fspath, paths))
    paths[1].write_text("x = 2")
    assert code_digest(*map(os.fspath, paths)) != before
