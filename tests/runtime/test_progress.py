import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios

import pytest

from ddpm.runtime import progress
from ddpm.runtime.progress import Progress
from tests.conftest import ROOT

SCRIPT = """
from ddpm.runtime.progress import Progress
with Progress(1000, "train", "img", 100) as bar:
    for step in range(9):
        bar.set_postfix(step=step, loss="0.1234", refresh=False)
        bar.update(100)
"""


def lines_of(capsys):
    out, err = capsys.readouterr()
    assert out == ""
    assert "\r" not in err
    assert err == "" or err.endswith("\n")
    return err.splitlines()


def test_without_a_terminal_whole_lines_show_rate_and_time_left(monkeypatch, capsys):
    monkeypatch.setattr(progress, "LINE_EVERY", 0.0)
    with Progress(4000, "train", "img", 1000) as bar:
        for step in range(3):
            bar.set_postfix(step=step, loss="0.5", refresh=False)
            bar.update(1000)
    first, *_, last = lines_of(capsys)
    assert first.startswith("train: 2.00k/4.00k img, ")
    assert "img/s, " in first
    assert first.endswith(" left, loss=0.5, step=0")
    assert last.startswith("train: 4.00k/4.00k img, ")
    assert last.endswith(", 00:00 left, loss=0.5, step=2")


def test_no_line_is_printed_twice_and_none_is_empty(monkeypatch, capsys):
    monkeypatch.setattr(progress, "LINE_EVERY", 0.0)
    with Progress(3, "x", "it") as bar:
        for _ in range(3):
            bar.update(1)
            bar.refresh()
    assert [line.split(",")[0] for line in lines_of(capsys)] == [
        "x: 1.00/3.00 it",
        "x: 2.00/3.00 it",
        "x: 3.00/3.00 it",
    ]


def test_between_two_lines_nothing_is_written(capsys):
    with Progress(10_000, "x", "it") as bar:
        for _ in range(10_000):
            bar.update(1)
    (line,) = lines_of(capsys)  # ten seconds have not passed: only the end is printed
    assert line.startswith("x: 10.0k/10.0k it")


@pytest.mark.parametrize("start", [0, 5])
def test_work_that_does_not_move_prints_nothing(capsys, start):
    with Progress(5, "x", "it", start):
        pass
    assert lines_of(capsys) == []


@pytest.mark.process
def test_a_log_file_gets_lines_and_standard_output_nothing():
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout == ""
    assert done.stderr.startswith("train: 1.00k/1.00k img, ")
    assert done.stderr.count("\n") == 1
    assert "\r" not in done.stderr


@pytest.mark.process
def test_on_a_terminal_there_is_a_bar():
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))  # without a width tqdm draws nothing
    stage = subprocess.Popen([sys.executable, "-c", SCRIPT], cwd=ROOT, stderr=theirs, stdout=subprocess.DEVNULL)
    os.close(theirs)
    text = b""
    try:
        while part := os.read(ours, 4096):
            text += part
    except OSError:  # EIO: how Linux says that the other end is closed
        pass
    finally:
        os.close(ours)
    assert stage.wait(60) == 0
    assert b"\r" in text
    bar = text.decode().split("\r")[-2]
    assert bar.startswith("train: 100%|█")
    assert "loss=0.1234, step=8" in bar
