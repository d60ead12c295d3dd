"""The stream of samples: endless, seeded, sharded, resumable bit for bit."""

import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

from gm.data.batches import Batches
from gm.data.latents import Latents
from gm.diffusion.discretizer import LegacyDDPMDiscretization
from gm.diffusion.loss import DiscreteSampling, StandardDiffusionLoss

SCALE = 0.13025


def draw(rng, shape):
    return rng.standard_normal(shape, dtype=np.float32), rng.random(shape[0])


def make_latents(count, *, views=1, std=0.1, digest="data"):
    """Picture n's latents lie near 10 n, so that a sample tells where it came from."""
    moments = np.zeros((count, views, 8, 4, 4), np.float32)
    means = 10 * np.arange(count)[:, None] + np.arange(views)
    moments[:, :, :4] = means[..., None, None, None]
    moments[:, :, 4:] = 2 * np.log(std)
    return Latents(
        names=tuple(f"{n}.png" for n in range(count)),
        moments=moments,
        original_size=np.array([(100 + n, 200 + n) for n in range(count)], np.float32),
        crop_coords_top_left=np.array(
            [[(n, 10 * v) for v in range(views)] for n in range(count)], np.float32
        ).reshape(count, views, 2),
        target_size=np.array([32, 32], np.float32),
        digest=digest,
    )


def make_captions(count):
    return [(f"a photo of {n}", f"a picture of {n}", f"{n}") for n in range(count)]


def stream(count=5, *, batch_size=2, seed=0, rank=0, world_size=1, views=1, draw=draw, **options):
    return Batches(
        make_latents(count, views=views, **options), make_captions(count), draw=draw,
        scale_factor=SCALE, batch_size=batch_size, seed=seed, rank=rank, world_size=world_size,
    )


def take(batches, steps):
    return [next(batches) for _ in range(steps)]


def assert_same(first, second):
    """Bit for bit."""
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        for field in fields(a):
            x, y = getattr(a, field.name), getattr(b, field.name)
            if isinstance(x, np.ndarray):
                assert x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes(), field.name
            else:
                assert x == y, field.name


def pictures_of(batches):
    return [round(float(z.mean()) / SCALE / 10) for batch in batches for z in batch.z0]


def test_a_batch_has_the_shapes_and_types_that_training_expects():
    batch = next(stream(batch_size=3))
    assert batch.z0.shape == batch.eps.shape == (3, 4, 4, 4)
    assert batch.z0.dtype == batch.eps.dtype == np.float32
    assert batch.sigma.shape == (3,) and batch.sigma.dtype == np.float64
    for pair in (batch.original_size, batch.crop_coords_top_left, batch.target_size):
        assert pair.shape == (3, 2) and pair.dtype == np.float32
    assert len(batch.captions) == 3 and all(isinstance(caption, str) for caption in batch.captions)


def test_caption_and_size_numbers_belong_to_the_picture():
    batches = take(stream(5, views=2), 20)
    order = pictures_of(batches)
    for k, n in enumerate(order):
        batch, b = batches[k // 2], k % 2
        view = round(float(batch.z0[b].mean()) / SCALE - 10 * n)
        assert batch.captions[b] in make_captions(5)[n]
        assert tuple(batch.original_size[b]) == (100 + n, 200 + n)
        assert tuple(batch.crop_coords_top_left[b]) == (n, 10 * view)
        assert tuple(batch.target_size[b]) == (32, 32)
    assert {tuple(c) for batch in batches for c in batch.crop_coords_top_left} == {
        (n, 10 * v) for n in range(5) for v in range(2)
    }


def test_latents_are_sampled_afresh_and_scaled():
    z0 = np.stack([batch.z0[0] for batch in take(stream(1, batch_size=1, std=2.0), 300)])
    assert len(np.unique(z0.sum((1, 2, 3)))) == 300
    np.testing.assert_allclose(z0.std(), 2.0 * SCALE, rtol=0.02)


def test_noise_and_noise_levels_have_their_distributions():
    batches = take(stream(batch_size=4), 500)
    eps = np.concatenate([batch.eps for batch in batches])
    sigma = np.concatenate([batch.sigma for batch in batches])
    np.testing.assert_allclose([eps.mean(), eps.std()], [0, 1], atol=0.01)
    assert abs(np.corrcoef(eps[:-1].ravel(), eps[1:].ravel())[0, 1]) < 0.02  # neighbours in the stream
    assert len(set(sigma)) == 2000 and abs(sigma.mean() - 0.5) < 0.02


def test_noise_and_levels_are_what_the_loss_draws():
    discretization = LegacyDDPMDiscretization()
    loss = StandardDiffusionLoss(DiscreteSampling(discretization, num_idx=1000))
    sigma = np.concatenate([batch.sigma for batch in take(stream(draw=loss.draw), 200)])
    assert set(sigma) <= set(discretization(1000)) and len(set(sigma)) > 250


def test_noise_is_independent_of_the_latent_sample():
    batches = take(stream(1, batch_size=4, std=1.0), 200)
    z0, eps = (np.concatenate([getattr(batch, name) for batch in batches]).ravel() for name in ("z0", "eps"))
    assert abs(np.corrcoef(z0, eps)[0, 1]) < 0.03


@pytest.mark.parametrize("count, batch_size", [(1, 1), (1, 4), (3, 4), (5, 2), (100, 3), (4, 4)])
def test_every_picture_comes_once_before_any_comes_again(count, batch_size):
    order = pictures_of(take(stream(count, batch_size=batch_size), -(-3 * count // batch_size)))
    for epoch in range(3):
        assert sorted(order[epoch * count : (epoch + 1) * count]) == list(range(count))


def test_epochs_are_shuffled_differently():
    order = pictures_of(take(stream(20, batch_size=20), 3))
    assert len({tuple(order[i : i + 20]) for i in (0, 20, 40)} | {tuple(range(20))}) == 4


def test_all_captions_of_a_picture_are_used():
    assert {c for batch in take(stream(1), 30) for c in batch.captions} == set(make_captions(1)[0])


def test_the_same_seed_gives_the_same_stream_and_another_seed_another():
    assert_same(take(stream(seed=0), 4), take(stream(seed=0), 4))
    assert not np.array_equal(next(stream(seed=0)).eps, next(stream(seed=1)).eps)


def test_the_global_random_state_plays_no_part():
    np.random.seed(1)
    first = take(stream(), 3)
    np.random.seed(2)
    assert_same(first, take(stream(), 3))


# Ranks


@pytest.mark.parametrize("world_size, batch_size", [(2, 2), (4, 1), (3, 2)])
def test_n_ranks_see_what_one_rank_with_n_times_the_batch_sees(world_size, batch_size):
    ranks = [take(stream(rank=r, world_size=world_size, batch_size=batch_size), 6) for r in range(world_size)]
    one = take(stream(batch_size=world_size * batch_size), 6)
    for step in range(6):
        for field in fields(one[0]):
            parts = [getattr(rank[step], field.name) for rank in ranks]
            whole = getattr(one[step], field.name)
            if isinstance(whole, list):
                assert sum(parts, []) == whole
            else:
                np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_ranks_differ_in_every_draw():
    first, second = (next(stream(rank=r, world_size=2, batch_size=1)) for r in range(2))
    assert not np.array_equal(first.eps, second.eps) and first.sigma[0] != second.sigma[0]
    assert pictures_of([first]) != pictures_of([second])


def test_ranks_share_an_epoch_without_repeats():
    ranks = [pictures_of(take(stream(8, rank=r, world_size=2, batch_size=2), 2)) for r in range(2)]
    assert sorted(ranks[0] + ranks[1]) == list(range(8))


def test_micro_batches_are_the_parts_of_a_large_batch():
    small = take(stream(batch_size=1), 4)
    large = next(stream(batch_size=4))
    np.testing.assert_array_equal(np.concatenate([batch.eps for batch in small]), large.eps)
    assert [batch.captions[0] for batch in small] == large.captions


# Resume


@pytest.mark.parametrize("taken", [0, 1, 2, 7])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_resumed_stream_continues_bit_for_bit(taken, rank):
    whole = stream(3, rank=rank, world_size=2)
    expected = take(whole, taken + 5)[taken:]
    broken_off = stream(3, rank=rank, world_size=2)
    take(broken_off, taken)
    state = json.loads(json.dumps(broken_off.state_dict()))
    resumed = stream(3, rank=rank, world_size=2)
    resumed.load_state_dict(state)
    assert_same(expected, take(resumed, 5))
    assert resumed.state_dict() == whole.state_dict()


def test_reading_the_state_does_not_move_the_stream():
    watched, plain = stream(), stream()
    for _ in range(4):
        watched.state_dict()
        assert_same([next(watched)], [next(plain)])


def test_another_process_continues_bit_for_bit(tmp_path):
    first = stream(3)
    take(first, 4)
    (tmp_path / "state.json").write_text(json.dumps(first.state_dict()))
    script = (
        "import json, sys; from tests.data.test_batches import stream\n"
        "resumed = stream(3); resumed.load_state_dict(json.load(open(sys.argv[1])))\n"
        "print(next(resumed).eps.tobytes().hex())"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "state.json")]
    root = Path(__file__).parents[2]
    output = subprocess.run(command, check=True, capture_output=True, text=True, cwd=root).stdout
    assert output.strip() == next(first).eps.tobytes().hex()


def test_state_of_other_pictures_captions_or_seed_is_refused():
    state = stream().state_dict()
    with pytest.raises(ValueError, match="--seed 0, not 1"):
        stream(seed=1).load_state_dict(state)
    with pytest.raises(ValueError, match="pictures, their crops, their captions or the VAE differ"):
        stream(digest="other").load_state_dict(state)
    captions = [("other words",)] * 5
    other = Batches(make_latents(5), captions, draw=draw, scale_factor=SCALE, batch_size=2, seed=0)
    with pytest.raises(ValueError, match="captions"):
        other.load_state_dict(state)


@pytest.mark.parametrize("wrong, flag", [({"batch_size": 0}, "--train_batch_size"), ({"seed": -1}, "--seed")])
def test_impossible_settings_are_refused(wrong, flag):
    with pytest.raises(ValueError, match=flag):
        stream(**wrong)
