"""A small repository of the same shape as this one, with experiments whose numbers the test chooses: nothing runs."""

import hashlib
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import yaml

PARAMS: dict[str, Any] = {
    "dataset": {"name": "digits"},
    "diffusion": {"prediction": "v"},
    "optimizer": {"_target_": "torch.optim.Adam", "lr": 0.002},
    "train": {"seed": 0, "steps": 1000},
    "sample": {"seed": 0, "count": 2000, "sampler": "ddim"},
    "evaluate": {"seed": 0},
}
GRAPH = {
    "stages": {
        "train": {
            "cmd": "true",
            "deps": ["code.py"],
            "params": ["dataset", "diffusion", "optimizer", "train"],
            "outs": ["models/ddpm"],
        },
        "evaluate": {
            "cmd": "true",
            "deps": ["models/ddpm"],
            "params": ["sample", "evaluate"],
            "metrics": [{"results/evaluate/metrics.json": {"cache": False}}],
        },
    }
}


class Repository:
    """Commits and experiments, written by git alone, as DVC stores them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        names = ("GIT_AUTHOR_NAME", "GIT_AUTHOR_EMAIL", "GIT_COMMITTER_NAME", "GIT_COMMITTER_EMAIL")
        self.env = {k: v for k, v in os.environ.items() if not k.startswith("DVC")} | dict.fromkeys(
            names, "t@example.org"
        )
        self.git("init", "-q", "-b", "main")
        (folder / ".dvc").mkdir()
        (folder / ".dvc/config").write_text("[core]\n    analytics = false\n")
        (folder / ".dvc/.gitignore").write_text("/tmp\n/cache\n")
        (folder / ".gitignore").write_text("/models\n/dvc_plots\n")
        (folder / "dvc.yaml").write_text(yaml.safe_dump(GRAPH))
        self.base = self.commit("main", {"frechet_distance": 0.05})

    def git(self, *arguments: str) -> str:
        done = subprocess.run(
            ["git", *arguments], cwd=self.folder, env=self.env, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    def _write(self, metrics: dict[str, float], code: str, changes: dict[str, Any]) -> None:
        tree = json.loads(json.dumps(PARAMS))
        for name, value in changes.items():
            section, _, key = name.partition(".")
            tree[section][key] = value
        (self.folder / "params.yaml").write_text(yaml.safe_dump(tree))
        (self.folder / "code.py").write_text(code)
        (self.folder / "results/evaluate").mkdir(parents=True, exist_ok=True)
        (self.folder / "results/evaluate/metrics.json").write_text(json.dumps(metrics))
        model = hashlib.md5(repr((tree["train"], tree["optimizer"], tree["diffusion"], code)).encode()).hexdigest()
        entry = {"path": "models/ddpm", "hash": "md5", "md5": f"{model}.dir"}
        source = {"path": "code.py", "hash": "md5", "md5": hashlib.md5(code.encode()).hexdigest()}
        lock = {
            "schema": "2.0",
            "stages": {
                "train": {"cmd": "true", "deps": [source], "outs": [entry]},
                "evaluate": {"cmd": "true", "deps": [entry]},
            },
        }
        (self.folder / "dvc.lock").write_text(yaml.safe_dump(lock))

    def commit(self, message: str, metrics: dict[str, float], code: str = "1\n", **changes: Any) -> str:
        """Make a commit on main; return its hash."""
        self._write(metrics, code, changes)
        self.git("add", "-A")
        self.git("commit", "-qm", message)
        return self.git("rev-parse", "HEAD")

    def experiment(self, name: str, metrics: dict[str, float], code: str = "1\n", **changes: Any) -> None:
        """Make an experiment that started from HEAD. Parameters by `section__name`."""
        base = self.git("rev-parse", "HEAD")
        self._write(metrics, code, {key.replace("__", ".", 1): value for key, value in changes.items()})
        self.git("add", "-A")
        made = self.git("commit-tree", self.git("write-tree"), "-p", base, "-m", f"dvc: commit experiment {name}")
        self.git("update-ref", f"refs/exps/{base[:2]}/{base[2:]}/{name}", made)
        self.git("reset", "-q", "--hard")
