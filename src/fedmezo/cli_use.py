"""The verbs that use a run or look after it."""

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from fedmezo.channels import aside, emit
from fedmezo.cli_config import Folder, Json, Out, Round, read_config, show
from fedmezo.errors import ConfigError

__all__ = ["ask", "doctor", "evaluate", "export", "report", "rollback", "verify"]


class Target(StrEnum):
    """What `export` writes."""

    peft = "peft"
    merged = "merged"


def evaluate(
    *,
    target: Annotated[Path, typer.Argument(metavar="DIR|ADAPTER")],
    round_number: Round = None,
    examples: Annotated[int | None, typer.Option(min=1, metavar="N", help="Examples at most.")] = None,
    metric: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Also exact_match or rouge_l; may be given again.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(metavar="CONFIG", help="Model and data for an adapter folder that is no run.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Judge the tuned model on the evaluation examples."""
    extra: dict[str, Any] = {} if config is None else {"config": read_config(config, None)}
    extra |= {"metrics": metric} if metric else {}
    with aside():
        from fedmezo.studies import run as study

        result = study.evaluate(target, round=round_number, examples=examples, **extra)
    show(result, as_json=as_json)


def ask(
    *,
    target: Annotated[Path, typer.Argument(metavar="DIR|ADAPTER")],
    prompt: Annotated[str, typer.Argument(metavar="PROMPT")],
    given: Annotated[str, typer.Option("--input", metavar="TEXT", help="The input that goes with the prompt.")] = "",
    round_number: Round = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-tokens", min=1, metavar="N", help="Tokens of the answer at most; as configured by default."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Print the tuned model's answer to a prompt, written as the run writes its prompts."""
    with aside():
        from fedmezo.studies.ask import ask as answer

        text = answer(target, prompt, given=given, round=round_number, max_tokens=max_tokens)
    if as_json:
        emit({"target": target, "prompt": prompt, "input": given, "round": round_number, "answer": text})
    else:
        typer.echo(text)


def export(
    *,
    folder: Folder,
    to: Annotated[
        Target, typer.Option("--to", help="peft: an adapter folder; merged: one ordinary model folder.")
    ] = Target.peft,
    round_number: Round = None,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Write the tuned model for peft and transformers, as of any round."""
    with aside():
        from fedmezo.studies import run as study

        path = study.export(folder, to=to.value, round=round_number, out=out)
    show({"path": path, "to": to.value}, as_json=as_json)


def verify(*, folder: Annotated[Path, typer.Argument(metavar="DIR|ADAPTER")], as_json: Json = False) -> None:
    """Compare every byte with the folder's seal, and the model rebuilt from a run's journal with the digests recorded.

    Exit code 1 when one bit has changed.
    """
    with aside():
        from fedmezo.studies import run as study

        result = study.verify(folder)
    show(result, as_json=as_json)
    if not result.get("ok"):
        raise typer.Exit(1)


def rollback(
    *,
    folder: Folder,
    round_number: Annotated[int, typer.Option("--round", min=0, metavar="N", help="Rounds to keep.")],
    as_json: Json = False,
) -> None:
    """Take back all rounds after the first N; the journal as it was is kept beside it."""
    with aside():
        from fedmezo.studies import run as study

        result = study.rollback(folder, round=round_number)
    show(result, as_json=as_json)


def report(*, folder: Folder, as_json: Json = False) -> None:
    """Write DIR/report.html again, one page that needs no network."""
    from fedmezo.studies.files import JOURNAL, SUMMARY

    journal = folder / JOURNAL
    if not journal.is_file():
        raise ConfigError(f"{folder} is not the folder of a run: it holds no {JOURNAL}.")
    known = folder / SUMMARY
    with aside():
        from fedmezo.studies.report import write_report
        from fedmezo.studies.seal import renew

        summary = json.loads(known.read_text(encoding="utf-8")) if known.is_file() else None
        path = write_report(journal, out=folder / "report.html", summary=summary, split=(summary or {}).get("split"))
        renew(folder, path.name)
    show({"path": path}, as_json=as_json)


def doctor(*, folder: Folder, as_json: Json = False) -> None:
    """Say why a run is slow, noisy or diverging, from its journal; also of a run in progress or one that died."""
    with aside():
        from fedmezo.studies.doctor import diagnose

        found = diagnose(folder)
    if as_json:
        emit(found.as_dict())
        return
    from rich.console import Console

    from fedmezo.studies.doctor.screen import diagnosis_text

    console = Console(highlight=False)
    console.print(diagnosis_text(found, width=console.width), soft_wrap=True, end="")
