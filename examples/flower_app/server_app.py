"""The server's side of the app: a fedmezo run over Flower's grid, with a word and a rule of our own every round."""

from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedmezo import RoundReport, run
from fedmezo.runtime.flower.line import FlowerLine
from fedmezo.studies.appconfig import config_of

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Runs the configuration in `[tool.flwr.app.config]`; Flower brings the messages to the clients and back."""
    told = context.run_config

    def enough(report: RoundReport) -> bool:
        print(f"round {report.round + 1}: loss {report.loss:.3f}, {report.bytes_up} bytes up", flush=True)
        return report.loss < float(told["enough"])

    line = FlowerLine(grid, ttl=3600.0)
    summary = run(config_of(told), out=Path(str(told["folder"])), line=line, stop=enough)
    print(f"digest {summary.digest}", flush=True)
