"""One of several processes of a run, for `accelerate launch -m tests.evaluation.sharing FOLDER SAMPLES`."""

import sys
from pathlib import Path

from qzoom_agent.data.samples import TaskSource
from qzoom_agent.evaluation.runner import Shard, evaluate
from tests.evaluation.player import numbers, player

if __name__ == "__main__":
    shard = Shard.launched()
    print(f"process {shard.index} of {shard.count}", flush=True)
    agent = player(lambda i: i % 3 > 0, zooms=lambda i: i % 2 > 0)
    evaluate(agent, [numbers()], out=Path(sys.argv[1]), source=TaskSource(n=int(sys.argv[2])), shard=shard)
