import errno
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from omegaconf import OmegaConf
from PIL import Image

from ddpm.errors import UserError
from ddpm.runtime import signals
from ddpm.runtime.signals import Interrupted
from ddpm.runtime.stage import REPRODUCIBLE_ENVIRONMENT, run_stage
from tests.conftest import ROOT, composed

pytestmark = pytest.mark.process

PATIENCE = 30  # seconds, for what takes a fraction of one on a free machine
SCRIPT = """
import errno, os, signal, sys, time
import ddpm.config.load  # before the platform is another one
from ddpm.errors import UserError
from ddpm.runtime.stage import run_stage

sys.platform = {platform!r}

def main(params):
    {body}

run_stage(main, ("runtime",))
"""
SLEEP = "print('ready', flush=True); time.sleep(60)"


def environment(**more):
    keep = {name: value for name, value in os.environ.items() if name not in REPRODUCIBLE_ENVIRONMENT}
    return keep | {"PYTHONPATH": str(ROOT)} | more


def prepare(folder, body="pass", platform=sys.platform, **runtime_changes):
    tree = composed()
    tree["runtime"] |= runtime_changes
    (folder / "params.yaml").write_text(OmegaConf.to_yaml(tree))
    (folder / "stage.py").write_text(SCRIPT.format(body=body, platform=platform))
    return {"cwd": folder, "env": environment(), "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}


def run(folder, body, **runtime_changes):
    return subprocess.run([sys.executable, "stage.py"], timeout=PATIENCE, **prepare(folder, body, **runtime_changes))


def test_a_user_error_is_printed_in_lines_without_a_traceback(tmp_path):
    done = run(tmp_path, "raise UserError('one: wrong\\ntwo: wrong')")
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "error: one: wrong\nerror: two: wrong\n")


def test_a_bug_keeps_its_traceback(tmp_path):
    done = run(tmp_path, "raise OSError(errno.EBADF, 'a bug')")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "a bug" in done.stderr


def test_a_full_disk_is_reported_in_one_line(tmp_path):
    done = run(tmp_path, "os.write(os.open('/dev/full', os.O_WRONLY), b'x')")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: a file: No space left on device\n"


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal_ends_the_stage_with_its_own_exit_code(tmp_path, name, code):
    with subprocess.Popen([sys.executable, "stage.py"], **prepare(tmp_path, SLEEP)) as stage:
        assert stage.stdout.readline() == "ready\n"
        stage.send_signal(signal.Signals[name])
        out, err = stage.communicate(timeout=PATIENCE)
    assert (stage.returncode, out, err) == (code, "", f"stopped by {name}; run the same command to resume\n")


EARLY = """
import os, runpy, signal, sys

class Early:
    def find_spec(self, name, path=None, target=None):
        if name == "pydantic":
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Early())
runpy.run_module(sys.argv[1], run_name="__main__")
"""


@pytest.mark.parametrize("stage", ["prepare_data", "train", "sample", "evaluate"])
def test_ctrl_c_during_the_imports_is_reported_in_one_line(tmp_path, stage):
    done = subprocess.run([sys.executable, "-c", EARLY, f"stages.{stage}"], timeout=PATIENCE, **prepare(tmp_path))
    assert (done.returncode, done.stderr) == (130, "stopped by SIGINT; run the same command to resume\n")


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal_during_an_import_ends_the_process_at_once(tmp_path, name, code):
    swallows = f"import os, signal\ntry: os.kill(os.getpid(), signal.{name})\nexcept BaseException: pass\n"
    (tmp_path / "swallows.py").write_text(swallows)
    done = run(tmp_path, "import swallows; print('continued')")
    assert (done.returncode, done.stdout, done.stderr) == (
        code,
        "",
        f"stopped by {name}; run the same command to resume\n",
    )


def test_an_impatient_second_signal_changes_nothing(tmp_path):
    body = "\n    ".join(
        [
            "try: os.kill(os.getpid(), signal.SIGINT); time.sleep(60)",
            "finally: os.kill(os.getpid(), signal.SIGINT); time.sleep(60)",
        ]
    )
    done = run(tmp_path, body)
    assert (done.returncode, done.stderr) == (130, "stopped by SIGINT; run the same command to resume\n")


@pytest.mark.parametrize(
    ("end", "code", "printed"), [("return", 0, ""), ("raise Interrupted(15)", 143, "stopped by SIGTERM")]
)
def test_a_signal_at_the_very_end_changes_nothing(tmp_path, end, code, printed):
    again = "os.kill(os.getpid(), signal.SIGTERM); sum(range(9999))"
    body = (
        f"import atexit; from ddpm.runtime.signals import Interrupted; atexit.register(lambda: exec({again!r})); {end}"
    )
    done = run(tmp_path, body)
    assert (done.returncode, done.stderr.partition(";")[0]) == (code, printed)
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("platform", sorted({"darwin", sys.platform}))
def test_a_stage_dies_with_its_parent(tmp_path, platform):
    shell = ["sh", "-c", f"'{sys.executable}' stage.py; true"]  # `; true` keeps the shell as the parent
    with subprocess.Popen(shell, **prepare(tmp_path, SLEEP, platform)) as parent:
        assert parent.stdout.readline() == "ready\n"
        parent.kill()
        start = time.monotonic()
        err = parent.stderr.read()  # ends when the stage, which holds the other end, has ended
        assert time.monotonic() - start < PATIENCE  # without the signal: 60 s
    assert err == "stopped by SIGTERM; run the same command to resume\n"


@pytest.mark.skipif(sys.platform != "linux", reason="read from /proc")
@pytest.mark.parametrize("name", ["exec-run", "repro"])
def test_a_queued_stage_stops_when_the_worker_is_killed(tmp_path, name):
    """dvc exp queue-worker starts dvc exp exec-run, which starts the stage; its outputs would not be collected."""
    inner = f"'{sys.executable}' stage.py; true"
    worker = ["sh", "-c", f'sh -c "{inner}" {name}; true']
    body = "print('ready', flush=True); time.sleep(3)"
    with subprocess.Popen(worker, **prepare(tmp_path, body)) as process:
        assert process.stdout.readline() == "ready\n"
        process.kill()
        err = process.stderr.read()
    assert err == ("stopped by SIGTERM; run the same command to resume\n" if name == "exec-run" else "")


BUSY = "another stage is at work here"
ORPHAN = ["sh", "-c", f"'{sys.executable}' stage.py &"]  # the shell has ended long before Python runs


@pytest.mark.parametrize("platform", ["linux", "darwin"])
def test_a_stage_that_lost_its_dvc_before_it_ran_stops_at_once(tmp_path, platform):
    options = prepare(tmp_path, "print('run')", platform)
    done = subprocess.run(
        ORPHAN, timeout=PATIENCE, start_new_session=True, **options | {"env": environment(DVC_STAGE="x")}
    )
    assert (done.stdout, done.stderr) == ("", "stopped by SIGTERM; run the same command to resume\n")


def test_a_stage_that_was_started_by_hand_needs_no_parent(tmp_path):
    done = subprocess.run(ORPHAN, timeout=PATIENCE, start_new_session=True, **prepare(tmp_path, "print('run')"))
    assert (done.stdout, done.stderr) == ("run\n", "")


def test_a_stage_waits_for_one_that_is_ending_in_the_same_folder(tmp_path):
    """As when dvc was killed and is started again while its stage still saves."""
    options = prepare(tmp_path, "print('ready', flush=True); time.sleep(1); print('done', flush=True)")
    with (
        subprocess.Popen([sys.executable, "stage.py"], **options) as first,
        subprocess.Popen([sys.executable, "stage.py"], **options) as second,
    ):
        out = [stage.communicate(timeout=PATIENCE) for stage in (first, second)]
    assert [stdout for stdout, _ in out] == ["ready\ndone\n"] * 2
    assert sorted(stderr for _, stderr in out) == ["", f"{tmp_path.resolve()}: {BUSY}; waiting for it to end\n"]


def test_a_stage_refuses_to_run_beside_another_in_a_folder(tmp_path):
    options = prepare(tmp_path, SLEEP)
    with subprocess.Popen([sys.executable, "stage.py"], **options) as first:
        assert first.stdout.readline() == "ready\n"
        (tmp_path / "second.py").write_text(
            "import ddpm.runtime.workspace as w; w.PATIENCE = 0.5; exec(open('stage.py').read())"
        )
        second = subprocess.run([sys.executable, "second.py"], timeout=PATIENCE, **options)
        first.kill()
    assert (second.returncode, second.stdout) == (1, "")
    assert second.stderr.splitlines()[1:] == [f"error: {tmp_path.resolve()}: {BUSY}; wait for it or stop it"]


@pytest.mark.parametrize("reproducible", [True, False])
def test_the_reproducible_environment_precedes_torch_and_numpy(tmp_path, reproducible):
    names = list(REPRODUCIBLE_ENVIRONMENT)
    body = f"assert not {{'torch', 'numpy'}} & set(sys.modules); print([os.environ.get(n) for n in {names}])"
    done = run(tmp_path, body, reproducible=reproducible)
    expected = list(REPRODUCIBLE_ENVIRONMENT.values()) if reproducible else [None] * len(names)
    assert (done.stderr, done.stdout) == ("", f"{expected}\n")


def everything_in(folder):
    return {p.relative_to(folder): p.stat().st_mtime_ns for p in folder.rglob("*")}


@pytest.mark.parametrize(
    ("old", "new", "printed"),
    [
        ("  batch_size:", "  bacth_size:", "train.bacth_size = "),
        ("  lr: 0.008", "  lr: abc", "optimizer.lr = 'abc': should be a valid number"),
        (
            "ddpm.training.muon.Muon\n",
            "os.system\n",
            "optimizer._target_ = 'os.system': unknown; allowed are the classes torch",
        ),
    ],
)
def test_wrong_parameters_stop_a_training_within_two_seconds(tmp_path, old, new, printed):
    for name in ("data/prepared/dataset.json", "models/ddpm/model_index.json", "results/train/metrics.json"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("{}")
    text = (ROOT / "params.yaml").read_text()
    assert old in text
    (tmp_path / "params.yaml").write_text(text.replace(old, new))
    before = everything_in(tmp_path)
    seconds = []
    while not seconds or (seconds[-1] > 2 and len(seconds) < 4):  # again where the machine was busy
        start = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-m", "stages.train"],
            cwd=tmp_path,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
        seconds.append(time.monotonic() - start)
    assert min(seconds) < 2
    assert (done.returncode, done.stdout) == (1, "")
    assert any(line.startswith(f"error: params.yaml: {printed}") for line in done.stderr.splitlines())
    assert all(line.startswith("error: params.yaml: ") for line in done.stderr.splitlines())
    assert everything_in(tmp_path) == before


@pytest.fixture
def quiet_process(monkeypatch, tmp_path):
    """Lets run_stage run in this process: its signal handlers, variables and parent's death are undone."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    monkeypatch.setattr(signals, "die_with_parent", lambda shares_group: None)
    monkeypatch.setattr(os, "environ", os.environ.copy())
    monkeypatch.chdir(tmp_path)
    prepare(tmp_path)
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def raising(error):
    def main(params):
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "code", "printed"),
    [
        (UserError("a: b\nc: d"), 1, "error: a: b\nerror: c: d\n"),
        (OSError(errno.ENOSPC, "full", "models/x"), 1, "error: models/x: No space left on device\n"),
        (OSError(errno.EDQUOT, "full", "models/x"), 1, "error: models/x: Disk quota exceeded\n"),
        (PermissionError(errno.EACCES, "no", "data/x"), 1, "error: data/x: Permission denied\n"),
        (OSError(errno.EROFS, "no", "results"), 1, "error: results: Read-only file system\n"),
        (Interrupted(signal.SIGTERM), 143, "stopped by SIGTERM; run the same command to resume\n"),
        (Interrupted(signal.SIGINT), 130, "stopped by SIGINT; run the same command to resume\n"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_every_expected_end_has_its_code_and_its_line(quiet_process, capsys, error, code, printed):
    with pytest.raises(SystemExit) as end:
        run_stage(raising(error), ("runtime",))
    assert end.value.code == code
    assert capsys.readouterr() == ("", printed)


def test_a_stage_sees_its_sections_alone_and_returns(quiet_process):
    seen = []
    run_stage(lambda params: seen.append(vars(params)), ("sample", "runtime"))
    assert set(seen[0]) == {"sample", "runtime"}


def test_other_faults_of_files_are_bugs(quiet_process):
    with pytest.raises(FileNotFoundError):
        run_stage(raising(FileNotFoundError(errno.ENOENT, "none", "x")), ("runtime",))


@pytest.fixture
def long_tmpdir(tmp_path):
    """A folder for temporary files whose sockets would have addresses longer than any system takes."""
    folder = tmp_path / ("t" * (150 - len(str(tmp_path)) - 1))
    folder.mkdir()
    return folder


def test_workers_run_where_tmpdir_is_too_long_for_a_socket(tmp_path, long_tmpdir):
    rng = np.random.default_rng(0)
    (tmp_path / "raw").mkdir()
    for i in range(12):
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(tmp_path / f"raw/{i}.png")
    small = ("dataset.image_size=8", "dataset.path=raw", "dataset.test_fraction=0.3", "model.base_channels=8")
    steps = ("train.steps=2", "train.batch_size=4", "train.workers=1", "train.warmup_steps=0", "runtime.threads=1")
    tree = composed("dataset=folder", *small, *steps, "tracking.wandb=disabled")
    (tmp_path / "params.yaml").write_text(OmegaConf.to_yaml(tree))
    for name in ("prepare_data", "train"):
        command = [sys.executable, "-m", f"stages.{name}"]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment(TMPDIR=str(long_tmpdir)), capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "models/ddpm/model_index.json").exists()


def test_a_long_tmpdir_is_refused_if_no_other_can_be_written(tmp_path, long_tmpdir):
    (tmp_path / "params.yaml").write_text(OmegaConf.to_yaml(composed()))
    code = (
        "from ddpm.runtime import stage, workspace; workspace.SHORT_FOLDERS = ('/nowhere',); "
        "stage.run_stage(print, ('runtime',))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment(TMPDIR=str(long_tmpdir)),
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert done.stderr.startswith(f"error: TMPDIR = {long_tmpdir}: too long for the sockets of worker processes")
    assert not list(long_tmpdir.iterdir())
