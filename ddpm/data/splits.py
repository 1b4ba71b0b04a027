"""Choose which images are held out, and which are kept of a large set, so that no class is lost."""

import numpy as np
import numpy.typing as npt

from ddpm.errors import UserError


def hold_out(number: npt.NDArray[np.generic], labels: npt.NDArray[np.int64], threshold: float) -> npt.NDArray[np.bool_]:
    """Hold out the images whose `number` is below `threshold`, corrected so that no class is lost.

    A class whose numbers are all below the threshold keeps its highest for training. A class with none below holds out
    the lowest that no class needs as its last training image. Images of the same number are copies: they stay together
    and count once.

    Args:
        number: (N,), one per image; it must not depend on which other images there are.
        labels: int64 (N,).
        threshold: on the scale of `number`.

    Returns:
        bool (N,), True where an image is held out; nowhere, if no class has two different images.
    """
    values, content = np.unique(number, return_inverse=True)
    held_out = values < threshold
    owner, owned = np.divmod(np.unique(labels * len(values) + content), len(values))  # each content of each class
    classes, starts = np.unique(owner, return_index=True)
    contents = np.split(owned, starts[1:])  # of each class, ascending
    for own in contents:
        if held_out[own].all():
            held_out[own[-1]] = False
    training = np.array([np.count_nonzero(~held_out[own]) for own in contents])
    for own in contents:
        if held_out[own].any():
            continue
        for lowest in own:
            owners = np.searchsorted(classes, owner[owned == lowest])
            if (training[owners] > 1).all():
                held_out[lowest] = True
                training[owners] -= 1
                break
    return held_out[content]


def subset_indices(labels: npt.NDArray[np.int64], subset: int | float | None) -> npt.NDArray[np.int64]:
    """Which images to keep, ascending: all, `subset` of them, or that fraction, at least one.

    A smaller subset is part of every larger one. One image of each class comes first, so that a subset has as many
    classes as it has room for.

    Args:
        labels: int64 (N,).

    Returns:
        int64 (n,), indices into `labels`.
    """
    count = len(labels)
    if subset is None:
        return np.arange(count)
    size = max(1, round(count * subset)) if isinstance(subset, float) else min(count, subset)
    order = np.random.default_rng(0).permutation(count)
    first = np.sort(np.unique(labels[order], return_index=True)[1])
    return np.sort(np.concatenate([order[first], np.delete(order, first)])[:size])


def check_subset(labels: npt.NDArray[np.int64], subset: int | float | None) -> None:
    """Refuse a subset that cannot hold a training image of each class.

    Raises:
        UserError: the subset is smaller than the number of classes in `labels`, int64 (N,), of the training side.
    """
    size, classes = len(subset_indices(labels, subset)), len(np.unique(labels))
    if size < classes:
        raise UserError(
            f"dataset.subset = {subset}: leaves {size} training image{'s' if size > 1 else ''} of {len(labels)} for "
            f"{classes} classes; take {classes} or more, or null for all"
        )
