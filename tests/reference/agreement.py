"""What it means to agree with diffusers: claims about a `reference`, stored or computed now.

A test file subclasses `Agreement` and has the fixtures `reference`, a mapping with the arrays that
make_reference.py describes, and `engine`, made of `engine_for`. The UNet runs in graph mode at one shape
and in PyNative mode at another, because compiling it twice would take longer than everything else.
"""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

from gm.diffusion.discretizer import LegacyDDPMDiscretization
from gm.diffusion.guiders import VanillaCFG
from gm.diffusion.samplers import DPMPP2MSampler, EulerEDMSampler, HeunEDMSampler
from gm.textual_inversion.concept import add_concept
from tests.tiny import tiny_engine

SAMPLERS = {"euler": EulerEDMSampler, "heun": HeunEDMSampler, "dpmpp_2m": DPMPP2MSampler}
# What float32 leaves is about 2e-6. A tanh GELU, the least visible mistake tried, makes 6e-5.
TOLERANCE = 2e-5


def assert_agrees(ours, theirs, tolerance=TOLERANCE):
    """Largest difference, relative to the largest value."""
    assert ours.shape == theirs.shape
    error = np.abs(ours - theirs).max() / np.abs(theirs).max()
    assert error < tolerance, f"relative error {error:.1e}, allowed {tolerance:.0e}"


def in_mode(mode, function, *arguments):
    ms.set_context(mode=ms.GRAPH_MODE if mode == "graph" else ms.PYNATIVE_MODE)
    try:
        return function(*arguments)
    finally:
        ms.set_context(mode=ms.GRAPH_MODE)


def engine_for(reference):
    """The tiny SDXL with the weights and the learned word of a reference."""
    engine = tiny_engine(int(reference["seed"]))
    rows = reference["text/rows_l"], reference["text/rows_g"]
    add_concept(engine.conditioner, token=str(reference["text/token"]), initializer=rows)
    return engine


def text_inputs(engine, reference):
    """The conditioner's inputs for all prompts, straight from text."""
    sizes = np.tile(reference["size/numbers"], (2, 1))
    return engine.conditioner.prepare(
        {
            "txt": reference["text/prompts"].tolist(),
            "original_size_as_tuple": sizes[:, :2],
            "crop_coords_top_left": sizes[:, 2:4],
            "target_size_as_tuple": sizes[:, 4:],
        }
    )


class Agreement:
    def test_prompts_become_the_same_ids(self, engine, reference):
        ids_l, ids_g, *_ = text_inputs(engine, reference)
        np.testing.assert_array_equal(ids_l[:, 0], reference["text/ids_l"])
        np.testing.assert_array_equal(ids_g[:, 0], reference["text/ids_g"])

    @pytest.mark.parametrize("mode", ["graph", "pynative"])
    def test_text_encoders(self, engine, reference, mode):
        inputs = map(Tensor, text_inputs(engine, reference))
        vector, context = (output.asnumpy() for output in in_mode(mode, engine.conditioner, *inputs))
        widths = reference["text/hidden_l"].shape[2], reference["text/pooled"].shape[1]
        assert_agrees(context[..., : widths[0]], reference["text/hidden_l"])
        assert_agrees(context[..., widths[0] :], reference["text/hidden_g"])
        assert_agrees(vector[:, : widths[1]], reference["text/pooled"])
        # Sines of thousands of radians: either side is 2e-4 from the exact value in float32.
        assert_agrees(vector[:2, widths[1] :], reference["size/embedded"], tolerance=5e-4)

    def test_unet_in_graph_mode(self, engine, reference):
        cond = {"crossattn": reference["unet/context"], "vector": reference["unet/vector"]}
        for x, t, out in zip(*(reference[f"unet/{name}_2"] for name in ("x", "t", "out")), strict=True):
            assert_agrees(engine.network(x, t, cond), out)

    def test_unet_in_pynative_mode_with_one_oblong_picture(self, engine, reference):
        cond = {"crossattn": reference["unet/context"][:1], "vector": reference["unet/vector"][:1]}
        out = in_mode("pynative", engine.network, reference["unet/x_1"][0], reference["unet/t_1"][0], cond)
        assert_agrees(out, reference["unet/out_1"][0])

    def test_refiners_unet(self, reference):
        engine = tiny_engine(int(reference["seed"]), kind="refiner")
        cond = {"crossattn": reference["refiner/context"], "vector": reference["refiner/vector"]}
        out = in_mode(
            "pynative", engine.network, reference["refiner/x_1"][0], reference["refiner/t_1"][0], cond
        )
        assert_agrees(out, reference["refiner/out_1"][0])

    @pytest.mark.parametrize("mode", ["graph", "pynative"])
    def test_autoencoder(self, engine, reference, mode):
        moments = in_mode(mode, engine.encode, reference["vae/image"])
        assert_agrees(moments, reference["vae/moments"])
        decoded = in_mode(mode, engine.decode, reference["vae/z"] * np.float32(engine.scale_factor))
        assert_agrees(decoded, reference["vae/decoded"])

    def test_sampling_visits_the_same_time_steps(self, reference):
        assert LegacyDDPMDiscretization().timesteps(20).tolist() == reference["sample/timesteps"].tolist()

    @pytest.mark.parametrize("name", SAMPLERS)
    def test_twenty_guided_steps(self, engine, reference, name):
        def denoise(x, sigma, cond):
            return engine.denoiser(engine.network, x, sigma, cond)

        cond, uncond = (
            {"crossattn": reference[f"sample/{which}_context"], "vector": reference[f"sample/{which}_vector"]}
            for which in ("cond", "uncond")
        )
        guider = VanillaCFG(float(reference["sample/guidance"]))
        sampler = SAMPLERS[name](LegacyDDPMDiscretization(), num_steps=20, guider=guider)
        assert_agrees(sampler(denoise, reference["sample/noise"], cond, uncond), reference[f"sample/{name}"])
