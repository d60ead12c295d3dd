"""The fused kernels: their precision, sizes that take several blocks and threads, and what happens without them."""

import logging
import math
import os
import subprocess
import sys
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

from gm.bfloat16 import from_bfloat16
from gm.models import fused, layers
from gm.runtime import RuntimeArgs, start_runtime
from tests.models.test_layers import OnMaps, SelfAttention, WeightedSum, assert_forms_agree, randomise, run

ROOT = Path(__file__).resolve().parents[2]


def rounded(array):
    """The nearest bfloat16 numbers."""
    return from_bfloat16(fused.to_bfloat16_bits(array))


def test_bfloat16_rounds_to_the_nearest_number_and_ties_to_even():
    one, step = 1.0, 2.0**-7
    numbers = np.float32([one + 0.4 * step, one + 0.5 * step, one + 1.5 * step, -3.0, 1e-20])
    expected = [one, one, one + 2 * step, -3.0]
    assert rounded(numbers)[:4].tolist() == expected
    assert abs(rounded(numbers)[4] / 1e-20 - 1) < 2**-8


def test_linear_in_bfloat16_is_the_product_of_rounded_numbers(mode):
    rng = np.random.default_rng(0)
    x, dy = (rng.standard_normal((2, 5, n)).astype(np.float32) for n in (24, 16))
    with layers.parameter_dtype(ms.bfloat16):
        net = layers.Linear(24, 16)
    w, bias = (rng.standard_normal(shape).astype(np.float32) for shape in ((16, 24), (16,)))
    net.weight.set_data(Tensor.from_numpy(layers.file_layouts(net)["weight"].pack(w)))
    net.bias.set_data(Tensor(bias))
    dx = ms.grad(WeightedSum(net), grad_position=0)(Tensor(x), Tensor(dy)).asnumpy()
    np.testing.assert_allclose(net(Tensor(x)).asnumpy(), rounded(x) @ rounded(w).T + bias, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dx, rounded(dy) @ rounded(w), rtol=1e-5, atol=1e-5)


HALF = {
    "geglu": (lambda: layers.GEGLU(24, 16), (2, 5, 24)),
    "conv3x3": (lambda: OnMaps(layers.Conv2d(8, 16, 3, padding=1)), (2, 8, 6, 4)),
    "conv3x3 down": (lambda: OnMaps(layers.Conv2d(8, 16, 3, stride=2, padding=1)), (2, 8, 6, 4)),
    "attention": (lambda: SelfAttention(causal=False), (2, 16, 24)),
    "causal attention": (lambda: SelfAttention(causal=True), (2, 16, 24)),
}


@pytest.mark.parametrize("layer", HALF)
def test_layers_in_bfloat16_equal_float32_within_its_rounding(mode, layer):
    make, shape = HALF[layer]
    rng = np.random.default_rng(0)
    x = rng.standard_normal(shape).astype(np.float32)
    with layers.forced_form("fused"):
        net = make()
        randomise(net, 0)
        dy = rng.standard_normal(net(Tensor(x)).shape).astype(np.float32)
    exact = run("fused", make, x, dy)
    with layers.parameter_dtype(ms.bfloat16):
        half = run("fused", make, x, dy)
    for name, expected in exact.items():
        error = np.linalg.norm(half[name] - expected) / np.linalg.norm(expected)
        assert 1e-4 < error < 1e-2, (name, error)


LARGE = {  # more rows than a block of windows, of queries, or of a thread holds
    "convolution": (lambda: OnMaps(layers.Conv2d(64, 64, 3, padding=1)), (1, 64, 136, 136)),
    "group norm": (lambda: OnMaps(layers.GroupNorm(32, 1e-5, num_groups=8, activation="silu")), (2, 32, 64, 48)),
    "layer norm": (lambda: layers.LayerNorm(320), (2, 300, 320)),
    "attention": (lambda: SelfAttention(causal=False), (1, 1500, 12)),
    "linear": (lambda: layers.Linear(320, 640), (2, 100, 320)),
    "linear of few columns": (lambda: layers.Linear(640, 8), (4000, 640)),
    "geglu": (lambda: layers.GEGLU(64, 640), (1, 4000, 64)),
}


@pytest.mark.parametrize("layer", LARGE)
def test_large_layers_equal_their_plain_form(layer):
    make, shape = LARGE[layer]
    assert_forms_agree(make, shape, forms=("fused",))


def test_a_convolution_with_more_weights_than_positions_equals_the_rows_form():
    rng = np.random.default_rng(1)
    x, dy = (rng.standard_normal((1, c, 30, 32)).astype(np.float32) for c in (512, 512))
    make = lambda: OnMaps(layers.Conv2d(512, 512, 3, padding=1))  # noqa: E731
    expected, found = (run(form, make, x, dy) for form in ("rows", "fused"))
    for name in ("y", "dx"):
        assert np.abs(found[name] - expected[name]).max() <= 2e-5 * np.abs(expected[name]).max(), name


def test_gelu_is_exact_to_float32():
    x = np.linspace(-8, 8, 4001, dtype=np.float32)
    with layers.forced_form("fused"):
        y = layers.Activation("gelu")(Tensor(x)).asnumpy()
    expected = [float(v) * 0.5 * math.erfc(-float(v) / math.sqrt(2)) for v in x]
    np.testing.assert_allclose(y, expected, rtol=2e-6, atol=4e-7)


def test_extreme_numbers_stay_what_they_are():
    with layers.forced_form("fused"):
        y = layers.Activation("silu")(Tensor(np.float32([-200, 200, np.nan, np.inf, 0]))).asnumpy()
        q = Tensor(np.full((1, 2, 4), 1e4, np.float32))
        v = Tensor(np.arange(8, dtype=np.float32).reshape(1, 2, 4))
        attended = layers.Attention(1)(q, q, v).asnumpy()
    assert abs(y[0]) < 1e-30 and y[1] == 200 and np.isnan(y[2]) and y[3] == np.inf and y[4] == 0
    np.testing.assert_allclose(attended[0, 0], [2, 3, 4, 5])  # scores of 4e8, equal: the mean


def test_a_weight_of_another_type_is_refused():
    net = layers.Linear(4, 4)
    assert layers.form_name() == "fused"
    net.weight.set_dtype(ms.float16)
    with pytest.raises(RuntimeError):
        net(Tensor(np.ones((2, 4), np.float32))).asnumpy()


PROGRAM = """
import mindspore as ms, numpy as np, sys
ms.set_context(mode=ms.GRAPH_MODE)
from tests.models.test_fused import LARGE
from tests.models.test_layers import run
make, shape = LARGE["group norm"]
x = np.random.default_rng(3).standard_normal(shape).astype(np.float32)
np.savez(sys.argv[1], **run("fused", make, x, x))
"""


def test_any_number_of_threads_gives_the_same_numbers(tmp_path):
    results = []
    for threads in ("1", "3"):
        path = tmp_path / f"{threads}.npz"
        environment = os.environ | {"OMP_NUM_THREADS": threads}
        subprocess.run([sys.executable, "-c", PROGRAM, str(path)], check=True, cwd=ROOT, env=environment)
        results.append(np.load(path))
    for name in results[0]:
        np.testing.assert_allclose(results[0][name], results[1][name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("environment", "reason"),
    [({"CXX": "false"}, "false failed"), ({"PATH": ""}, "no C++ compiler"), ({"CXX": "no-such-compiler"}, "no-such")],
)
def test_without_kernels_the_program_says_why_and_goes_on(environment, reason, monkeypatch, tmp_path, caplog, capsys):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    for cached in (fused.library, fused.available):
        monkeypatch.setattr(fused, cached.__name__, cached.__wrapped__)
    with caplog.at_level(logging.WARNING):
        assert layers.form_name() == "rows"
    assert reason in caplog.text
    assert start_runtime(RuntimeArgs(device_target="CPU", ms_amp_level="bf16")).dtype == ms.float32
    assert "Going on in float32" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.so"))


def test_kernels_are_compiled_once(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = fused.library.__wrapped__()
    made = Path(first).stat().st_mtime_ns
    assert fused.library.__wrapped__() == first and Path(first).stat().st_mtime_ns == made
    assert list(Path(first).parent.iterdir()) == [Path(first)]
