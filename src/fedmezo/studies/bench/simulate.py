"""Many clients in one forward pass against the same clients one Hugging Face forward at a time."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from fedmezo.errors import ModelError
from fedmezo.fl.algorithm import Point
from fedmezo.models.bench import ModelBench
from fedmezo.models.plain import trained_names
from fedmezo.studies.bench.inplace import InPlace
from fedmezo.studies.bench.options import BenchOptions
from fedmezo.studies.bench.rows import Frame, Row
from fedmezo.studies.bench.step import COARSE
from fedmezo.studies.bench.subjects import MU, Subjects, batch_of, forwards, open_model, subjects
from fedmezo.studies.bench.timing import interleaved, marginal, median
from fedmezo.zo.perturb import lane_, step_

__all__ = ["largest_differences", "simulate_rows"]

FEW, MANY = 1, 3


@dataclass(frozen=True, slots=True)
class _Cohort:
    """Clients with batches of these lengths, and the dtypes they are usually measured in."""

    lengths: tuple[int, ...]
    dtypes: tuple[str, ...]

    @property
    def name(self) -> str:
        """How it is told: 8 x 24, or 16+32."""
        if len(set(self.lengths)) == 1:
            return f"{len(self.lengths)} x {self.lengths[0]}"
        return "+".join(map(str, self.lengths))


COHORTS = (
    _Cohort((24,) * 8, ("float32", "bfloat16")),
    _Cohort((16, 32, 64, 128), ("bfloat16",)),
    _Cohort((64,) * 4, ("float32",)),
)


def simulate_rows(asked: BenchOptions, *, say: Callable[[str], None]) -> Iterator[Row]:
    """Yields the rows of each cohort: forwards and whole steps, one client at a time and packed, and the speed-ups.

    Two plain forwards are here two per client, with PEFT's adapter attached. `packed forwards` are the same losses in
    one pass, every client with weights of its own; `packed step` has directions and updates, too. In float32 the
    largest difference of a loss is told: packed against one client at a time by the same products, and against plain
    forwards, whose products may be another library's. `tokens` is the mean over the clients. With tokens asked for,
    there is one cohort, with one client per number.
    """
    cohorts = (_Cohort(asked.tokens, ("float32", "bfloat16")),) if asked.tokens else COHORTS
    for cohort in cohorts:
        for dtype in asked.dtypes or cohort.dtypes:
            tokens = round(sum(cohort.lengths) / len(cohort.lengths))
            frame = Frame(f"simulate: {cohort.name}", dtype, tokens, len(cohort.lengths))
            say(f"{frame.group} tokens, {dtype}")
            loaded = open_model(asked, dtype)
            try:
                three = subjects(loaded, asked, train="lora", lengths=cohort.lengths)
            except ModelError as error:
                yield frame.missing("packed step", error)
                continue
            yield from _case(three, asked, frame=frame, lengths=cohort.lengths)


def _case(three: Subjects, asked: BenchOptions, *, frame: Frame, lengths: Sequence[int]) -> Iterator[Row]:
    batches = [batch_of(length, three.plain) for length in lengths]
    clients = range(len(lengths))
    works: dict[str, Callable[[], object]] = {
        "base": partial(forwards, three.inplace.model, [batch for batch in batches for _ in range(2)]),
        "inplace": partial(_one_by_one, three.inplace, batches),
        "packed": partial(three.ours.losses, _points(three.ours, len(lengths))),
        "few": three.round(clients, steps=FEW),
        "many": three.round(clients, steps=MANY),
    }
    samples = interleaved(works, repeats=asked.repeats, device=asked.device)
    base, inplace = median(samples["base"]), median(samples["inplace"])
    frame = frame.against(base=base, inplace=inplace)
    yield frame.row("plain forwards one at a time, PEFT's adapter attached", base)
    yield frame.row("in-place scheme, one client at a time", inplace)
    packed = marginal(samples["few"], samples["many"], more=MANY - FEW)
    yield frame.row("packed step", packed) if packed else frame.missing("packed step", COARSE)
    forward = median(samples["packed"])
    yield frame.row("packed forwards, an adapter per client", forward)
    yield frame.plain("speed-up of forwards over plain ones", base / forward, unit="x")
    if packed:
        yield frame.plain("speed-up of a step over plain forwards", base / packed, unit="x")
        yield frame.plain("speed-up of a step over the in-place scheme", inplace / packed, unit="x")
    if frame.dtype == "float32":
        own, plain = largest_differences(three, batches)
        yield frame.plain("largest loss difference, packed against one at a time", own, unit="nats")
        yield frame.plain("largest loss difference, packed against plain forwards", plain, unit="nats")


def _points(bench: ModelBench, clients: int) -> list[Point]:
    """Returns two points per client, each client at parameters of its own."""
    copies = [bench.params.clone() for _ in range(clients)]
    return [Point(params, 0, 0.0, client, 0, 0) for client, params in enumerate(copies) for _ in range(2)]


def _one_by_one(inplace: InPlace, batches: Sequence[Mapping[str, Tensor]]) -> None:
    for seed, batch in enumerate(batches):
        inplace.step(batch, seed=seed)


def largest_differences(three: Subjects, batches: Sequence[Mapping[str, Tensor]]) -> tuple[float, float]:
    """Returns the largest |loss packed - loss alone|, nats, over all sides: alone by us, and by a plain forward.

    PEFT's matrices take the very bits of each lane first. Moves our parameters a little, for B = 0 would hide errors.
    """
    attached = three.inplace.model
    params, held = three.ours.params, dict(attached.named_parameters())
    step_(params, 7, coefficient=1e-3, law=three.law)
    sides = [(client, offset) for client in range(len(batches)) for offset in (MU, -MU)]
    points = [Point(params, client, offset, client, 0, 0) for client, offset in sides]
    packed, own, plain = three.ours.losses(points), [three.ours.losses([point])[0] for point in points], []
    for client, offset in sides:
        for name, ours in trained_names(attached).items():
            lane_(held[name].data, params[ours], name=ours, seed=client, offset=offset, law=three.law)
        with torch.inference_mode():
            plain.append(float(attached(**batches[client]).loss.double()))
    apart = [max(abs(a - b) for a, b in zip(packed, alone, strict=True)) for alone in (own, plain)]
    return apart[0], apart[1]
