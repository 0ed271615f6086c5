"""What a curious server learns from scalars: docs/results/leak.jsonl and the tables of docs/privacy.md.

    python scripts/leak.py                       # the parts that are missing in the file; about ten minutes of one core
    python scripts/leak.py --only gradient       # one part: steps | sums | noise | runs | gradient | tokens | smollm2
    python scripts/leak.py --table               # the tables in Markdown

The server follows the protocol. It knows the model, the tasks and so every direction, and it sees replies. Every round
is the first one of a run, by the product's own client code; where a client stands at a step is rebuilt from its reply.
The server computes on the same machine, so what it computes differs from what it sees in the last bits only; a model in
16 bits looks at candidates one by one, since its losses go by what else is in a forward pass.

Membership. Candidates are examples of the same clients, no two with the same tokens. A candidate's score is one of
  alone   the logarithm of the likelihood ratio of the seen slopes with and without it, the other examples being normal
          with the candidates' mean and covariance;
  joint   its part in the best linear explanation of several slopes by all candidates, the members being among them;
  sets    its chance of being in the batch when every set of as many candidates is as likely (up to 4 of 64);
  sign    the seen slope's sign times its own slope: all that one bit per step allows.
A trial is one step (64 candidates, the batch among them), or one round or run (half of the candidates are in it). Its
AUC is the chance that a member scores above a non-member, ties counting half; reported is the mean over trials. `tpr`
is the share of members above what 1 % of non-members exceed, `top` the share of members among as many best scores.

Part "noise": one slope of a batch of given size out of 64 examples, with the noise that makes a run of 128 such steps
(epsilon, 1e-3)-private. Part "runs" holds the model still where it starts. "directions of one batch": slopes of many directions on one batch.
"run, order known": 32 or 128 steps without privacy, whose order of batches the server computes from the seed. "run":
Poisson batches that only the client knows, each of 64 examples with probability 1/4; the slopes of example-level
privacy are made as fl/privacy.py makes them, differences of two losses limited to their median absolute value, with
the sigma that the PLD accountant asks for at delta = 1e-3. `worst` knows all other examples and their coins, as
differential privacy supposes; `bound` is the largest AUC that (epsilon, delta) allows to anyone.

Gradient. The least-norm solution of slopes = directions x gradient, or for full tuning, where directions are far fewer
than parameters and so nearly orthogonal, their mean; its cosine with the gradient by backpropagation; `expected` is
sqrt(directions / parameters). Tokens: which of the tokens that public text has in this role (answer or prompt) are in
the batch, by the estimate's embedding rows: for answers minus the product with the mean hidden state before public
answers, for prompts the row's norm. Tokens of every (answers) or half of all (prompts) public texts do not count.
Score "prior" is the frequency in public text, the best guess without any slope.

Statistics: means over trials with 95 % intervals by the percentile bootstrap over trials, 2,000 resamples. Trials share
model and data set, so intervals speak of these only. Seeds: 0 for run, batches and directions; 1 for candidates, coins,
noise and resamples.
"""

import argparse
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from leak_gradient import gradient_part, tokens_part
from leak_scores import Floats, Row, alone, bound, joint, mean_of, mixed, poisson_scores, split, subset, summary
from leak_world import Look, World, looks, matrix, row_of, smollm2, tiny

from fedmezo.data.batches import Batches
from fedmezo.fl.accountant import sigma_for
from fedmezo.fl.algorithm import Reply, Task
from fedmezo.fl.pool import directions_of
from fedmezo.fl.privacy import noisy_sum
from fedmezo.fl.share import share_of, summed
from fedmezo.fl.walk import walk_of
from fedmezo.zo.perturb import step_

HERE = Path(__file__).resolve().parent.parent
RESULTS = HERE / "docs" / "results" / "leak.jsonl"
CANDIDATES, DELTA, MOST_SETS = 64, 1e-3, 4


def steps_of(world: World, *, rounds: int, most: int, view: str = "single slopes") -> Iterator[Row]:
    """Yields rows on membership in one step's batch."""
    rng, found = np.random.default_rng(1), {}
    for number in range(rounds):
        for seen in looks(world, number):
            for look in seen[:most]:
                for name, scores in _scored(world, look, rng).items():
                    found.setdefault(name, []).append(scores)
    for name, trials in found.items():
        yield row_of(world, view=view, score=name) | summary(trials)


def _scored(world: World, look: Look, rng: np.random.Generator) -> dict[str, tuple[Floats, Floats]]:
    members = list(dict.fromkeys(look.members))
    which = members + world.distinct(members, CANDIDATES - len(members), rng)
    own = world.own(look.params, look.seeds, which, mu=look.task.mu)
    weights = world.weights(which) * world.batch / len(look.members)  # a sum is over several clients' batches
    known = {"weights": weights, "batch": len(look.members), "error": world.error}
    scores = {"alone": alone(look.slopes, own, **known)}
    if len(look.slopes) > 1:
        scores["joint"] = joint(look.slopes, own, **known)
    if 1 < len(look.members) <= MOST_SETS:
        sizes = world.sizes(which)
        scores["sets"] = subset(look.slopes, own, sizes=sizes, batch=len(look.members), error=world.error)
    if len(look.slopes) == 1:
        scores["sign"] = np.sign(look.slopes[0]) * own[:, 0]
    return {name: (score[: len(members)], score[len(members) :]) for name, score in scores.items()}


def rounds_of(world: World, *, rounds: int) -> Iterator[Row]:
    """Yields a row on membership in any batch of a round."""
    rng, trials = np.random.default_rng(1), []
    for number in range(rounds):
        for seen in looks(world, number):
            used = list(dict.fromkeys(at for look in seen for at in look.members))
            inside = rng.permutation(used)[: CANDIDATES // 2].tolist()
            outside = world.distinct(used, len(inside), rng)
            trials.append(_round_scores(world, seen, inside, outside))
    yield row_of(world, view="round of 10 steps", score="alone") | summary(trials)


def _round_scores(world: World, seen: Sequence[Look], inside: list[int], outside: list[int]) -> tuple[Floats, Floats]:
    total = np.full(len(inside) + len(outside), -np.inf)
    for look in seen:
        own = world.own(look.params, look.seeds, inside + outside, mu=look.task.mu)
        known = {"weights": world.weights(inside + outside), "batch": world.batch, "error": world.error}
        total = np.logaddexp(total, alone(look.slopes, own, **known))
    return total[: len(inside)], total[len(inside) :]


def steps_part() -> Iterator[Row]:
    """Yields rows on single slopes, whole rounds and walks written out."""
    for batch in (1, 4, 16):
        world = tiny(batch=batch)
        yield from steps_of(world, rounds=1, most=10)
        yield from rounds_of(world, rounds=1)
    yield walk_row()


def walk_row() -> Row:
    """Returns how well slopes are read off a walk that was written out."""
    world, worst = (
        tiny(batch=1, federation={"transport": "dense", "clients": 4, "local_steps": 10, "batch_size": 1}),
        0.0,
    )
    algorithm = world.built.algorithm
    tasks = algorithm.plan(algorithm.init(), range(4))
    for task, reply in zip(tasks, algorithm.client(tasks, world.built.bench), strict=True):
        if reply.delta is None:
            raise ValueError("A dense reply came without its walk.")
        whole = np.concatenate(
            [reply.delta.tensors[name].double().flatten() for name in world.built.bench.params.names]
        )
        true = np.array(walk_of(task, reply.slopes).coefficients)
        read = np.linalg.lstsq(matrix(world.built.bench.params, directions_of(task).seeds).T, whole, rcond=None)[0]
        worst = max(worst, float(np.abs(read - true).max() / np.abs(true).mean()))
    return row_of(world, view="walk written out") | {"error": worst, "trials": len(tasks)}


def sums_part() -> Iterator[Row]:
    """Yields rows on secret sums over clients, and on what they would tell if clients drew directions of their own."""
    for batch in (1, 4):
        secret = {"shared": True, "clip_at": 50.0}  # as network.secure has it
        yield sums_row(tiny(batch=batch, clients=5, algorithm=secret), rounds=4)
    for pool in (64, 512, 4096):
        yield unshared_row(pool)


def sums_row(world: World, *, rounds: int) -> Row:
    """Returns a row on membership in the batches of all clients, from the mean of their shares."""
    rng, trials = np.random.default_rng(1), []
    for number in range(rounds):
        params = world.built.bench.params.clone()
        for same in zip(*looks(world, number), strict=True):
            replies = [Reply(number, look.task.client, 1, 0.0, tuple(look.slopes.tolist())) for look in same]
            tasks = [replace(look.task, steps=1) for look in same]
            mean = np.mean([share_of(*pair) for pair in zip(tasks, replies, strict=True)], axis=0, dtype=np.float64)
            slopes = np.array(summed(tasks, mean)[1].slopes) / tasks[0].rate
            members = tuple(at for look in same for at in look.members)
            trials.append(_scored(world, Look(tasks[0], params, same[0].seeds, slopes, members), rng)["alone"])
            # The mean of the walks is all that the server can rebuild; clients stand a little beside it.
            step_(params, same[0].seeds[0], coefficient=-tasks[0].rate * float(slopes[0]), law=tasks[0].law)
    return row_of(world, view="secret sum", score="alone") | {"clients": len(same)} | summary(trials)


def unshared_row(pool: int, *, clients: int = 4, steps: int = 30) -> Row:
    """Returns which share of slopes a sum by candidate seeds would show, since the server can compute who draws what."""
    task = Task(0, 0, 0, 1e-3, 1e-3, steps, pool=pool)
    places = [directions_of(replace(task, round=r, client=c)).places for r in range(10) for c in range(clients)]
    rounds = [
        Counter(place for some in places[at : at + clients] for place in some) for at in range(0, 10 * clients, clients)
    ]
    shown = [sum(count == 1 for count in drawn.values()) / (clients * steps) for drawn in rounds]
    mean, low, high = mean_of(shown)
    facts = {"view": "sum by seeds, directions of one's own", "clients": clients, "pool": pool, "trials": len(shown)}
    return facts | {"read": round(mean, 4), "low": round(low, 4), "high": round(high, 4)}


def runs_part() -> Iterator[Row]:
    """Yields rows on membership in a client's data set, with and without privacy."""
    world = tiny(batch=16, clients=1)
    rng = np.random.default_rng(1)
    first = rng.permutation(len(world.examples)).tolist()[:1]
    which = first + world.distinct(first, 159, rng)
    params, task = world.built.bench.params, world.built.algorithm.plan(world.built.algorithm.init(), [0])[0]
    seeds = directions_of(replace(task, steps=128)).seeds
    drops = 2 * task.mu * world.own(params, seeds, which, mu=task.mu).T
    yield from directions_of_a_step(world, drops)
    for steps in (32, 128):
        facts = row_of(world, steps=steps)
        yield facts | {"view": "run, order known", "score": "alone"} | summary(ordered_run(drops[:steps]))
        for epsilon in (math.inf, 8.0, 4.0, 1.0):
            yield from (facts | row for row in private_rows(drops[:steps], epsilon))


def directions_of_a_step(world: World, drops: Floats) -> Iterator[Row]:
    """Yields rows on membership in a batch along which many directions are tried, from [n, examples] slopes of each."""
    rng = np.random.default_rng(1)
    for batch, count in ((batch, count) for batch in (4, 16) for count in (1, 8, 32, 128)):
        found: dict[str, list[tuple[Floats, Floats]]] = {}
        for _ in range(40):
            own = drops[:count, rng.permutation(drops.shape[1])[:CANDIDATES]].T
            known = {"weights": np.full(len(own), 1 / batch), "batch": batch, "error": world.error}
            for name, score in (("alone", alone), ("joint", joint)):
                found.setdefault(name, []).append(split(score(own[:batch].mean(0), own, **known), batch))
        for name, trials in found.items():
            facts = {"view": "directions of one batch", "batch": batch, "directions": count, "score": name}
            yield row_of(world) | facts | summary(trials)


def private_rows(drops: Floats, epsilon: float, *, kept: int = 64, rate: float = 0.25) -> Iterator[Row]:
    """Yields rows on a run of Poisson batches.

    Args:
      drops: [T, examples], difference of the two losses of each step and example.
      epsilon: privacy of the run; inf for no clip and no noise.
      kept: examples in the data set; as many others are candidates too.
      rate: chance of an example to be in a batch.
    """
    private = math.isfinite(epsilon)
    sigma = sigma_for(epsilon, count=len(drops), rate=rate, delta=DELTA) if private else 0.0
    clip = float(np.median(np.abs(drops)))
    clipped = np.clip(drops, -clip, clip) if private else drops
    rng, server, worst = np.random.default_rng(1), [], []
    for _ in range(30):
        drawn = rng.permutation(drops.shape[1])[: 2 * kept]
        own = clipped[:, drawn]
        coins = rng.random((len(drops), kept)) < rate
        limits = {"clip": clip if private else math.inf, "deviation": clip * sigma}
        normals = rng.standard_normal(len(drops)).tolist()
        chosen = [some[coin].tolist() for some, coin in zip(drops[:, drawn[:kept]], coins, strict=True)]
        seen = np.array([noisy_sum(some, normal=one, **limits) for some, one in zip(chosen, normals, strict=True)])
        noises = seen - (own[:, :kept] * coins).sum(1)
        server.append(split(poisson_scores(seen, own, rate=rate, kept=kept, deviation=clip * sigma), kept))
        if private:
            rest = noises[:, None] + np.hstack([own[:, :kept] * coins, np.zeros_like(own[:, kept:])])
            worst.append(split(mixed((own * rest - own**2 / 2) / (clip * sigma) ** 2, rate), kept))
    facts = {"epsilon": epsilon if private else None, "sigma": round(sigma, 3), "view": "run"}
    yield facts | {"score": "alone"} | summary(server)
    if private:
        yield facts | {"score": "worst", "bound": round(bound(epsilon, DELTA), 4)} | summary(worst)


def noise_part() -> Iterator[Row]:
    """Yields rows on membership in one step's batch, from one slope with the noise of a private run of 128 steps."""
    world = tiny(batch=1, clients=1)
    first = [0]
    which = first + world.distinct(first, 127, np.random.default_rng(1))
    task = world.built.algorithm.plan(world.built.algorithm.init(), [0])[0]
    seeds = directions_of(replace(task, steps=20)).seeds
    drops = 2 * task.mu * world.own(world.built.bench.params, seeds, which, mu=task.mu).T
    for batch, epsilon in ((batch, epsilon) for batch in (1, 4, 16) for epsilon in (math.inf, 8.0, 4.0, 1.0)):
        yield row_of(world) | {"batch": batch, "steps": 128} | noisy_row(drops, batch, epsilon)


def noisy_row(drops: Floats, batch: int, epsilon: float) -> Row:
    """Returns a row on slopes of given batches out of 64 examples; arguments as for `private_rows`."""
    private = math.isfinite(epsilon)
    sigma = sigma_for(epsilon, count=128, rate=batch / CANDIDATES, delta=DELTA) if private else 0.0
    clip = float(np.median(np.abs(drops)))
    rng, trials = np.random.default_rng(1), []
    for trial in range(100):
        own = drops[trial % len(drops), rng.permutation(drops.shape[1])[:CANDIDATES]][:, None]
        own = np.clip(own, -clip, clip) if private else own
        deviation = clip * sigma / batch
        seen = own[:batch].mean(0) + deviation * rng.standard_normal(1)
        error = max(3e-5, deviation / math.sqrt(np.mean(own**2)))
        weights = np.full(len(own), 1 / batch)
        trials.append(split(alone(seen, own, weights=weights, batch=batch, error=error), batch))
    facts = {
        "view": "single slope",
        "score": "alone",
        "epsilon": epsilon if private else None,
        "sigma": round(sigma, 3),
    }
    return facts | summary(trials)


def ordered_run(drops: Floats, *, kept: int = 64, batch: int = 16) -> list[tuple[Floats, Floats]]:
    """Returns the scores of a run in which every epoch deals the examples into batches in an order the server knows.

    A candidate is tried at every place of the data set, and scores as at the best one.
    """
    rng, trials = np.random.default_rng(1), []
    for trial in range(30):
        own = drops[:, rng.permutation(drops.shape[1])[: 2 * kept]]
        batches = Batches([list(range(kept))], batch_size=batch, local_steps=len(drops), seed=trial)  # type: ignore[list-item]
        total = np.zeros((kept, 2 * kept))
        for step in range(len(drops)):
            places = list(batches(0, 0, step))
            seen = own[step, places].mean(keepdims=True)
            weights = np.full(2 * kept, 1 / batch)
            total[places] += alone(seen, own[step][:, None], weights=weights, batch=batch, error=3e-5)
        trials.append(split(total.max(0), kept))
    return trials


def smollm2_part() -> Iterator[Row]:
    """Yields rows on single slopes of SmolLM2-135M, whose losses are made of 16-bit logits."""
    yield from steps_of(smollm2(batch=1, steps=6), rounds=1, most=6)


PARTS: dict[str, Callable[[], Iterator[Row]]] = {
    "steps": steps_part,
    "sums": sums_part,
    "noise": noise_part,
    "runs": runs_part,
    "gradient": gradient_part,
    "tokens": tokens_part,
    "smollm2": smollm2_part,
}


def table(rows: Sequence[Row], columns: Sequence[str]) -> str:
    """Returns rows as Markdown; what a row lacks is "-"."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(_told(row.get(column)) for column in columns) + " |" for row in rows]
    return "\n".join(lines)


def _told(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def read(path: Path) -> list[Row]:
    """Returns the rows of a file; none if it is not there."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def main() -> None:
    """Measures what is missing, or prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--only", choices=PARTS)
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    if args.table:
        for part in PARTS:
            rows = [row for row in read(args.out) if row["part"] == part]
            columns = dict.fromkeys(column for row in rows for column in row if column != "part")
            print(f"{part}\n\n{table(rows, list(columns))}\n")
        return
    done = {row["part"] for row in read(args.out)}
    for part in [args.only] if args.only else PARTS:
        if part in done:
            continue
        rows = []
        for row in PARTS[part]():
            rows.append({"part": part} | row)
            print(json.dumps(rows[-1]), flush=True)
        # A part is written when it is whole, so that one that was stopped is measured again.
        with args.out.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    main()
