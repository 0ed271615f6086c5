"""The client's side of the app: messages go to the `fedmezo client` of the machine, which holds model and data.

In Flower's own simulation there is no such program; its actors hold them.
"""

from fedmezo.flower_client import app

__all__ = ["app"]
