"""The figures of the comparison page: a band of seeds per arm against every budget, and the search for the rates."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace

from fedmezo.studies.charts import AXES, TITLES, Chart, Trace, house_layout, line
from fedmezo.studies.compare.curves import Band, Point, band
from fedmezo.studies.compare.rows import Row
from fedmezo.studies.page import PALETTE

__all__ = ["colours", "curve_charts", "log_axes", "tuning_chart"]

Curves = Mapping[str, Sequence[Sequence[Point]]]
_METRICS = {**TITLES, "rouge_l": "Rouge-L", "exact_match": "Written answers right"}
_SHARES = ("accuracy", "token_accuracy", "exact_match")
# Arms whose ends lie further apart than this cannot be seen on one linear axis.
_FAR_APART = 20.0
# A loss above so many times the start's is cut off, or one arm that surged would flatten all the others.
_SURGED = 1.5


def colours(arms: Sequence[str]) -> dict[str, str]:
    """Returns each arm's colour."""
    return {arm: PALETTE[at % len(PALETTE)] for at, arm in enumerate(arms)}


def log_axes(curves: Sequence[Curves]) -> set[str]:
    """Returns the axes on which some arms end so far from others that only logarithms show them all."""
    ends = [points[-1].spent for found in curves for listed in found.values() for points in listed if points]
    return {
        axis for axis in AXES if ends and max(end[axis] for end in ends) > _FAR_APART * min(end[axis] for end in ends)
    }


def curve_charts(
    curves: Curves, *, column: str, axis: str, named: Mapping[str, str], logs: Collection[str] = ()
) -> list[Chart]:
    """Returns one chart per metric: the arms' curves with the range over their seeds.

    Args:
      curves: arm -> one curve per seed.
      column: part of the charts' ids.
      axis: what they are drawn against at first.
      named: each arm's colour.
      logs: axes with a log scale.
    """
    return [
        _on_log_axes(chart, axis, logs) if logs else chart
        for metric in _METRICS
        if (chart := _curve_chart(curves, metric, column=column, axis=axis, named=named))
    ]


def _on_log_axes(chart: Chart, axis: str, logs: Collection[str]) -> Chart:
    """Returns a chart without the points at 0 of logarithmic axes, which Plotly would draw at the left edge."""
    traces = []
    for trace in chart.traces:
        spent: Mapping[str, Sequence[float]] = trace["meta"]  # type: ignore[assignment]
        meta = {name: [at or None for at in spent[name]] if name in logs else spent[name] for name in spent}
        traces.append({**trace, "meta": meta, "x": meta[axis]})
    if axis not in logs:
        return replace(chart, traces=traces)
    x = {**chart.layout["xaxis"], "type": "log", "dtick": 1}  # type: ignore[dict-item]
    return replace(chart, traces=traces, layout={**chart.layout, "xaxis": x})


def _curve_chart(curves: Curves, metric: str, *, column: str, axis: str, named: Mapping[str, str]) -> Chart | None:
    bands = {arm: found for arm, listed in curves.items() if (found := band(listed, metric))}
    if not bands:
        return None
    traces = [trace for arm, found in bands.items() for trace in _band_traces(arm, found, axis, colour=named[arm])]
    y: dict[str, object] = {"tickformat": ".0%", "rangemode": "tozero"} if metric in _SHARES else {}
    limit = _SURGED * max(found.mean[0] for found in bands.values())
    cut = metric == "loss" and max(max(found.high) for found in bands.values()) > limit
    if cut:
        low = min(min(found.low) for found in bands.values())
        y["range"] = [low - 0.05 * (limit - low), limit]
    several = max(found.seeds for found in bands.values()) > 1
    notes = ["Line: mean over the seeds; band: lowest to highest seed."] if several else []
    notes += [f"Losses above {limit:.3g} are cut off."] if cut else []
    return Chart(
        f"curve-{column}-{metric}",
        _METRICS[metric],
        traces,
        house_layout(AXES[axis], y=y, height=360),
        tuple((arm, named[arm]) for arm in bands),
        " ".join(notes),
    )


def _band_traces(arm: str, found: Band, axis: str, *, colour: str) -> Iterator[Trace]:
    x, meta = found.spent[axis], dict(found.spent)
    if found.seeds > 1:
        look: dict[str, object] = {"mode": "lines", "hoverinfo": "skip", "meta": meta}
        fill = {"fill": "tonexty", "fillcolor": f"{colour}2e"}
        yield line(arm, x, found.low, colour=colour, width=0, **look)
        yield line(arm, x, found.high, colour=colour, width=0, **look, **fill)
    yield line(arm, x, found.mean, colour=colour, width=2.2, meta=meta, hovertemplate="%{y:.4g}")


def tuning_chart(points: Sequence[Row], *, named: Mapping[str, str]) -> Chart | None:
    """Returns the final loss of the tuning runs against the rate, the chosen one as a large mark; None without any."""
    found = {arm: [p for p in points if p["arm"] == arm and p["loss"] is not None] for arm in named}
    found = {arm: listed for arm, listed in found.items() if listed}
    if not found:
        return None
    traces = []
    for arm, listed in found.items():
        x, y = [p["rate"] for p in listed], [p["loss"] for p in listed]
        sizes = [13 if p["chosen"] else 6 for p in listed]
        trace = line(arm, x, y, colour=named[arm], mode="lines+markers", hovertemplate="%{x:.3g}: %{y:.4g}")
        traces.append({**trace, "marker": {"size": sizes, "color": named[arm]}})
    layout = house_layout("Rate", y={"automargin": True}, height=360)
    layout |= {"xaxis": {"title": {"text": "Rate"}, "type": "log", "dtick": 1, "fixedrange": True, "tickformat": "~g"}}
    layout |= {"hovermode": "closest"}
    note = "Large mark: the rate that was taken. Runs that failed or diverged are not drawn; the table has them."
    title = "Final evaluation loss of the tuning runs (nats)"
    return Chart("tuning", title, traces, layout, tuple((arm, named[arm]) for arm in found), note)
