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
