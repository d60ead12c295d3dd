"""One rank of test_distributed.py: three updates, each rank from data of its own; then it waits."""

import json
import time

import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from gm.runtime import RuntimeArgs, start_runtime
from gm.training.optim import OptimArgs
from gm.training.step import Learner


class Distance(nn.Cell):
    """Mean over a batch of the squared distance of the rows to its points."""

    def __init__(self):
        super().__init__()
        self.rows = Parameter(Tensor(np.zeros((2, 3), np.float32)), name="rows")

    def construct(self, points):
        return ops.reduce_mean(ops.square(points - self.rows)) * 6.0


def learn(batches, *, world_size):
    """(losses, rows) after micro-batches of points, two an update."""
    net = Distance()
    optim = OptimArgs(lr=0.1, schedule="constant", max_grad_norm=0.5)
    learner = Learner(net, [net.rows], optim, accumulation_steps=2, total_steps=6, world_size=world_size)
    return [learner(points).loss for points in batches], net.rows.asnumpy()


def points():
    """(6 steps, 4 samples, 2, 3)."""
    return np.random.default_rng(0).standard_normal((6, 4, 2, 3)).astype(np.float32)


if __name__ == "__main__":
    runtime = start_runtime(RuntimeArgs(device_target="CPU", is_parallel=True))
    share = 4 // runtime.world_size
    losses, rows = learn(
        points()[:, runtime.rank * share : (runtime.rank + 1) * share], world_size=runtime.world_size
    )
    print(json.dumps({"rank": runtime.rank, "losses": losses, "rows": rows.tolist()}), flush=True)
    while True:
        time.sleep(0.05)
        runtime.any_rank(False)
