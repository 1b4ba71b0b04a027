"""Stage prepare_data: a named data set, or a folder of images, to data/prepared/.

Writes {train,test}/images.npy (uint8 N x H x W x C), {train,test}/labels.npy (int64 N) and dataset.json.
"""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ddpm.runtime.stage import run_stage
from ddpm.runtime.workspace import root

if TYPE_CHECKING:
    from ddpm.config.schema import Params

SECTIONS = ("dataset",)
OUT = Path("data/prepared")


def main(params: "Params") -> None:
    # imported after the parameters are checked, since these modules import NumPy, Pillow and torch
    from ddpm.config.checks import check_data
    from ddpm.config.load import load_all
    from ddpm.data.prepare import prepare

    p, later = params.dataset, load_all()  # all sections, to refuse now what a later stage would
    if later.train.transforms:
        from ddpm.data.transforms import Transforms

        Transforms(later.train.transforms).probe((p.channels, p.image_size, p.image_size))
    summary = prepare(p, OUT, root() / "data/downloads", check=partial(check_data, later))
    counts, shape = summary["counts"], "x".join(map(str, summary["shape"]))
    print(
        f"{summary['name']}: {counts['train']} train and {counts['test']} test images of {shape}, "
        f"{len(summary['classes'])} class{'es' * (len(summary['classes']) != 1)}, in {OUT}"
    )


if __name__ == "__main__":
    run_stage(main, SECTIONS)
