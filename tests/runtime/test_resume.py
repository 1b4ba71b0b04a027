import fcntl
import hashlib
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import tools.states
from ddpm.errors import UserError
from ddpm.runtime import imports, resume, workspace
from ddpm.runtime.progress import Progress
from ddpm.runtime.resume import MAX_UNFINISHED_RUNS, ResumeState, Store, fingerprint, state_folder, states
from tests.conftest import ROOT

WITHOUT_TORCH = """
import sys, types
sys.modules["torch"] = types.ModuleType("torch")  # slow to import, and not needed there
sys.modules["torch"].__version__ = "1"
"""
HOLDER = f"""{WITHOUT_TORCH}
from pathlib import Path
from ddpm.runtime.resume import ResumeState
with ResumeState(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def state(tmp_path):
    with ResumeState(tmp_path / "a" / "state") as held:
        yield held


def save(state, values):
    """Save, and wait until it is on the disk."""
    state.save(values)
    state.saved()


def newest(state):
    return state.folder / "state.pt"


def python(*arguments, **options):
    options = {"cwd": ROOT, "text": True, "stdout": subprocess.PIPE} | options
    return subprocess.Popen([sys.executable, *map(str, arguments)], **options)


def test_what_is_saved_is_loaded_bit_for_bit(state):
    weights = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(weights.parameters(), lr=0.1, betas=(0.8, 0.9))
    weights(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    saved = {
        "model": weights.state_dict(),
        "half": torch.tensor([1.5, float("nan")], dtype=torch.bfloat16),
        "optimizer": optimizer.state_dict(),
        "step": 7,
        "history": [(25, {"loss": 0.1, "learning_rate": 1e-3}), (50, {"loss": float("nan")})],
        "none": None,
    }
    assert state.load() is None
    save(state, saved)
    loaded = state.load()
    assert loaded.keys() == saved.keys()
    for name in ("weight", "bias"):
        assert torch.equal(loaded["model"][name], weights.state_dict()[name])
    assert torch.equal(loaded["half"].view(torch.int16), saved["half"].view(torch.int16))
    assert loaded["history"][0] == (25, {"loss": 0.1, "learning_rate": 1e-3})
    assert (loaded["step"], loaded["none"]) == (7, None)
    again = torch.optim.Adam(weights.parameters(), lr=9.0)
    again.load_state_dict(loaded["optimizer"])
    assert again.param_groups[0]["lr"] == 0.1
    assert again.param_groups[0]["betas"] == (0.8, 0.9)
    old, new = optimizer.state_dict()["state"], again.state_dict()["state"]
    assert all(torch.equal(old[i][name], new[i][name]) for i in old for name in old[i])


def test_the_same_state_has_the_same_bytes_in_any_folder(tmp_path):
    for name in ("one", "another"):
        with ResumeState(tmp_path / name) as state:
            save(state, {"x": torch.arange(9.0), "step": 3})
    assert (tmp_path / "one/state.pt").read_bytes() == (tmp_path / "another/state.pt").read_bytes()


def test_a_state_is_copied_at_once_and_written_in_the_background(state, monkeypatch):
    weights, gate = torch.zeros(3), threading.Event()
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (gate.wait(30), fsync(file)))
    state.save({"weights": weights})
    weights += 1  # the training continues
    assert not newest(state).exists()
    gate.set()
    assert torch.equal(state.load()["weights"], torch.zeros(3))


def test_a_failed_write_of_a_state_is_reported_at_the_next_save(tmp_path, monkeypatch):
    def full(file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"), ResumeState(tmp_path / "state") as state:
        state.save({"step": 1})
    with ResumeState(tmp_path / "state") as state:
        state.save({"step": 1})
        with pytest.raises(OSError, match="No space"):
            state.save({"step": 2})
        state.save({"step": 2})
        state.remove()  # the run is complete


def test_the_end_waits_for_what_is_being_written(tmp_path, monkeypatch):
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (time.sleep(0.2), fsync(file)))
    with pytest.raises(KeyboardInterrupt), ResumeState(tmp_path / "state") as state:
        state.save({"step": 1})
        raise KeyboardInterrupt
    assert newest(state).exists()
    state.save({"step": 2})
    state.remove()
    assert not state.folder.exists()


def cut(data):
    return data[: len(data) // 2]


def flipped(data):
    return data[:500] + bytes([data[500] ^ 1]) + data[501:]


def emptied(data):
    return b""


DAMAGES = pytest.mark.parametrize(
    "damage", [cut, flipped, emptied, lambda data: data[:20], lambda data: data[:-1], lambda data: bytes(len(data))]
)


@DAMAGES
def test_a_damaged_state_is_named_and_the_previous_one_loaded(state, damage, capsys):
    for step in (1, 2):
        save(state, {"step": step})
    assert state.load() == {"step": 2}
    newest(state).write_bytes(damage(newest(state).read_bytes()))
    assert state.load() == {"step": 1}
    assert capsys.readouterr() == ("", f"{newest(state)}: damaged, skipped\n")


@DAMAGES
def test_a_run_whose_two_states_are_damaged_starts_over(state, damage, capsys):
    for step in (1, 2):
        save(state, {"step": step})
    for file in state.folder.glob("*.pt"):
        file.write_bytes(damage(file.read_bytes()))
    assert state.load() is None
    assert capsys.readouterr().err.count("damaged, skipped\n") == 2


def test_a_save_after_a_damaged_one_is_loaded(state):
    for step in (1, 2):
        save(state, {"step": step})
    newest(state).write_bytes(b"")
    save(state, {"step": 3})
    assert state.load() == {"step": 3}


@pytest.mark.parametrize(
    ("saves", "owner", "name", "calls"),
    [
        *((saves, owner, name, 1) for saves in (0, 1, 2) for owner, name in ((os, "fsync"), (torch, "save"))),
        *((saves, Path, "replace", 1) for saves in (0, 1, 2)),
        *((saves, Path, "replace", 2) for saves in (1, 2)),  # the first save renames once
    ],
)
def test_a_crash_while_saving_leaves_the_earlier_state(state, monkeypatch, saves, owner, name, calls):
    for step in range(saves):
        save(state, {"step": step})
    real, count = getattr(owner, name), []

    def crash(*arguments, **options):
        count.append(1)
        if len(count) == calls:
            raise OSError(28, "No space left on device")
        return real(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, crash)
        with pytest.raises(OSError, match="No space"):
            save(state, {"step": 99})
    assert state.load() == ({"step": saves - 1} if saves else None)
    save(state, {"step": 100})  # files that the crash left do not matter
    assert state.load() == {"step": 100}


def test_a_state_has_reached_the_disk_before_it_is_renamed(state, monkeypatch):
    order = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (order.append(os.fstat(fd).st_size), fsync(fd))[1])
    monkeypatch.setattr(Path, "replace", lambda *a: (order.append(a[0].name), replace(*a))[1])
    save(state, {"step": 1})
    assert order == [newest(state).stat().st_size, "state.tmp"]


class Code:
    """Unpickled by pickle, it would make a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_code_in_a_state_with_a_right_checksum_is_not_run(state, tmp_path, capsys):
    save(state, {"step": 1})
    save(state, {"step": 2})
    data = pickle.dumps({"step": Code(str(tmp_path / "made"))}, protocol=2)
    newest(state).write_bytes(hashlib.sha256(data).digest() + data)
    assert state.load() == {"step": 1}
    assert capsys.readouterr().err == f"{newest(state)}: damaged, skipped\n"
    torch.save({"step": Code(str(tmp_path / "made"))}, tmp_path / "evil")
    data = (tmp_path / "evil").read_bytes()
    newest(state).write_bytes(hashlib.sha256(data).digest() + data)
    assert state.load() == {"step": 1}
    assert not (tmp_path / "made").exists()


@pytest.mark.process
def test_a_second_process_is_refused_until_the_first_has_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(workspace, "PATIENCE", 0.2)
    folder = tmp_path / "state"
    with python("-c", HOLDER, folder, stdin=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError) as caught, ResumeState(folder):
            pass
        assert str(caught.value) == f"{folder}: another process is at work on this very run; wait for it or stop it"
        holder.send_signal(signal.SIGKILL)
        holder.wait(30)
    with ResumeState(folder) as state:
        save(state, {"step": 1})
        with pytest.raises(UserError, match="another process"), ResumeState(folder):
            pass  # not twice in one process either
    with ResumeState(folder) as state:
        assert state.load() == {"step": 1}


@pytest.mark.process
@pytest.mark.parametrize("end", ["pass", "state.remove()"])
def test_a_process_waits_for_one_that_is_still_saving(tmp_path, monkeypatch, end, capfd):
    folder = tmp_path / "state"
    code = HOLDER.replace("sys.stdin.read()", f"import time; time.sleep(1); {end}").replace("):\n", ") as state:\n")
    with python("-c", code, folder) as holder:
        assert holder.stdout.readline() == "held\n"
        with ResumeState(folder) as state:
            assert holder.wait(30) == 0
            save(state, {"step": 1})
            monkeypatch.setattr(workspace, "PATIENCE", 0.2)
            with pytest.raises(UserError), ResumeState(folder):
                pass
    expected = f"{folder}: another process is at work on this very run; waiting for it to end\n"
    assert capfd.readouterr().err == expected * 2


def test_remove_deletes_the_folder(state):
    save(state, {"step": 1})
    state.remove()
    assert not state.folder.exists()
    with ResumeState(state.folder) as fresh:
        assert fresh.load() is None


def unfinished(parent, names):
    """States of runs that were stopped, each a minute after the one before."""
    for age, name in enumerate(names):
        (parent / name).mkdir(parents=True)
        for file in ("lock", "state.pt"):
            (parent / name / file).write_bytes(b"1234567")
        os.utime(parent / name, (60 * age,) * 2)
    return [parent / name for name in names]


def test_the_oldest_unfinished_runs_make_room_for_a_new_one(tmp_path, capsys):
    other, *runs = unfinished(tmp_path, ["sample-0", *(f"train-{i}" for i in range(MAX_UNFINISHED_RUNS + 2))])
    with (runs[0] / "lock").open() as at_work:
        fcntl.flock(at_work, fcntl.LOCK_EX)
        with ResumeState(tmp_path / "train-new") as new:
            assert states(tmp_path) == [other, runs[0], *runs[3:], new.folder]
    expected = [f"{run}: removed, the oldest of more than {MAX_UNFINISHED_RUNS} unfinished runs" for run in runs[1:3]]
    assert capsys.readouterr().err.splitlines() == expected


@pytest.mark.parametrize("option", [[], ["--clean"]])
def test_states_are_listed_and_cleaned_by_one_command(tmp_path, monkeypatch, capsys, option):
    at_work, *runs = unfinished(tmp_path / ".state", ["train-a1", "train-b2", "sample-c3", "evaluate-d4.done"])
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["states", *option])
    with (at_work / "lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        tools.states.main()
    printed = capsys.readouterr().out
    rows = [line.split() for line in printed.splitlines() if re.search(r"\d\.\d", line)]
    word = ["deleted"] if option else []
    hours = [row.pop(2) for row in rows]
    assert all(float(hour) > 400_000 for hour in hours)
    assert rows == [
        ["train", "a1", "0.0", "in", "use"],
        ["train", "b2", "0.0", *word],
        ["sample", "c3", "0.0", *word],
        ["evaluate", "d4.done", "0.0", *word],
    ]
    assert [run.exists() for run in (at_work, *runs)] == [True, *[not option] * 3]


PARAMS = {"train": {"seed": 0, "lr": 1e-3}, "lr_schedule": None}


def test_the_fingerprint_follows_parameters_and_data():
    names = {
        fingerprint(PARAMS, "hash"),
        fingerprint(PARAMS | {"lr_schedule": {}}, "hash"),
        fingerprint(PARAMS | {"train": {"seed": 1, "lr": 1e-3}}, "hash"),
        fingerprint(PARAMS, "other"),
        fingerprint("hash", PARAMS),
    }
    assert len(names) == 5
    assert all(len(name) == 16 and int(name, 16) >= 0 for name in names)
    assert fingerprint(PARAMS, "hash") == fingerprint(dict(reversed(PARAMS.items())), "hash")


@pytest.mark.parametrize(
    ("owner", "name"),
    [(torch, "__version__"), (resume.platform, "machine"), (resume.platform, "python_version")],
)
def test_versions_change_a_states_folder_and_no_runs_name(monkeypatch, owner, name, tmp_path):
    def names():
        return fingerprint(PARAMS), state_folder(tmp_path, "train", fingerprint(PARAMS))

    before = names()
    monkeypatch.setattr(owner, name, "9.9" if owner is torch else lambda: "other")
    after = names()
    assert after[0] == before[0]
    assert after[1] != before[1]
    assert after[1].parent == tmp_path
    assert state_folder(tmp_path, "sample", fingerprint(PARAMS)).name.startswith("sample-")


def test_a_part_that_was_kept_is_not_computed_again(state):
    calls = []

    def compute():
        calls.append(1)
        return np.arange(6.0).reshape(2, 3)

    for _ in range(2):
        np.testing.assert_array_equal(state.kept("a-0", compute), np.arange(6.0).reshape(2, 3))
    assert len(calls) == 1
    state.kept("a-6", compute)
    assert len(calls) == 2


@pytest.mark.parametrize("done", [(), (2,), (0, 1), (0, 1, 2, 3)])
def test_finished_batches_are_read_back_and_counted_by_the_bar(state, done):
    """Ten rows, three at a time, four units of the bar per row."""
    computed, moved = [], []

    def compute(rows):
        computed.append(rows.start)
        bar.update(4 * (rows.stop - rows.start))
        return np.arange(rows.start, rows.stop)

    for store in (state, Store()):
        computed.clear()
        moved.clear()
        for batch in done:
            rows = slice(3 * batch, min(3 * batch + 3, 10))
            state.kept(f"a-{rows.start}-{rows.stop}", lambda rows=rows: np.arange(rows.start, rows.stop))
        with Progress(40, "work", "unit") as bar:
            arrays = []
            for rows, array in store.batches("a", 10, 3, compute, bar):
                arrays.append(array)
                moved.append((rows.start, rows.stop, bar.n))
        assert np.concatenate(arrays).tolist() == list(range(10))
        assert moved == [(0, 3, 12), (3, 6, 24), (6, 9, 36), (9, 10, 40)]
        assert computed == [3 * i for i in range(4) if store is not state or i not in done]


def test_batches_are_kept_as_soon_as_each_is_finished(state):
    def compute(rows):
        if rows.start == 6:
            raise KeyboardInterrupt
        return np.arange(rows.start, rows.stop)

    with Progress(10, "work", "row") as bar, pytest.raises(KeyboardInterrupt):
        list(state.batches("a", 10, 3, compute, bar))
    assert sorted(path.name for path in state.folder.glob("*.npy")) == ["a-0-3.npy", "a-3-6.npy"]


def test_processes_share_the_batches_and_each_yields_all(state, monkeypatch):
    computed = []
    monkeypatch.setattr(resume.processes, "size", lambda: 2)
    monkeypatch.setattr(resume.processes, "barrier", lambda: computed.append("all are done"))

    def compute(rows):
        computed.append(rows.start)
        return np.arange(rows.start, rows.stop)

    with Progress(10, "work", "row") as bar:
        batches = list(state.batches("a", 10, 3, compute, bar))
    assert computed[:3] == [0, 6, "all are done"]  # the first process's share
    assert np.concatenate([array for _, array in batches]).tolist() == list(range(10))


@DAMAGES
def test_a_damaged_part_is_named_and_computed_again(state, damage, capsys):
    state.kept("part", lambda: np.arange(100))
    path = state.folder / "part.npy"
    path.write_bytes(damage(path.read_bytes()))
    assert state.kept("part", lambda: np.arange(100) * 2)[1] == 2
    assert capsys.readouterr().err == f"{path}: damaged, skipped\n"
    assert state.kept("part", lambda: np.arange(100) * 3)[1] == 2


def test_a_crash_while_a_part_is_kept_leaves_none(state, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(OSError, match="No space"):
            state.kept("part", lambda: np.arange(3))
    assert state.kept("part", lambda: np.arange(3) + 1)[0] == 1


def test_code_changes_a_states_folder_and_no_runs_name(monkeypatch, tmp_path):
    monkeypatch.setattr(imports, "ROOT", tmp_path / "code")
    for path in ("stages/train.py", "ddpm/a.py", "ddpm/b.py"):
        (tmp_path / "code" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "code" / path).write_text("def f():\n    from ddpm import a\n")
    names = []
    for path in (None, "stages/train.py", "ddpm/a.py", "ddpm/b.py"):
        if path:
            (tmp_path / "code" / path).write_text("def f():\n    from ddpm import a  # clearer\n")
        names.append((fingerprint(PARAMS), state_folder(tmp_path, "train", fingerprint(PARAMS)).name))
    assert len({run for run, _ in names}) == 1
    assert len({state for _, state in names}) == 3
    assert names[2] == names[3], "ddpm/b.py is imported by nothing"


@pytest.fixture
def two_origins(tmp_path, monkeypatch):
    """A state that other code has saved, and the folder for the same run of today's code."""
    with monkeypatch.context() as patch:
        patch.setattr(resume, "code_of", lambda stage: {"ddpm/core/unet.py": "1", "ddpm/old.py": "2"})
        with ResumeState(state_folder(tmp_path / ".state", "train", "abc")) as old:
            save(old, {"step": 7})
    monkeypatch.setattr(resume, "code_of", lambda stage: {"ddpm/core/unet.py": "3"})
    yield old.folder, state_folder(tmp_path / ".state", "train", "abc")


def test_a_state_of_other_code_is_reported_with_its_files(two_origins, capsys):
    old, new = two_origins
    for printed in (True, False):  # once: the second time this code has a state of its own
        with ResumeState(new) as state:
            assert state.load() is None
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == printed
        for line in lines:
            assert "another version of ddpm/core/unet.py, ddpm/old.py;" in line
            assert line.endswith(f"make states ADOPT={old.name}")
    assert old.exists()


def test_an_adopted_state_is_resumed_by_todays_code(two_origins, capsys):
    old, new = two_origins
    with ResumeState(new) as started_over:
        save(started_over, {"step": 1})
        with pytest.raises(UserError, match="stop it first"):
            resume.adopt(old)
    assert resume.adopt(old) == new
    capsys.readouterr()
    with ResumeState(new) as state:
        assert state.load() == {"step": 7}
    assert capsys.readouterr().err == ""
    for name in (new, old):
        with pytest.raises(UserError, match="make states shows all"):
            resume.adopt(name)


@pytest.mark.process
def test_the_fingerprint_is_the_same_in_every_process():
    code = f"{WITHOUT_TORCH}from ddpm.runtime.resume import fingerprint; print(fingerprint({PARAMS!r}, 'hash'))"
    names = set()
    for seed in ("1", "2"):
        with python("-c", code, env=os.environ | {"PYTHONHASHSEED": seed}) as process:
            names.add(process.communicate(timeout=60)[0])
    assert len(names) == 1
    assert len(names.pop()) == 17
