"""FedAvg: plain torch optimisers as twins, the laws of one round, and what is skipped or refused."""

import math
import weakref
from contextlib import contextmanager, suppress
from dataclasses import replace

import pytest
import torch
from test_models_bench import bench_of
from toys import ToyBench, quadratic_params

from fedmezo.errors import ConfigError, RunError
from fedmezo.fl.aggregate import sample_weights
from fedmezo.fl.algorithm import Point, Reply, Task
from fedmezo.fl.fedavg import Settings, State, descend, fedavg
from fedmezo.fl.fedmezo import Settings as WalkSettings
from fedmezo.fl.fedmezo import fedmezo
from fedmezo.zo.perturb import apply_

CLIENTS = (0, 1, 2)
SETTINGS = Settings(rate=0.05, steps=4)


def loss_of(tensors, client, round, step):
    """Quartic, with an optimum that depends on client and batch, so that neither can be mixed up."""
    place = client + 0.1 * round + 0.03 * step
    return sum(0.5 * ((t - place) ** 2).sum() + 0.01 * (t**4).sum() for t in tensors.values())


class GradientToy(ToyBench):
    """A toy bench with autograd; what it was asked is in `asked`; `spoil` may change a loss and its gradient."""

    def __init__(self, *, spoil=lambda point, loss, gradient: (loss, gradient), **options):
        super().__init__(quadratic_params(), lambda *args: float(loss_of(*args)), **options)
        self.spoil, self.asked = spoil, []

    def gradient(self, point: Point):
        self.asked.append((point.client, point.round, point.step))
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in point.params}
        loss = loss_of(leaves, point.client, point.round, point.step)
        gradient = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
        return self.spoil(point, loss.item(), gradient)

    def losses(self, points):
        self.asked += [(point.client, point.round, point.step) for point in points]
        return super().losses(points)


def play(settings, *, rounds=1, bench=None, clients=CLIENTS, cohort=None, seed=5, **options):
    """Runs rounds in the plainest way; returns (params, state, replies per round)."""
    bench = bench or GradientToy()
    algorithm = fedavg(settings, seed=seed, cohort=cohort or len(clients), **options)
    state, history = algorithm.init(), []
    for _ in range(rounds):
        tasks = algorithm.plan(state, clients)
        replies = algorithm.client(tasks, bench)
        state, update = algorithm.aggregate(state, tasks, replies)
        apply_(bench.params, update, law="gaussian")
        history.append(replies)
    return bench.params, state, history


def twin(make, *, client, round=0, steps=4, start=None, left_out=()):
    """The parameters and losses after `steps` steps of the optimiser that `make` makes, in plain torch."""
    leaves = {name: t.detach().clone().requires_grad_() for name, t in (start or quadratic_params())}
    optimizer, losses = make(list(leaves.values())), []
    for step in range(steps):
        if step in left_out:
            continue
        optimizer.zero_grad()
        loss = loss_of(leaves, client, round, step)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return {name: tensor.detach() for name, tensor in leaves.items()}, losses


def assert_close(got, wanted, *, tolerance=3e-7):
    for name, tensor in got:
        assert torch.allclose(tensor, wanted[name], rtol=tolerance, atol=tolerance), name


@pytest.mark.parametrize(("momentum", "decay"), [(0.0, 0.0), (0.9, 0.0), (0.0, 0.1), (0.5, 0.2)])
def test_one_client_is_plain_sgd_to_rounding(momentum, decay):
    """SGD by hand: v <- momentum v + g + decay w, w <- w - rate v."""
    settings = replace(SETTINGS, momentum=momentum, weight_decay=decay)
    got, _, _ = play(settings, clients=(2,))
    leaves = {name: t.double() for name, t in quadratic_params()}
    speed = {name: torch.zeros_like(t) for name, t in leaves.items()}
    for step in range(4):
        for name, t in leaves.items():
            slope = (t - (2 + 0.03 * step)) + 0.04 * t**3
            speed[name] = momentum * speed[name] + slope + decay * t
            leaves[name] = t - 0.05 * speed[name]
    assert_close(got, {name: t.float() for name, t in leaves.items()}, tolerance=1e-6)


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_one_client_is_torchs_adamw_to_rounding(decay):
    settings = replace(SETTINGS, optimizer="adamw", weight_decay=decay)
    got, _, _ = play(settings, clients=(2,))
    wanted, _ = twin(lambda ts: torch.optim.AdamW(ts, lr=0.05, weight_decay=decay), client=2)
    assert_close(got, wanted)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_optimiser_starts_anew_every_round(optimizer):
    settings = replace(SETTINGS, optimizer=optimizer, momentum=0.9 if optimizer == "sgd" else 0.0)
    got, _, _ = play(settings, rounds=3, clients=(1,))
    made = {
        "sgd": lambda ts: torch.optim.SGD(ts, lr=0.05, momentum=0.9),
        "adamw": lambda ts: torch.optim.AdamW(ts, lr=0.05, weight_decay=0),
    }[optimizer]
    wanted = dict(quadratic_params())
    for number in range(3):
        wanted, _ = twin(made, client=1, round=number, start=list(wanted.items()))
    assert_close(got, wanted, tolerance=1e-6)


@pytest.mark.parametrize("weights", [None, sample_weights])
def test_mean_of_deltas_is_mean_of_models(weights):
    class Uneven(GradientToy):
        def examples(self, client, round, step):
            return client + 1

    options = {} if weights is None else {"weights": weights}
    got, _, _ = play(SETTINGS, bench=Uneven(), **options)
    ends = [twin(lambda ts: torch.optim.SGD(ts, lr=0.05), client=client)[0] for client in CLIENTS]
    shares = [1 / 3] * 3 if weights is None else [1 / 6, 2 / 6, 3 / 6]
    wanted = {name: sum(share * end[name] for share, end in zip(shares, ends, strict=True)) for name in ends[0]}
    assert_close(got, wanted, tolerance=5e-7)


def test_a_reply_says_the_change_the_mean_loss_and_the_examples():
    bench = GradientToy(batch=3)
    _, _, ((reply,),) = play(SETTINGS, bench=bench, clients=(1,))
    end, losses = twin(lambda ts: torch.optim.SGD(ts, lr=0.05), client=1)
    start = quadratic_params()
    assert reply.loss == pytest.approx(sum(losses) / 4, rel=1e-6)
    assert (reply.examples, reply.slopes, reply.skipped) == (12, (), 0)
    assert_close(reply.delta.tensors.items(), {name: end[name] - start[name] for name in end})


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_step_that_is_not_finite_is_skipped_and_not_counted(what, value):
    def spoil(point, loss, gradient):
        if point.step != 1 or point.client != 1:
            return loss, gradient
        if what == "loss":
            return value, gradient
        gradient["b"][0, 0] = value
        return loss, gradient

    _, _, ((sound, reply),) = play(
        replace(SETTINGS, momentum=0.5), bench=GradientToy(spoil=spoil, batch=2), clients=(0, 1)
    )
    make = lambda ts: torch.optim.SGD(ts, lr=0.05, momentum=0.5)  # noqa: E731
    end, losses = twin(make, client=1, left_out=(1,))
    assert (sound.examples, reply.examples) == (8, 6)
    assert reply.loss == pytest.approx(sum(losses) / 3, rel=1e-6)
    start = quadratic_params()
    assert_close(reply.delta.tensors.items(), {name: end[name] - start[name] for name in end})


def test_a_client_whose_every_step_is_skipped_changes_nothing():
    bench = GradientToy(spoil=lambda point, loss, gradient: (math.nan, gradient))
    got, state, ((reply,),) = play(replace(SETTINGS, weight_decay=0.5), bench=bench, clients=(1,))
    assert math.isnan(reply.loss) and reply.examples == 0 and state.round == 1
    assert not any(tensor.any() for tensor in reply.delta.tensors.values())
    assert got.digest() == quadratic_params().digest()


@pytest.mark.parametrize(
    ("decay", "factors"),
    [("constant", [1, 1, 1, 1]), ("linear", [1, 0.75, 0.5, 0.25]), ("cosine", [1, 0.8535534, 0.5, 0.1464466])],
)
def test_the_rate_decays_over_the_rounds(decay, factors):
    algorithm = fedavg(replace(SETTINGS, decay=decay, rounds=4), seed=1, cohort=1)
    rates = [algorithm.plan(State(round=number), (0,))[0].rate for number in range(4)]
    assert rates == pytest.approx([0.05 * factor for factor in factors], rel=1e-6)


def test_slow_down_and_the_clients_own_rate_multiply():
    algorithm = fedavg(SETTINGS, seed=1, cohort=2)
    state = algorithm.slow_down(algorithm.slow_down(replace(algorithm.init(), round=1), 0.5), 0.5)
    own = algorithm.with_factors(state, {0: 2.0, 3: 5.0})
    assert [task.rate for task in algorithm.plan(own, (0, 3))] == pytest.approx([0.025, 0.0625])
    assert algorithm.aggregate(state, algorithm.plan(state, (0, 1)), [])[0] == State(round=2, slowed=0.25)


def test_a_task_carries_every_setting():
    settings = Settings(0.1, 7, momentum=0.4, weight_decay=0.2)
    (task,) = fedavg(settings, seed=9, cohort=1).plan(State(round=3), (6,))
    got = (task.round, task.client, task.seed, task.rate, task.steps, task.method, task.momentum, task.weight_decay)
    assert got == (3, 6, 9, 0.1, 7, "sgd", 0.4, 0.2)
    assert fedavg(replace(SETTINGS, optimizer="adamw"), seed=9, cohort=1).plan(State(), (6,))[0].method == "adamw"


def test_cohorts_and_batches_are_fedmezos():
    mine, theirs = (GradientToy(capacity=1) for _ in range(2))
    descent, walk = fedavg(SETTINGS, seed=3, cohort=2), fedmezo(WalkSettings(rate=0.01, steps=4), seed=3, cohort=2)
    for number in range(6):
        descent.client(descent.plan(State(round=number), range(7)), mine)
        walk.client(walk.plan(replace(walk.init(), round=number), range(7)), theirs)
    assert mine.asked == theirs.asked[::2]  # a walk looks at each batch twice
    assert len(set(mine.asked)) == 6 * 2 * 4
    other = fedavg(SETTINGS, seed=4, cohort=2)
    drawn = [[t.client for t in a.plan(State(round=r), range(7))] for a in (descent, other) for r in range(6)]
    assert drawn[:6] != drawn[6:]


def test_a_round_does_not_depend_on_the_order_of_replies():
    algorithm = fedavg(SETTINGS, seed=1, cohort=3, weights=sample_weights)
    tasks = algorithm.plan(State(), CLIENTS)
    replies = algorithm.client(tasks, GradientToy())
    _, forth = algorithm.aggregate(State(), tasks, replies)
    _, back = algorithm.aggregate(State(), tasks[::-1], replies[::-1])
    assert [id(part) for part in forth.parts] == [id(part) for part in back.parts] and forth.weights == back.weights


class Watched(GradientToy):
    """Remembers the copies it lent, where gradients were asked, and whether the last gradient was let go by then."""

    def __init__(self, **options):
        super().__init__(**options)
        self.lent, self.used, self.alive, self._last = [], [], 0, []

    @contextmanager
    def open(self, count):
        with super().open(count) as copies:
            self.lent += copies
            yield copies

    def gradient(self, point):
        self.alive = max(self.alive, sum(reference() is not None for reference in self._last))
        self.used.append(point.params)
        loss, gradient = super().gradient(point)
        self._last = [weakref.ref(tensor) for tensor in gradient.values()]
        return loss, gradient


def test_many_clients_walk_one_after_another_on_lent_copies():
    bench = Watched(capacity=1)
    before = bench.params.digest()
    algorithm = fedavg(SETTINGS, seed=1, cohort=3)
    assert [reply.client for reply in algorithm.client(algorithm.plan(State(), CLIENTS), bench)] == [0, 1, 2]
    assert bench.params.digest() == before
    assert len(bench.lent) == 3
    assert [id(params) for params in bench.used] == [id(params) for params in bench.lent for _ in range(4)]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_one_gradient_is_in_memory_at_a_time(optimizer):
    bench = Watched()
    play(replace(SETTINGS, optimizer=optimizer), bench=bench)
    assert bench.alive == 0


def test_no_gradient_is_left_on_a_copy_even_after_an_error(monkeypatch):
    for _ in range(2):
        bench = Watched()
        with suppress(KeyError):
            play(SETTINGS, bench=bench)
        assert not any(t.grad is not None or t.requires_grad for p in (bench.params, *bench.lent) for _, t in p)
        monkeypatch.setattr(torch.optim.SGD, "step", lambda *_: {}["missing"])
    assert len(bench.lent) == 1


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_on_a_model_the_reply_is_the_walk_and_every_bit_is_put_back(kind, optimizer):
    bench = bench_of("qwen2", kind)
    before, start = bench.params.digest(), {name: t.clone() for name, t in bench.params}
    (reply,) = descend([Task(0, 1, 5, 0.01, 1e-3, 1, method=optimizer)], bench)
    loss, gradient = bench.gradient(Point(bench.params, 0, 0.0, 1, 0, 0))
    assert bench.params.digest() == before and reply.loss == loss and reply.examples == 2
    leaves = {name: t.requires_grad_() for name, t in start.items()}
    made = torch.optim.SGD if optimizer == "sgd" else torch.optim.AdamW
    optimizer = made(list(leaves.values()), lr=0.01, weight_decay=0)
    for name, leaf in leaves.items():
        leaf.grad = gradient[name]
    optimizer.step()
    for name, tensor in bench.params:
        assert torch.equal(reply.delta.tensors[name], leaves[name].detach() - tensor)
    assert not any(t.grad is not None or t.requires_grad for _, t in bench.params)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_rounds_lower_the_loss_of_a_model(kind):
    bench = bench_of("llama", kind)
    algorithm = fedavg(Settings(0.1 if kind == "lora" else 0.02, 4), seed=0, cohort=2)
    state, losses = algorithm.init(), []
    for _ in range(3):
        tasks = algorithm.plan(state, (0, 1))
        replies = algorithm.client(tasks, bench)
        state, update = algorithm.aggregate(state, tasks, replies)
        apply_(bench.params, update, law="gaussian")
        losses.append(sum(reply.loss for reply in replies))
    assert losses[2] < losses[1] < losses[0] - 0.05


def test_replies_that_do_not_fit_are_refused():
    algorithm = fedavg(SETTINGS, seed=1, cohort=1)
    tasks = algorithm.plan(State(), (0,))
    with pytest.raises(RunError, match="no change"):
        algorithm.aggregate(State(), tasks, [Reply(0, 0, 1, 1.0, ())])
    (reply,) = algorithm.client(tasks, GradientToy())
    for wrong in (replace(reply, round=1), replace(reply, slopes=(1.0,))):
        with pytest.raises(RunError, match="Round 0"):
            algorithm.aggregate(State(), tasks, [wrong])
    with pytest.raises(RunError, match="twice"):
        algorithm.aggregate(State(), tasks, [reply, reply])
    with pytest.raises(RunError, match="client 0 replied, and there is no task"):
        algorithm.aggregate(State(), [], [reply])


def test_tasks_and_settings_that_do_not_fit_are_refused():
    with pytest.raises(RunError, match="walk"):
        descend([Task(0, 0, 1, 0.1, 1e-3, 1)], GradientToy())
    with pytest.raises(ConfigError, match=r"algorithm\.momentum"):
        replace(SETTINGS, optimizer="adamw", momentum=0.9)
