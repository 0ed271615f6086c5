"""The live page: a page on this machine that follows a run's journal, whoever writes it.

The watchers of `fedmezo.studies.watch`, which `run(watch=...)` takes, are objects that the run itself tells of every
round; this page needs nothing from the run but its folder.
"""

from fedmezo.studies.live.server import LivePage, watch

__all__ = ["LivePage", "watch"]
