import os
import stat

import pytest

from ddpm.files import write_file


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_a_link_is_replaced_and_what_it_led_to_stays(tmp_path, link):
    cached, output = tmp_path / "cache", tmp_path / "out/file"
    cached.write_bytes(b"old")
    output.parent.mkdir()
    link(cached, output)
    write_file(output, b"new")
    assert (cached.read_bytes(), output.read_bytes()) == (b"old", b"new")
    assert not output.is_symlink()
    assert stat.S_IMODE(output.stat().st_mode) & stat.S_IWUSR


def test_a_failed_write_keeps_the_file_of_before_and_names_it(tmp_path, monkeypatch):
    path = tmp_path / "made" / "file"
    write_file(path, b"old")
    monkeypatch.setattr("pathlib.Path.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(OSError, match="No space") as caught:
        write_file(path, b"new")
    assert caught.value.filename == str(path)
    assert [entry.name for entry in path.parent.iterdir()] == ["file"]
    assert path.read_bytes() == b"old"
