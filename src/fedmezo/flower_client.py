"""The ClientApp of the Flower App: both kinds of message go, as bytes, to the worker process of `fedmezo client`."""

from flwr.clientapp import ClientApp

from fedmezo.runtime.flower.shim import forward

__all__ = ["app"]

app = ClientApp()
app.query()(forward)
app.train()(forward)
