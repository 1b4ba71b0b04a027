"""Recording a run: curves and pictures to DVCLive (files that DVC hashes) and to Weights & Biases.

What depends on the clock or the machine goes to W&B and the terminal only. wandb is imported where it is used: it takes
0.3 s, which a run with `tracking.wandb: disabled` saves.
"""

import netrc
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

from dvclive import Live
from omegaconf import OmegaConf
from PIL import Image

from ddpm import pictures
from ddpm.config.schema import Tracking
from ddpm.runtime import processes
from ddpm.runtime.workspace import root

PATIENCE = {"online": 20, "offline": 90}  # seconds: for a server, and for W&B's own service on a busy machine
SERVER = "https://api.wandb.ai"  # W&B also accepts the key of this address, whatever its server's address is now


class Tracker:
    """One run's records. Trouble with W&B is a warning, never the end of a run. Use as a context manager.

    Args:
        folder: DVCLive's, emptied first; None to record no curves.
        config: every parameter of the run, as plain values.
        run_id: W&B's id of the run; the stages that belong together pass the same.
        stage: the name of the stage, for W&B's job type and as the prefix of its metrics.
    """

    def __init__(self, folder: str | None, tracking: Tracking, config: dict[str, Any], run_id: str, stage: str) -> None:
        self.stage = stage
        self._records = processes.rank() == 0  # one process for all
        self.live = Live(folder, dvcyaml=False, save_dvc_exp=False, report=None) if folder and self._records else None
        self.run = _start_wandb(tracking, config, run_id, stage) if self._records else None

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._wandb(lambda run: run.finish(exit_code=0 if kind is None else 1))

    def log(self, step: int, metrics: dict[str, float], machine: dict[str, float] | None = None) -> None:
        """Record values at a step. `machine`: values that depend on the clock or the machine; only W&B gets them."""
        if self.live:
            self.live.step = step  # next_step() would read every file again
            for name, value in metrics.items():
                self.live.log_metric(name, value)
        values = {f"{self.stage}/{name}": value for name, value in (metrics | (machine or {})).items()}
        self._wandb(lambda run: run.log(values | {f"{self.stage}/step": step}))

    def log_picture(self, step: int, name: str, picture: Image.Image, folder: Path | None = None) -> None:
        """Record a picture in W&B; where `folder` is given, also save it there as <name>.png."""
        if folder and self._records:
            pictures.save(picture, folder / f"{name}.png")
        key = f"{self.stage}/{name.split('_')[0]}"
        self._wandb(lambda run: run.log({key: _image(picture, name), f"{self.stage}/step": step}))

    def finish(self) -> None:
        """Write DVCLive's metrics.json from the last values."""
        if self.live:
            self.live.make_summary()

    def _wandb(self, action: Callable[[Any], None]) -> None:
        if self.run is None:
            return
        try:
            action(self.run)
        except Exception as error:  # trouble with W&B does not end the training
            _warn(f"{error}; this run is no longer recorded there")
            self.run = None


def _image(picture: Image.Image, caption: str) -> Any:
    import wandb

    return wandb.Image(picture, caption=caption)


def _has_key() -> bool:
    """Whether W&B would find a key: in the environment, or in ~/.netrc, where `wandb login` puts it."""
    import wandb

    if os.environ.get("WANDB_API_KEY"):
        return True
    own = os.environ.get("WANDB_BASE_URL")
    servers = [own] if own else [wandb.Settings().base_url, SERVER]
    try:
        known = netrc.netrc()
    except (OSError, netrc.NetrcParseError):
        return False
    return any(known.authenticators(urlsplit(server).netloc) for server in servers)


def _start_wandb(tracking: Tracking, config: dict[str, Any], run_id: str, stage: str) -> Any:
    """Start the W&B run, offline where it cannot be online; None where it is disabled, or neither works.

    Every step down is a warning.
    """
    mode: Any = os.environ.get("WANDB_MODE") or tracking.wandb
    if mode == "auto":
        mode = "online" if _has_key() else "offline"
    if mode == "online" and not _has_key():  # W&B would ask for one, and wait
        _warn("there is no key (wandb login); recorded offline")
        mode = "offline"
    if mode == "disabled":
        return None
    import wandb

    for variable in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):  # the home may be read-only
        os.environ.setdefault(variable, str(root() / "wandb" / "cache"))
    for attempt in dict.fromkeys((mode, "offline")):
        try:
            return _init(attempt, tracking.project, config, run_id, stage)
        except Exception as error:  # trouble with W&B does not end the stage
            outcome = "recorded offline (WANDB_MODE=offline saves the wait)" if attempt == "online" else "not recorded"
            _warn(f"{' '.join(str(error).split())[:200]}; {outcome}")
            wandb.teardown()  # its service would hold the run's id
    return None


def _warn(text: str) -> None:
    print(f"warning: W&B: {text}", file=sys.stderr, flush=True)


def _init(mode: Any, project: str, config: dict[str, Any], run_id: str, stage: str) -> Any:
    import wandb

    (root() / "wandb").mkdir(exist_ok=True)
    run = wandb.init(
        project=project,
        id=run_id,
        name=os.environ.get("DVC_EXP_NAME"),
        job_type=stage,
        resume="allow" if mode == "online" else None,
        mode=mode,
        dir=str(root()),
        config=config,
        settings=wandb.Settings(
            silent=True,
            console="off",
            disable_code=True,
            disable_git=True,
            save_code=False,
            init_timeout=PATIENCE[mode],
        ),
    )
    run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
    artifact = wandb.Artifact(f"{stage}-config-{run_id}", type="config")
    with artifact.new_file("params.yaml") as file:
        file.write(OmegaConf.to_yaml(OmegaConf.create(config)))
    run.log_artifact(artifact)
    return run
