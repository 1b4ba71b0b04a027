"""Check, before any work on the prepared data, that the settings of all stages fit it."""

from collections.abc import Mapping
from typing import Any

from ddpm.config.checks import check_data
from ddpm.config.load import load_all
from ddpm.data.transforms import Transforms


def check_settings(info: Mapping[str, Any]) -> None:
    """Refuse now what any later stage would refuse for this data.

    Args:
        info: the content of dataset.json.

    Raises:
        UserError: a line for each setting of params.yaml that does not fit, or for the transform that fails.
    """
    params = load_all()
    check_data(params, info)
    size, _, channels = info["shape"]
    Transforms(params.train.transforms).probe((channels, size, size))
