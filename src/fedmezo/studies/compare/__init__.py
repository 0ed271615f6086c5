"""Several algorithms under one equal budget: the runs, the choice of rates, rows, verdicts, one page."""

from fedmezo.studies.compare.study import (
    Terms,
    compare,
    parse_budget,
    parse_grids,
    parse_list,
    parse_seeds,
    read_arms,
)

__all__ = ["Terms", "compare", "parse_budget", "parse_grids", "parse_list", "parse_seeds", "read_arms"]
