"""A metric against a parameter, as a picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import vl_convert

from tools.common.experiments import METRICS, Group, shown
from tools.common.statistics import mean, standard_error

WIDE = 10  # largest value / smallest, from which an axis is logarithmic


def _axis(values: Sequence[Any], title: str) -> dict[str, Any]:
    """The axis of a parameter: numbers to scale, all else side by side."""
    if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        return {"field": "x", "type": "nominal", "title": title, "sort": None, "axis": {"labelAngle": 0}}
    wide = min(values) > 0 and max(values) / min(values) >= WIDE
    return {
        "field": "x",
        "type": "quantitative",
        "title": title,
        "scale": {"type": "log" if wide else "linear", "zero": False, "nice": False, "padding": 12},
    }


def specification(groups: Sequence[Group], by: str, metric: str, others: Sequence[str]) -> dict[str, Any]:
    """The Vega-Lite chart: a faint point per run, the mean of each group with its standard error, a line through means.

    Args:
        others: further parameters that vary: a colour for each of their combinations.
    """
    points: list[dict[str, Any]] = []
    means: list[dict[str, Any]] = []
    for group in groups:
        values = group.values(metric)
        if not values:
            continue
        label = ", ".join(f"{name}={shown(name, group.params.get(name))}" for name in others)
        value = group.params.get(by)
        x = value if isinstance(value, int | float) and not isinstance(value, bool) else shown(by, value)
        error = standard_error(values) or 0.0
        points += [{"x": x, "y": y, "of": label} for y in values]
        means.append(
            {"x": x, "y": mean(values), "low": mean(values) - error, "high": mean(values) + error, "of": label}
        )
    x_axis = _axis([row["x"] for row in means], by)
    scale = {"type": "log" if min(row["low"] for row in means) > 0 and _wide(points) else "linear", "zero": False}
    y_axis = {"type": "quantitative", "title": METRICS[metric].heading, "scale": scale}
    colour = {
        "color": {
            "field": "of",
            "type": "nominal",
            "title": None,
            "legend": {"orient": "top", "columns": 1, "labelLimit": 500},
        }
    }
    encoding = {"x": x_axis, "y": y_axis | {"field": "y"}} | (colour if others else {})
    interval = {"y": y_axis | {"field": "low"}, "y2": {"field": "high"}}
    return {
        "$schema": "https://vega.github.io/schema/vega-lite/v5.json",
        "width": 560,
        "height": 300,
        "encoding": {"x": x_axis} | encoding,
        "layer": [
            {"data": {"values": points}, "mark": {"type": "point", "opacity": 0.35, "size": 40}},
            {"data": {"values": means}, "mark": {"type": "rule", "strokeWidth": 2}, "encoding": interval},
            {"data": {"values": means}, "mark": {"type": "line", "point": {"size": 60}}},
        ],
    }


def _wide(points: Sequence[dict[str, Any]]) -> bool:
    values = [point["y"] for point in points]
    return max(values) / min(values) >= WIDE


def by_parameter(path: Path, *chart: Any) -> None:
    """Write the chart of `specification` as a PNG; a missing folder is created."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(vl_convert.vegalite_to_png(specification(*chart), scale=1.5))
