"""What tests/test_reference.py, which holds the UNet's numbers, does not cover."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

from gm.models.unet import UNetModel

SETTINGS = {
    "in_channels": 4, "out_channels": 4, "model_channels": 32, "attention_resolutions": [1], "num_res_blocks": 1,
    "channel_mult": [1], "transformer_depth": [1], "num_head_channels": 16, "context_dim": 8, "adm_in_channels": 10,
}  # fmt: skip


def context_gradient(**settings):
    """Gradient by the text of a UNet with fixed random weights and inputs."""
    rng = np.random.default_rng(0)

    def draw(*shape):
        return Tensor(rng.standard_normal(shape).astype(np.float32))

    net = UNetModel(**SETTINGS, **settings)
    for _, parameter in net.parameters_and_names():
        parameter.set_data(draw(*parameter.shape) * 0.05)
    inputs = draw(1, 4, 8, 8), Tensor([5.0]), draw(1, 7, 8), draw(1, 10)
    return ms.grad(net, grad_position=2)(*inputs).asnumpy()


def test_recomputing_activations_does_not_change_the_gradient():
    plain, recomputed = context_gradient(), context_gradient(use_recompute=True)
    assert np.abs(plain).max() > 0
    np.testing.assert_allclose(recomputed, plain, atol=1e-6 * np.abs(plain).max())


@pytest.mark.parametrize(
    "settings, words",
    [({"num_classes": 1000}, "sequential"), ({"use_linear_in_transformer": False}, "must be true"),
     ({"num_head_channels": 24}, "no multiple of 24"), ({"transformer_depth": [1, 2]}, "2 entries")],
)  # fmt: skip
def test_another_family_of_unets_is_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        UNetModel(**{**SETTINGS, **settings})
