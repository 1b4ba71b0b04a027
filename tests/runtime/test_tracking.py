import json
import os
import subprocess
import sys
from contextlib import contextmanager, nullcontext
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import urlsplit

import pytest
import wandb
from omegaconf import OmegaConf
from PIL import Image

from ddpm.config.schema import Tracking
from ddpm.runtime.tracking import Tracker
from tests.conftest import ROOT, composed
from tests.support.wandb_log import records, values

pytestmark = pytest.mark.process

KEY = "0123456789abcdef" * 2 + "a1b2c3d4"  # as long as a real one
AUTO = Tracking(wandb="auto", project="ddpm")
OFF = Tracking(wandb="disabled", project="ddpm")
CONFIG = composed()
PICTURE = Image.new("L", (9, 9), 128)
HISTORY = [(step, {"loss": 1 / step, "grad_norm": step / 3, "learning_rate": 1e-3}) for step in (25, 50, 75, 100)]


@pytest.fixture(autouse=True)
def own_environment(tmp_path, monkeypatch):
    """A folder of its own, W&B as in a fresh shell, and no variable that outlives the test."""
    before = dict(os.environ)
    for name in [name for name in os.environ if name.startswith(("WANDB_", "DVC_"))]:
        del os.environ[name]
    os.environ |= {"DVC_ROOT": str(tmp_path), "HOME": str(tmp_path / "home")}
    monkeypatch.chdir(tmp_path)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def offline(tmp_path_factory):
    """A run without a network, recorded once: its folder."""
    folder = tmp_path_factory.mktemp("offline")
    before = dict(os.environ)
    os.environ |= {"DVC_ROOT": str(folder), "WANDB_MODE": "offline", "WANDB_API_KEY": KEY, "HOME": str(folder)}
    try:
        with Tracker(str(folder / "results"), AUTO, CONFIG, "abc123", "train") as tracker:
            for step, metrics in HISTORY:
                tracker.log(step, metrics, {"images_per_second": 1000.0 + step})
            for name in ("inputs", "noise", "samples_epoch_00001"):
                tracker.log_picture(100, name, PICTURE)
            tracker.finish()
            assert tracker.run is not None
        wandb.teardown()
    finally:
        os.environ.clear()
        os.environ.update(before)
    return folder


@pytest.fixture(scope="module")
def logged(offline):
    (file,) = offline.glob("wandb/offline-run-*-abc123/run-abc123.wandb")
    return list(records(file))


def test_wandb_holds_every_point_of_the_curves_and_the_speed(logged):
    rows = [values(record.history.item) for record in logged if record.WhichOneof("record_type") == "history"]
    points = [row for row in rows if "train/loss" in row]
    assert [row["train/step"] for row in points] == [step for step, _ in HISTORY]
    for row, (step, metrics) in zip(points, HISTORY, strict=True):
        assert {name: row[f"train/{name}"] for name in metrics} == metrics
        assert row["train/images_per_second"] == 1000.0 + step


def test_wandb_holds_the_inputs_the_noise_and_the_samples(logged, offline):
    rows = {}
    for record in logged:
        if record.WhichOneof("record_type") == "history":
            rows |= values(record.history.item)
    (run,) = offline.glob("wandb/offline-run-*")
    for name, caption in (("inputs", "inputs"), ("noise", "noise"), ("samples", "samples_epoch_00001")):
        assert rows[f"train/{name}.caption"] == caption
        with Image.open(run / "files" / rows[f"train/{name}.path"]) as picture:
            assert picture.convert("L").tobytes() == PICTURE.tobytes()


def test_wandb_holds_every_hyper_parameter(logged):
    config = {}
    for record in logged:
        if record.WhichOneof("record_type") == "run":
            config |= values(record.run.config.update)
    assert {name: config[name] for name in CONFIG} == CONFIG
    assert config["train"]["seed"] == 0


def test_wandb_holds_the_composed_config_as_an_artifact(logged):
    (artifact,) = (
        record.request.log_artifact.artifact if record.request.HasField("log_artifact") else record.artifact
        for record in logged
        if record.WhichOneof("record_type") == "artifact" or record.request.HasField("log_artifact")
    )
    assert (artifact.name, artifact.type) == ("train-config-abc123", "config")
    (entry,) = artifact.manifest.contents
    assert entry.path == "params.yaml"
    assert OmegaConf.to_container(OmegaConf.load(entry.local_path)) == CONFIG


def test_wandb_gets_no_code_and_no_key(offline):
    files = [path for path in offline.rglob("*") if path.is_file()]
    assert len(files) > 5
    for path in files:
        data = path.read_bytes()
        assert KEY.encode() not in data, path
        assert b"def _start_wandb" not in data, path  # our source
        assert path.suffix not in (".py", ".patch", ".diff"), path


def test_dvclive_gets_what_does_not_depend_on_the_machine(offline):
    files = sorted(str(path.relative_to(offline / "results")) for path in (offline / "results").rglob("*.*"))
    assert files == ["metrics.json", *(f"plots/metrics/{n}.tsv" for n in ("grad_norm", "learning_rate", "loss"))]
    rows = (offline / "results/plots/metrics/loss.tsv").read_text().splitlines()
    assert rows[0] == "step\tloss"
    assert [row.split("\t")[0] for row in rows[1:]] == ["25", "50", "75", "100"]


def test_a_home_that_cannot_be_written_does_not_matter(tmp_path):
    code = (
        "from ddpm.config.schema import Tracking; from ddpm.runtime.tracking import Tracker\n"
        "with Tracker(None, Tracking(wandb='auto', project='x'), {'a': 1}, 'abc', 'train') as tracker:\n"
        "    tracker.log(1, {'loss': 0.5})\n"
        "    assert tracker.run"
    )
    home = {"HOME": "/dev/null/home", "PYTHONPATH": str(ROOT), "XDG_CONFIG_HOME": "", "XDG_CACHE_HOME": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=os.environ | home, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert len(list(tmp_path.glob("wandb/offline-run-*/run-abc.wandb"))) == 1


class FakeRun:
    """Stands for a W&B run; fails from the given call of `log` on."""

    def __init__(self):
        self.calls, self.fails_at, self.ended = [], 10**9, []

    def log(self, row):
        self.calls.append(row)
        if len(self.calls) >= self.fails_at:
            raise wandb.errors.CommError("the network is gone")

    def define_metric(self, *arguments, **options):
        pass

    log_artifact = define_metric

    def finish(self, exit_code):
        self.ended.append(exit_code)


class Started(list):
    """The arguments of each call of wandb.init, which gives `run`."""

    def __init__(self):
        super().__init__()
        self.run = FakeRun()

    def __call__(self, **options):
        self.append(options)
        return self.run


@pytest.fixture
def started(monkeypatch):
    monkeypatch.setattr(wandb, "init", started := Started())
    return started


def track(folder="results", history=HISTORY, setting=AUTO, machine=None):
    with Tracker(folder, setting, CONFIG, "abc123", "train") as tracker:
        for step, metrics in history:
            tracker.log(step, metrics, machine)
        tracker.finish()
    return tracker


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


def test_a_run_that_cannot_be_started_is_a_warning(monkeypatch, capsys):
    def init(**options):
        raise wandb.errors.CommError("no route to the host")

    monkeypatch.setattr(wandb, "init", init)
    assert track().run is None
    assert capsys.readouterr().err == "warning: W&B: no route to the host; not recorded\n"
    assert json.loads(Path("results/metrics.json").read_text())["loss"] == 0.01


def test_a_run_that_cannot_be_online_is_recorded_offline(started, monkeypatch, capsys):
    def init(**options):
        if options["mode"] == "online":
            raise wandb.errors.CommError("no route\nto the host")
        return started(**options)

    monkeypatch.setattr(wandb, "init", init)
    os.environ["WANDB_API_KEY"] = KEY
    assert track().run is started.run
    assert [options["mode"] for options in started] == ["offline"]
    assert capsys.readouterr().err == (
        "warning: W&B: no route to the host; recorded offline (WANDB_MODE=offline saves the wait)\n"
    )
    del os.environ["WANDB_API_KEY"]
    track(setting=Tracking(wandb="online", project="ddpm"))
    assert capsys.readouterr().err == "warning: W&B: there is no key (wandb login); recorded offline\n"


class Answers(BaseHTTPRequestHandler):
    """A stand-in for W&B's server: it answers every request alike, and counts them."""

    def do_POST(self):
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        answer = json.dumps(self.server.answer).encode()
        self.send_response(self.server.code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)
        self.server.asked += 1

    do_GET = do_POST  # noqa: N815

    def log_message(self, *parts):
        pass


@contextmanager
def server(code, answer):
    """The address of a server that gives this answer to every request."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as answering:
        answering.code, answering.answer, answering.asked = code, answer, 0
        Thread(target=answering.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{answering.server_port}"
        answering.shutdown()
    assert answering.asked


def test_the_key_that_wandb_login_keeps_is_found(started):
    viewer = {"id": "1", "entity": "me", "username": "me", "email": "", "flags": "{}", "teams": {"edges": []}}
    Path(os.environ["HOME"]).mkdir()
    with server(200, {"data": {"viewer": viewer}}) as address:
        os.environ["WANDB_BASE_URL"] = address
        subprocess.run([Path(sys.executable).parent / "wandb", "login", KEY], check=True, timeout=120)
    track(None)
    assert [options["mode"] for options in started] == ["online"]


def test_what_was_recorded_offline_is_what_wandb_sync_would_send(offline):
    done = subprocess.run(
        [Path(sys.executable).parent / "wandb", "sync", "--dry-run"],
        cwd=offline, capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert "abc123" in done.stdout + done.stderr


@pytest.mark.parametrize("refused", [False, True])
def test_a_wrong_key_and_no_network_record_offline_for_real(tmp_path, refused):
    code = (
        "from ddpm.config.schema import Tracking; from ddpm.runtime import tracking\n"
        "tracking.PATIENCE['online'] = 5\n"
        "with tracking.Tracker(None, Tracking(wandb='auto', project='x'), {'a': 1}, 'abc', 'train') as tracker:\n"
        "    tracker.log(1, {'loss': 0.5})\n"
    )
    errors = {"errors": [{"message": "user is not logged in"}]}
    with server(401, errors) if refused else nullcontext("http://127.0.0.1:9") as address:
        wrong = os.environ | {"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": address, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, env=wrong, capture_output=True, text=True, timeout=120
        )
    assert (done.returncode, done.stdout) == (0, "")
    assert "recorded offline" in done.stderr
    assert "0000" not in done.stderr
    (file,) = tmp_path.glob("wandb/offline-run-*-abc/run-abc.wandb")
    rows = [values(record.history.item) for record in records(file) if record.WhichOneof("record_type") == "history"]
    assert rows[0]["train/loss"] == 0.5


def test_a_broken_connection_is_a_warning_and_dvclive_continues(started, capsys):
    started.run.fails_at = 2
    assert track().run is None
    assert capsys.readouterr().err == "warning: W&B: the network is gone; this run is no longer recorded there\n"
    assert len(started.run.calls) == 2
    assert len(Path("results/plots/metrics/loss.tsv").read_text().splitlines()) == 1 + len(HISTORY)


def test_a_folder_that_cannot_be_made_is_a_warning(started, capsys, tmp_path):
    (tmp_path / "wandb").write_text("a file where the folder should be")
    assert track().run is None
    assert capsys.readouterr().err.startswith("warning: W&B: ")
    assert started == []


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_the_end_of_a_run_is_recorded_with_its_outcome(started, error):
    try:
        with Tracker(None, AUTO, CONFIG, "abc123", "train"):
            if error:
                raise error
    except (ValueError, KeyboardInterrupt):
        pass
    assert started.run.ended == [1 if error else 0]


def netrc(host):
    Path(os.environ["HOME"]).mkdir()
    Path(os.environ["HOME"], ".netrc").write_text(f"machine {host}\n  login user\n  password {KEY}\n")
    Path(os.environ["HOME"], ".netrc").chmod(0o600)


@pytest.mark.parametrize(
    ("setting", "variable", "key", "mode"),
    [
        ("auto", None, None, "offline"),
        ("auto", None, "environment", "online"),
        ("auto", None, "netrc", "online"),
        ("auto", None, "netrc of another host", "offline"),
        ("auto", "", "environment", "online"),
        ("auto", "offline", "environment", "offline"),
        ("auto", "online", None, "offline"),
        ("offline", None, "environment", "offline"),
        ("offline", "online", "netrc", "online"),
        ("online", None, None, "offline"),
        ("online", None, "environment", "online"),
        ("auto", None, "netrc of today's server", "online"),
        ("online", "offline", "environment", "offline"),
        ("disabled", "offline", None, "offline"),
        ("disabled", None, "environment", None),
        ("online", "disabled", "environment", None),
    ],
)
def test_the_mode_follows_the_key_and_the_variable_wins(started, setting, variable, key, mode):
    if variable is not None:
        os.environ["WANDB_MODE"] = variable
    if key == "environment":
        os.environ["WANDB_API_KEY"] = KEY
    elif key:
        today = urlsplit(wandb.Settings().base_url).hostname
        netrc({"netrc": "api.wandb.ai", "netrc of today's server": today}.get(key, "example.org"))
    track(None, setting=Tracking(wandb=setting, project="mine"))
    assert [options["mode"] for options in started] == ([mode] if mode else [])


def test_a_broken_netrc_means_that_there_is_no_key(started):
    netrc("api.wandb.ai\n  nonsense")
    track(None)
    assert started[0]["mode"] == "offline"


@pytest.mark.parametrize("mode", ["online", "offline"])
def test_a_resumed_stage_continues_the_same_run(started, mode, tmp_path):
    os.environ |= {"WANDB_MODE": mode, "DVC_EXP_NAME": "brave-one", "WANDB_API_KEY": KEY}
    track(None)
    (options,) = started
    assert (options["project"], options["id"], options["name"]) == ("ddpm", "abc123", "brave-one")
    assert options["resume"] == ("allow" if mode == "online" else None)  # offline runs cannot be resumed
    assert options["dir"] == str(tmp_path.resolve())
    assert options["config"] == CONFIG
    assert options["settings"].disable_code
    assert not options["settings"].save_code


def test_two_runs_with_the_same_records_leave_the_same_bytes():
    track("one", setting=OFF, machine={"images_per_second": 12.5})
    track("two", setting=OFF, machine={"images_per_second": 99.0, "gpu_memory_gib": 3.0})
    assert contents("one") == contents("two")
    assert set(contents("one")) == {"metrics.json", *(f"plots/metrics/{name}.tsv" for name in HISTORY[0][1])}
    assert not any(b"images_per_second" in data or b"12.5" in data for data in contents("one").values())


def test_a_replayed_history_has_the_bytes_of_an_undisturbed_run():
    track("whole", setting=OFF)
    with Tracker("resumed", OFF, CONFIG, "abc123", "train") as tracker:  # stopped: no finish()
        for step, metrics in HISTORY[:3]:
            tracker.log(step, metrics)
    track("resumed", [*HISTORY[:2], *HISTORY[2:]], OFF)  # the state was of the second point
    assert contents("resumed") == contents("whole")


def test_an_earlier_runs_curves_are_removed():
    track("results", [(1, {"old": 1.0})], OFF)
    track("results", setting=OFF)
    assert "plots/metrics/old.tsv" not in contents("results")


def test_the_summary_holds_the_last_values():
    with Tracker("results", OFF, CONFIG, "abc123", "train") as tracker:
        for step, metrics in HISTORY:
            tracker.log(step, metrics)
        before = contents("results").get("metrics.json")
        tracker.finish()
    step, metrics = HISTORY[-1]
    assert json.loads(contents("results")["metrics.json"]) == metrics | {"step": step}
    assert before is None or json.loads(before) != metrics | {"step": step}


def test_a_picture_is_kept_only_where_a_folder_is_given(started):
    with Tracker("results", AUTO, CONFIG, "abc123", "train") as tracker:
        tracker.log_picture(3, "samples_epoch_00001", PICTURE, Path("kept/here"))
        tracker.log_picture(0, "noise", PICTURE)
    assert list(contents("kept")) == ["here/samples_epoch_00001.png"]
    assert not any(name.endswith(".png") for name in contents("results"))
    with Image.open("kept/here/samples_epoch_00001.png") as picture:
        assert picture.tobytes() == PICTURE.tobytes()
    first, second = started.run.calls
    assert (first["train/step"], second["train/step"]) == (3, 0)
    assert isinstance(first["train/samples"], wandb.Image)
    assert isinstance(second["train/noise"], wandb.Image)


def test_without_a_folder_and_without_wandb_nothing_is_written(tmp_path):
    track(None, setting=OFF)
    assert list(tmp_path.iterdir()) == []


def test_a_chosen_folder_for_wandbs_own_files_is_kept(started, tmp_path):
    os.environ["WANDB_CACHE_DIR"] = "/chosen"
    track(None)
    assert os.environ["WANDB_CACHE_DIR"] == "/chosen"
    assert os.environ["WANDB_DATA_DIR"] == str(tmp_path.resolve() / "wandb/cache")
