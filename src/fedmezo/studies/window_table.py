"""What follows from a measured window of mu: the choice of a run, sentences, and a table."""

import math
from dataclasses import asdict

from rich.table import Table

from fedmezo.models.bench import ModelBench
from fedmezo.studies.config import Config
from fedmezo.studies.window import Window, customary_mu, window_of

__all__ = ["chosen_mu", "lost_in_rounding", "moved_words", "window_dict", "window_table", "window_words"]

_LEAST_IN_BFLOAT16 = 2.5e-3


def chosen_mu(config: Config, bench: ModelBench) -> tuple[float, tuple[str, ...]]:
    """Returns the customary mu unless its slopes are more error than signal, then the best one, and a sentence.

    It is left, too, where a loss at it, or nearer, is not finite. So most runs of a number format have the same mu,
    whatever a few directions say about the best: a run averages thousands of slopes, and bears noise better than a mu
    that bends them.
    """
    dtype, window = config.model.dtype, window_of(config, bench)
    usual = customary_mu(dtype)
    if window.signal > 0 and usual <= window.reach and window.error(usual) <= window.signal:
        return usual, ()
    mu = usual if window.best is None else float(f"{window.best:.2g}")
    return mu, (moved_words(window, usual=usual, dtype=dtype),)


def lost_in_rounding(config: Config) -> tuple[str, ...]:
    """Returns a sentence where a mu that was asked for is too small for bfloat16; nothing is measured.

    With adapters on SmolLM2 runs at 1e-3 were lost and those at 5e-3 were not (docs/studies/findings.md); runs of all
    weights were not tried.
    """
    mu, dtype = config.algorithm.mu, config.model.dtype
    walks = config.algorithm.name != "fedavg" and config.adapter.kind == "lora"
    if mu is None or mu >= _LEAST_IN_BFLOAT16 or dtype != "bfloat16" or not walks:
        return ()
    return (
        f"mu {mu:g} is small for bfloat16: slopes are mostly rounding there, and the run may be lost. Leave "
        f"algorithm.mu out for {customary_mu(dtype):g} or what suits, or look with fedmezo analyze mu.",
    )


def window_table(window: Window) -> Table:
    """Returns a table for the terminal, one line per mu of the ladder."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for title in ("mu", "slope", "rounding", "bend", "usable"):
        table.add_column(title, justify="right", no_wrap=True)
    for rung in window.rungs:
        numbers = (rung.mu, rung.slope, rung.rounding, rung.bend)
        table.add_row(*(f"{number:.3g}" for number in numbers), "yes" if rung.usable else "no")
    return table


def window_dict(window: Window) -> dict[str, object]:
    """Returns the fields as plain values; `reach` only where a loss was not finite."""
    told = asdict(window)
    told["reach"] = None if window.reach > window.rungs[-1].mu else window.reach
    return told


def window_words(window: Window, *, dtype: str, asked: float | None = None) -> str:
    """Returns one sentence on where mu may lie, and one on the mu asked for, or on the customary one.

    Args:
      window: what was measured.
      dtype: model.dtype.
      asked: algorithm.mu; None for "auto".
    """
    usual = customary_mu(dtype)
    mu = usual if asked is None else asked
    if window.lowest is None or window.highest is None:
        return _none_usable(window, dtype=dtype)
    # Nothing was tried beyond the ends of the ladder.
    low, high = window.lowest == window.rungs[0].mu, window.highest == window.rungs[-1].mu
    where = f"mu may lie between {window.lowest:.2g}{' or less' * low} and {window.highest:.2g}{' or more' * high}"
    first = f"{where}; the error is smallest near {window.best:.2g}."
    whose = f'"auto" is {usual:g}' if asked is None else f"algorithm.mu is {asked:g}"
    if window.holds(mu):
        return f"{first} {whose}, which is usable."
    if asked is None:
        return f"{first} {moved_words(window, usual=usual, dtype=dtype)}"
    return f"{first} {whose}: there {_compared(window, mu=mu)}."


def moved_words(window: Window, *, usual: float, dtype: str) -> str:
    """Returns the sentence that says why mu is not the customary one, or why none is good."""
    if window.lowest is None:
        return _none_usable(window, dtype=dtype)
    return f"mu is {window.best:.2g}: at {usual:g} {_compared(window, mu=usual, whose=f'{dtype} ')}."


def _compared(window: Window, *, mu: float, whose: str = "") -> str:
    if any(math.isnan(rung.slope) for rung in window.rungs if rung.mu <= mu * (1 + 1e-3)):
        return "a loss here is not finite"
    rounds = window.rounding / mu > window.bend * mu**window.power
    cause = "rounding" if rounds else "bend"
    much = "is mostly" if window.error(mu) > window.signal else "has too much"
    return f"a {whose}slope here {much} {cause} (signal {window.signal:.2g}, noise {window.error(mu):.2g})"


def _none_usable(window: Window, *, dtype: str) -> str:
    ladder = f"from {window.rungs[0].mu:.2g} to {window.rungs[-1].mu:.2g}"
    if window.reach <= window.rungs[0].mu:
        return f"No mu {ladder} can be judged: a loss is not finite already near the start; look at the data or dtype."
    if window.best is None:
        return f"No mu {ladder} can be judged: the losses do not change along any direction tried; look at the data."
    cure = "average more algorithm.directions"
    if dtype != "float32":
        cure = f'set model.dtype = "float32" or {cure}'
    return (
        f"No mu {ladder} gives a usable slope here: at {window.best:.2g}, the best, the signal is {window.signal:.2g} "
        f"and the noise {window.error(window.best):.2g}; {cure}."
    )
