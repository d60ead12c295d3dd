"""Measure one case with this project: the same calls as train_textual_inversion.py and the sampling command make.

Latents and noise are random, pictures are not read. See tools/benchmark.py.
"""

import statistics
import time
from unittest import mock

import numpy as np

from gm import checkpoint
from gm.config import build_engine
from gm.models import fused
from gm.models.layers import file_layouts, parameter_dtype
from gm.runtime import RuntimeArgs, start_runtime
from gm.sampling import SamplingArgs, condition, decode, draw_latents, latent_shape
from gm.textual_inversion.concept import add_concept
from gm.training.optim import OptimArgs
from gm.training.step import Learner
from gm.weight_files import LazyTensor
from tools.benchmarks import GUIDANCE, NUM_VECTORS, PRECISIONS, find_model, measure_case
from tools.random_weights import random_values

WORD = "<my-word>"


def make_engine(case, clock):
    """A loaded engine, and the Runtime."""
    runtime = start_runtime(RuntimeArgs(device_target="CPU", **PRECISIONS[case.precision]))
    model = find_model(case.model)
    with parameter_dtype(runtime.dtype):
        engine = build_engine(model.config)
    clock.lap("build")
    if weights := case.weight or model.weights:
        checkpoint.load_weights(engine, weights)
    else:
        load_random(engine)
    clock.lap("load")
    return engine, runtime


def load_random(engine):
    """Fill an engine with random numbers by the loader of files, so that dtypes and peak memory are a file's."""

    def lazy(name, shape):
        return LazyTensor(shape, np.dtype(np.float32), lambda: random_values(name, shape, 0))

    tensors = {name: lazy(name, layout.shape) for name, layout in file_layouts(engine).items()}
    with mock.patch.object(checkpoint, "read_weights", lambda path: tensors):
        checkpoint.load_weights(engine, "random weights")


def train(case, clock):
    """Seconds of every training step, from random latents to new rows, and what the kernels do in one."""
    engine, runtime = make_engine(case, clock)
    rng = np.random.default_rng(0)
    concept = add_concept(engine.conditioner, token=WORD, num_vectors=NUM_VECTORS, rng=rng)
    shape = (case.batch, *latent_shape(engine, SamplingArgs(height=case.side, width=case.side)))
    engine.drop_first_stage()
    learner = Learner(
        engine, concept.parameters(), OptimArgs(), accumulation_steps=1, total_steps=case.repeats,
        half_precision=runtime.half_precision,
    )  # fmt: skip
    size = [(case.side, case.side)] * case.batch

    def step():
        z0 = rng.standard_normal(shape, np.float32)
        eps, sigma = engine.loss_fn.draw(rng, shape)
        noised = engine.loss_fn.prepare(engine.denoiser, z0, eps=eps, sigma=sigma)
        conditioning = engine.conditioner.prepare(
            {
                "txt": [f"a photo of a {WORD}"] * case.batch,
                "original_size_as_tuple": size,
                "crop_coords_top_left": [(0, 0)] * case.batch,
                "target_size_as_tuple": size,
            }
        )
        learner(*noised, *conditioning)  # waits for the loss

    times = clock.time(step, case, before=fused.take_profile)
    return times, {"kernels": kernels(case)}


def sample(case, clock):
    """Seconds of every batch drawn, from prompt to pixels; of the decoding, and what the kernels do for one batch."""
    engine, _ = make_engine(case, clock)
    args = SamplingArgs(
        height=case.side, width=case.side, guidance_scale=GUIDANCE, steps=case.sampling_steps, sampler="EulerEDM"
    )
    decoding = []

    def draw():
        text = condition(engine, "a photo of a heart", args)
        latents = draw_latents(engine, text, range(case.batch), args)
        start = time.monotonic()
        decode(engine, latents)
        decoding.append(time.monotonic() - start)

    times = clock.time(draw, case, before=fused.take_profile)
    decode_s = statistics.median(decoding[-case.repeats :]) / case.batch
    return times, {"decode_s": decode_s, "kernels": kernels(case)}


def kernels(case):
    """Kernel -> [calls, seconds, operations] of one repetition."""
    return {name: [n / case.repeats for n in numbers] for name, numbers in fused.take_profile().items()}


if __name__ == "__main__":
    measure_case(train, sample)
