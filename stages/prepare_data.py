"""Stage prepare_data: a named data set, or a folder of images, to data/prepared/.

Writes {train,test}/images.npy (uint8 N x H x W x C), {train,test}/labels.npy (int64 N) and dataset.json.
"""

from pathlib import Path
from typing import Any

from ddpm.runtime import root, run_stage

SECTIONS = ("dataset",)
OUT = Path("data/prepared")


def main(params: Any) -> None:
    from ddpm.datasets import prepare  # after the parameters are checked: it loads numpy and Pillow

    summary = prepare(params.dataset, OUT, downloads=root() / "data/downloads")
    counts, shape = summary["counts"], "x".join(map(str, summary["shape"]))
    print(
        f"{summary['name']}: {counts['train']} train and {counts['test']} test images of {shape}, "
        f"{len(summary['classes'])} classes, in {OUT}"
    )


if __name__ == "__main__":
    run_stage(main, SECTIONS)
