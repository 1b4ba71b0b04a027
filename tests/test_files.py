import os
import stat
from pathlib import Path

import numpy as np
import pytest

from ddpm.errors import UserError
from ddpm.files import load_array, save_array, write_file


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_a_link_is_replaced_and_its_target_stays(tmp_path, link):
    cached, output = tmp_path / "cache", tmp_path / "out/file"
    cached.write_bytes(b"old")
    output.parent.mkdir()
    link(cached, output)
    write_file(output, b"new")
    assert (cached.read_bytes(), output.read_bytes()) == (b"old", b"new")
    assert not output.is_symlink()
    assert stat.S_IMODE(output.stat().st_mode) & stat.S_IWUSR


def test_a_failed_write_keeps_the_old_file_and_names_it(tmp_path, monkeypatch):
    path = tmp_path / "made" / "file"
    write_file(path, b"old")
    monkeypatch.setattr("pathlib.Path.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(OSError, match="No space") as caught:
        write_file(path, b"new")
    assert caught.value.filename == str(path)
    assert [entry.name for entry in path.parent.iterdir()] == ["file"]
    assert path.read_bytes() == b"old"


def test_an_array_is_saved_in_numpys_bytes_and_read_back_mapped(tmp_path):
    array = np.arange(24, dtype=np.uint8).reshape(2, 3, 2, 2)
    save_array(tmp_path / "made/array.npy", array)
    np.save(tmp_path / "expected.npy", array)
    assert (tmp_path / "made/array.npy").read_bytes() == (tmp_path / "expected.npy").read_bytes()
    loaded = load_array(tmp_path / "made/array.npy", "sample", "uint8", 4)
    assert isinstance(loaded, np.memmap) and np.array_equal(loaded, array)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_an_array_that_fills_the_disk_is_reported_with_its_file(tmp_path):
    (tmp_path / ".array.npy.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space") as caught:
        save_array(tmp_path / "array.npy", np.zeros(10**6))
    assert (caught.value.errno, caught.value.filename) == (28, str(tmp_path / "array.npy"))


@pytest.mark.parametrize(("dtype", "dimensions"), [("int64", 4), ("uint8", 3)])
def test_a_wrong_array_is_reported_with_the_stage_to_run(tmp_path, dtype, dimensions):
    path = tmp_path / "array.npy"
    save_array(path, np.zeros((2, 3, 2, 2), np.uint8))
    with pytest.raises(UserError) as caught:
        load_array(path, "sample", dtype, dimensions)
    assert str(caught.value) == f"{path}: holds uint8 (2, 3, 2, 2), not {dtype}; run the stage sample again"
