"""FedMeZO by its pseudocode in numpy float64: slow, readable, shares only the names of the directions with the library.

It follows sections 2.1 and 2.2 of the method as written: broadcast, H two-point steps in place, average the models.
"""

import numpy as np

from fedmezo.zo.noise import derive_seed, noise


def z(seed: int, shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    return {
        name: noise(seed, name, size=int(np.prod(shape))).numpy().astype(np.float64).reshape(shape)
        for name, shape in shapes.items()
    }


def client_walk(theta, loss, *, client, round_number, run_seed, rate, mu, steps, directions, limit):
    """Returns theta after H steps and the raw slopes; `limit(slopes so far)` gives the clip."""
    shapes = {name: value.shape for name, value in theta.items()}
    theta = {name: value.copy() for name, value in theta.items()}
    slopes = []
    for k in range(steps):
        moves = []
        for n in range(directions):
            direction = z(derive_seed("direction", run_seed, round_number, client, k, n), shapes)
            above = loss({name: theta[name] + mu * direction[name] for name in theta}, client, round_number, k)
            below = loss({name: theta[name] - mu * direction[name] for name in theta}, client, round_number, k)
            slopes.append((above - below) / (2 * mu))
            moves.append((direction, np.clip(slopes[-1], -limit(slopes), limit(slopes))))
        for direction, slope in moves:
            theta = {name: theta[name] - rate * slope / directions * direction[name] for name in theta}
    return theta, slopes


def fedmezo(theta, loss, *, rounds, clients, run_seed, rate, mu, steps, directions=1, clip=np.inf):
    """Returns the global model after every round: full participation, uniform weights, constant rate."""
    trajectory, scale, lowest = [], 0.0, np.inf
    for round_number in range(rounds):

        def limit(seen, scale=scale):
            if np.isinf(clip):
                return np.inf
            known = scale if scale else 1.4826 * np.median(np.abs(seen))
            return clip * known

        results = [
            client_walk(
                theta, loss, client=c, round_number=round_number, run_seed=run_seed, rate=rate, mu=mu, steps=steps,
                directions=directions, limit=limit,
            )
            for c in clients
        ]  # fmt: skip
        theta = {name: sum(result[0][name] for result in results) / len(clients) for name in theta}
        seen = 1.4826 * np.median(np.abs([slope for result in results for slope in result[1]]))
        scale = min(np.clip(seen, 0.9 * scale, 1.02 * scale), 4 * lowest) if scale else seen
        lowest = min(lowest, scale)
        trajectory.append(theta)
    return trajectory


def pool_places(run_seed, round_number, client, steps, chances):
    """Returns the pool places a client draws: the inverse of the cumulative chances at named uniform numbers."""
    uniform = [derive_seed("draw", run_seed, round_number, client, k, 0) / 2**64 for k in range(steps)]
    return np.searchsorted(np.cumsum(chances), uniform, side="right")


def pro_chances(history, *, score_clip=1000.0):
    """Returns FedKSeed-Pro's probabilities from each candidate's list of slopes, as the paper's section on it says."""
    scores = np.array([np.mean([abs(np.clip(g, -score_clip, score_clip)) for g in seen]) for seen in history])
    scaled = (scores - scores.min()) / (scores.max() - scores.min() + 1e-10)
    return np.exp(scaled) / np.exp(scaled).sum()


def fedkseed(theta0, loss, *, rounds, clients, run_seed, rate, mu, steps, pool, pro=False):
    """Returns (the model after every round, the accumulators of slopes, the history of every candidate).

    The model is rebuilt from the accumulators every round: w = w0 - rate * sum_j a_j z(s_j).
    """
    shapes = {name: value.shape for name, value in theta0.items()}
    directions = [z(derive_seed("pool", run_seed, j), shapes) for j in range(pool)]
    accumulators, history, trajectory = np.zeros(pool), [[0.0] for _ in range(pool)], []
    model = theta0
    for round_number in range(rounds):
        chances = pro_chances(history) if pro else np.full(pool, 1 / pool)
        gathered, seen = np.zeros(pool), []
        for client in clients:
            here = {name: value.copy() for name, value in model.items()}
            for k, j in enumerate(pool_places(run_seed, round_number, client, steps, chances)):
                above = loss({n: here[n] + mu * directions[j][n] for n in here}, client, round_number, k)
                below = loss({n: here[n] - mu * directions[j][n] for n in here}, client, round_number, k)
                slope = (above - below) / (2 * mu)
                here = {n: here[n] - rate * slope * directions[j][n] for n in here}
                gathered[j] += slope / len(clients)
                seen.append((j, slope))
        accumulators += gathered
        for j, slope in seen:
            history[j].append(slope)
        model = {
            n: theta0[n] - rate * sum(a * d[n] for a, d in zip(accumulators, directions, strict=True)) for n in theta0
        }
        trajectory.append(model)
    return trajectory, accumulators, history
