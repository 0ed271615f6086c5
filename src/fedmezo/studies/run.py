"""What a user does with a run: start it, go on, judge it, check it, take it away.

Every verb of the command line is one function here.
"""

import json
import platform
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from fedmezo import __version__
from fedmezo.errors import ConfigError, JournalError
from fedmezo.models.adapters import load_adapter, save_adapter, save_merged
from fedmezo.models.bench import Evaluation
from fedmezo.runtime.journal import Header, Journal, replay, update_of
from fedmezo.runtime.meter import peak_rss_mb
from fedmezo.runtime.simulate import START, simulate
from fedmezo.studies.build import Built, build
from fedmezo.studies.config import Config, load_config, parse_config
from fedmezo.studies.metrics import written_metrics
from fedmezo.studies.watch import NullWatch, TensorBoardWatch, Watch, Watchers
from fedmezo.zo.noise import NOISE_VERSION
from fedmezo.zo.perturb import apply_

__all__ = ["Summary", "evaluate", "export", "resume", "rollback", "run", "verify"]

JOURNAL = "journal.sqlite"


@dataclass(frozen=True)
class Summary:
    """The result of a run; `as_dict` is what `--json` prints.

    Attributes:
      run_dir: the run's folder.
      rounds: complete rounds.
      clients: clients of the federation.
      dim: trained scalars d.
      mu: perturbation scale.
      rate: learning rate of the first round.
      eval: {"start": metrics, "end": metrics} on the common evaluation set.
      bytes: wire bytes: up_per_client_round, down_per_client_round, up_total, down_total.
      forwards: forward passes of the walks (one per point), evaluation not counted.
      tokens: tokens those passes read.
      seconds: wall clock of the walks.
      peak_rss_mb: largest resident set of this process.
      skipped_steps: directions skipped because a loss was not finite.
      digest: sha256 of the trained parameters.
    """

    run_dir: str
    rounds: int
    clients: int
    dim: int
    mu: float
    rate: float
    eval: Mapping[str, Mapping[str, float]]
    bytes: Mapping[str, float]
    forwards: int
    tokens: int
    seconds: float
    peak_rss_mb: float
    skipped_steps: int
    digest: str

    def as_dict(self) -> dict[str, object]:
        """Returns the fields as plain values."""
        return asdict(self)


def run(config: Config, *, out: Path | None = None, watch: Watch | None = None) -> Summary:
    """Runs a configuration from its first round to its last and returns the summary.

    Args:
      config: what to do.
      out: the run's folder; else `output.dir`; else a new one under runs/.
      watch: told of every round.

    Raises:
      ConfigError: the folder holds a run already.
    """
    folder = _folder(config, out)
    built = build(config)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.toml").write_text(built.config.to_toml())
    header = Header(
        config=built.config.model_dump_json(),
        fingerprint=built.loaded.fingerprint,
        layout=built.bench.params.layout(),
        law=built.config.algorithm.law,
        noise_version=NOISE_VERSION,
        package=__version__,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    with Journal.create(folder / JOURNAL, header) as journal:
        return _go_on(built, journal, folder=folder, watch=watch)


def resume(folder: Path, *, rounds: int | None = None, watch: Watch | None = None) -> Summary:
    """Goes on where the journal ends, with the bits of a run that was never interrupted.

    Args:
      folder: the run's folder.
      rounds: run to this many rounds instead of the configured number.
      watch: told of every round.
    """
    with Journal.open(_journal(folder)) as journal:
        built = _rebuild(journal, rounds=rounds)
        return _go_on(built, journal, folder=folder, watch=watch)


def _folder(config: Config, out: Path | None) -> Path:
    named = out or (Path(config.output.dir) if config.output.dir else None)
    folder = named or Path("runs") / time.strftime("%Y%m%d-%H%M%S")
    if (folder / JOURNAL).exists():
        raise ConfigError(f"{folder} holds a run already; go on with `fedmezo resume {folder}` or choose another --out.")
    return folder


def _journal(folder: Path) -> Path:
    path = folder / JOURNAL
    if not path.exists():
        raise ConfigError(f"{folder} holds no run (no {JOURNAL} in it); give the folder that `fedmezo run` made.")
    return path


def _rebuild(journal: Journal, *, rounds: int | None = None) -> Built:
    """Builds a run's objects again from its journal and checks that the base model is the same."""
    config = parse_config(json.loads(journal.header.config))
    if journal.header.noise_version != NOISE_VERSION:
        raise JournalError(
            f"The journal uses noise v{journal.header.noise_version}, this package noise v{NOISE_VERSION}; "
            f"install fedmezo {journal.header.package}."
        )
    if rounds is not None:
        config = config.model_copy(update={"federation": config.federation.model_copy(update={"rounds": rounds})})
    built = build(config)
    if built.loaded.fingerprint != journal.header.fingerprint:
        raise JournalError(
            f"The base model has changed: fingerprint {built.loaded.fingerprint[:12]}, the journal's is "
            f"{journal.header.fingerprint[:12]}; restore the model '{config.model.name}' the run started from."
        )
    return built


def _go_on(built: Built, journal: Journal, *, folder: Path, watch: Watch | None) -> Summary:
    config = built.config
    watchers: list[Watch] = [watch or NullWatch()]
    if config.output.tensorboard:
        watchers.append(TensorBoardWatch(folder / "tensorboard"))
    watched = Watchers(watchers)
    watched.start(_facts(built, folder, done=journal.last))
    for report in simulate(
        built.algorithm,
        built.bench,
        journal=journal,
        clients=tuple(range(config.federation.clients)),
        rounds=config.federation.rounds,
        evaluate=lambda: judge(built),
        every=config.eval.every,
        on_surge=config.guard.on_surge,
    ):
        watched.round(report)
    summary = summarise(built, journal, folder=folder)
    kept = {**summary.as_dict(), "split": built.data.split.as_dict()}
    (folder / "summary.json").write_text(json.dumps(kept, indent=2) + "\n")
    if config.output.export:
        save(built, folder / "adapter")
    if config.output.report:
        _report(journal, built, summary, folder=folder)
    watched.finish(summary.as_dict())
    return summary


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


def judge(built: Built) -> dict[str, dict[str, float]]:
    """Returns split -> metrics of the model as it stands."""
    return {name: _judge_one(built, name) for name in built.data.evaluation}


def _judge_one(built: Built, name: str) -> dict[str, float]:
    examples, settings = built.data.evaluation[name], built.config.eval
    metrics = _flat(built.bench.evaluate(examples))
    written = written_metrics(
        built.bench,
        built.loaded.tokenizer,
        examples=examples,
        records=built.data.records,
        names=settings.metrics,
        max_new_tokens=settings.max_new_tokens,
    )
    return {**metrics, **written}


def _flat(evaluation: Evaluation) -> dict[str, float]:
    """Returns an evaluation as metric -> value; categories become "category/<name>/<metric>"."""
    flat: dict[str, float] = {
        "loss": evaluation.loss,
        "tokens": evaluation.tokens,
        "examples": evaluation.examples,
    }
    optional = {"accuracy": evaluation.accuracy, "token_accuracy": evaluation.token_accuracy}
    flat |= {name: value for name, value in optional.items() if value is not None}
    for category, scores in evaluation.categories.items():
        flat[f"category/{category}/loss"] = scores.loss
        flat[f"category/{category}/examples"] = scores.examples
        if scores.accuracy is not None:
            flat[f"category/{category}/accuracy"] = scores.accuracy
    return flat


def summarise(built: Built, journal: Journal, *, folder: Path) -> Summary:
    """Returns the summary of a run as far as its journal goes."""
    rounds = list(journal.rounds())
    entries = [entry for done in rounds for entry in done.entries]
    up, down = sum(e.bytes_up for e in entries), sum(e.bytes_down for e in entries)
    judged = [(number, metrics) for number, split, metrics in journal.evaluations() if split == "eval"]
    return Summary(
        run_dir=str(folder),
        rounds=len(rounds),
        clients=built.config.federation.clients,
        dim=built.bench.params.dim,
        mu=float(built.config.algorithm.mu or 0),
        rate=float(built.config.algorithm.rate or 0),
        eval={
            "start": dict(next((m for n, m in judged if n == START), {})),
            "end": dict(judged[-1][1]) if judged else {},
        },
        bytes={
            "up_per_client_round": up / max(len(entries), 1),
            "down_per_client_round": down / max(len(entries), 1),
            "up_total": up,
            "down_total": down,
        },
        forwards=sum(done.forwards for done in rounds),
        tokens=sum(done.tokens for done in rounds),
        seconds=sum(done.seconds for done in rounds),
        peak_rss_mb=peak_rss_mb(),
        skipped_steps=sum(entry.reply.skipped for entry in entries),
        digest=built.bench.params.digest(),
    )


def _report(journal: Journal, built: Built, summary: Summary, *, folder: Path) -> None:
    from fedmezo.studies.report import write_report

    write_report(journal, out=folder / "report.html", summary=summary.as_dict(), split=built.data.split.as_dict())


def save(built: Built, folder: Path, *, merged: bool = False) -> Path:
    """Writes the model as it stands: a PEFT adapter folder, or a whole model when merged or when all of it is trained."""
    config = built.config
    adapter, params = built.bench.adapter, built.bench.params
    if merged or adapter.kind == "full":
        save_merged(folder, built.loaded.model, adapter=adapter, params=params, tokenizer=built.loaded.tokenizer)
    else:
        save_adapter(folder, params, adapter=adapter, base=_base_name(built))
    (folder / "fedmezo.toml").write_text(config.to_toml())
    return folder


def _base_name(built: Built) -> str:
    """Returns what PEFT shall load as base: a hub id as it is, anything else as the folder it was loaded from."""
    return built.loaded.source


def export(folder: Path, *, to: str = "peft", round: int | None = None, out: Path | None = None) -> Path:
    """Writes the model after `round` rounds (default: all) and returns the new folder.

    Args:
      folder: the run's folder.
      to: "peft" (adapter folder) or "merged" (whole model).
      round: number of complete rounds; 0 is the untrained model.
      out: where to; default inside the run's folder.
    """
    if to not in ("peft", "merged"):
        raise ConfigError(f"--to: expected peft or merged, got {to!r}.")
    with Journal.open(_journal(folder), readonly=True) as journal:
        upto = _upto(journal, round)
        built = _rebuild(journal)
        if to == "peft" and built.config.adapter.kind == "full":
            raise ConfigError("This run trains all parameters, so there is no adapter; use --to merged.")
        replay(built.bench.params, journal, upto=upto)
    return save(built, out or folder / f"{to}-round-{upto}", merged=to == "merged")


def _upto(journal: Journal, round_number: int | None) -> int:
    upto = journal.last if round_number is None else round_number
    if not 0 <= upto <= journal.last:
        raise ConfigError(f"--round: expected 0 to {journal.last} (complete rounds), got {upto}.")
    return upto


def verify(folder: Path) -> dict[str, object]:
    """Rebuilds the model from the journal and compares it with every digest taken during the run.

    Raises:
      JournalError: the chain is broken, or a digest differs; the message names the round.
    """
    with Journal.open(_journal(folder), readonly=True) as journal:
        journal.verify_chain()
        built = _rebuild(journal)
        compared = 0
        for done in journal.rounds():
            apply_(built.bench.params, update_of(done), law=built.config.algorithm.law)
            if done.digest is not None:
                compared += 1
                if built.bench.params.digest() != done.digest:
                    raise JournalError(f"Round {done.round}: the rebuilt model differs from the digest taken then.")
        digest = built.bench.params.digest()
        return {"ok": True, "digest": digest, "rounds": journal.last, "compared": compared, "run_dir": str(folder)}


def rollback(folder: Path, *, round: int) -> dict[str, object]:
    """Keeps the first `round` rounds of a run; a copy of the whole journal is left beside it."""
    with Journal.open(_journal(folder)) as journal:
        upto = _upto(journal, round)
        backup = journal.rollback(upto, "by hand")
        return {"run_dir": str(folder), "rounds": journal.last, "backup": str(backup)}


def evaluate(
    target: Path, *, round: int | None = None, examples: int | None = None, config: Config | None = None
) -> dict[str, object]:
    """Returns loss, tokens, examples and metrics of a run's model or of an adapter folder.

    Args:
      target: a run's folder, or an adapter folder.
      round: number of complete rounds, for a run.
      examples: evaluate on at most so many.
      config: what data to judge an adapter on; default: the configuration saved beside it.
    """
    if (target / JOURNAL).exists():
        with Journal.open(target / JOURNAL, readonly=True) as journal:
            built = _with_examples(_rebuild(journal), examples)
            upto = _upto(journal, round)
            replay(built.bench.params, journal, upto=upto)
    else:
        built, upto = _with_examples(_from_adapter(target, config), examples), None
    judged = judge(built)
    result: dict[str, object] = {"target": str(target), "round": upto, **judged.pop("eval")}
    return result | ({"splits": judged} if judged else {})


def _with_examples(built: Built, examples: int | None) -> Built:
    if examples is None:
        return built
    if examples < 1:
        raise ConfigError(f"--examples: expected at least 1, got {examples}.")
    fewer = {name: some[:examples] for name, some in built.data.evaluation.items()}
    return Built(**{**vars(built), "data": type(built.data)(**{**vars(built.data), "evaluation": fewer})})


def _from_adapter(folder: Path, config: Config | None) -> Built:
    if not (folder / "adapter_config.json").exists():
        raise ConfigError(f"{folder} is neither a run (no {JOURNAL}) nor an adapter (no adapter_config.json).")
    if config is None:
        if not (folder / "fedmezo.toml").exists():
            raise ConfigError(f"{folder} does not say on what data to judge it; give --config.")
        config = load_config(folder / "fedmezo.toml")
    built = build(config)
    _, tuned = load_adapter(folder, built.loaded.model)
    built.bench.adapter.check(tuned)
    built.bench.params.copy_(tuned)
    return built
