"""Feed damaged, odd and hostile inputs to the readers of a user's files, and odd settings to the samplers: each ends in
a result or in a reported fault.

    python -m tests.robustness.fuzz --examples 5000
    python -m tests.robustness.fuzz --only images --examples 100000 --seed 7

Reported means a `UserError` whose lines a terminal can show; anything else, from a KeyError to a hang, is a bug, and
hypothesis reduces the input that shows it.
"""

import argparse
import hashlib
import io
import json
import os
import shutil
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from PIL import Image

from ddpm.config.load import check, load_params
from ddpm.config.schema import Dataset
from ddpm.config.targets import TRANSFORM, allowed_names, argument_names
from ddpm.core import samplers
from ddpm.core.diffusion import DiffusionConfig, GaussianDiffusion
from ddpm.data.batches import batches
from ddpm.data.decode import decode_file
from ddpm.data.prepare import prepare
from ddpm.data.prepared import Images, Prepared
from ddpm.data.transforms import TOLERANCE, Transforms
from ddpm.errors import UserError
from ddpm.model_folder import load_model, save_model, training_run
from ddpm.runtime.resume import ResumeState
from tests.conftest import composed, small_unet

EXTENSIONS = ("png", "jpg", "jpeg", "webp", "bmp", "gif", "PNG", "txt", "png.exe", "")
MODES = (
    "1",
    "L",
    "LA",
    "La",
    "P",
    "PA",
    "RGB",
    "RGBA",
    "RGBa",
    "RGBX",
    "CMYK",
    "YCbCr",
    "LAB",
    "HSV",
    "I",
    "F",
    "I;16",
)
SIZES = ((1, 1), (1, 33), (40, 1), (17, 9), (64, 64))
NUMBERS = (-(2**63), -1, 0, 1, 2, 3, 7, 8, 16, 10**4, 10**9, 10**15, 2**63, 10**400)
JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.sampled_from(NUMBERS)
    | st.floats()
    | st.sampled_from([1e-300, 0.5, 1e308])
    | st.text(max_size=6)
    | st.sampled_from(["UNet2DModel", "AttnDownBlock2D", "linear", "../../etc/passwd", "\x1b[2J", "os.system", "${x}"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=5,
)
PLACE = st.floats(0, 1, exclude_max=True)  # in a file or a list, whatever its length
# What may happen to the bytes of a file
BYTES = st.lists(
    st.tuples(
        st.sampled_from(["cut", "flip", "set", "insert", "delete", "repeat", "zero"]),
        PLACE,
        st.binary(min_size=1, max_size=8),
    ),
    max_size=4,
)
# ... and to the values of a JSON or YAML tree
VALUES = st.lists(st.tuples(st.sampled_from(["set", "delete", "add"]), st.lists(PLACE, min_size=3, max_size=3), JUNK),
                  min_size=1, max_size=3)  # fmt: skip


def damaged(content: bytes, changes: list[tuple[str, float, bytes]]) -> bytes:
    data = bytearray(content)
    for kind, place, new in changes:
        at = int(place * len(data))
        if kind == "cut":
            del data[at:]
        elif kind == "flip" and data:
            data[at] ^= 1 << new[0] % 8
        elif kind == "set":
            data[at : at + len(new)] = new
        elif kind == "insert":
            data[at:at] = new
        elif kind == "delete":
            del data[at : at + 16 * new[0]]
        elif kind == "repeat":
            data[at:at] = data[at : at + 4 * new[0]]
        elif kind == "zero":
            data[at : at + new[0]] = bytes(len(data[at : at + new[0]]))
    return bytes(data)


def mutated(tree: Any, changes: list[tuple[str, list[float], Any]]) -> Any:
    for kind, places, value in changes:
        node, key = tree, None
        for place in places:  # down to a node that has a value at a key
            keys = sorted(node, key=str) if isinstance(node, dict) else range(len(node))
            key = keys[int(place * len(keys))] if keys else None
            if key is None or not isinstance(node[key], dict | list):
                break
            if place < 0.9:
                node = node[key]
                key = None
        if kind == "add" and isinstance(node, dict):
            node[str(value)[:8]] = value
        elif key is not None and kind == "set":
            node[key] = value
        elif key is not None and kind == "delete":
            del node[key]
    return tree


def outcome(read: Callable[[], object]) -> str:
    """Check that `read` returns a result, or reports the fault in lines that a terminal can show."""
    try:
        read()
    except UserError as fault:
        lines = str(fault).split("\n")
        assert all(line.strip() and line.isprintable() and len(line) < 2500 for line in lines), lines
        return "reported"
    return "result"


def scratch() -> Path:
    """A new folder, in memory if possible."""
    memory = Path("/dev/shm")
    return Path(tempfile.mkdtemp(prefix="fuzz-", dir=memory if memory.is_dir() else None))


# The files that are damaged


@cache
def params() -> dict[str, Any]:
    return composed()


@cache
def image_corpus() -> list[bytes]:
    """Images in every format and mode that Pillow can write, in a few odd sizes, animated where possible."""
    Image.init()
    rng = np.random.default_rng(0)
    found = [b"", b"not an image", b"GIF89a", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF\x10\0\0\0WEBP", b"BM"]
    found += [b'<svg xmlns="http://www.w3.org/2000/svg"/>', b"%PDF-1.4", b"\x1f\x8b\x08\0"]
    for kind in sorted(set(Image.SAVE) - {"PDF", "EPS"}):
        for mode in MODES:
            for size in SIZES if mode in ("L", "RGB", "RGBA", "P") else SIZES[-1:]:
                pixels = Image.fromarray(rng.integers(0, 256, (*size, 4), dtype=np.uint8), "RGBA")
                try:
                    image = pixels.convert("RGB").convert(mode) if mode != "RGBA" else pixels
                    buffer = io.BytesIO()
                    many = {"save_all": True, "append_images": [image]} if kind in Image.SAVE_ALL else {}
                    image.save(buffer, kind, **many)
                except Exception:
                    continue
                found.append(buffer.getvalue())
    return found


@cache
def model_files() -> dict[str, bytes]:
    folder = scratch()
    network = small_unet(num_class_embeds=3, has_no_label=True)
    provenance = {"run": "0" * 16, "data": {"name": "digits"}}
    save_model(folder, network, DiffusionConfig(20, "linear", "epsilon"), provenance, ("a", "b"))
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    shutil.rmtree(folder)
    return files


@cache
def prepared_files() -> dict[str, bytes]:
    folder = scratch()
    prepare(Dataset(**params()["dataset"] | {"subset": 20}), folder / "prepared", folder)
    files = {
        path.relative_to(folder / "prepared").as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }
    shutil.rmtree(folder)
    return files


def written(files: dict[str, bytes]) -> Path:
    folder = scratch()
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def named(files: Callable[[], dict[str, bytes]], changes: dict[str, Any]) -> Path:
    """The files, one of them changed in its bytes or, if it is JSON, in its values, or gone."""
    all_files = dict(files())
    name = sorted(all_files)[int(changes["which"] * len(all_files))]
    if changes["values"] and name.endswith(".json"):
        all_files[name] = json.dumps(mutated(json.loads(all_files[name]), changes["values"])).encode()
    elif changes["gone"]:
        del all_files[name]
    all_files = {
        other: damaged(content, changes["bytes"]) if other == name else content for other, content in all_files.items()
    }
    return written(all_files)


FILES = st.fixed_dictionaries(
    {"which": PLACE, "bytes": BYTES, "values": st.just([]) | VALUES, "gone": st.sampled_from([False] * 9 + [True])}
)

# What reads them


def parameters(changes: list[tuple[str, list[float], Any]]) -> str:
    tree = mutated(json.loads(json.dumps(params())), changes)
    return outcome(lambda: check(tree))


def parameter_file(changes: list[tuple[str, float, bytes]]) -> str:
    folder = scratch()
    (folder / "params.yaml").write_bytes(damaged(OmegaConf.to_yaml(params()).encode(), changes))
    try:
        return outcome(lambda: load_params(("train",), folder / "params.yaml"))
    finally:
        shutil.rmtree(folder)


@cache
def pictures() -> list[tuple[str, int, bytes]]:
    """Images like photographs, in formats that detect a lost part: the format, the start of the pixels, the file."""
    found = []
    y, x = np.mgrid[:144, :192]
    for grain in (10, 30):
        waves = np.stack([np.sin(x / 17), np.cos(y / 21 + x / 30), np.sin((x + y) / 40)], axis=-1)
        pixels = 127 + 90 * waves + np.random.default_rng(0).normal(0, grain, waves.shape)
        image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
        for mode in ("RGB", "L"):
            for kind, options in (
                *(("JPEG", {"quality": quality}) for quality in (30, 75, 95)),
                ("JPEG", {"progressive": True}),
                ("JPEG", {"optimize": True, "restart_marker_blocks": 7}),
                *(("WEBP", {"quality": quality, "method": method}) for quality in (30, 80) for method in (0, 4)),
                ("WEBP", {"lossless": True}),
                ("PNG", {}),
                ("GIF", {}),
            ):
                buffer = io.BytesIO()
                image.convert(mode).save(buffer, kind, **options)
                start = {"JPEG": buffer.getvalue().find(b"\xff\xda") + 14, "GIF": 800}.get(kind, 64)
                found.append((kind, start, buffer.getvalue()))
    return found


def shortened(case: tuple[float, float, str]) -> str:
    """Files without their end, or with zeros or an end marker in its place: each is reported."""
    which, place, tail = case
    kind, start, whole = pictures()[int(which * len(pictures()))]
    at = start + int(place * (len(whole) - start))
    content = whole[:at]
    if tail == "zeros":
        content += bytes(len(whole) - at)
    elif tail == "marker" and kind == "JPEG":
        content += b"\xff\xd9"
    if tail == "whole":
        content = whole
    folder = written({"a.png": content})
    try:
        result = decode_file(str(folder / "a.png"), 32, 3, max_megapixels=1)
    finally:
        shutil.rmtree(folder)
    assert isinstance(result, str) == (tail != "whole"), (kind, len(whole), at)
    return "reported" if isinstance(result, str) else "result"


def images(case: tuple[float, str, list[tuple[str, float, bytes]], int, int]) -> str:
    which, extension, changes, size, channels = case
    corpus = image_corpus()
    folder = written({f"a.{extension}": damaged(corpus[int(which * len(corpus))], changes)})
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = decode_file(str(next(folder.iterdir())), size, channels, max_megapixels=1)
    finally:
        shutil.rmtree(folder)
    if isinstance(result, str):
        assert result.strip() and "\n" not in result and len(result) < 1000, result
        return "reported"
    assert result.shape == (size, size, channels) and result.dtype == np.uint8
    return "result"


TEXT = st.text(st.characters(exclude_characters="/\0", codec="utf-8"), min_size=1, max_size=12)
BINARY = st.binary(max_size=12).map(lambda name: os.fsdecode(name.translate(None, b"/\0")))
# Rarely a name that is not UTF-8, since one is enough for a folder to be refused
NAME = st.one_of(*[TEXT] * 20, BINARY).filter(lambda name: name not in ("", ".", ".."))


def one_by_one(function: Callable[[str], Any], files: list[str], chunk: int, label: str) -> Iterator[list[Any]]:
    """Replaces `in_parallel`: starting processes takes a hundred times longer than the rest."""
    for start in range(0, len(files), chunk):
        yield [function(file) for file in files[start : start + chunk]]


def image_folders(case: dict[str, Any]) -> str:
    folder = scratch()
    png = [content for content in image_corpus() if content.startswith(b"\x89PNG")]
    corpus = image_corpus() + png * (3 * len(image_corpus()) // len(png))  # three of four are images
    try:
        for parents, name, extension, which in case["files"]:
            try:
                path = folder.joinpath("data", *parents, f"{name}.{extension}")
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(corpus[int(which * len(corpus))])
            except (OSError, UnicodeEncodeError):  # a file where a folder is needed, or a name that is invalid here
                continue
        dataset = Dataset(**params()["dataset"] | case["dataset"] | {"name": "folder", "path": str(folder / "data")})
        with (
            patch("ddpm.data.folders.in_parallel", one_by_one),
            patch("ddpm.data.prepare.in_parallel", one_by_one),
            redirect_stdout(io.StringIO()),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            return outcome(lambda: prepare(dataset, folder / "prepared", folder))
    finally:
        shutil.rmtree(folder)


def files_in(places: list[list[str]] | None) -> st.SearchStrategy[Any]:
    """Files in these folders, or in any."""
    parents = st.lists(NAME, max_size=2) if places is None else st.sampled_from(places)
    return st.lists(st.tuples(parents, NAME, st.sampled_from(EXTENSIONS[:-1]), PLACE), min_size=2, max_size=8)


# Names of folders, one in three of which may be a side
FOLDERS = ("cat", "dog", "Bus", "0", "archive", "images", "seg_train", "seg_test", "bullet_train")
TRAINING = ("train", "Train", "training", "training_set")
HELD_OUT = ("test", "TEST", "test1", "val", "valid", "Validation", "held_out")


def folder_layouts(case: dict[str, Any]) -> str:
    """Each image has its own colour, so that the prepared pixels show where it went."""
    folder = scratch()
    try:
        places: list[str] = []
        for parents, count in case["places"]:
            for _ in range(count):
                path = folder.joinpath("data", *parents, f"{len(places)}.png")
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (4, 4), (len(places), len(parents), 0)).save(path)
                places.append(path.relative_to(folder / "data").as_posix())
        values = params()["dataset"] | case["dataset"]
        dataset = Dataset(**values | {"name": "folder", "path": str(folder / "data"), "image_size": 4, "channels": 3})
        printed = io.StringIO()

        def read() -> None:
            with redirect_stdout(printed):
                prepare(dataset, folder / "prepared", folder)

        with patch("ddpm.data.folders.in_parallel", one_by_one), patch("ddpm.data.prepare.in_parallel", one_by_one):
            result = outcome(read)
        if result == "result":
            where_they_went(folder / "prepared", places, dataset, printed.getvalue())
        return result
    finally:
        shutil.rmtree(folder)


def where_they_went(prepared: Path, places: list[str], dataset: Dataset, printed: str) -> None:
    data = Prepared(prepared)
    info = data.info
    train, test = ({places[image[0, 0, 0]] for image in side.images} for side in (data.train, data.test))
    assert (len(train), len(test)) == (info["counts"]["train"], info["counts"]["test"]), "an image occurs twice"
    assert train and test and not train & test
    assert not [file for file in train if set(file.split("/")[:-1]) & set(HELD_OUT)], "a held-out image is trained on"
    pairs = [
        file
        for file in train
        for other in places
        if "seg_test/" in file
        if other.startswith(f"{file.partition('seg_test/')[0]}seg_train/")
    ]
    assert not pairs, "the held-out part of a pair of folders is trained on"
    classes = len(info["classes"])
    labels = np.bincount(data.train.labels, minlength=classes).tolist()
    assert (labels if classes else []) == info["class_counts"] and all(info["class_counts"]), "a class has no image"
    if dataset.subset is None and "left out" not in printed:
        assert train | test == set(places), "an image is lost silently"


def models(changes: dict[str, Any]) -> str:
    folder = named(model_files, changes)

    def read() -> None:
        unet, config, _ = load_model(folder)
        training_run(folder)
        GaussianDiffusion(config)
        size, channels = unet.config.sample_size, unet.config.in_channels
        assert all(value.dtype == torch.float32 for value in unet.state_dict().values())
        if size <= 64:
            labels = torch.zeros(1, dtype=torch.int64) if unet.config.classes else None
            unet(torch.zeros(1, channels, size, size), torch.zeros(1, dtype=torch.int64), labels)

    try:
        return outcome(read)
    finally:
        shutil.rmtree(folder)


def prepared(changes: dict[str, Any]) -> str:
    folder = named(prepared_files, changes)

    def read() -> None:
        data = Prepared(folder)
        info = data.info
        assert len(info["sha256"]) and len(info["shape"]) == 3 and isinstance(info["classes"], list)
        for split in (data.train, data.test):
            assert len(np.asarray(split.images)) == len(split.labels)

    try:
        return outcome(read)
    finally:
        shutil.rmtree(folder)


def states(case: tuple[list[tuple[str, float, bytes]], bool, bool]) -> str:
    """A state is read whole, or skipped; `sealed`: with a checksum that fits the damage."""
    changes, sealed, array = case
    folder = scratch()
    try:
        with ResumeState(folder / "state") as state, redirect_stderr(io.StringIO()):
            state.save({"step": 1, "model": {"w": torch.arange(6.0)}})
            state.save({"step": 2, "model": {"w": torch.arange(6.0)}})
            state.saved()
            state.kept("part", lambda: np.arange(5))
            path = folder / "state" / ("part.npy" if array else "state.pt")
            content = path.read_bytes()
            body = damaged(content[32:], changes) if sealed else b""
            path.write_bytes(hashlib.sha256(body).digest() + body if sealed else damaged(content, changes))
            if array:
                kept = state.kept("part", lambda: np.arange(5))
                assert isinstance(kept, np.ndarray)
                return "result"
            loaded = state.load()
            assert loaded is not None  # the previous state is whole
            return "result" if loaded.get("step") == 2 else "reported"
    finally:
        shutil.rmtree(folder)


# Arguments that most transforms of 8 x 8 images take, by their name
SUITABLE: dict[str, Any] = {
    "size": 8,
    "padding": 1,
    "degrees": 10,
    "mean": [0.5],
    "std": [0.5],
    "kernel_size": 3,
    "bits": 4,
    "threshold": 0.5,
    "sharpness_factor": 2,
    "quality": 50,
    "dtype": "torch.float32",
    "scale": True,
    "min_size": 8,
    "max_size": 9,
    "target_size": [8, 8],
}
ARGUMENT = st.sampled_from(
    [None, True, False, -1, 0, 1, 2, 3, 8, 33, 256, -0.5, 0.0, 0.3, 1.0, 9.5, [], [1], [8, 8], [0.2, 0.7], [3, 1, 2],
     "", "constant", "reflect", "random", "imagenet", "torch.uint8", "torch.float16", "torch.int64", {}, {"a": 1}]
)  # fmt: skip


@st.composite
def transform(draw: st.DrawFn, depth: int = 2) -> dict[str, Any]:
    """An allowed class, with its arguments missing, suitable or arbitrary."""
    name = draw(st.sampled_from(allowed_names(TRANSFORM)))
    node: dict[str, Any] = {"_target_": f"{TRANSFORM.module}.{name}"}
    for argument in argument_names(TRANSFORM, name):
        choice = draw(st.integers(0, 19))
        if argument == "transforms" and depth and choice:
            node[argument] = draw(st.lists(transform(depth - 1), max_size=2))
        elif choice == 0:
            node[argument] = draw(ARGUMENT)
        elif argument in SUITABLE:
            node[argument] = SUITABLE[argument]
    return node


def transform_lists(case: tuple[list[dict[str, Any]], int]) -> str:
    """An accepted list gives uint8 images, or float32 in [0, 1]; any other is refused, in a step if not before."""
    nodes, channels = case
    split = Images(np.random.default_rng(0).integers(0, 256, (6, 8, 8, channels), dtype=np.uint8), np.zeros(6, int))
    tree = json.loads(json.dumps(params()))
    tree["train"]["transforms"] = nodes

    def read() -> None:
        check(tree)
        Transforms(nodes).probe((channels, 8, 8))
        for batch, _ in batches(split, batch_size=3, seed=0, steps=range(2), transforms=nodes):
            assert batch.shape == (3, channels, 8, 8)
            assert batch.dtype in (torch.uint8, torch.float32)
            assert batch.dtype == torch.uint8 or -TOLERANCE <= batch.min() <= batch.max() <= 1 + TOLERANCE

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return outcome(read)


TIMESTEPS = st.integers(2, 1200) | st.sampled_from([2, 3, 1000, 4000, 20_000, 100_000])
STEPS = st.integers(0, 60) | st.integers(1, 1300)  # more than there are timesteps, too


def sampling(case: dict[str, Any]) -> str:
    """A sampler with the best network for one normal pixel, in closed form: as many states as steps, all finite."""
    config, total, mean, std = case["config"], case["timesteps"], 0.1, 0.2

    def read() -> None:
        try:
            d = GaussianDiffusion(DiffusionConfig(total, **config))
            path = samplers.timesteps(total, case["steps"], case["spacing"])
        except ValueError as error:  # the core knows no settings; the rooms above name them
            raise UserError(str(error)) from None
        assert len(path) == len(set(path)) and total > path[0] and path[-1] >= 0 and path == sorted(path)[::-1]

        def model(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            a = float(d.alphas_cumprod[int(t[0])])
            signal, sigma = a**0.5, (1 - a) ** 0.5
            epsilon = sigma * (x - signal * mean) / (a * std**2 + 1 - a)
            x0 = mean + signal * std**2 * (x - signal * mean) / (a * std**2 + 1 - a)
            output = {"epsilon": epsilon, "x0": x0, "v": signal * epsilon - sigma * x0}[config["prediction"]]
            return torch.cat([output, torch.zeros_like(x)], dim=1) if config["learn_variance"] else output

        g = torch.Generator().manual_seed(0)
        noise = lambda: torch.randn(4, 1, 1, 1, generator=g)  # noqa: E731
        sampler = samplers.SAMPLERS[case["sampler"]]
        states = list(sampler(model, d, noise(), path, noise, variance=case["variance"], eta=case["eta"]))
        assert [state.t for state in states] == path
        assert all(state.x.isfinite().all() and state.x0.abs().max() <= 1 for state in states)

    return outcome(read)


CHECKS: dict[str, tuple[st.SearchStrategy[Any], Callable[[Any], str]]] = {
    "parameters": (VALUES, parameters),
    "parameter_file": (BYTES, parameter_file),
    "transform_lists": (st.tuples(st.lists(transform(), max_size=4), st.sampled_from([1, 3])), transform_lists),
    "images": (
        st.tuples(PLACE, st.sampled_from(EXTENSIONS), BYTES, st.sampled_from([4, 8, 33]), st.sampled_from([1, 3])),
        images,
    ),
    "shortened": (
        st.tuples(PLACE, st.floats(0.05, 0.95), st.sampled_from(["nothing", "zeros", "marker", "whole"])),
        shortened,
    ),
    "image_folders": (
        st.fixed_dictionaries(
            {
                "files": st.sampled_from([[[]], [["cat"], ["dog"]], [["train"], ["test"]], None]).flatmap(files_in),
                "dataset": st.fixed_dictionaries(
                    {"on_broken": st.sampled_from(["stop", "skip"]), "subset": st.sampled_from([None, 1, 0.5])}
                ),
            }
        ),
        image_folders,
    ),
    "folder_layouts": (
        st.fixed_dictionaries(
            {
                "places": st.lists(
                    st.tuples(
                        st.lists(
                            st.sampled_from(FOLDERS) | st.sampled_from(TRAINING) | st.sampled_from(HELD_OUT), max_size=3
                        ),
                        st.integers(1, 4),
                    ),
                    min_size=1,
                    max_size=6,
                ),
                "dataset": st.fixed_dictionaries(
                    {"test_fraction": st.sampled_from([0.01, 0.3, 0.99]), "subset": st.sampled_from([None, 4, 0.5])}
                ),
            }
        ),
        folder_layouts,
    ),
    "sampling": (
        st.fixed_dictionaries(
            {
                "timesteps": TIMESTEPS,
                "steps": STEPS,
                "spacing": st.sampled_from(["leading", "trailing", "linear", "quadratic"]),
                "sampler": st.sampled_from(list(samplers.SAMPLERS)),
                "variance": st.sampled_from(["fixed_small", "fixed_large", "learned"]),
                "eta": st.sampled_from([0.0, 0.5, 1.0]),
                "config": st.fixed_dictionaries(
                    {
                        "schedule": st.sampled_from(["linear", "cosine", "sigmoid"]),
                        "prediction": st.sampled_from(["epsilon", "x0", "v"]),
                        "learn_variance": st.booleans(),
                        "beta_start": st.sampled_from([1e-4, 1e-12, 1e-6, 0.01]),
                        "beta_end": st.sampled_from([0.02, 0.05, 0.5, 0.999]),
                    }
                ),
            }
        ),
        sampling,
    ),
    "models": (FILES, models),
    "prepared": (FILES, prepared),
    "states": (st.tuples(BYTES, st.booleans(), st.booleans()), states),
}


def fuzz(name: str, examples: int, number: int | None = None) -> Counter[str]:
    """Try so many inputs, and count how they ended. `number`: a seed; None for the same inputs each time."""
    strategy, check_one = CHECKS[name]
    counts: Counter[str] = Counter()

    @settings(
        max_examples=examples,
        derandomize=number is None,
        database=None,
        deadline=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def one(value: Any) -> None:
        counts[check_one(value)] += 1

    (one if number is None else seed(number)(one))()
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=5000, help="of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=list(CHECKS), default=list(CHECKS))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{len(image_corpus())} images of {len(Image.SAVE)} formats to be damaged", flush=True)
    for name in arguments.only:
        start = time.monotonic()
        counts = fuzz(name, arguments.examples, arguments.seed)
        print(
            f"{name:15} {counts.total():7} inputs: {counts['result']:7} results, {counts['reported']:7} faults, "
            f"{time.monotonic() - start:5.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    sys.exit(main())
