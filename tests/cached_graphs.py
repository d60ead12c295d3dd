"""Run by test_compile_cache.py: compiles what its arguments name, and prints the digest of what each gave.

Arguments: the cache folder, then any of: a number n (two steps that learn rows through a small network, on n rows of
data), "hidden" (a cell that does not know its network), "micro" (all that the micro engine compiles).
"""

import functools
import hashlib
import sys
from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from gm import compile_cache
from gm.models.layers import Conv2d, LayerNorm, Linear, to_feature_map
from gm.runtime import RuntimeArgs, start_runtime
from gm.textual_inversion.concept import add_concept
from gm.training.optim import OptimArgs
from gm.training.step import Learner
from tests.tiny import tiny_engine

OPTIM = OptimArgs(lr=0.01, schedule="constant")


class Network(nn.Cell):
    """Rows -> frozen layers -> squared distance to the data."""

    def __init__(self, width=8):
        super().__init__()
        rng = np.random.default_rng(1)
        self.rows = Parameter(Tensor(rng.standard_normal((3, width)).astype(np.float32)), name="rows")
        self.linear, self.norm, self.conv = Linear(width, width), LayerNorm(width), Conv2d(1, 4, 3, padding=1)
        for parameter in self.get_parameters():
            if parameter is not self.rows:
                parameter.requires_grad = False
                parameter.set_data(Tensor(rng.standard_normal(parameter.shape).astype(np.float32)))

    def construct(self, data):
        states = self.norm(self.linear(self.rows))
        return ops.mean(ops.square(ops.mean(self.conv(to_feature_map(states[None, None]))) - data))


class Hidden(nn.Cell):
    """Calls a network that is not an attribute of it."""

    def __init__(self):
        super().__init__()
        self.function = ms.value_and_grad(Network(), 0, weights=None)

    def construct(self, data):
        return self.function(data)


def data(*shape):
    return np.random.default_rng(2).standard_normal(shape).astype(np.float32)


def learned(learner, *inputs):
    """Numbers and state after two steps."""
    results = [learner(*inputs) for _ in range(2)]
    return [np.array([(r.loss, r.grad_norm) for r in results]), *learner.state_dict()[0].values()]


def small(n):
    network = Network()
    return learned(Learner(network, [network.rows], OPTIM, accumulation_steps=2, total_steps=2), data(n, 4))


def hidden():
    return [output.asnumpy() for output in compile_cache.call(Hidden(), Tensor(data(2, 4)))]


def micro():
    engine = tiny_engine(kind="micro")
    concept = add_concept(engine.conditioner, token="<toy>", num_vectors=2, rng=np.random.default_rng(0))
    batch = {"txt": ["a <toy>"], **dict.fromkeys(SIZES, [[64, 64]])}
    learner = Learner(engine, concept.parameters(), OPTIM, accumulation_steps=2, total_steps=2)
    x, target, one = data(1, 4, 8, 8), data(1, 4, 8, 8) + 1, np.ones(1, np.float32)
    outputs = learned(learner, x, one, target, one, *engine.conditioner.prepare(batch))
    vector, crossattn = engine.conditioner.encode(batch)
    unet = engine.network(x, one, {"vector": vector, "crossattn": crossattn})
    return [*outputs, vector, crossattn, unet, engine.decode(x), engine.encode(data(1, 3, 64, 64))]


SIZES = ("original_size_as_tuple", "crop_coords_top_left", "target_size_as_tuple")

if __name__ == "__main__":
    start_runtime(RuntimeArgs(device_target="CPU"))
    compile_cache.cache_folder = lambda: Path(sys.argv[1])
    for what in sys.argv[2:]:
        arrays = {"hidden": hidden, "micro": micro}.get(what) or functools.partial(small, int(what))
        outputs = arrays()
        assert all(np.isfinite(array).all() for array in outputs), what
        print("digest", what, hashlib.sha256(b"".join(array.tobytes() for array in outputs)).hexdigest(), flush=True)
