"""A search of two trials with two seeds each, as in a file of conf/search/."""

from typing import Any

SEARCH: dict[str, Any] = {
    "study": "s",
    "storage": None,
    "remote": None,
    "metric": "frechet_distance",
    "seeds": [0, 1],
    "trials": 2,
    "prune_after": None,
    "prune_from": 0.3,
    "overrides": [],
    "space": {"optimizer.lr": {"low": 1e-4, "high": 5e-3, "log": True}},
}
