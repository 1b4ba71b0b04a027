"""Trees of parameters for the tests: the default with changes, and the faults that `check` finds in them."""

import copy

import pytest

from ddpm.config.load import check
from ddpm.errors import UserError
from tests.conftest import composed

DEFAULT = composed()
DELETED = object()


def changed(**changes):
    """The default tree with `section__key=value` set, or removed where the value is DELETED."""
    tree = copy.deepcopy(DEFAULT)
    for path, value in changes.items():
        *parents, last = path.split("__")
        node = tree
        for parent in parents:
            node = node[parent]
        if value is DELETED:
            del node[last]
        else:
            node[last] = value
    return tree


def faults(tree):
    with pytest.raises(UserError) as caught:
        check(tree)
    return str(caught.value).split("\n")


def only_fault(**changes):
    (line,) = faults(changed(**changes))
    return line
