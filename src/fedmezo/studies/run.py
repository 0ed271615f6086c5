"""What a user does with a run: start it, go on, judge it, check it, take it away.

Every verb of the command line is one function here; those about a run that is there come from `uses`.
"""

import json
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from fedmezo import __version__
from fedmezo.channels import plain
from fedmezo.errors import ConfigError, JournalError
from fedmezo.runtime.journal import Header, Journal
from fedmezo.runtime.line import Line
from fedmezo.runtime.lookout import Lookout
from fedmezo.runtime.progress import RoundReport
from fedmezo.runtime.simulate import simulate
from fedmezo.runtime.walkers import Walkers
from fedmezo.studies.build import Built, build, build_downlink, load_base, walkers_of
from fedmezo.studies.config import Config
from fedmezo.studies.connect import NETWORK, connected
from fedmezo.studies.descent import build_lookout, cost_of
from fedmezo.studies.folder import BEGUN, DATA, JOURNAL, base_of, new_folder, opened, writing
from fedmezo.studies.judge import judge
from fedmezo.studies.summary import Summary, summarise
from fedmezo.studies.uses import evaluate, export, rollback, save, verify
from fedmezo.studies.watch import NullWatch, TensorBoardWatch, Watch, Watchers
from fedmezo.zo.noise import NOISE_VERSION

__all__ = ["Summary", "evaluate", "export", "resume", "rollback", "run", "verify"]


def run(
    config: Config, *, out: Path | str | None = None, watch: Watch | None = None, line: Line | None = None
) -> Summary:
    """Runs a configuration from its first round to its last and returns the summary.

    Args:
      config: what to do.
      out: the run's folder; else `output.dir`; else a new one under runs/.
      watch: told of every round.
      line: the way to clients on other machines; None simulates them.

    Raises:
      ConfigError: the folder holds a run already, or cannot be written.
    """
    folder = new_folder(config, Path(out) if out is not None else None)
    built = build(config, loaded=load_base(config, say=(watch or NullWatch()).note))
    header = Header(
        config=built.config.model_dump_json(),
        fingerprint=built.loaded.fingerprint,
        layout=built.bench.params.layout(),
        law=built.config.algorithm.law,
        noise_version=NOISE_VERSION,
        package=__version__,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        kind="simulation" if line is None else NETWORK,
    )
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with Journal.create(folder / JOURNAL, header) as journal:
        # After the journal: whoever loses a race for the folder has written nothing into it.
        with writing(folder):
            (folder / "config.toml").write_text(built.config.to_toml(), encoding="utf-8")
            (folder / DATA).write_text(built.data.digest() + "\n", encoding="utf-8")
            known = {"dim": built.bench.params.dim, "split": built.data.split.as_dict()}
            (folder / BEGUN).write_text(json.dumps(plain(known), allow_nan=False) + "\n", encoding="utf-8")
        return _go_on(built, journal, folder=folder, watch=watch, line=line)


def resume(
    folder: Path | str,
    *,
    rounds: int | None = None,
    workers: int | None = None,
    watch: Watch | None = None,
    line: Line | None = None,
) -> Summary:
    """Goes on where the journal ends, with the bits of a run that was never interrupted.

    Args:
      folder: the run's folder.
      rounds: run to this many rounds instead of the configured number; a decaying rate follows the new number.
      workers: walk in so many processes instead of the configured number.
      watch: told of every round.
      line: the way to clients on other machines; None simulates them.

    Raises:
      ConfigError: the folder holds no run, more rounds than `rounds`, or one with clients that `line` has to reach.
      JournalError: the base model or the data is not what the run began with.
    """
    folder = Path(folder)
    with opened(folder) as journal:
        if line is None and journal.header.kind == NETWORK:
            raise ConfigError(
                f"The clients of {folder} are on other machines; go on with `fedmezo server --resume {folder}`."
            )
        if rounds is not None and rounds < journal.last:
            raise ConfigError(
                f"--rounds: {folder} has {journal.last} rounds already, got {rounds}; give more, or take some back "
                f"with `fedmezo rollback {folder} --round {rounds}`."
            )
        config, loaded = base_of(journal)
        if rounds is not None:
            config = config.model_copy(update={"federation": config.federation.model_copy(update={"rounds": rounds})})
        if workers is not None:
            config = config.model_copy(update={"runtime": config.runtime.model_copy(update={"workers": workers})})
        built = build(config, loaded=loaded)
        known = folder / DATA
        if known.exists() and known.read_text(encoding="utf-8").strip() != built.data.digest():
            raise JournalError(
                f"The data has changed since {folder} began: its records give other batches now; restore them, or "
                f"delete {known} to go on with the new ones."
            )
        return _go_on(built, journal, folder=folder, watch=watch, line=line)


def _go_on(built: Built, journal: Journal, *, folder: Path, watch: Watch | None, line: Line | None) -> Summary:
    watched = _watchers(built, watch or NullWatch(), folder=folder)
    watched.start(_facts(built, folder, done=journal.last))
    lookout = build_lookout(built.config, built.bench)
    for note in (*built.notes, *cost_of(lookout, built.config)):
        watched.note(note)
    with _walkers(built, journal, line, folder=folder, watch=watched) as (built, walkers):
        for report in _reports(built, journal, walkers=walkers, lookout=lookout):
            watched.round(report)
    summary = summarise(built, journal, folder=folder)
    _keep(built, journal, folder=folder, summary=summary, watch=watched)
    watched.finish(summary.as_dict())
    return summary


@contextmanager
def _walkers(
    built: Built, journal: Journal, line: Line | None, *, folder: Path, watch: Watch
) -> Iterator[tuple[Built, Walkers | None]]:
    """Lends whoever walks, with the run's objects as they are then."""
    if line is not None:
        yield connected(built, journal, line, folder=folder, watch=watch)
        return
    with walkers_of(built) as walkers:
        yield built, walkers


def _reports(
    built: Built, journal: Journal, *, walkers: Walkers | None, lookout: Lookout | None
) -> Iterator[RoundReport]:
    config = built.config
    return simulate(
        built.algorithm,
        built.bench,
        journal=journal,
        clients=tuple(range(config.federation.clients)),
        rounds=config.federation.rounds,
        evaluate=lambda: judge(built),
        every=config.eval.every,
        on_surge=config.guard.on_surge,
        downlink=build_downlink(config, dim=built.bench.params.dim),
        budget=config.federation.budget,
        walkers=walkers,
        lookout=lookout,
    )


def _watchers(built: Built, watch: Watch, *, folder: Path) -> Watch:
    """Returns `watch`, joined by TensorBoard's when it is wanted and installed."""
    if not built.config.output.tensorboard:
        return watch
    try:
        return Watchers([watch, TensorBoardWatch(folder / "tensorboard")])
    except ConfigError as missing:
        watch.note(str(missing))
        return watch


def _keep(built: Built, journal: Journal, *, folder: Path, summary: Summary, watch: Watch) -> None:
    """Writes what a finished run leaves beside its journal: summary, adapter, report."""
    from fedmezo.studies.report import write_report

    split = built.data.split.as_dict()
    with writing(folder):
        kept = json.dumps(plain({**summary.as_dict(), "split": split}), indent=2, allow_nan=False)
        (folder / "summary.json").write_text(kept + "\n", encoding="utf-8")
        if built.config.output.export:
            save(built, folder / "adapter")
        if built.config.output.report:
            try:
                write_report(journal, out=folder / "report.html", summary=summary.as_dict(), split=split)
            except ConfigError as missing:
                watch.note(str(missing))


def _facts(built: Built, folder: Path, *, done: int) -> dict[str, object]:
    config = built.config
    return {
        "run_dir": str(folder),
        "model": config.model.name,
        "source": built.loaded.source,
        "adapter": config.adapter.kind,
        "dim": built.bench.params.dim,
        "clients": config.federation.clients,
        "sizes": built.data.sizes,
        "rounds": config.federation.rounds,
        "done": done,
        "rate": config.algorithm.rate,
        "mu": config.algorithm.mu,
        "dropped": dict(built.data.dropped),
        "python": platform.python_version(),
    }
