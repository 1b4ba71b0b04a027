"""The layout of a user's folder: which images are trained on, which are held out, and what their classes are.

A split, or a folder that only wraps others, is recognised where the names of the folders leave no doubt. Any other
layout is refused in a line that says what was seen: held-out images must never be trained on.
"""

import os
import re
import shlex
import subprocess
from collections import Counter, defaultdict
from collections.abc import Iterable
from contextlib import closing
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ddpm.data.decode import EXTENSIONS, digest_file, image_files
from ddpm.data.splits import hold_out
from ddpm.errors import UserError, legible, listed
from ddpm.runtime.pool import in_parallel

FILES_PER_CHUNK = 64
# What the words of a folder's name say about its images
ROLES = {
    "train": ("train", "training", "trainset", "trainval"),
    "test": ("test", "testing", "testset", "holdout"),
    "val": ("val", "valid", "validation", "valset", "eval", "evaluation", "dev", "devset"),
}
FILLERS = {"set", "data", "dataset", "split", "folder", "image", "images", "img", "imgs", "photo", "photos", "pictures"}

Classes = dict[str, str | None]  # the class of each file; None where the side has no classes


class Sides(NamedTuple):
    """The files of a folder, as posix paths relative to it, with their classes."""

    train: Classes
    test: Classes
    taken: str  # which folders were taken for which side, in words


def read_folder(folder: Path, test_fraction: float) -> Sides:
    """Find the images of a folder, their split and their classes; print a line about what was found.

    Raises:
        UserError: the folder is missing or holds no images, or its layout leaves a doubt.
    """
    here = f"dataset.path = {legible(folder)}"
    if not folder.is_dir():
        raise UserError(f"{here}: {_why_missing(folder)}")
    _check_names(folder, here)
    files, ignored = image_files(folder)
    if ignored:
        print(f"{legible(folder)}: {ignored} other file{'s' * (ignored > 1)} ignored")
    if not files:
        raise UserError(f"{here}: holds no {', '.join(EXTENSIONS)} files; put images there{_of_workspace(folder)}")
    base = _unwrapped(files, "")
    tops = _by_folder(files, base)
    loose = tops.pop("", [])
    split = _find_split(tops, base, here)
    if split is None:
        _refuse_empty_side(folder, files, base, here)
        sides = _split_by_content(folder, files, base, test_fraction, here)
    else:
        sides = _given_split(tops, *split, loose, base, here)
    print(f"{legible(folder)}: {sides.taken}; {_class_counts(sides)}")
    if not _travels(folder):
        print(
            f"{legible(folder)}: tracked by neither DVC nor git, so that queued runs and other clones do not see it; "
            f"to share it: dvc add {shlex.quote(legible(folder))}"
        )
    return sides


def _travels(folder: Path) -> bool:
    """Whether other workspaces of this repository have the folder: it is tracked, or lies outside the repository."""
    place, here = folder.absolute(), Path.cwd()
    if not place.is_relative_to(here):
        return True
    inside = [place, *place.parents][: len(place.relative_to(here).parts)]
    if any(path.with_name(f"{path.name}.dvc").exists() for path in inside):
        return True
    listing = subprocess.run(["git", "ls-files", "--", str(place)], capture_output=True, check=False)
    return listing.returncode != 0 or bool(listing.stdout)  # an error: this is no repository


@cache
def role_of(name: str) -> tuple[str, str]:
    """What a folder's name says: its role ("train", "test", "val", or "" for none), and the rest of the name.

    `Train`, `training_set` and `train2017` are ("train", ""), `seg_train` is ("train", "seg"), `images` is ("", "").
    """
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)
    words = re.findall(r"[^\W\d_]+", re.sub(r"h[eo]ld[\W_]?out", "holdout", spaced.casefold()))
    roles = [role for word in words for role, names in ROLES.items() if word in names]
    if not words or len(roles) > 1:
        return "", name
    rest = [word for word in words if word not in FILLERS and not any(word in names for names in ROLES.values())]
    return roles[0] if roles else "", " ".join(rest)


# What lies where


def _by_folder(files: Iterable[str], base: str) -> dict[str, list[str]]:
    """The files below `base` ("" or a path that ends in a slash) by the folder in it, or "" if directly in it."""
    found: dict[str, list[str]] = defaultdict(list)
    for file in files:
        name, slash, _ = file[len(base) :].partition("/")
        found[name if slash else ""].append(file)
    return dict(sorted(found.items()))


def _unwrapped(files: list[str], base: str) -> str:
    """The folder at or below `base` where the classes, the splits or the images are: wrapping folders are passed.

    A wrapper is the only folder with images; it holds none directly, unless its name is no class, such as `images`.
    """
    while True:
        (name, *others) = _by_folder(files, base)
        inner = f"{base}{name}/"
        if others or not name or (role_of(name)[1] and any("/" not in file[len(inner) :] for file in files)):
            return base
        base = inner


def _seen(tops: dict[str, list[str]]) -> str:
    return listed(f"{name}/ ({_images(len(files))})" for name, files in tops.items())


def _images(count: int) -> str:
    return f"{count} image{'s' * (count != 1)}"


def _class_of(file: str, base: str) -> str | None:
    name, slash, _ = file[len(base) :].partition("/")
    return name if slash else None


def _class_counts(sides: Sides) -> str:
    train, test = Counter(sides.train.values()), Counter(sides.test.values())
    if None in train:
        return "no classes"
    counts = listed(f"{name}: {train[name]} + {test[name]}" for name in sorted(map(str, train)))
    return f"{len(train)} class{'es' if len(train) > 1 else ''} (training + held out images): {counts}"


# The split


def _find_split(tops: dict[str, list[str]], base: str, here: str) -> tuple[str, str] | None:
    """The folders of `base` that are the training and the held-out side, or None if the folders are no split.

    Raises:
        UserError: the folders may be a split, and it is not clear which is which side.
    """
    training, tests, validation, others = (
        {name: role_of(name)[1] for name in tops if role_of(name)[0] == role} for role in ("train", "test", "val", "")
    )
    held_out = tests or validation
    seen = f"{here}: holds {_seen(tops)}{f' in {legible(base)}' if base else ''}"
    if training and len({role_of(name)[1] for name in tops}) == len(training) == len(held_out) == 1 and not others:
        return next(iter(training)), next(iter(held_out))
    beside = {*training.values(), *(name.casefold() for name in others)}
    alike = beside & {*tests.values(), *validation.values()}  # cat_train and cat_test, or cat and cat_test
    if alike or (training and held_out and not others):  # else classes, such as bus, bullet_train and test_pattern
        raise UserError(
            f"{seen}, so what to train on is in doubt; leave one training and one held-out folder (train/ and test/) "
            f"and move the others out, or rename what is a class"
        )
    plain = [name for name, rest in training.items() if not rest]
    nested = [name for name in plain if all("/" in file[len(f"{base}{name}/") :] for file in tops[name])]
    if len(tops) > 1 and (len(plain) > 1 or nested):
        raise UserError(
            f"{seen}, and {listed(f'{name}/' for name in plain)} may be a training side; move the other folders out, "
            f"name the held-out one test/, or rename what is a class"
        )
    return None


def _refuse_held_out(files: list[str], here: str) -> None:
    """Raise where images that would be trained on lie in a folder with the name of a held-out side."""
    inside: dict[str, set[str]] = defaultdict(set)  # the names of the folders in each folder
    for parent in {file.rpartition("/")[0] for file in files} - {""}:
        parts = parent.split("/")
        for depth, part in enumerate(parts):
            inside["".join(f"{above}/" for above in parts[:depth])].add(part)
    for above, names in sorted(inside.items()):
        for name in sorted(names):
            role, rest = role_of(name)
            alone = bool(rest) and not any(role_of(other) == ("train", rest) for other in names)
            if role not in ("test", "val") or alone:
                continue
            place = f"{above}{name}/"
            count = sum(file.startswith(place) for file in files)
            raise UserError(
                f"{here}: holds {legible(place)} ({_images(count)}), which is named like a held-out side, but is not "
                f"part of a split at the top; put all images below train/ and test/, set dataset.path to the folder to "
                f"use, or rename it if it is a class"
            )


def _refuse_empty_side(folder: Path, files: list[str], base: str, here: str) -> None:
    """Raise where a folder with the name of a side holds no images, so that the split is not as it looks."""
    levels = ["", *(base[: match.end()] for match in re.finditer("/", base))]
    for level in levels:
        with_images = _by_folder((file for file in files if file.startswith(level)), level)
        for name in sorted(entry.name for entry in os.scandir(folder / level) if entry.is_dir()):
            role, rest = role_of(name)
            if role and not rest and name not in with_images:
                raise UserError(
                    f"{here}: {legible(level + name)}/ holds no images; put some there, or remove it to have some "
                    f"held out"
                )


def _given_split(
    tops: dict[str, list[str]], training: str, held_out: str, loose: list[str], base: str, here: str
) -> Sides:
    roots = [_unwrapped(tops[name], f"{base}{name}/") for name in (training, held_out)]
    _refuse_held_out(tops[training], here)
    train, test = (
        {file: _class_of(file, root) for file in tops[name]}
        for name, root in zip((training, held_out), roots, strict=True)
    )
    _refuse_mixed(train | test, here)
    lacking = sorted(set(map(str, test.values())) - set(map(str, train.values())))
    if lacking:
        raise UserError(
            f"{here}: {legible(roots[1])} has {len(lacking)} class{'es' if len(lacking) > 1 else ''} that "
            f"{legible(roots[0])} has no image of: {listed(lacking)}; put training images there, or move them out"
        )
    left = {name: files for name, files in tops.items() if name not in (training, held_out)}
    taken = (
        f"{legible(roots[0])} is trained on ({_images(len(train))}), {legible(roots[1])} is held out "
        f"({_images(len(test))})"
    )
    if left:
        taken += f", left out: {_seen(left)}"
    if loose:
        taken += f", {_images(len(loose))} beside them left out ({legible(loose[0])})"
    return Sides(train, test, taken)


def _split_by_content(folder: Path, files: list[str], base: str, test_fraction: float, here: str) -> Sides:
    """Hold out the files whose hash, read as a number in [0, 1), is below `test_fraction`, some of each class.

    So a file stays on its side when it is renamed or others come or go, and copies of it are on the same side.
    """
    _refuse_held_out(files, here)
    classes = {file: _class_of(file, base) for file in files}
    _refuse_mixed(classes, here)
    paths = [str(folder / file) for file in files]
    with closing(in_parallel(digest_file, paths, FILES_PER_CHUNK, "split")) as chunks:
        number = np.array([int.from_bytes(digest[:8], "big") / 2**64 for chunk in chunks for digest in chunk])
    names = {name: k for k, name in enumerate(dict.fromkeys(classes.values()))}
    labels = np.array([names[name] for name in classes.values()], dtype=np.int64)
    held_out = hold_out(number, labels, test_fraction)
    if not held_out.any():
        has = f"{len(files)} file{'s of one content' if len(files) > 1 else ''}"
        if len(names) > 1:
            has = f"{len(files)} in {len(names)} classes"
        raise UserError(
            f"{here}: needs two different images{' of one class' if len(names) > 1 else ''} at least, one of them to "
            f"hold out; has {has}"
        )
    sides: dict[bool, Classes] = {False: {}, True: {}}
    for (file, name), held in zip(classes.items(), held_out, strict=True):
        sides[bool(held)][file] = name
    below = f" of {legible(base)}" if base else ""
    taken = f"of {len(files)} images{below}, {len(sides[False])} trained on, {len(sides[True])} held out by content"
    return Sides(sides[False], sides[True], taken)


def _refuse_mixed(classes: Classes, here: str) -> None:
    loose = next((file for file, name in classes.items() if name is None), None)
    inside = next((file for file, name in classes.items() if name is not None), None)
    if loose and inside:
        raise UserError(
            f"{here}: holds images in class sub-folders ({legible(inside)}) and beside them ({legible(loose)}); "
            f"move all into sub-folders, or none"
        )


# What keeps a folder from being read


def _check_names(folder: Path, here: str) -> None:
    """Raise at a name that is not UTF-8: DVC cannot record it, and no file of parameters can hold it."""
    for parent, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted((*folders, *names)):
            try:
                name.encode()
            except UnicodeEncodeError:
                raise UserError(
                    f"{here}: the name of {legible(Path(parent, name))} is not UTF-8; rename it, or fix all names: "
                    f"convmv -f latin1 -t utf8 -r --notest {shlex.quote(legible(folder))}"
                ) from None


def _why_missing(folder: Path) -> str:
    if folder.exists():
        return "is not a folder; set dataset.path to the folder with your images"
    alike = [
        path
        for path in (sorted(folder.parent.iterdir()) if folder.parent.is_dir() else [])
        if path.is_dir() and path.name.strip().casefold() == folder.name.strip().casefold()
    ]
    if alike:
        return f"there is no such folder, but there is {legible(alike[0])!r}; set dataset.path to it"
    return (
        f"there is no such folder; make it and put images there, or set dataset.path to the folder with yours"
        f"{_of_workspace(folder)}"
    )


def _of_workspace(folder: Path) -> str:
    """What to do where DVC runs the stage in a copy of the repository, which lacks untracked files."""
    root = os.environ.get("DVC_ROOT")
    if root is None or folder.is_absolute() or Path(root).resolve() == Path.cwd():
        return ""
    return (
        f"; DVC runs this in a temporary workspace, which only files that git or DVC tracks reach: "
        f"run dvc add {shlex.quote(legible(folder))} in {legible(root)}, or set dataset.path to its absolute path"
    )
