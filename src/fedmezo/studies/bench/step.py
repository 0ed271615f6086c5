"""One client's step against two plain forwards and against a step of the in-place scheme, in one interleaved run."""

from collections.abc import Callable, Iterator
from functools import partial

from fedmezo.errors import ModelError
from fedmezo.studies.bench.options import BenchOptions, Trained
from fedmezo.studies.bench.rows import Frame, Row
from fedmezo.studies.bench.subjects import Subjects, batch_of, forwards, open_model, subjects
from fedmezo.studies.bench.timing import interleaved, marginal, median

__all__ = ["step_rows"]

FEW, MANY = 5, 10  # steps of the two rounds whose difference is what a step costs
COARSE = "the clock is too coarse for so small a model; give more --repeats or more --tokens"


def step_rows(asked: BenchOptions, *, say: Callable[[str], None]) -> Iterator[Row]:
    """Yields the rows: two forwards, the in-place step, our step and our round of ten, by dtype, adapter and length.

    `one step` is what a step adds to a round; `round of 10` is a whole round, with what it pays once (private copies or
    kept weights), and its ratios are to ten times two forwards and to ten steps of the in-place scheme.
    """
    lengths = asked.tokens_or(64, 256)
    for dtype in asked.dtypes_or("float32", "bfloat16"):
        for train in asked.train:
            loaded = open_model(asked, dtype, copies=1 if train == "lora" else 2)
            try:
                three = subjects(loaded, asked, train=train, lengths=lengths)
            except ModelError as error:
                frames = (Frame("step", dtype, tokens) for tokens in lengths)
                yield from (frame.missing(f"{train}, one step", error) for frame in frames)
                continue
            for client, tokens in enumerate(lengths):
                say(f"step: {train}, {dtype}, {tokens} tokens")
                yield from _case(three, asked, train=train, frame=Frame("step", dtype, tokens), client=client)


def _case(three: Subjects, asked: BenchOptions, *, train: Trained, frame: Frame, client: int) -> Iterator[Row]:
    batch = batch_of(frame.tokens, three.plain)
    works: dict[str, Callable[[], object]] = {
        "base": partial(forwards, three.plain, [batch] * 2),
        "inplace": partial(three.inplace.step, batch, seed=1),
        "few": three.round([client], steps=FEW),
        "many": three.round([client], steps=MANY),
    }
    if three.attached is not None:
        works["attached"] = partial(forwards, three.attached, [batch] * 2)
    samples = interleaved(works, repeats=asked.repeats, device=asked.device)
    times = {name: median(each) for name, each in samples.items()}
    frame = frame.against(base=times["base"], inplace=times["inplace"])
    yield frame.row(f"{train}, two plain forwards", times["base"])
    if "attached" in times:
        yield frame.row(f"{train}, two forwards with PEFT's adapter attached", times["attached"])
    yield frame.row(f"{train}, one step of the in-place scheme", times["inplace"])
    one = marginal(samples["few"], samples["many"], more=MANY - FEW)
    yield frame.row(f"{train}, one step", one) if one else frame.missing(f"{train}, one step", COARSE)
    yield frame.row(f"{train}, round of {MANY}", times["many"], per=MANY)
