import json
from types import SimpleNamespace

import pytest
import torch

from ddpm.config.schema import Runtime, Tracking
from ddpm.errors import UserError
from ddpm.runtime.resume import fingerprint
from ddpm.runtime.run import open_run

INPUTS = {"data": "hash of the data"}


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """A folder of its own; torch's switches are restored."""
    threads, exact = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    monkeypatch.setenv("DVC_ROOT", str(tmp_path / "main"))
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(exact)


def opened(device="cpu", stage="train", inputs=INPUTS, **options):
    runtime = Runtime(device=device, reproducible=True, threads=1, launcher="none", processes=None)
    tracking = Tracking(wandb="disabled", project="ddpm")
    params = SimpleNamespace(runtime=runtime, tracking=tracking)
    return open_run(stage, params, inputs, memory_advice="lower train.batch_size", **options)


def states(place):
    return [path.name for path in (place / "main/.state").glob("*")]


def test_parameters_and_inputs_name_a_run_and_are_its_provenance(place):
    with opened() as run:
        config = run.provenance["params"]
        assert config["runtime"]["threads"] == 1 and config["tracking"]["project"] == "ddpm"
        assert run.provenance == {"run": fingerprint(config, INPUTS), "params": config} | INPUTS
        assert run.device == torch.device("cpu")
        assert run.state.folder.parent == place / "main/.state"
        assert run.state.folder.name.startswith(f"train-{run.provenance['run']}-")
        assert run.tracker.stage == "train"
    with opened(inputs={"data": "another hash"}) as other:
        assert other.provenance["run"] != run.provenance["run"]


def test_a_run_that_ends_well_leaves_no_state(place):
    with opened() as run:
        run.state.save({"step": 1})
    assert states(place) == []


@pytest.mark.parametrize("error", [RuntimeError("a bug"), KeyboardInterrupt()])
def test_a_run_that_is_cut_off_is_resumed_by_the_next(place, error):
    with pytest.raises(type(error)), opened() as run:
        run.state.save({"step": 7})
        raise error
    assert states(place) == [run.state.folder.name]
    with opened() as run:
        assert run.state.load() == {"step": 7}


def test_out_of_memory_is_one_line_and_the_state_stays(place):
    with pytest.raises(UserError, match=r"^out of memory: lower train.batch_size$"), opened():
        torch.empty(2**60)
    assert len(states(place)) == 1


def test_a_refused_device_touches_neither_state_nor_records(place, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (place / "results").mkdir()
    (place / "results/metrics.json").write_text("{}")
    with pytest.raises(UserError, match="this machine has no CUDA device"), opened("cuda", curves="results"):
        pass
    assert [path.name for path in place.rglob("*")] == ["results", "metrics.json"]


def test_a_run_that_is_held_elsewhere_touches_no_records(place, monkeypatch):
    monkeypatch.setattr("ddpm.runtime.workspace.PATIENCE", 0.2)
    (place / "results").mkdir()
    (place / "results/metrics.json").write_text("{}")
    with opened():
        with pytest.raises(UserError, match="at work on this very run"), opened(curves="results"):
            pass
        assert (place / "results/metrics.json").read_text() == "{}"


def test_curves_and_last_values_are_written_if_a_folder_is_named(place):
    with opened(stage="sample") as run:
        run.tracker.log(1, {"loss": 0.5})
    assert not (place / "results").exists()
    with opened(curves=place / "results") as run:
        run.tracker.log(1, {"loss": 0.5})
    assert (place / "results/plots/metrics/loss.tsv").exists()
    assert json.loads((place / "results/metrics.json").read_text())["loss"] == 0.5


def test_an_input_that_was_changed_ends_the_run_and_its_state(place):
    with opened() as run:
        run.check_unchanged(False, "data/prepared")
    with (
        pytest.raises(UserError, match="data/prepared: was changed while the stage ran, so its results"),
        opened() as run,
    ):
        run.state.save({"step": 7})
        run.check_unchanged(True, "data/prepared")
    assert states(place) == []
