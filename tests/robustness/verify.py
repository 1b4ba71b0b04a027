"""Run the whole pipeline again in a scratch clone of HEAD, and compare the bytes of each stage with dvc.lock.

    python -m tests.robustness.verify                             # as dvc.lock says
    python -m tests.robustness.verify --threads 1 2 4 --workers 0 1 3
    python -m tests.robustness.verify --smoke --threads 1 --workers 3

--threads n: the environment asks the libraries for n threads, and no more than n cores are given (the number of threads
that counts is the parameter runtime.threads). --workers n: the parameter train.workers; training.json, which
holds the parameters, is then left out of the comparison. --smoke: the smoke preset, compared with a first run of it.
"""

import argparse
import hashlib
import os
import shutil
import sys
import tempfile
from pathlib import Path

from omegaconf import OmegaConf

from tests.robustness.scratch import clone, environment, run

PROVENANCE = "models/ddpm/training.json"
LIBRARIES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def lock(folder: Path) -> dict[str, dict[str, str]]:
    """stage -> output -> its hash, by dvc.lock."""
    stages = OmegaConf.to_container(OmegaConf.load(folder / "dvc.lock"))["stages"]  # type: ignore[index,call-overload]
    return {name: {out["path"]: out["md5"] for out in stage["outs"]} for name, stage in stages.items()}


def contents(folder: Path) -> dict[str, dict[str, str]]:
    """stage -> file -> its hash, of the files that are there, without the file that holds the parameters."""
    return {
        name: {
            file.relative_to(folder).as_posix(): hashlib.md5(file.read_bytes()).hexdigest()
            for out in map(folder.joinpath, outs)
            for file in (sorted(out.rglob("*")) if out.is_dir() else [out])
            if file.is_file() and file != folder / PROVENANCE
        }
        for name, outs in lock(folder).items()
    }


def rerun(folder: Path, env: dict[str, str], threads: int | None = None, workers: int | None = None) -> None:
    """Run `dvc repro -f` in the clone, under these conditions."""
    around: list[str] = []
    if threads is not None:
        env = env | dict.fromkeys(LIBRARIES, str(threads))
        cores = sorted(os.sched_getaffinity(0))[:threads]
        around = ["taskset", "--cpu-list", ",".join(map(str, cores))]
    if workers is not None:
        params = OmegaConf.load(folder / "params.yaml")
        params.train.workers = workers
        (folder / "params.yaml").write_text(OmegaConf.to_yaml(params))
    run(folder, env, *around, "dvc", "repro", "-f")


def differences(before: dict[str, dict[str, str]], after: dict[str, dict[str, str]]) -> list[str]:
    """One line per stage; the line of a stage with other bytes starts with "OTHER"."""
    lines = []
    for stage, outs in before.items():
        different = [path for path, content in outs.items() if after[stage].get(path) != content]
        different += sorted(after[stage].keys() - outs.keys())
        verdict = f"OTHER BYTES: {', '.join(different)}" if different else f"the same bytes ({len(outs)} outputs)"
        lines.append(f"  {stage:13} {verdict}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[])
    parser.add_argument("--workers", type=int, nargs="+", default=[])
    parser.add_argument("--smoke", action="store_true")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="verify-")) / "clone"
    env = environment(folder)
    clone(folder)
    if arguments.smoke:
        run(folder, env, "dvc", "exp", "run", "-S", "+experiment=smoke")
        run(folder, env, "git", "commit", "-qam", "smoke")
    other = 0

    def report(title: str, lines: list[str]) -> None:
        nonlocal other
        other += sum("OTHER" in line for line in lines)
        print("\n".join([title, *lines]), flush=True)

    if not arguments.smoke:
        before = lock(folder)
        rerun(folder, env)
        report("dvc repro -f:", differences(before, lock(folder)))
        if difference := run(folder, env, "git", "diff", "--stat", "--", "dvc.lock", "results"):
            print(f"  git diff:\n{difference}", end="")
            other += 1
    made, recorded = contents(folder), lock(folder)
    for threads in arguments.threads:
        rerun(folder, env, threads=threads)
        report(f"with {threads} threads on {min(threads, len(os.sched_getaffinity(0)))} cores:",
               differences(recorded, lock(folder)))  # fmt: skip
    for workers in arguments.workers:
        rerun(folder, env, workers=workers)
        report(f"with {workers} loader workers:", differences(made, contents(folder)))
    shutil.rmtree(folder.parent)
    sys.exit(f"error: {other} differences" if other else 0)


if __name__ == "__main__":
    main()
