"""How long a round's update takes to be rebuilt from its seeds, against regenerating it with fresh tensors."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

from torch import nn

from fedmezo.errors import ModelError
from fedmezo.models.adapters import make_adapter
from fedmezo.models.plain import twin, with_peft
from fedmezo.studies.bench.inplace import update_
from fedmezo.studies.bench.options import BenchOptions
from fedmezo.studies.bench.rows import Frame, Row
from fedmezo.studies.bench.subjects import batch_of, forwards, open_model
from fedmezo.studies.bench.timing import interleaved, median
from fedmezo.zo.noise import derive_seed
from fedmezo.zo.perturb import apply_
from fedmezo.zo.seedsum import Update, Walk

__all__ = ["replay_rows"]

WALKS, STEPS = 9, 10
TOKENS = 64
PUSH = 1e-9  # a coefficient that leaves the parameters what they were, however often they are replayed


def replay_rows(asked: BenchOptions, *, say: Callable[[str], None]) -> Iterator[Row]:
    """Yields the rows: two plain forwards, 90 seeds replayed with fresh tensors, 90 seeds replayed by us.

    The parameters are LoRA's, float32 as our masters always are.
    """
    frame = Frame("replay", "float32", asked.tokens_or(TOKENS)[0])
    say(f"replay: {WALKS * STEPS} seeds")
    loaded = open_model(asked, "float32")
    try:
        attached = with_peft(twin(loaded.model), **asked.lora)
    except ModelError as error:
        yield frame.missing("seeds", error)
        return
    params = make_adapter(loaded.model, kind="lora", **asked.lora).start(loaded.model, seed=0)
    held = {name: p for name, p in attached.named_parameters() if p.requires_grad}
    walks = _walks()
    update = Update(tuple(walks), (1 / WALKS,) * WALKS)
    batch = batch_of(frame.tokens, loaded.model)
    samples = interleaved(
        {
            "base": partial(forwards, loaded.model, [batch] * 2),
            "inplace": partial(_with_fresh_tensors, held, walks),
            "ours": partial(apply_, params, update, law=asked.law),
        },
        repeats=asked.repeats,
        device=asked.device,
    )
    frame = frame.against(base=median(samples["base"]), inplace=median(samples["inplace"]))
    what = f"{WALKS * STEPS} seeds over {params.dim:,} LoRA parameters"
    yield frame.row("two plain forwards", frame.base)
    yield frame.row(f"{what}, fresh Gaussian tensors", frame.inplace)
    yield frame.row(f"{what}, {asked.law}", median(samples["ours"]))


def _walks() -> list[Walk]:
    return [
        Walk(tuple(derive_seed("replay", walk, step) for step in range(STEPS)), (PUSH,) * STEPS)
        for walk in range(WALKS)
    ]


def _with_fresh_tensors(held: Mapping[str, nn.Parameter], walks: Sequence[Walk]) -> None:
    """Takes each step with new tensors, as who keeps (seed, slope) pairs and has the in-place update would."""
    for walk in walks:
        for seed, coefficient in zip(walk.seeds, walk.coefficients, strict=True):
            update_(held, seed, slope=1.0, rate=-coefficient / len(walks), weight_decay=0.0)
