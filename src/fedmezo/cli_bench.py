"""The verb `bench`."""

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from fedmezo.channels import aside, emit, plain, saying
from fedmezo.cli_config import Json, Quiet, draw
from fedmezo.errors import ConfigError

__all__ = ["bench"]


class What(StrEnum):
    """What `bench` measures."""

    all = "all"
    noise = "noise"
    step = "step"
    simulate = "simulate"
    replay = "replay"
    memory = "memory"


class Law(StrEnum):
    """The law of a direction."""

    gaussian = "gaussian"
    rademacher = "rademacher"


def bench(
    *,
    what: Annotated[What, typer.Argument(metavar="[WHAT]", show_default=False)] = What.all,
    model: Annotated[str, typer.Option(metavar="NAME", help="As model.name of a configuration.")] = "smollm2-135m",
    shape: Annotated[
        str | None, typer.Option(metavar="NAME", help="Random weights in this shape, 3b, for step and memory.")
    ] = None,
    device: Annotated[str, typer.Option(metavar="DEVICE", help="A torch device: cpu, cuda.")] = "cpu",
    dtype: Annotated[
        str | None, typer.Option(metavar="NAME,...", help="float32, bfloat16, float16; the usual ones by default.")
    ] = None,
    tokens: Annotated[
        str | None, typer.Option(metavar="N,...", help="Tokens per batch; for simulate, one client per number.")
    ] = None,
    train: Annotated[str, typer.Option(metavar="NAME,...", help="What is trained: lora, full.")] = "lora,full",
    law: Annotated[Law, typer.Option(help="The law of a direction.")] = Law.gaussian,
    rank: Annotated[int, typer.Option(min=1, metavar="N", help="LoRA rank; alpha is twice that.")] = 128,
    threads: Annotated[int, typer.Option(min=1, metavar="N", help="Threads of torch and of the noise.")] = 1,
    repeats: Annotated[int, typer.Option(min=1, metavar="N", help="Turns counted; medians are told.")] = 5,
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="Also write the JSON object here.")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure this machine: as ratios to two plain forwards and to the widespread in-place scheme.

    A first try, without any download: `fedmezo bench step --model builtin:tiny --repeats 3`

    Both sides of a ratio take turns in one run. Exit code 1 when a float32 LoRA step needs over 1.05 times the
    memory of a plain forward and the adapter.
    """
    if out is not None and not out.absolute().parent.is_dir():
        raise ConfigError(f"--out: there is no folder {out.parent}; make it first.")
    with aside():
        from fedmezo.studies import bench as study

        asked = study.BenchOptions(
            kinds=tuple(kind for kind in study.KINDS if what in (What.all, kind)),
            model=model,
            shape=shape,
            device=device,
            dtypes=study.read_list(dtype, option="--dtype"),
            tokens=study.read_list(tokens, option="--tokens", of=int),
            train=study.read_list(train, option="--train") or (),
            law=law.value,
            rank=rank,
            threads=threads,
            repeats=repeats,
        )
        result = study.bench(asked, say=saying(quiet=quiet))
    if out is not None:
        out.write_text(json.dumps(plain(result), allow_nan=False, indent=1) + "\n", encoding="utf-8")
    _show(result, as_json=as_json)
    for sentence in result["failed"]:
        typer.echo(f"error: {sentence}", err=True)
    if result["failed"]:
        raise typer.Exit(1)


def _show(result: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        emit(result)
        return
    from fedmezo.studies.bench.screen import bench_table

    draw(bench_table(result))
