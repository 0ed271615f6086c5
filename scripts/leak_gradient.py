"""Gradients and tokens from slopes, for leak.py."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from leak_scores import Floats, Row, cosine, mean_of, summary
from leak_world import World, matrix, row_of, tiny

from fedmezo.data.prompt import Example
from fedmezo.fl.algorithm import Point
from fedmezo.fl.pool import directions_of
from fedmezo.zo.noise import noise


def many_slopes(world: World, count: int, round_number: int) -> tuple[tuple[int, ...], Floats, dict[str, torch.Tensor]]:
    """Returns directions, a client's slopes along them on its first batch of a round, and the true gradient there."""
    algorithm, bench = world.built.algorithm, world.built.bench
    planned = algorithm.plan(algorithm.init(), [0])[0]
    task = replace(planned, steps=1, directions=count, round=round_number, clip=math.inf)
    slopes = algorithm.client([task], bench)[0].slopes
    truth = bench.gradient(Point(bench.params, 0, 0.0, 0, round_number, 0))[1]
    return directions_of(task).seeds, np.array(slopes), truth


def gradient_part() -> Iterator[Row]:
    """Yields rows on the gradient of a small LoRA adapter, from a few directions to more than parameters."""
    world = tiny(batch=1, clients=1, adapter={"rank": 1, "targets": ["q_proj"]})
    params, found = world.built.bench.params, {}
    for trial in range(3):
        seeds, slopes, truth = many_slopes(world, 3 * params.dim // 2, trial)
        rows, target = matrix(params, seeds), torch.cat([truth[n].flatten() for n in params.names]).double().numpy()
        for share in (1 / 128, 1 / 32, 1 / 8, 1 / 2, 3 / 4, 1, 3 / 2):
            count = round(share * params.dim)
            solved = np.linalg.lstsq(rows[:count], slopes[:count], rcond=None)[0]
            found.setdefault(count, []).append(cosine(solved, target))
    for count, cosines in found.items():
        yield _gradient_row(world, count, cosines)


def _gradient_row(world: World, count: int, cosines: Sequence[float]) -> Row:
    mean, low, high = (round(number, 4) for number in mean_of(cosines))
    dim = world.built.bench.params.dim
    facts = row_of(world, view="gradient") | {"directions": count, "parameters": dim, "trials": len(cosines)}
    return facts | {"cosine": mean, "low": low, "high": high, "expected": round(min(1.0, math.sqrt(count / dim)), 4)}


COUNTS = (1, 10, 30, 100, 500)


def tokens_part() -> Iterator[Row]:
    """Yields rows on the tokens of a batch, from the embedding rows of a whole model's gradient."""
    world = tiny(batch=1, clients=1, adapter={"kind": "full"})
    hidden, found, cosines = public_state(world), {}, {}
    for trial in range(8):
        seeds, slopes, truth = many_slopes(world, COUNTS[-1], trial)
        table, measured = estimates(world, seeds, slopes, truth)
        for count, value in measured.items():
            cosines.setdefault(count, []).append(value)
        for key, scores in _token_scores(world, table, hidden, trial).items():
            found.setdefault(key, []).append(scores)
    for count, values in cosines.items():
        yield _gradient_row(world, count, values)
    for (role, source), trials in found.items():
        facts = row_of(world, view=f"tokens of the {role}", score=str(source))
        yield facts | {"directions": source if isinstance(source, int) else None} | summary(trials)


def _embedding(world: World) -> str:
    weight = world.built.loaded.model.get_input_embeddings().weight
    return next(name for name, tensor in world.built.loaded.model.named_parameters() if tensor is weight)


def estimates(
    world: World, seeds: Sequence[int], slopes: Floats, truth: dict[str, torch.Tensor]
) -> tuple[dict[int | str, Floats], dict[int, float]]:
    """Returns the estimated rows of the embedding, by number of slopes or "backpropagation", and the cosines."""
    params, name = world.built.bench.params, _embedding(world)
    total = {tensor: torch.zeros(value.numel()) for tensor, value in params}
    table: dict[int | str, Floats] = {"backpropagation": truth[name].double().numpy()}
    cosines: dict[int, float] = {}
    for number, (seed, slope) in enumerate(zip(seeds, slopes.tolist(), strict=True), start=1):
        for tensor, some in total.items():
            some.add_(noise(seed, tensor, size=len(some)), alpha=slope)
        if number in COUNTS:
            table[number] = total[name].view_as(params[name]).double().numpy() / number
            both = (torch.cat([side[n].flatten() for n in params.names]).double().numpy() for side in (total, truth))
            cosines[number] = cosine(*both)
    return table, cosines


def public_state(world: World) -> Floats:
    """Returns the mean hidden state of the untuned model before an answer token of public text."""
    model, states = world.built.loaded.model, []
    with torch.no_grad():
        for example in world.built.data.evaluation["eval"]:
            row = example.rows[0]
            output = model(input_ids=torch.tensor([row.ids]), output_hidden_states=True)
            states.append(output.hidden_states[-1][0, row.start - 1 : -1])
    return torch.cat(states).double().mean(0).numpy()


def _token_scores(
    world: World, table: dict[int | str, Floats], hidden: Floats, trial: int
) -> dict[tuple[str, int | str], tuple[Floats, Floats]]:
    examples = world.examples
    batch = [examples[at] for at in world.batches(0, trial, 0)]  # type: ignore[call-overload]
    found: dict[tuple[str, int | str], tuple[Floats, Floats]] = {}
    for role, most in (("answer", 1.0), ("prompt", 0.5)):
        public = Counter(token for one in world.built.data.evaluation["eval"] for token in tokens(one, role))
        common = {token for token, count in public.items() if count >= most * len(world.built.data.evaluation["eval"])}
        inside = sorted({token for one in batch for token in tokens(one, role)} - common)
        outside = sorted(set(public) - set(inside) - common)
        if not inside:
            continue
        for source, rows in table.items():
            scores = -rows @ hidden if role == "answer" else np.linalg.norm(rows, axis=1)
            found[role, source] = scores[inside], scores[outside]
        prior = np.array([public[token] for token in range(len(table["backpropagation"]))], float)
        found[role, "prior"] = prior[inside], prior[outside]
    return found


def tokens(example: Example, role: str) -> set[int]:
    """Returns the tokens of an example's answer or prompt."""
    row = example.rows[0]
    return set(row.ids[row.start :] if role == "answer" else row.ids[: row.start])
