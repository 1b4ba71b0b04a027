"""No number of a table is cut, however narrow the terminal."""

import os
import pty
import subprocess
import sys

import pytest

from tests.conftest import ROOT

PRINT = """
from rich.table import Table
from tools.common.tables import print_whole

def make(narrow):
    made = Table()
    for heading in "abc":
        made.add_column(heading)
    numbers = ["1.2345 x0.1", "2.3456 x0.2", "3.4567 x0.3"]
    made.add_row(*(text.replace(" ", chr(10)) if narrow else text for text in numbers))
    return made

print_whole(make)
"""


@pytest.mark.process
@pytest.mark.parametrize(("columns", "lines"), [(80, 1), (36, 2), (10, 2)])
def test_numbers_stand_on_two_lines_before_any_is_cut(columns, lines):
    ours, theirs = pty.openpty()
    environment = {**os.environ, "COLUMNS": str(columns), "PYTHONPATH": str(ROOT), "TERM": "xterm", "NO_COLOR": "1"}
    subprocess.run([sys.executable, "-c", PRINT], stdout=theirs, env=environment, check=True)
    os.close(theirs)
    text = os.read(ours, 10_000).decode()
    os.close(ours)
    assert all(number in text for number in ("1.2345", "2.3456", "3.4567", "x0.1", "x0.2", "x0.3")), text
    assert sum("0.1" in line or "1.2345" in line for line in text.splitlines()) == lines, text
