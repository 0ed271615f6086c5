"""Flower inside this process: a grid whose nodes run a ClientApp, each message through Flower's own bytes."""

from collections.abc import Callable, Iterable

from flwr.app import Context, Error, Message, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.supercore.task_identity import TaskIdentity

App = Callable[[Message, Context], Message]


def identify() -> None:
    """Makes messages possible outside Flower's processes; the only use of this private class."""
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1


class Silence(Exception):
    """A node that does not answer at all."""


class FakeGrid:
    """A `Grid` whose nodes answer when they are looked at.

    Attributes:
      contexts: node -> its context, whose state lasts.
      online: nodes that are there.
      before: called with (node, message) before a node's app is; what it raises is the node's failure.
      replies: every reply that came back, with the node: all that the server ever sees.
      requests: every message that went out, with the node.
    """

    def __init__(self, app: App, configs: dict[int, dict]) -> None:
        identify()
        self.app, self.online = app, set(configs)
        self.contexts = {node: self.context(node, config) for node, config in configs.items()}
        self.before: Callable[[int, Message], None] = lambda node, message: None
        self.replies: list[tuple[int, Message]] = []
        self.requests: list[tuple[int, Message]] = []
        self._waiting: dict[str, Message] = {}

    @staticmethod
    def context(node: int, config: dict) -> Context:
        return Context(run_id=1, node_id=node, node_config=config, state=RecordDict(), run_config={})

    def get_node_ids(self) -> list[int]:
        return sorted(self.online)

    def push_messages(self, messages: Iterable[Message]) -> list[str | None]:
        tickets: list[str | None] = []
        for message in messages:
            node = message.metadata.dst_node_id
            if node not in self.online:
                tickets.append(None)
                continue
            copy = through_bytes(message.content)
            sent = Message(
                copy, node, message.metadata.message_type, ttl=message.metadata.ttl, group_id=message.metadata.group_id
            )
            tickets.append(str(len(self.requests)))
            sent.metadata.__dict__["_message_id"] = tickets[-1]
            self.requests.append((node, message))
            self._waiting[tickets[-1]] = sent
        return tickets

    def pull_messages(self, ids: Iterable[str]) -> list[Message]:
        found = [self._waiting.pop(ticket) for ticket in sorted(set(ids) & self._waiting.keys(), key=int)]
        return [reply for sent in found if (reply := self._answer(sent)) is not None]

    def _answer(self, sent: Message) -> Message | None:
        node = sent.metadata.dst_node_id
        if node not in self.online:
            return None
        try:
            self.before(node, sent)
            reply = self.app(sent, self.contexts[node])
            reply = Message(through_bytes(reply.content), reply_to=sent)
        except Silence:
            return None
        except Exception as error:
            reply = Message(Error(2, f"{type(error)}:<{str(error)!r}>"), reply_to=sent)
        reply.metadata.__dict__["_src_node_id"] = node
        self.replies.append((node, reply))
        return reply


def through_bytes(content: RecordDict) -> RecordDict:
    proto = recorddict_to_proto(content)
    return recorddict_from_proto(type(proto).FromString(proto.SerializeToString()))
