"""What a run is up against, before it starts: measured constants, caps on the rate, advice. Half a minute.

python examples/know_before.py
"""

import sys

from fedmezo.studies.config import parse_config
from fedmezo.studies.constants import measure_constants
from fedmezo.studies.forecast import in_words
from fedmezo.studies.plan import plan
from fedmezo.studies.sampling import SamplingOptions

config = parse_config(
    {
        "model": {"name": "builtin:tiny"},
        "data": {"name": "builtin:skills", "max_tokens": 40, "template": "{input} is"},
        "split": {"kind": "lda", "alpha": 0.5},
        "federation": {"clients": 3, "rounds": 20, "local_steps": 10, "batch_size": 4},
        "runtime": {"threads": 1},
    }
)
measured = measure_constants(
    config, asked=SamplingOptions(directions=32, points=2), say=lambda text: sys.stderr.write(f"{text}\n")
)
planned = plan(config, measured=measured)
for name, words in in_words(planned["theory"]).items():
    print(f"{name:60}  {words}")
print()
for sentence in planned["advice"]:
    print(f"- {sentence}")
