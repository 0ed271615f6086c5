"""What a user does with a run that is there: judge it, check it, take it back, take it away."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fedmezo.errors import ConfigError, JournalError
from fedmezo.models.adapters import WEIGHTS, save_adapter, save_merged
from fedmezo.models.load import Loaded
from fedmezo.runtime.journal import replay, update_of
from fedmezo.studies.build import Built, Tuned, build, build_model, load_base
from fedmezo.studies.card import CARD, Card, card_of
from fedmezo.studies.config import Config, load_config
from fedmezo.studies.files import JOURNAL
from fedmezo.studies.folder import aside, base_of, is_run, opened, rounds_upto, writing
from fedmezo.studies.judge import judge
from fedmezo.studies.origin import from_folder, from_model
from fedmezo.studies.seal import MANIFEST, check, renew, seal, sealing, unseal
from fedmezo.studies.summary import spent_of
from fedmezo.zo.perturb import apply_

__all__ = ["evaluate", "export", "rollback", "save", "verify"]

SETTINGS = "fedmezo.toml"


def save(tuned: Tuned, folder: Path, *, merged: bool = False, card: Card | None = None) -> Path:
    """Writes the model as it stands: a PEFT adapter folder, or a whole model when merged or when all of it is trained.

    The folder is sealed when it is complete; `verify` compares every byte of it with the seal.

    Args:
      tuned: the model.
      folder: where to.
      merged: whether to write a whole model where there is an adapter.
      card: what README.md shall say; None for no README.md.

    Raises:
      ConfigError: the folder cannot be written.
    """
    adapter, params = tuned.bench.adapter, tuned.bench.params
    merged = merged or adapter.kind == "full"
    unseal(folder)
    with writing(folder), aside(folder) as new:
        if merged:
            whole = _whole(tuned)
            save_merged(new, whole.model, adapter=adapter, params=params, tokenizer=whole.tokenizer)
        else:
            save_adapter(new, params, adapter=adapter, base=tuned.base_name)
        (new / SETTINGS).write_text(tuned.config.to_toml(), encoding="utf-8")
        if card is not None:
            (new / CARD).write_text(card.text(weights=_sha256(new / WEIGHTS)), encoding="utf-8")
    about = {"base": tuned.base_name, "fingerprint": tuned.loaded.fingerprint, "digest": params.digest()}
    seal(folder, kind="model" if merged else "adapter", about=about)
    return folder


def _sha256(path: Path) -> str:
    """Returns the sha256 of a file in hex; empty where there is none."""
    if not path.exists():
        return ""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _whole(tuned: Tuned) -> Loaded:
    """Returns the base model with its weights as numbers: a quantised one is loaded again, unquantised."""
    model = tuned.config.model
    if model.quantize == "none":
        return tuned.loaded
    return load_base(tuned.config.model_copy(update={"model": model.model_copy(update={"quantize": "none"})}))


def export(folder: Path | str, *, to: str = "peft", round: int | None = None, out: Path | str | None = None) -> Path:
    """Writes the model after `round` rounds (default: all) and returns the new folder; needs no training data.

    Args:
      folder: the run's folder.
      to: "peft" (adapter folder) or "merged" (whole model).
      round: number of complete rounds; 0 is the untrained model.
      out: where to; default inside the run's folder.

    Raises:
      ConfigError: no such run or round, nothing to export that way, or `out` holds a run.
    """
    if to not in ("peft", "merged"):
        raise ConfigError(f"--to: expected peft or merged, got {to!r}.")
    folder, out = Path(folder), Path(out) if out is not None else None
    if out is not None and (out / JOURNAL).exists():
        raise ConfigError(f"--out: {out} is the folder of a run; choose another, such as {out / to}.")
    with opened(folder, readonly=True) as journal:
        upto = rounds_upto(journal, round)
        tuned = build_model(*base_of(journal))
        if to == "peft" and tuned.config.adapter.kind == "full":
            raise ConfigError("This run trains all parameters, so there is no adapter; use --to merged.")
        replay(tuned.bench.params, journal, upto=upto)
        card = card_of(journal, tuned, upto=upto, merged=to == "merged")
    written = save(tuned, out or folder / f"{to}-round-{upto}", merged=to == "merged", card=card)
    if written.absolute().parent == folder.absolute():
        renew(folder, written.name)
    return written


def verify(folder: Path | str) -> dict[str, object]:
    """Compares every byte of a run's folder, or of one that `export` wrote, with what it was when it was sealed.

    Of a run also rebuilds the model from the journal and compares it with every digest taken during the run; that
    needs the base model and no training data. A run that has not ended has no seal, so "seal" is None: every bit that
    matters to its rounds is checked all the same.

    Raises:
      JournalError: the chain is broken, or a digest differs; the message names the round.
      SealError: any other byte has changed; the message names the file.
      ConfigError: the folder holds no run, or an export without a seal.
    """
    folder = Path(folder)
    if not is_run(folder) and ((folder / MANIFEST).exists() or _exported(folder)):
        return _verify_export(folder)
    with opened(folder, readonly=True) as journal:
        journal.verify_chain()
        known = check(folder)
        tuned = build_model(*base_of(journal))
        compared = 0
        for done in journal.rounds():
            apply_(tuned.bench.params, update_of(done), law=tuned.config.algorithm.law)
            if done.digest is not None:
                compared += 1
                if tuned.bench.params.digest() != done.digest:
                    raise JournalError(f"Round {done.round}: the rebuilt model differs from the digest taken then.")
        digest = tuned.bench.params.digest()
        sealed = {"seal": known.seal if known else None, "run_dir": str(folder)}
        return {"ok": True, "digest": digest, "rounds": journal.last, "compared": compared, **sealed}


def _verify_export(folder: Path) -> dict[str, object]:
    known = check(folder)
    if known is None:
        raise ConfigError(f"{folder} has no seal (no {MANIFEST} in it); export it again to give it one.")
    told = {"ok": True, "kind": known.kind, "digest": known.about.get("digest"), "files": len(known.files)}
    return {**told, "seal": known.seal, "run_dir": str(folder)}


def _exported(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("adapter_config.json", "config.json"))


def rollback(folder: Path | str, *, round: int) -> dict[str, object]:
    """Keeps the first `round` rounds of a run; a copy of the whole journal is left beside it."""
    folder = Path(folder)
    with opened(folder) as journal:
        upto = rounds_upto(journal, round)
        if spent_of(journal) is not None:
            raise ConfigError(
                f"{folder} is private, and what its clients have told cannot be taken back; go on with it, or "
                f"`fedmezo export {folder} --round {upto}` for the model of that round."
            )
        with sealing(folder, journal):
            backup = journal.rollback(upto, "by hand")
        return {"run_dir": str(folder), "rounds": journal.last, "backup": str(backup)}


def evaluate(
    target: Path | str,
    *,
    round: int | None = None,
    examples: int | None = None,
    metrics: Sequence[str] = (),
    config: Config | None = None,
) -> dict[str, object]:
    """Returns loss, tokens, examples and metrics of a run's model, an adapter folder or a merged model.

    Args:
      target: a run's folder, or one that `export` wrote.
      round: number of complete rounds, for a run.
      examples: evaluate on at most so many.
      metrics: further metrics, such as exact_match and rouge_l, beside the configured ones.
      config: what data to judge an exported folder on; default: the configuration saved in it.
    """
    target = Path(target)
    if is_run(target):
        if config is not None:
            raise ConfigError(f"--config: {target} is a run and knows its data; name an adapter folder instead.")
        with opened(target, readonly=True) as journal:
            upto = rounds_upto(journal, round)
            whole, loaded = base_of(journal)
            built = _with_examples(build(whole, loaded=loaded), examples)
            replay(built.bench.params, journal, upto=upto)
    else:
        built, upto = _with_examples(_from_folder(target, config), examples), None
    judged = judge(_with_metrics(built, metrics))
    result: dict[str, object] = {"target": str(target), "round": upto, **judged.pop("eval")}
    return result | ({"splits": judged} if judged else {})


def _with_metrics(built: Built, metrics: Sequence[str]) -> Built:
    known = ("loss", "accuracy", "rouge_l", "exact_match")
    unknown = [name for name in metrics if name not in known]
    if unknown:
        raise ConfigError(f"--metric: expected one of {', '.join(known)}, got {unknown[0]!r}.")
    judged = built.config.eval.model_copy(update={"metrics": tuple({*built.config.eval.metrics, *metrics})})
    return replace(built, config=built.config.model_copy(update={"eval": judged}))


def _with_examples(built: Built, examples: int | None) -> Built:
    if examples is None:
        return built
    if examples < 1:
        raise ConfigError(f"--examples: expected at least 1, got {examples}.")
    fewer = {name: some[:examples] for name, some in built.data.evaluation.items()}
    return replace(built, data=replace(built.data, evaluation=fewer))


def _from_folder(folder: Path, config: Config | None) -> Built:
    """Returns what an exported folder holds: an adapter on its base model, or a whole model."""
    adapter = (folder / "adapter_config.json").exists()
    if not _exported(folder):
        raise ConfigError(
            f"{folder} is neither a run (no {JOURNAL}) nor an adapter (no adapter_config.json) nor a model "
            "(no config.json)."
        )
    check(folder, in_part=True)
    if config is None:
        if not (folder / SETTINGS).exists():
            raise ConfigError(f"{folder} does not say on what data to judge it; give --config.")
        config = load_config(folder / SETTINGS)
    if not adapter:
        return build(from_model(config, folder), measure=False)
    return build(from_folder(config, folder), measure=False)
