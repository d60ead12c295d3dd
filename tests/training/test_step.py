"""The training step against the same loop in diffusers and torch (tests/reference), and its special cases."""

import functools
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from mindspore import Parameter, Tensor, nn, ops

from gm.textual_inversion.concept import add_concept
from gm.training.optim import LossScale, OptimArgs, schedule_factor
from gm.training.step import Learner
from tests.tiny import tiny_engine

REFERENCE = Path(__file__).parents[1] / "reference" / "tiny_sdxl.npz"


@functools.cache
def reference():
    return dict(np.load(REFERENCE))


def update_inputs(engine, data, update, samples):
    """The loss net's inputs for some of the four samples of an update."""
    sigma = engine.denoiser.sigmas[data["train/timesteps"][update, samples]]
    noised = engine.loss_fn.prepare(
        engine.denoiser, data["train/latents"][samples], eps=data["train/noise"][update, samples], sigma=sigma
    )
    ids = (data[f"train/ids_{which}"][samples, None].astype(np.int32) for which in "lg")
    sizes = data["train/sizes"][samples].astype(np.float32)
    return (*noised, *ids, *(sizes[:, i : i + 2] for i in (0, 2, 4)))


def train(case, *, micro_batch, updates):
    """Losses, norms and rows after some updates, and what should not have changed."""
    data = reference()
    engine = tiny_engine(int(data["seed"]))
    frozen = {name: p.asnumpy().copy() for name, p in engine.parameters_and_names()}
    rows = data["train/rows_l"], data["train/rows_g"]
    concept = add_concept(engine.conditioner, token="<toy>", initializer=rows)
    optim = OptimArgs(
        lr=float(data["train/lr"]),
        weight_decay=float(data["train/weight_decay"]),
        clip_grad=case == "clipped",
        max_grad_norm=float(data["train/max_grad_norm"]),
        schedule="constant",
    )
    learner = Learner(
        engine, concept.parameters(), optim, accumulation_steps=4 // micro_batch, total_steps=updates * 4
    )
    losses, norms = [], []
    for update in range(updates):
        parts = [np.arange(i, i + micro_batch) for i in range(0, 4, micro_batch)]
        results = [learner(*update_inputs(engine, data, update, part)) for part in parts]
        assert [r.updated for r in results] == [False] * (len(parts) - 1) + [True]
        losses.append(np.mean([r.loss for r in results]))
        norms.append(results[-1].grad_norm)
    now = {n: p.asnumpy() for n, p in engine.parameters_and_names()}
    changed = [n for n, before in frozen.items() if not np.array_equal(before, now[n])]
    return np.array(losses), np.array(norms), concept.rows(), changed


def assert_close(found, expected, tolerance=1e-4):
    assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


@pytest.mark.parametrize("case, micro_batch", [("free", 4), ("clipped", 1)])
def test_ten_updates_equal_those_of_diffusers_and_torch(case, micro_batch):
    losses, norms, rows, changed = train(case, micro_batch=micro_batch, updates=10)
    data = reference()
    assert_close(losses, data[f"train/{case}/losses"])
    assert_close(norms, data[f"train/{case}/grad_norms"])
    assert_close(rows[0], data[f"train/{case}/rows_l"])
    assert_close(rows[1], data[f"train/{case}/rows_g"])
    assert changed == []
    for before, after in zip((data["train/rows_l"], data["train/rows_g"]), rows, strict=True):
        assert (np.abs(after - before).max(axis=1) > 1e-3).all()  # each of the word's rows has learned


def test_pynative_mode_takes_the_same_step():
    ms.set_context(mode=ms.PYNATIVE_MODE)
    try:
        losses, norms, _, changed = train("clipped", micro_batch=4, updates=1)
    finally:
        ms.set_context(mode=ms.GRAPH_MODE)
    assert_close(losses, reference()["train/clipped/losses"][:1])
    assert_close(norms, reference()["train/clipped/grad_norms"][:1])
    assert changed == []


class Quadratic(nn.Cell):
    """Loss a * sum(rows^2), which an input can make overflow."""

    def __init__(self):
        super().__init__()
        self.rows = Parameter(Tensor(np.ones((2, 3), np.float32)), name="rows")

    def construct(self, a):
        return ops.reduce_sum(ops.square(self.rows)) * a


def quadratic_learner(*, half_precision=False, accumulation_steps=1, **optim):
    net = Quadratic()
    return net, Learner(
        net, [net.rows], OptimArgs(schedule="constant", **optim),
        accumulation_steps=accumulation_steps, total_steps=100, half_precision=half_precision,
    )  # fmt: skip


ONE, HUGE, NAN = (np.array(x, np.float32) for x in (1.0, 3e38, np.nan))


def test_an_overflow_skips_the_update_and_lowers_the_scale(mode):
    net, learner = quadratic_learner(half_precision=True, accumulation_steps=2)
    scale = learner.loss_scale.value
    learner(HUGE)
    result = learner(ONE)  # the micro-batch before it overflowed
    assert result.overflow and not result.updated
    assert learner.loss_scale.value == scale / 2 and learner.updates == 0
    np.testing.assert_array_equal(net.rows.asnumpy(), np.ones((2, 3), np.float32))
    learner(ONE)
    assert learner(ONE).updated  # nothing of the overflow is left in the accumulated gradient
    assert np.isfinite(net.rows.asnumpy()).all() and learner.updates == 1


def test_nan_without_a_loss_scale_stops_the_run_and_leaves_the_rows(mode):
    net, learner = quadratic_learner()
    with pytest.raises(FloatingPointError, match="nan"):
        learner(NAN)
    np.testing.assert_array_equal(net.rows.asnumpy(), np.ones((2, 3), np.float32))


def test_overflow_that_no_scale_mends_stops_the_run():
    _, learner = quadratic_learner(half_precision=True, loss_scale="1024")
    with pytest.raises(FloatingPointError, match="1024"):
        learner(HUGE)


def test_gradient_is_clipped_globally_and_the_first_step_is_bias_corrected(mode):
    net, learner = quadratic_learner(lr=0.1, weight_decay=0.0, max_grad_norm=1.0)
    result = learner(ONE)
    assert result.grad_norm == pytest.approx(2 * np.sqrt(6), rel=1e-6)  # before clipping
    np.testing.assert_allclose(net.rows.asnumpy(), 0.9, atol=1e-6)  # Adam's first step is lr, whatever the gradient


def test_weight_decay_is_decoupled(mode):
    net, learner = quadratic_learner(lr=0.1, weight_decay=0.5)
    learner(np.array(0.0, np.float32))
    np.testing.assert_allclose(net.rows.asnumpy(), 1 - 0.1 * 0.5, rtol=1e-6)


def test_a_restored_learner_goes_on_bit_for_bit():
    values = np.random.default_rng(0).uniform(0.5, 2, 7).astype(np.float32)
    net, learner = quadratic_learner(accumulation_steps=2)
    for value in values[:3]:  # stops between two micro-batches
        learner(value)
    arrays, numbers = learner.state_dict()
    for value in values[3:]:
        learner(value)
    other, resumed = quadratic_learner(accumulation_steps=2)
    resumed.load_state_dict(arrays, numbers)
    for value in values[3:]:
        resumed(value)
    np.testing.assert_array_equal(net.rows.asnumpy(), other.rows.asnumpy())


def test_state_of_another_concept_is_refused():
    _, learner = quadratic_learner()
    arrays, numbers = learner.state_dict()
    arrays["rows"] = arrays["rows"][:1]
    with pytest.raises(ValueError, match=r"rows is \(1, 3\), needed is \(2, 3\)"):
        learner.load_state_dict(arrays, numbers)


def test_schedules_count_updates_and_never_run_out():
    steps = OptimArgs(schedule="multi_step", milestones=[2, 4], gamma=0.5)
    assert [schedule_factor(steps, i, 6) for i in (0, 1, 2, 3, 4, 1000)] == [1, 1, 0.5, 0.5, 0.25, 0.25]
    warm = OptimArgs(schedule="constant", warmup_steps=3)
    assert [schedule_factor(warm, i, 6) for i in (0, 1, 2, 3, 99)] == [0.25, 0.5, 0.75, 1, 1]
    cosine = OptimArgs(schedule="cosine")
    factors = [schedule_factor(cosine, i, 10) for i in range(12)]
    assert factors[0] == 1 and factors[5] == pytest.approx(0.5) and factors[10] == factors[11] == 0.01


def test_dynamic_loss_scale_grows_again():
    scale = LossScale(8.0, dynamic=True, window=2)
    assert scale.after_update(overflow=True) and scale.value == 4
    assert scale.after_update(overflow=False) and scale.after_update(overflow=False) and scale.value == 8


@pytest.mark.parametrize(
    "settings, word",
    [({"schedule": "linear"}, "linear"), ({"lr": 0.0}, "lr"), ({"milestones": [5, 2]}, "rise"),
     ({"beta1": 1.0}, "beta1"), ({"loss_scale": "fast"}, "fast"), ({"weight_decay": -1.0}, "negative")],
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused(settings, word):
    with pytest.raises(ValueError, match=word):
        OptimArgs(**settings)
