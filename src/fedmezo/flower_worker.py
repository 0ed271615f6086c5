"""The process that keeps a client's model and data: `python -m fedmezo.flower_worker`, started by `fedmezo client`.

The first line of its standard input is its order, a JSON object: "socket", the path where it answers, and what makes an
`ClientOptions` (`studies/resident.py`): "client", "state", "settings", "own", "threads", "trusting", all but the first
with a default. It ends when that input does. On its standard output it writes one line, and only if it cannot begin:
{"error": class name, "text": sentence}. All else goes to standard error; sentences for the person at the client begin
with "fedmezo: ".
"""

import json
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fedmezo.errors import FedMeZOError
from fedmezo.runtime.resident import serve_socket

__all__ = ["main"]


def main() -> int:
    """Answers requests until the parent is gone; returns an exit code if it cannot begin."""
    news = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints is no reason
    sys.stdout = sys.stderr  # and is in the log at once
    try:
        order = json.loads(sys.stdin.readline())
        serve_socket(Path(order["socket"]), _answers(order), ready=news.close)
    except Exception as error:
        if news.closed:
            raise
        traceback.print_exc()
        json.dump({"error": type(error).__name__, "text": " ".join(str(error).split())}, news)
        news.close()
        return error.exit_code if isinstance(error, FedMeZOError) else 1
    return 0


def _answers(order: Mapping[str, Any]) -> Callable[[bytes], bytes]:
    """Returns what answers requests; what it is built of is imported here, where a failure to is told."""
    from fedmezo.studies.resident import ClientOptions, build_resident

    told = {name: value for name, value in order.items() if name != "socket"}
    told["state"] = Path(told["state"]) if told.get("state") else None
    told["settings"] = tuple(told.get("settings", ()))
    return build_resident(ClientOptions(**told), say=_say).answer


def _say(sentence: str) -> None:
    sys.stderr.write(f"fedmezo: {sentence}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
