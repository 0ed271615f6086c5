"""The ServerApp of the Flower App: one run, whose clients are behind Flower's nodes and whose folder it is told."""

from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedmezo.errors import RunError

__all__ = ["app"]

app = ServerApp()
_TTL = 12 * 3600.0  # seconds a task is kept for a node that does not fetch it


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Runs or resumes what the run configuration says (`studies/appconfig.py`).

    Raises:
      RunError: no folder is named.
    """
    from fedmezo.runtime.flower.line import FlowerLine
    from fedmezo.studies.appconfig import config_of
    from fedmezo.studies.follow import Teller
    from fedmezo.studies.run import resume, run
    from fedmezo.studies.screen import Screen
    from fedmezo.studies.watch import Watchers

    told = context.run_config
    if not told.get("folder"):
        raise RunError("The run configuration names no folder; give `flwr run ... -c 'folder=\"/path/of/the/run\"'`.")
    folder, line = Path(str(told["folder"])), FlowerLine(grid, ttl=_TTL)
    with Screen(folder=folder) as screen:
        watch = Watchers([screen, Teller(folder)])
        if told.get("resume"):
            resume(folder, rounds=int(told.get("more") or 0) or None, watch=watch, line=line)
        else:
            run(config_of(told), out=folder, watch=watch, line=line)
