"""The CPU forms of each layer equal the plain form, in value and gradient, in both modes."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops

from gm.models import layers, native, rows


class OnMaps(nn.Cell):
    """A layer on feature maps, called with (B, C, H, W)."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def construct(self, x):
        return layers.from_feature_map(self.layer(layers.to_feature_map(x)))


class ConcatAndAdd(nn.Cell):
    def __init__(self):
        super().__init__()
        self.add = layers.AddPerSample()

    def construct(self, x):
        y = layers.concat_channels(x, x)
        e = ops.mean(layers.to_tokens(y), 1)
        return layers.from_tokens(layers.to_tokens(self.add(y, e)) * 2.0, like=x)


class SelfAttention(nn.Cell):
    def __init__(self, causal):
        super().__init__()
        self.attention = layers.Attention(2, causal=causal)
        self.split = ops.Split(-1, 3)

    def construct(self, x):
        q, k, v = self.split(x)
        return self.attention(q, k, v)


class WeightedSum(nn.Cell):
    """A scalar whose gradient by the net's output is dy."""

    def __init__(self, net):
        super().__init__(auto_prefix=False)
        self.net = net

    def construct(self, x, dy):
        return ops.reduce_sum(self.net(x) * dy)


def randomise(net, seed):
    """Random weights, the same numbers for both forms, through the original file's layout."""
    rng = np.random.default_rng(seed)
    layouts = layers.file_layouts(net)
    for name, parameter in net.parameters_and_names():
        array = rng.standard_normal(layouts[name].shape).astype(np.float32)
        parameter.set_data(Tensor.from_numpy(layouts[name].pack(array)))


def run(form, make, x, dy):
    """Output, gradient of the input and, but for the fused form, of the weights in the file's layout."""
    with layers.forced_form(form):
        net = make()
        randomise(net, 0)
        weights = list(net.trainable_params())
        gradient = ms.grad(WeightedSum(net), grad_position=0, weights=weights or None)
        result = gradient(Tensor(x), Tensor(dy))
        dx, dweights = result if weights else (result, ())
        layouts = layers.file_layouts(net)
        named = {p.name: layouts[p.name].unpack(g.asnumpy()) for p, g in zip(weights, dweights)}
        return {"y": net(Tensor(x)).asnumpy(), "dx": dx.asnumpy(), **named}


def assert_forms_agree(make, shape, *, forms=("rows", "fused"), tolerance=2e-5):
    rng = np.random.default_rng(1)
    x = (rng.standard_normal(shape) * 2 + 0.5).astype(np.float32)
    with layers.forced_form("native"):
        net = make()
        randomise(net, 0)
        dy = rng.standard_normal(net(Tensor(x)).shape).astype(np.float32)
    plain = run("native", make, x, dy)
    for form in forms:
        found = run(form, make, x, dy)
        assert found.keys() == (plain.keys() if form == "rows" else {"y", "dx"})
        for name, value in found.items():
            assert value.shape == plain[name].shape, (form, name)
            assert np.abs(value - plain[name]).max() <= tolerance * np.abs(plain[name]).max(), (form, name)


MAP_LAYERS = {
    "conv3x3": lambda: layers.Conv2d(3, 5, 3, padding=1),
    "conv3x3 unpadded": lambda: layers.Conv2d(3, 5, 3),
    "conv3x3 down": lambda: layers.Conv2d(3, 5, 3, stride=2, padding=1),
    "conv3x3 down, VAE": lambda: layers.Conv2d(3, 5, 3, stride=2, padding=(0, 1, 0, 1)),
    "conv1x1": lambda: layers.Conv2d(3, 5, 1),
    "group norm": lambda: layers.GroupNorm(3, 1e-6, num_groups=3),
    "group norm, wide groups": lambda: layers.GroupNorm(3, 1e-5, num_groups=1),
    "group norm and silu": lambda: layers.GroupNorm(3, 1e-5, num_groups=3, activation="silu"),
    "silu": lambda: layers.Activation("silu"),
    "enlarge": layers.Enlarge,
    "concat and add": ConcatAndAdd,
}


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("layer", MAP_LAYERS)
def test_map_layers_equal_their_plain_form(mode, layer, batch):
    assert_forms_agree(lambda: OnMaps(MAP_LAYERS[layer]()), (batch, 3, 6, 4))


TOKEN_LAYERS = {
    "linear": lambda: layers.Linear(6, 4),
    "linear without bias": lambda: layers.Linear(6, 4, has_bias=False),
    "layer norm": lambda: layers.LayerNorm(6),
    "gelu": lambda: layers.Activation("gelu"),
    "quick gelu": lambda: layers.Activation("quick_gelu"),
    "geglu": lambda: layers.GEGLU(6, 4),
    "attention": lambda: SelfAttention(causal=False),
    "causal attention": lambda: SelfAttention(causal=True),
}


@pytest.mark.parametrize("layer", TOKEN_LAYERS)
def test_token_layers_equal_their_plain_form(mode, layer):
    width = 12 if "attention" in layer else 6
    assert_forms_agree(TOKEN_LAYERS[layer], (2, 8, width))


def test_convolution_in_bands_equals_one_product(mode, monkeypatch):
    monkeypatch.setattr(rows, "MAX_WINDOW_BYTES", 4 * 8 * 6 * 3 * 9 // 3)  # three bands
    assert rows._num_bands(1, 8, 6, 3, 3, 1) == 3
    assert_forms_agree(lambda: OnMaps(layers.Conv2d(3, 5, 3, padding=1)), (1, 3, 8, 6))
    assert_forms_agree(lambda: OnMaps(layers.Conv2d(3, 5, 3, padding=(1, 0, 0, 1))), (2, 3, 8, 6))


def test_attention_in_chunks_equals_one_product(mode, monkeypatch):
    monkeypatch.setattr(rows, "MAX_SCORE_BYTES", 4 * 4 * 8 * 8 // 4)  # four chunks of two queries
    assert rows._num_chunks(4, 8, 8) == 4
    assert_forms_agree(lambda: SelfAttention(causal=False), (2, 8, 12))


def test_linear_computes_in_the_dtype_of_its_weight(mode):
    with layers.parameter_dtype(ms.float16):
        net = layers.Linear(4, 3)
    assert net(Tensor(np.ones((2, 4), np.float32))).dtype == ms.float16


def test_norms_compute_in_float32_and_keep_the_dtype(mode):
    x = Tensor(np.full((1, 2, 4), 300.0), ms.float16) + Tensor(np.arange(4), ms.float16)
    net = layers.LayerNorm(4)
    net.weight.set_data(Tensor(np.ones(4, np.float32)))
    y = net(x)  # squares of 300 overflow float16
    assert y.dtype == ms.float16
    np.testing.assert_allclose(y.asnumpy()[0, 0], [-1.342, -0.447, 0.447, 1.342], atol=2e-3)


def test_sinusoids_are_cosines_then_sines_with_divisor_half(mode):
    x = np.array([0.0, 7.0, 999.0], np.float32)
    angles = x[:, None] * 10000.0 ** (-np.arange(4) / 4)
    expected = np.concatenate([np.cos(angles), np.sin(angles)], 1)
    np.testing.assert_allclose(layers.Sinusoid(8)(Tensor(x)).asnumpy(), expected, atol=1e-4)


def test_embedding_takes_rows(mode):
    net = layers.Embedding(4, 2)
    net.weight.set_data(Tensor(np.arange(8, dtype=np.float32).reshape(4, 2)))
    np.testing.assert_array_equal(net(Tensor([[3, 0]], ms.int32)).asnumpy(), [[[6, 7], [0, 1]]])


def test_flash_attention_without_ascend_is_an_error():
    with pytest.raises(ValueError, match="Ascend"):
        native.use_flash_attention(True)


@pytest.mark.parametrize("form", ["rows", "native"])
@pytest.mark.parametrize("batch", [1, 2])
def test_a_vector_a_sample_is_added_in_float16(form, batch, mode):
    with layers.forced_form(form):
        x = layers.to_feature_map(Tensor(np.ones((batch, 3, 2, 2)), ms.float16))
        e = Tensor(np.arange(3 * batch).reshape(batch, 3), ms.float16)
        y = layers.from_feature_map(layers.AddPerSample()(x, e))
    assert y.dtype == ms.float16
    assert y.asnumpy()[:, :, 1, 0].ravel().tolist() == [1.0 + i for i in range(3 * batch)]
