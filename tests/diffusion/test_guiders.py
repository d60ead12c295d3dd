import numpy as np
import pytest

from gm.diffusion.guiders import DynamicThresholding, IdentityGuider, VanillaCFG

SHAPE = (2, 4, 8, 8)


def predictions(seed=0):
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(SHAPE).astype(np.float32) for _ in range(2))


def inputs():
    x = np.zeros(SHAPE, np.float32)
    cond = {"crossattn": np.ones((2, 3, 5)), "vector": np.ones((2, 7))}
    return x, np.full(2, 0.5), cond, {key: -value for key, value in cond.items()}


def test_guidance_asks_for_both_predictions_at_once_unconditional_first():
    x, sigma, cond = VanillaCFG(7.5).prepare(*inputs())
    assert x.shape == (4, 4, 8, 8) and sigma.tolist() == [0.5] * 4
    assert cond["crossattn"][:, 0, 0].tolist() == cond["vector"][:, 0].tolist() == [-1, -1, 1, 1]


def test_guidance_extrapolates_from_unconditional_to_conditional():
    uncond, cond = predictions()
    np.testing.assert_allclose(
        VanillaCFG(7.5).combine(np.concatenate((uncond, cond))), uncond + 7.5 * (cond - uncond), rtol=1e-6
    )


@pytest.mark.parametrize("guider", [IdentityGuider(), VanillaCFG(1), VanillaCFG(1.0, DynamicThresholding())])
def test_without_guidance_nothing_is_doubled(guider):
    given = inputs()
    for got, expected in zip(guider.prepare(*given[:3], None), given[:3], strict=True):
        assert got is expected
    _, cond = predictions()
    np.testing.assert_array_equal(guider.combine(cond), cond)


def test_guidance_without_an_unconditional_conditioning_is_an_error():
    with pytest.raises(ValueError, match=r"scale of 5\.0 needs an unconditional"):
        VanillaCFG(5).prepare(*inputs()[:3], None)


def test_thresholding_keeps_guided_latents_in_the_range_of_the_conditional_ones():
    uncond, cond = predictions()
    guider = VanillaCFG(12, dyn_thresh=DynamicThresholding(percentile=1.0))
    guided = guider.combine(np.concatenate((uncond, cond)))
    assert guided.dtype == np.float32
    np.testing.assert_allclose(
        np.abs(guided).max(axis=(1, 2, 3)), np.abs(cond).max(axis=(1, 2, 3)), rtol=1e-6
    )
    # At percentile 1 nothing is clipped: the picture is scaled as a whole.
    free = uncond + 12 * (cond - uncond)
    np.testing.assert_allclose(np.ptp(guided / free, axis=(1, 2, 3)), 0, atol=1e-5)


def test_thresholding_at_one_is_imagens():
    uncond, cond = predictions()
    uncond[0], cond[0] = 0.0, 0.01 * cond[0]  # stays within [-1, 1]
    guided = DynamicThresholding(percentile=0.9, threshold=1.0)(uncond, cond, 4.0)
    free = uncond + 4 * (cond - uncond)
    np.testing.assert_array_equal(guided[0], free[0])
    s = np.quantile(np.abs(free[1]), 0.9)
    np.testing.assert_allclose(guided[1], np.clip(free[1], -s, s) / s, rtol=1e-5)


def test_a_picture_is_thresholded_whatever_its_neighbours():
    uncond, cond = predictions()
    together = DynamicThresholding()(uncond, cond, 9.0)
    np.testing.assert_array_equal(together[:1], DynamicThresholding()(uncond[:1], cond[:1], 9.0))
