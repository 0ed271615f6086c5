"""What a user does with a run: start it, go on, judge it, check it, take it away.

Every verb of the command line is one function here; those about a run that is there come from `uses`.
"""

import json
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from fedmezo import __version__
from fedmezo.channels import plain
from fedmezo.errors import ConfigError, JournalError, RunError
from fedmezo.runtime.journal import Header, Journal
from fedmezo.runtime.line import Line
from fedmezo.runtime.lookout import Lookout
from fedmezo.runtime.progress import RoundReport
from fedmezo.runtime.simulate import simulate
from fedmezo.runtime.walkers import Walkers
from fedmezo.studies.build import Built, build, build_downlink, load_base, walkers_of
from fedmezo.studies.card import card_of
from fedmezo.studies.config import Config, parse_config
from fedmezo.studies.connect import NETWORK, connected
from fedmezo.studies.descent import build_lookout, cost_of
from fedmezo.studies.files import BEGUN, DATA, JOURNAL, SUMMARY
from fedmezo.studies.folder import base_of, new_folder, opened, write_whole, writing
from fedmezo.studies.given import PYTHON, check_same, check_untrained, refuse_elsewhere
from fedmezo.studies.judge import judge
from fedmezo.studies.seal import MANIFEST, sealing, sound
from fedmezo.studies.secret import kept_secret, new_secret, write_secret
from fedmezo.studies.summary import Summary, summarise
from fedmezo.studies.trackers import with_trackers
from fedmezo.studies.uses import evaluate, export, rollback, save, verify
from fedmezo.studies.watch import NullWatch, Tracker, Watch
from fedmezo.zo.noise import NOISE_VERSION

__all__ = ["Summary", "evaluate", "export", "resume", "rollback", "run", "verify"]

Stop = Callable[[RoundReport], bool]
_SHORT = ("out of memory", "can't allocate memory", "std::bad_alloc")


def run(
    config: Config | Built,
    *,
    out: Path | str | None = None,
    watch: Watch | None = None,
    trackers: Sequence[Tracker] = (),
    line: Line | None = None,
    stop: Stop | None = None,
) -> Summary:
    """Runs a configuration from its first round to its last and returns the summary.

    Args:
      config: what to do; or what `build` made of one, with any of its parts replaced.
      out: the run's folder; else `output.dir`; else a new one under runs/.
      watch: told of every round.
      trackers: where curves go, beside what [output] names; objects with `log(metrics, step)`.
      line: the way to clients on other machines; None simulates them.
      stop: ends the run after the first round of which it is true.

    Raises:
      ConfigError: the folder holds a run already, or cannot be written.
    """
    told = config.config if isinstance(config, Built) else config
    folder = new_folder(told, Path(out) if out is not None else None)
    if isinstance(config, Built):
        check_untrained(config)
    built = config if isinstance(config, Built) else _built(config, watch)
    kind = NETWORK if line is not None else PYTHON if isinstance(config, Built) else "simulation"
    header = Header(
        config=built.config.model_dump_json(),
        fingerprint=built.loaded.fingerprint,
        layout=built.bench.params.layout(),
        law=built.config.algorithm.law,
        noise_version=NOISE_VERSION,
        package=__version__,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        kind=kind,
    )
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    # The journal comes first: whoever loses a race for the folder has written nothing into it.
    with Journal.create(folder / JOURNAL, header) as journal, sealing(folder, journal):
        if told.privacy.mode != "none" and told.privacy.noise_seed is None:
            with writing(folder):
                write_secret(folder, built.secret)
        _describe(built, journal, folder=folder, anew=True)
        return _go_on(built, journal, folder=folder, watch=watch, trackers=trackers, line=line, stop=stop)


def _built(config: Config, watch: Watch | None) -> Built:
    secret = new_secret(config.privacy)
    return build(config, loaded=load_base(config, say=(watch or NullWatch()).note), secret=secret)


def resume(
    folder: Path | str,
    *,
    rounds: int | None = None,
    workers: int | None = None,
    watch: Watch | None = None,
    trackers: Sequence[Tracker] = (),
    line: Line | None = None,
    built: Built | None = None,
    stop: Stop | None = None,
) -> Summary:
    """Goes on where the journal ends, with the bits of a run that was never interrupted.

    Args:
      folder: the run's folder.
      rounds: run to this many rounds instead of the configured number; a decaying rate follows the new number.
      workers: walk in so many processes instead of the configured number.
      watch: told of every round.
      trackers: where curves go, beside what [output] names; objects with `log(metrics, step)`.
      line: the way to clients on other machines; None simulates them.
      built: what a run that was begun with `run(built)` goes on with, made anew as it was then; `rounds` and `workers`
        are those of its configuration.
      stop: ends the run after the first round of which it is true.

    Raises:
      ConfigError: the folder holds no run, more rounds than `rounds`, one with clients that `line` has to reach, or one
        that needs `built` and does not fit it.
      JournalError: the base model or the data is not what the run began with.
    """
    folder = Path(folder)
    # Before it is opened: to open it for writing may change a byte of it, which the chain does not know.
    _refuse_damaged(folder)
    with opened(folder) as journal:
        journal.check_head()
        refuse_elsewhere(journal, folder, line=line, built=built)
        if built is not None:
            check_same(built, journal)
            rounds = built.config.federation.rounds
        if rounds is not None and rounds < journal.last:
            raise ConfigError(
                f"--rounds: {folder} has {journal.last} rounds already, got {rounds}; give more, or take some back "
                f"with `fedmezo rollback {folder} --round {rounds}`."
            )
        built = built or _rebuilt(journal, folder, rounds=rounds, workers=workers)
        known = folder / DATA
        if known.exists() and known.read_text(encoding="utf-8").strip() != built.data.digest():
            raise JournalError(
                f"The data has changed since {folder} began: its records give other batches now; restore them, or "
                f"delete {known} to go on with the new ones."
            )
        with sealing(folder, journal):
            _describe(built, journal, folder=folder, anew=False)
            return _go_on(built, journal, folder=folder, watch=watch, trackers=trackers, line=line, stop=stop)


def _rebuilt(journal: Journal, folder: Path, *, rounds: int | None, workers: int | None) -> Built:
    config, loaded = base_of(journal)
    if rounds is not None:
        config = config.model_copy(update={"federation": config.federation.model_copy(update={"rounds": rounds})})
    if workers is not None:
        config = config.model_copy(update={"runtime": config.runtime.model_copy(update={"workers": workers})})
    # Nothing was walked before the secret lay there.
    return build(config, loaded=loaded, secret=kept_secret(folder, config.privacy, make=journal.last == 0))


def _refuse_damaged(folder: Path) -> None:
    if not sound(folder, JOURNAL):
        raise JournalError(
            f"{folder / JOURNAL} is damaged: it is not what it was when it was sealed, and `fedmezo verify {folder}` "
            f"says more; restore a copy, or delete {folder / MANIFEST} if it was changed on purpose."
        )


def _describe(built: Built, journal: Journal, *, folder: Path, anew: bool) -> None:
    """Writes what a run leaves beside its journal from its start on; unless `anew`, what a kill kept from there."""
    config = parse_config(json.loads(journal.header.config))
    known = {"dim": built.bench.params.dim, "split": built.data.split.as_dict()}
    texts = {
        "config.toml": config.to_toml(),
        DATA: built.data.digest() + "\n",
        BEGUN: json.dumps(plain(known), allow_nan=False) + "\n",
    }
    with writing(folder):
        for name, text in texts.items():
            if anew or not (folder / name).exists():
                write_whole(folder / name, text)


def _go_on(
    built: Built,
    journal: Journal,
    *,
    folder: Path,
    watch: Watch | None,
    trackers: Sequence[Tracker],
    line: Line | None,
    stop: Stop | None,
) -> Summary:
    watched = with_trackers(watch or NullWatch(), built.config, folder=folder, trackers=trackers)
    watched.start(_facts(built, folder, done=journal.last))
    lookout = build_lookout(built.config, built.bench)
    for note in (*built.notes, *cost_of(lookout, built.config)):
        watched.note(note)
    with _walkers(built, journal, line, folder=folder, watch=watched) as (built, walkers), _out_of_memory(folder):
        for report in _reports(built, journal, walkers=walkers, lookout=lookout):
            watched.round(report)
            if stop is not None and stop(report):
                break
    summary = summarise(built, journal, folder=folder)
    _keep(built, journal, folder=folder, summary=summary, watch=watched)
    watched.finish(summary.as_dict())
    return summary


@contextmanager
def _out_of_memory(folder: Path) -> Iterator[None]:
    """Turns what Python, torch on a CPU and torch on a GPU raise when memory is short into one sentence."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not any(told in str(error).lower() for told in _SHORT):
            raise
        raise RunError(
            f"There was not enough memory for a round; every finished one is in the journal. Free some and go on with "
            f"`fedmezo resume {folder}`, or begin a run with a smaller federation.batch_size, data.max_tokens or "
            "runtime.lanes."
        ) from error


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


def _keep(built: Built, journal: Journal, *, folder: Path, summary: Summary, watch: Watch) -> None:
    """Writes what a finished run leaves beside its journal: summary, adapter, report."""
    from fedmezo.studies.report import write_report

    split = built.data.split.as_dict()
    with writing(folder):
        kept = json.dumps(plain({**summary.as_dict(), "split": split}), indent=2, allow_nan=False)
        write_whole(folder / SUMMARY, kept + "\n")
        if built.config.output.export:
            merged = built.config.adapter.kind == "full"
            save(built, folder / "adapter", card=card_of(journal, built, upto=journal.last, merged=merged))
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
