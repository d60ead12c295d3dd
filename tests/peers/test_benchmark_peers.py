"""What benchmark_peers measures of diffusers is the same model and the same training as ours."""

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from mindspore import Tensor

from gm.config import build_engine
from gm.diffusers_layout import to_components
from gm.models.layers import file_layouts
from gm.weight_files import in_memory
from tests.tiny import CONFIGS, tiny_engine
from tools import benchmarks
from tools.benchmarks import Case, theirs

pytestmark = pytest.mark.peers
# Their networks, and where ours stand in the engine.
PARTS = {
    "unet": "model.",
    "text": "conditioner.embedders.0.",
    "text_2": "conditioner.embedders.1.",
    "vae": "first_stage_model.",
}
# Of the published SDXL base 1.0.
PUBLISHED = {"unet": 2567463684, "text": 123060480, "text_2": 694659840, "vae": 83653863}


def case(task, precision):
    return Case(task, str(CONFIGS["micro"]), 64, 2, precision, "empty", repeats=1, sampling_steps=2)


def count(net):
    return sum(parameter.numel() for parameter in net.parameters())


@pytest.mark.parametrize("model", ["small", "full"])
def test_each_network_has_as_many_parameters_as_ours(model):
    config = benchmarks.find_model(model).config
    with torch.device("meta"):  # sizes alone
        nets = theirs.Networks(config, torch.float32)
    counts = {part: count(getattr(nets, part)) for part in PARTS}
    if model == "full":
        assert counts == PUBLISHED
        return
    shapes = {name: layout.shape for name, layout in file_layouts(build_engine(config)).items()}
    for part, prefix in PARTS.items():
        ours = sum(int(np.prod(shape)) for name, shape in shapes.items() if name.startswith(prefix))
        assert counts[part] == ours, part


def test_with_our_weights_their_loss_is_ours():
    engine = tiny_engine()
    nets = theirs.Networks(CONFIGS["base"], torch.float32)
    parameters = dict(engine.parameters_and_names())
    tensors = {
        name: in_memory(layout.unpack(parameters[name].asnumpy())) for name, layout in file_layouts(engine).items()
    }
    components = to_components(tensors)
    for part, component in (("unet", "unet"), ("text", "text_encoder"), ("text_2", "text_encoder_2"), ("vae", "vae")):
        net = getattr(nets, part)
        # transformers 5 leaves this prefix out of the names of one of its classes in memory
        prefix = "" if any(name.startswith("text_model.") for name in net.state_dict()) else "text_model."
        state = {name.removeprefix(prefix): torch.tensor(t.read()) for name, t in components[component].items()}
        net.load_state_dict(state)

    rng = np.random.default_rng(0)
    latents, noise = rng.standard_normal((2, 2, 4, 8, 8), np.float32)
    timesteps = np.array([100, 900])
    noised = engine.loss_fn.prepare(engine.denoiser, latents, eps=noise, sigma=engine.denoiser.sigmas[timesteps])
    sizes = {
        "original_size_as_tuple": [[64, 96], [80, 64]],
        "crop_coords_top_left": [[0, 8], [0, 0]],
        "target_size_as_tuple": [[64, 64]] * 2,
    }
    inputs = engine.conditioner.prepare({"txt": ["cat", "a cat"], **sizes})
    ours = float(engine(*map(Tensor, noised), *map(Tensor, inputs)).asnumpy())

    noisy = DDPMScheduler(**theirs.NOISE).add_noise(*map(torch.tensor, (latents, noise, timesteps)))
    ids = [torch.tensor(i[:, 0]).long() for i in inputs[:2]]
    numbers = torch.tensor(np.concatenate(list(map(np.float32, sizes.values())), 1))
    loss = nets.loss(noisy, torch.tensor(timesteps), torch.tensor(noise), numbers, *ids)
    assert loss.item() == pytest.approx(ours, rel=1e-4)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_their_training_moves_the_new_rows_alone(precision, monkeypatch):
    nets = theirs.Networks(CONFIGS["micro"], theirs.DTYPES[precision], new_rows=benchmarks.NUM_VECTORS)
    assert {p.dtype for net in (nets.unet, nets.text, nets.text_2) for p in net.parameters()} == {
        theirs.DTYPES[precision]
    }
    before = {
        (part, name): tensor.clone()
        for part in ("unet", "text", "text_2")
        for name, tensor in getattr(nets, part).state_dict().items()
    }
    monkeypatch.setattr(theirs, "make_networks", lambda *args, **settings: nets)

    class TwoSteps:
        def time(self, work, case):
            work()
            work()

    theirs.train(case("train", precision), TwoSteps())
    for (part, name), old in before.items():
        new = getattr(nets, part).state_dict()[name]
        if "token_embedding" in name:
            moved = (old != new).any(dim=1)
            assert not moved[: -benchmarks.NUM_VECTORS].any() and moved[-benchmarks.NUM_VECTORS :].all()
        else:
            assert torch.equal(old, new), (part, name)


@pytest.mark.parametrize("task, precision", [("train", "bf16"), ("sample", "fp32"), ("sample", "bf16")])
def test_a_case_of_theirs_is_measured_in_its_own_process(task, precision, tmp_path):
    result = benchmarks.Runner(tmp_path)("theirs", case(task, precision))
    assert "error" not in result, result["error"]
    assert len(result["times"]) == 1 and result["seconds"] > 0
    assert 0.1 < result["peak_gib"] < 10
