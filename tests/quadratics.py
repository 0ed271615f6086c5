"""Federated quadratics whose every expectation is known exactly, to hold bounds against.

Client i's loss is f_i(x) = x' A_i x / 2 - b_i' x. A mini-batch multiplies it by 1 + a or 1 - a and adds noise' x, so
E|grad F_i|^2 = (1 + a^2) |grad f_i|^2 + tr(noise covariance): Assumption 4 with equality. Directions are Gaussian or
uniform on the sphere of radius sqrt(d). The two-point slope is exact on quadratics, so an estimate is z z' grad F, and
the first two moments of the weights after any number of steps follow from a linear recursion: nothing is sampled.
"""

import math
from dataclasses import dataclass

import numpy as np

from fedmezo.theory.constants import Constants


@dataclass(frozen=True)
class Federation:
    """N quadratic clients: curvatures (N, d, d), pulls (N, d), batch factor a, noise variance per coordinate."""

    curvatures: np.ndarray
    pulls: np.ndarray
    wobble: float = 0.0
    noise: float = 0.0

    @property
    def curvature(self):
        return self.curvatures.mean(0)

    @property
    def pull(self):
        return self.pulls.mean(0)

    @property
    def optimum(self):
        return np.linalg.solve(self.curvature, self.pull)

    def value(self, x):
        return float(x @ self.curvature @ x / 2 - self.pull @ x)

    def gap(self, x):
        away = x - self.optimum
        return float(away @ self.curvature @ away / 2)

    def constants(self):
        """The smallest constants that are simple to prove, from grad f_i - grad f = D_i inv(A) grad f + rest_i."""
        mean, inverse = self.curvature, np.linalg.inv(self.curvature)
        tilts = np.stack([(own - mean) @ inverse for own in self.curvatures])
        rests = np.stack([tilt @ self.pull - (own - self.pull) for tilt, own in zip(tilts, self.pulls, strict=True)])
        tilt = max(np.linalg.norm(t, 2) for t in tilts) ** 2
        rest = max(r @ r for r in rests)
        both = 2 if tilt > 1e-12 and rest > 1e-12 else 1
        largest = np.linalg.norm(mean, 2)
        return Constants(
            dim=len(self.pull),
            effective_rank=max(1.0, float(np.trace(mean) / largest)),
            smoothness=(1 + self.wobble) * float(max(np.linalg.norm(own, 2) for own in self.curvatures)),
            c_g=1 + self.wobble**2,
            sigma_g2=self.noise * len(self.pull),
            c_h=both * float(tilt),
            sigma_h2=both * float(rest),
        )


def random_federation(seed, *, dim, clients, spread=0.0, tilt=0.0, wobble=0.0, noise=0.0):
    """Returns a federation whose pulls differ by about `spread` and curvatures by about `tilt`, and a start."""
    rng = np.random.default_rng(seed)
    turn, _ = np.linalg.qr(rng.normal(size=(dim, dim)))
    mean = turn @ np.diag(10 ** rng.uniform(-1, 0.5, dim)) @ turn.T
    tilts = rng.normal(size=(clients, dim, dim)) * tilt
    tilts = (tilts + tilts.transpose(0, 2, 1)) / 2
    pulls = rng.normal(size=(clients, dim)) * spread
    federation = Federation(mean + tilts - tilts.mean(0), pulls, wobble, noise)
    return federation, federation.optimum + rng.normal(size=dim) * 10 ** rng.uniform(-2, 0.5)


def estimate_moment(gradient_moment, *, directions, kind):
    """Returns E[e e'] from E[g g'] for e = (1/n) sum_j z_j z_j' g."""
    dim = gradient_moment.shape[-1]
    trace = np.trace(gradient_moment, axis1=-2, axis2=-1)[..., None, None]
    alone = 2 * gradient_moment + trace * np.eye(dim)
    alone = alone * (dim / (dim + 2)) if kind == "sphere" else alone
    return alone / directions + gradient_moment * (1 - 1 / directions)


def trajectory(federation, start, *, rate, steps, rounds, directions=1, kind="gaussian"):
    """Returns E f and E|grad f|^2 at the start of each round and after the last: two arrays of rounds + 1."""
    matrix, pull = federation.curvature, federation.pull
    mean, moment = start.copy(), np.outer(start, start)
    losses, squares = [], []
    for t in range(rounds + 1):
        losses.append(np.trace(matrix @ moment) / 2 - pull @ mean)
        squares.append(np.trace(matrix @ moment @ matrix) - 2 * pull @ matrix @ mean + pull @ pull)
        if t < rounds:
            mean, moment = _round(federation, mean, moment, rate=rate, steps=steps, directions=directions, kind=kind)
    return np.array(losses), np.maximum(squares, 0)


def _round(federation, mean, moment, *, rate, steps, directions, kind):
    """Returns the server's mean and second moment after a round.

    Given the round's start, clients are independent, and each one's mean is affine in it: P_i start + q_i.
    """
    own, pulls = federation.curvatures, federation.pulls
    clients, dim = pulls.shape
    shrink = np.eye(dim) - rate * own
    factors, offsets = np.broadcast_to(np.eye(dim), own.shape), np.zeros((clients, dim))
    means, moments = np.broadcast_to(mean, pulls.shape), np.broadcast_to(moment, own.shape)
    for _ in range(steps):
        moments = own_step(federation, means, moments, rate=rate, directions=directions, kind=kind)
        factors, offsets = shrink @ factors, (shrink @ offsets[..., None])[..., 0] + rate * pulls
        means = (factors @ mean) + offsets
    # The mean over pairs i != j of E[x_i x_j'], as all pairs of conditional means less the pairs i = i.
    whole, lift = factors.mean(0), offsets.mean(0)
    pairs = _affine(whole, lift, mean, moment)
    alike = sum(_affine(f, o, mean, moment) for f, o in zip(factors, offsets, strict=True)) / clients
    return means.mean(0), pairs + (moments.mean(0) - alike) / clients


def _affine(factor, offset, mean, moment):
    cross = np.outer(factor @ mean, offset)
    return factor @ moment @ factor.T + cross + cross.T + np.outer(offset, offset)


def own_step(federation, means, moments, *, rate, directions, kind):
    """Returns each client's E[x x'] after one step x - rate e."""
    own, pulls = federation.curvatures, federation.pulls
    drag = moments @ own - means[:, :, None] * pulls[:, None, :]  # E[x grad f_i']
    across = own @ means[..., None] * pulls[:, None, :]
    moment = own @ moments @ own - across - across.transpose(0, 2, 1) + pulls[:, :, None] * pulls[:, None, :]
    moment = (1 + federation.wobble**2) * moment + federation.noise * np.eye(pulls.shape[1])
    squared = estimate_moment(moment, directions=directions, kind=kind)
    return moments - rate * (drag + drag.transpose(0, 2, 1)) + rate**2 * squared


def sampled(federation, start, *, rate, steps, rounds, runs, seed):
    """Returns f at the end of each of `runs` sampled runs: the same process, step by step, with Gaussian directions."""
    rng = np.random.default_rng(seed)
    x = np.tile(start, (runs, 1))
    for _ in range(rounds):
        ends = []
        for own, pull in zip(federation.curvatures, federation.pulls, strict=True):
            walk = x.copy()
            for _ in range(steps):
                sign = rng.choice([-1.0, 1.0], size=(runs, 1))
                gradient = (1 + federation.wobble * sign) * (walk @ own - pull)
                gradient += math.sqrt(federation.noise) * rng.normal(size=walk.shape)
                z = rng.normal(size=walk.shape)
                walk -= rate * (z * gradient).sum(1, keepdims=True) * z
            ends.append(walk)
        x = np.mean(ends, axis=0)
    return ((x @ federation.curvature) * x).sum(1) / 2 - x @ federation.pull


def directions_of(kind, dim=3):
    """Returns weights (m,) and directions (m, 3) that average polynomials of degree <= 5 exactly."""
    if kind == "sphere":  # an icosahedron's corners
        golden = (1 + math.sqrt(5)) / 2
        corners = [np.roll((0, a, b * golden), k) for k in range(3) for a in (-1, 1) for b in (-1, 1)]
        points = np.array(corners) * math.sqrt(3 / (1 + golden**2))
        return np.full(12, 1 / 12), points
    nodes, weights = np.array([-math.sqrt(3), 0.0, math.sqrt(3)]), np.array([1 / 6, 2 / 3, 1 / 6])
    grid = np.stack(np.meshgrid(*[nodes] * dim, indexing="ij"), -1).reshape(-1, dim)
    shares = np.stack(np.meshgrid(*[weights] * dim, indexing="ij"), -1).reshape(-1, dim)
    return shares.prod(1), grid
