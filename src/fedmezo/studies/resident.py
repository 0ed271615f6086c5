"""A client's side of a run over a network: one model and one client's data, kept in memory between rounds.

    resident = build_resident(ClientOptions(client=0))
    answer = resident.answer(request)      # bytes to bytes; see runtime/calls.py

What it trains on is its share of the run's data, dealt as in a simulation, or, with `own`, all of its own file, which
no server ever sees. It loads the model when the first hello says which, and walks when a task comes whose model it has.
"""

import json
import math
import secrets
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from fedmezo import __version__
from fedmezo.errors import ConfigError, FedMeZOError, ModelError, RunError
from fedmezo.fl.algorithm import Task
from fedmezo.fl.share import share_of
from fedmezo.models.bench import ModelBench
from fedmezo.runtime.calls import (
    PROTOCOL,
    Addend,
    Answer,
    Behind,
    Done,
    Hello,
    Noted,
    Refused,
    Share,
    Stranger,
    Walk,
    Welcome,
    check_of,
    decode_request,
    encode_answer,
)
from fedmezo.runtime.pull import catch_up_
from fedmezo.runtime.walkers import Client, walk
from fedmezo.runtime.wire import WIRE_VERSION, Sums, Told, Values, decode_task, encode_reply
from fedmezo.studies.build import build_model, load_base
from fedmezo.studies.config import Config, parse_config, with_changes
from fedmezo.studies.consent import refuse_unasked
from fedmezo.studies.deal import read_data, read_own
from fedmezo.studies.descent import build_algorithm
from fedmezo.studies.kept import Held, keep, kept
from fedmezo.studies.spent import Spent
from fedmezo.zo.noise import NOISE_VERSION, Law
from fedmezo.zo.params import Params, Saved
from fedmezo.zo.seedsum import DenseDelta

__all__ = ["ClientOptions", "Resident", "build_resident"]

Say = Callable[[str], None]
# Of two models that transformers loads at once in threads of one process, one may lack its tied weights.
_BUILDING = threading.Lock()
# What the person at a client may set: where things are, and what this machine is. All else is the run's.
_OWN = ("data", "runtime")
_ALSO = ("model.name", "adapter.start", "privacy.epsilon")


@dataclass(frozen=True)
class ClientOptions:
    """What a client was started with.

    Attributes:
      client: its stable number.
      state: folder that keeps its model between starts; None keeps nothing.
      settings: `a.b=c` changes to the server's configuration: data, runtime, model.name, adapter.start and
        privacy.epsilon only; the last is what this client will spend at most, over all private runs its state folder
        knows; it takes part in no other ones then.
      own: whether all of its data is its own, instead of a share of the run's.
      threads: CPU threads; None leaves the choice to the configuration.
      trusting: whether the server may name any model and any file of this machine.
    """

    client: int
    state: Path | None = None
    settings: tuple[str, ...] = ()
    own: bool = False
    threads: int | None = None
    trusting: bool = False


def build_resident(asked: ClientOptions, *, say: Say = lambda _: None) -> "Resident":
    """Returns a client that has not heard of any run yet; `say` hears sentences for the person at it.

    Raises:
      ConfigError: a setting that is not the client's to choose.
    """
    for setting in asked.settings:
        name = setting.partition("=")[0].strip()
        if name not in _ALSO and name.split(".")[0] not in _OWN:
            raise ConfigError(
                f"--set {setting}: a client sets data.*, runtime.*, {', '.join(_ALSO)}; the server the rest."
            )
    return Resident(asked, say)


@dataclass
class _Taking:
    """The run that a client takes part in: everything is built, and the model is where `held` says."""

    hello: Hello
    bench: ModelBench
    client: Client
    examples: int
    base: Saved
    held: Held
    secure: bool = False
    spent: Spent | None = None

    def reset_(self) -> None:
        self.base.restore_(self.bench.params)
        self.held = replace(self.held, rounds=0, exact=True)


class Resident:
    """A client between rounds; `answer` is all that anyone asks of it."""

    def __init__(self, asked: ClientOptions, say: Say) -> None:
        """Keeps what it was started with."""
        self._asked, self._say = asked, say
        self._taking: _Taking | None = None
        self._instance = secrets.token_hex(16)
        self._last: tuple[bytes, bytes] = b"", b""

    def answer(self, request: bytes) -> bytes:
        """Returns the answer to a request; what goes wrong is refused in one sentence, and said here too."""
        if request and request == self._last[0]:
            return self._last[1]  # a server that was started again asks for what it lost
        try:
            answer = self._answer(request)
        except FedMeZOError as error:
            self._say(str(error))
            answer = Refused(str(error))
        except (OSError, RuntimeError, ValueError) as error:
            self._say(f"{type(error).__name__}: {error}")
            answer = Refused(f"{type(error).__name__}: {error}")
        given = encode_answer(answer)
        if isinstance(answer, Done | Share):
            self._last = request, given
        return given

    def _answer(self, request: bytes) -> Answer:
        told = decode_request(request)
        if isinstance(told, Hello):
            return self._join(told)
        if isinstance(told, Walk):
            return Stranger() if self._taking is None else self._walk(self._taking, told)
        self._say(told.text)
        return Noted()

    def _join(self, hello: Hello) -> Answer:
        refuse_strangers(hello)
        taking = self._taking
        if taking is None or taking.hello.run != hello.run:
            # The model of another run is given up before this one's is loaded.
            self._taking = taking = None
            with _BUILDING:
                self._taking = taking = self._take_part(hello)
            self._say(f"Client {self._asked.client} takes part with {taking.examples} examples.")
        held = taking.held
        return Welcome(
            hello.run, self._asked.client, held.instance, taking.examples, held=held.rounds, exact=held.exact
        )

    def _take_part(self, hello: Hello) -> _Taking:
        told = parse_config(json.loads(hello.config))
        if not self._asked.trusting:
            refuse_unasked(told, self._asked.settings, own=self._asked.own)
        config = self._configured(told)
        loaded = load_base(config, say=self._say)
        if loaded.fingerprint != hello.fingerprint:
            raise ModelError(
                f"Client {self._asked.client} has another base model: fingerprint {loaded.fingerprint[:12]} of "
                f"'{config.model.name}', the server's is {hello.fingerprint[:12]}; give it the server's model."
            )
        data = read_data(config, loaded.tokenizer) if not self._asked.own else None
        parts = data.parts if data is not None else ()
        client = self._asked.client
        if data is not None and not client < len(parts):
            raise ConfigError(f"The run has clients 0 to {len(parts) - 1}, got --id {client}; give another one.")
        part = parts[client] if data is not None else read_own(config, loaded.tokenizer)
        tuned = build_model(config, loaded, parts={client: part})
        params = tuned.bench.params
        if params.layout() != hello.layout:
            raise ModelError(
                f"Client {client} would train other parameters (layout {params.layout()[:12]}) than the server "
                f"({hello.layout[:12]}); use one version of fedmezo, transformers and peft on both."
            )
        base, held = Saved(params), Held(hello.run, self._instance)
        if self._asked.state is not None:
            held = kept(self._asked.state, params, wanted=held) or held
        frugal = any(setting.split("=")[0].strip() == "privacy.epsilon" for setting in self._asked.settings)
        spent = Spent.of(tuned.config, self._asked.state, run=hello.run, part=part, whole=frugal)
        secret = spent.secret if spent is not None else b""
        method = build_algorithm(tuned.config, {client: len(part)}, params=params, secret=secret)
        return _Taking(hello, tuned.bench, method.client, len(part), base, held, config.network.secure, spent)

    def _configured(self, config: Config) -> Config:
        """Returns the server's configuration with what this machine sets; a worker's own keys are the client's."""
        plain = {"device": "cpu", "workers": 1, "threads": self._asked.threads}
        runtime = config.runtime.model_copy(update={**plain, "lanes": config.runtime.lanes})
        return with_changes(config.model_copy(update={"runtime": runtime}), self._asked.settings)

    def _walk(self, taking: _Taking, told: Walk) -> Answer:
        params = taking.bench.params
        shapes = {name: tuple(tensor.shape) for name, tensor in params}
        task, content = decode_task(told.task, shapes=shapes)
        if taking.secure and not isinstance(told, Addend):
            raise RunError("This run shows the server sums only, and it asked for a single client's slopes.")
        if task.client != self._asked.client:
            raise RunError(f"A task for client {task.client} came to client {self._asked.client}.")
        before = taking.held
        if not self._caught_up(taking, content, round_number=task.round, law=task.law):
            return Behind(taking.held.rounds)
        if taking.held.exact and check_of(taking.hello.run, params.digest()) != told.check:
            if isinstance(content, Values):
                raise RunError("The model differs from the server's after all of it was sent; this is a bug.")
            taking.reset_()
            return Behind(0)
        if self._asked.state is not None and taking.held != before:
            keep(self._asked.state, params, taking.held)
        return self._walked(taking, task, share=isinstance(told, Addend))

    def _walked(self, taking: _Taking, task: Task, *, share: bool) -> Answer:
        """Walks, and returns the reply, or the share of a sum."""
        if taking.spent is not None:
            self._say(taking.spent.spend(task, taking.bench.params.digest()))
        walked = walk(taking.client, taking.bench, [task])
        reply = walked.replies[0]
        loss = "" if math.isnan(reply.loss) else f"loss {reply.loss:.4g}, "
        self._say(f"Round {task.round}: {loss}{walked.seconds:.1f} s.")
        if taking.spent is not None:
            # How long it took, and over how many tokens, tells of the examples.
            return Done(encode_reply(reply), walked.forwards)
        if share:
            return Share(share_of(task, reply).astype("<f4").tobytes())
        return Done(encode_reply(reply), walked.forwards, walked.tokens, walked.seconds)

    @staticmethod
    def _caught_up(taking: _Taking, content: Told, *, round_number: int, law: Law) -> bool:
        """Brings the model to a round by what came with its task; returns whether that was enough."""
        params = taking.bench.params
        if isinstance(content, DenseDelta):
            raise RunError("A task came with a change of all parameters, which no server sends; this one is not ours.")
        if isinstance(content, Values):
            params.copy_(Params(dict(content.tensors)))
            taking.held = replace(taking.held, rounds=round_number, exact=True)
            return True
        if isinstance(content, Sums):
            taking.base.restore_(params)
            catch_up_(params, content, law=law)
            taking.held = replace(taking.held, rounds=round_number, exact=False)
            return True
        if taking.held.rounds > round_number:
            taking.reset_()  # the server has gone back
        missed = [item for item in content if item.tasks[0].round >= taking.held.rounds]
        rounds, wanted = [item.tasks[0].round for item in missed], range(taking.held.rounds, round_number)
        # Lengths first: a server may name any round, and four thousand million numbers are no small list.
        if len(rounds) != len(wanted) or rounds != list(wanted):
            return False
        catch_up_(params, missed, law=law)
        taking.held = replace(taking.held, rounds=round_number)
        return True


def refuse_strangers(hello: Hello) -> None:
    """Does nothing when both sides speak alike.

    Raises:
      RunError: another protocol, wire format, noise or package.
    """
    ours: Mapping[str, object] = {
        "protocol": PROTOCOL, "wire": WIRE_VERSION, "noise": NOISE_VERSION, "package": __version__,
    }  # fmt: skip
    for name, mine in ours.items():
        if getattr(hello, name) != mine:
            raise RunError(
                f"The server has {name} version {getattr(hello, name)}, this client {mine}; install one version of "
                "fedmezo on both."
            )
