"""Write samples as PNG files in their own size: python -m tools.images [REV] [--only "0 10-19"] [--classes "cat dog"]

REV is a commit or an experiment; without REV, the samples are those of the working tree. A file is named after the
number of its sample, and after its class where there are classes.
"""

import argparse
import json
import os
import re
import sys
import tempfile
from pathlib import Path

import numpy as np
from dvc.api import DVCFileSystem
from dvc.exceptions import DvcException
from dvc.repo import Repo
from dvc.scm import resolve_rev
from PIL import Image

from ddpm import pictures
from ddpm.config.load import load_all
from ddpm.core.unet import UNetConfig
from ddpm.errors import UserError, legible, listed
from ddpm.files import load_array
from ddpm.model_folder import CLASSES, TRAINING, class_counts
from ddpm.sampling import Classes, class_sequence

SAMPLES, MODEL, PARAMS = "samples/images.npy", "models/ddpm", "params.yaml"
NEEDED, OPTIONAL = (SAMPLES, f"{MODEL}/{TRAINING}", PARAMS), (f"{MODEL}/{CLASSES}",)


def fetch(rev: str, folder: Path) -> None:
    """Copy the samples of a revision, and the files that determine their classes, from the cache or the remote.

    Raises:
        UserError: there is no such revision, or its samples are neither in the cache nor in the remote.
    """
    try:
        with Repo() as repo:
            files = DVCFileSystem(rev=resolve_rev(repo.scm, rev))
        for name in (*NEEDED, *(name for name in OPTIONAL if files.exists(name))):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            files.get_file(name, str(folder / name))
    except DvcException as error:
        raise UserError(f"REV = {rev}: {error}") from None
    except FileNotFoundError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"REV = {rev}: {reason}; fetch its outputs by dvc pull, or dvc exp pull <remote> {rev}"
        ) from None


def class_names(root: Path, count: int) -> list[str]:
    """The class of each sample; empty for an unconditional model."""
    if not (root / MODEL / CLASSES).exists():
        return []
    names = tuple(map(str, json.loads((root / MODEL / CLASSES).read_text(encoding="utf-8"))))
    # only the number of classes of the network matters here
    network = UNetConfig(2, 1, 1, (64,), 1, (False,), num_class_embeds=len(names) + 1, has_no_label=True)
    classes = Classes(names, class_counts(root / MODEL))
    return [names[i] for i in class_sequence(load_all(root / PARAMS).sample, network, classes, count)]


def numbers(text: str, count: int) -> list[int]:
    """The numbers that a text names, as in "0 5 10-19".

    Raises:
        UserError: a word is not a number or a range, or is beyond the samples.
    """
    found: dict[int, None] = {}
    for word in text.replace(",", " ").split():
        if not (match := re.fullmatch(r"(\d+)(?:-(\d+))?", word)) or int(match[1]) > int(match[2] or match[1]):
            raise UserError(f"ONLY = {legible(text)}: {legible(word)} is neither a number nor a range such as 10-19")
        if int(match[2] or match[1]) >= count:
            raise UserError(f"ONLY = {legible(text)}: {word} is beyond the {count} samples, 0 to {count - 1}")
        found |= dict.fromkeys(range(int(match[1]), int(match[2] or match[1]) + 1))
    return list(found)


def chosen(asked: argparse.Namespace, labels: list[str], count: int) -> list[int]:
    """The numbers of the samples to write: all, or those of `--only` and `--classes`.

    Raises:
        UserError: a number or a class does not exist.
    """
    places = numbers(asked.only, count) if asked.only else list(range(count))
    wanted = asked.classes.split()
    for name in wanted:
        if name not in labels:
            known = f"there are {listed(dict.fromkeys(labels))}" if labels else "the model is unconditional"
            raise UserError(f"CLASS = {legible(name)}: no sample has this class; {known}")
    return [i for i in places if not wanted or labels[i] in wanted]


def write(root: Path, out: Path, asked: argparse.Namespace) -> int:
    """Write the files, and return how many.

    Raises:
        UserError: the folder exists, so that it would hold files of two runs; or a number or a class does not exist.
    """
    if out.exists():
        raise UserError(f"OUT = {out}: exists already; remove it, or name another folder")
    images = load_array(root / SAMPLES, "sample", "uint8", 4)
    labels = class_names(root, len(images))
    places = chosen(asked, labels, len(images))
    for i in places:
        pixels = np.asarray(images[i])
        name = f"{i:05d}" + (f"_{labels[i].replace(os.sep, '-')}" if labels else "")
        pictures.save(Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels), out / f"{name}.png")
    return len(places)


def main() -> None:
    """Write the files, and print where they are."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("revision", nargs="?", default="")
    parser.add_argument("--only", default="")
    parser.add_argument("--classes", default="")
    parser.add_argument("--out", default="")
    asked = parser.parse_args()
    out = Path(asked.out or f"images/{(asked.revision or 'workspace').replace('/', '-')}")
    try:
        with tempfile.TemporaryDirectory() as folder:
            if asked.revision:
                fetch(asked.revision, Path(folder))
            count = write(Path(folder if asked.revision else "."), out, asked)
    except UserError as fault:
        sys.exit("\n".join(f"error: {line}" for line in str(fault).splitlines()))
    print(f"{count} images in {out}")


if __name__ == "__main__":
    main()
