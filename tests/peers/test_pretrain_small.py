"""Pretraining of the small model, and its PyTorch twin against gm's networks, at toy widths."""

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from gm.checkpoint import load_weights
from gm.config import build_engine
from tools.pretrain_small import (
    CONFIG,
    CONFIGS,
    ROOT,
    WEIGHTS,
    DiffusionStage,
    Settings,
    VAEStage,
    orthogonalise,
    publish,
    restore,
    scale_factor,
)
from tools.torch_twin import SmallSDXL, initialise

pytestmark = pytest.mark.peers
SETTINGS = Settings(steps=4, batch=4, lr=3e-3, warmup=1)


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def toy_config():
    """The shipped YAML at the smallest widths."""
    config = yaml.safe_load((ROOT / CONFIG).read_text())
    params = config["model"]["params"]
    texts = params["conditioner_config"]["params"]["emb_models"]
    for entry in texts[:2]:
        entry["params"] |= {"width": 16, "layers": 2, "version": str(ROOT / entry["params"]["version"])}
    texts[0]["params"]["layer_idx"] = 1
    texts[1]["params"]["embed_dim"] = 16
    for entry in texts[2:]:
        entry["params"]["outdim"] = 8
    network = params["network_config"]["params"]
    network |= {"model_channels": 8, "num_head_channels": 8, "context_dim": 32, "adm_in_channels": 16 + 6 * 8}
    network |= {"num_res_blocks": 1, "norm_num_groups": 4}
    params["first_stage_config"]["params"]["ddconfig"] |= {"ch": 8, "norm_num_groups": 4}
    return config


def toy_net(seed=0):
    net = SmallSDXL(toy_config()["model"]["params"])
    initialise(net, generator=torch.Generator().manual_seed(seed))
    return net


def stage(kind, folder, *, net=None, **settings):
    net = net or toy_net()
    if kind is DiffusionStage and not (folder / "vae.pt").exists():
        VAEStage(net, folder, SETTINGS, pictures=2).save()
    return kind(net, folder, Settings(**(vars(SETTINGS) | settings)), pictures=4)


def weights(stage):
    return {n: p.detach().clone() for n, p in stage.named.items()} | stage.optimizer.average


@pytest.mark.parametrize("kind", [VAEStage, DiffusionStage])
def test_the_loss_falls_on_a_batch_seen_again_and_again(kind, tmp_path):
    trained = stage(kind, tmp_path, steps=1000)
    trained.rng = lambda: np.random.default_rng(3)
    losses = [trained.step() for _ in range(12)]
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("kind", [VAEStage, DiffusionStage])
def test_a_resumed_run_equals_one_that_never_stopped(kind, tmp_path):
    whole = stage(kind, tmp_path / "whole")
    for _ in range(4):
        whole.step()
    stopped = stage(kind, tmp_path / "stopped")
    for _ in range(2):
        stopped.step()
    stopped.save()
    resumed = stage(kind, tmp_path / "stopped", net=toy_net(seed=9))
    assert resumed.done == 2
    for _ in range(2):
        resumed.step()
    for name, tensor in weights(whole).items():
        assert torch.equal(weights(resumed)[name], tensor), name


def test_two_processes_halve_a_batch(tmp_path):
    alone = stage(VAEStage, tmp_path)
    shares = []
    for rank in (0, 1):
        alone.rank, alone.ranks = rank, 2
        shares.append(alone.batch(alone.rng()))
    alone.rank, alone.ranks = 0, 1
    both = alone.batch(alone.rng())
    assert np.array_equal(both[0::2], shares[0]) and np.array_equal(both[1::2], shares[1])


def test_scores_and_a_log_come_with_a_run(tmp_path):
    trained = stage(DiffusionStage, tmp_path, steps=1)
    trained.scores = lambda: DiffusionStage.scores(trained, number=2)
    trained.run(log_every=1)
    lines = [yaml.safe_load(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines[0]["loss"] > 0
    assert set(lines[1]["gate"]) == {"shape", "colour", "texture", "size", "background", "style", "all"}
    assert trained.path.exists()


def test_the_learning_rate_rises_stays_and_falls():
    settings = Settings(steps=100, batch=1, lr=1.0, warmup=10, decay=0.2)
    assert settings.lr_at(0) == 0.1
    assert settings.lr_at(50) == 1
    assert settings.lr_at(90) == 0.5
    assert settings.lr_at(99) == 0.05


def test_orthogonalised_directions_have_singular_values_near_one():
    g = torch.randn(2, 40, 24, generator=torch.Generator().manual_seed(0))
    for matrices in (g, g.mT):
        values = torch.linalg.svdvals(orthogonalise(matrices))
        assert 0.5 < values.min() and values.max() < 1.4


def test_the_scale_factor_makes_latents_of_deviation_one():
    moments = np.random.default_rng(0).normal(0, 3, (500, 8, 4, 4))
    moments[:, 4:] = np.log(16)  # mean of deviation 3, and noise of deviation 4 on top: 5 together
    assert scale_factor(moments) == pytest.approx(1 / 5, rel=0.02)


def test_the_twin_computes_what_gm_computes_from_the_published_file(tmp_path):
    """Every network, through a file with the original names."""
    net = toy_net()
    with torch.no_grad():  # biases and norms too, which start as zeros and ones
        for p in net.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(toy_config()))
    save_file({n: p.contiguous() for n, p in net.state_dict().items()}, tmp_path / "toy.safetensors")
    engine = build_engine(tmp_path / "toy.yaml")
    load_weights(engine, tmp_path / "toy.safetensors")

    rng = np.random.default_rng(0)
    pictures = rng.uniform(-1, 1, (2, 3, 32, 32)).astype(np.float32)
    latents = rng.standard_normal((2, 4, 8, 8), dtype=np.float32)
    steps = np.float32([10, 900])
    ids = engine.conditioner.prepare(
        {
            "txt": ["a photo of a small striped red heart on a sky background", ""],
            "original_size_as_tuple": [[64, 64]] * 2,
            "crop_coords_top_left": [[0, 0]] * 2,
            "target_size_as_tuple": [[64, 64]] * 2,
        }
    )
    vae = net.first_stage_model
    with torch.no_grad():
        sizes = torch.tensor([[64.0, 64, 0, 0, 64, 64]] * 2)
        y, context = net.conditioner(*(torch.from_numpy(i[:, 0]).long() for i in ids[:2]), sizes, torch.ones(2, 1))
        twin = {
            "moments": vae.encode(torch.from_numpy(pictures)),
            "pictures": vae.decode(torch.from_numpy(latents) / engine.scale_factor).clamp(-1, 1),
            "vector": y,
            "crossattn": context,
            "noise": net.model.diffusion_model(torch.from_numpy(latents), torch.from_numpy(steps), context, y),
        }
    cond = {"vector": y.numpy(), "crossattn": context.numpy()}
    vector, crossattn = (t.asnumpy() for t in engine.conditioner(*map(_tensor, ids)))
    ours = {
        "moments": engine.encode(pictures),
        "pictures": engine.decode(latents),
        "vector": vector,
        "crossattn": crossattn,
        "noise": engine.network(latents, steps, cond),
    }
    for name, expected in twin.items():
        np.testing.assert_allclose(ours[name], expected.numpy(), atol=3e-5, rtol=1e-4, err_msg=name)


def _tensor(array):
    import mindspore as ms

    return ms.Tensor(array)


def test_publish_writes_averaged_half_precision_weights_that_restore_continues(tmp_path):
    for name in (*CONFIGS, WEIGHTS):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    for name in CONFIGS:
        (tmp_path / name).write_text((ROOT / name).read_text())
    state = tmp_path / "state"
    trained = stage(DiffusionStage, state)
    trained.step()
    trained.save()
    publish(toy_net(seed=5), state, tmp_path)

    file = load_file(tmp_path / WEIGHTS)
    assert set(file) == set(toy_net().state_dict())
    for name, average in trained.optimizer.average.items():
        assert torch.equal(file[name], average.half()), name
    for name in CONFIGS:
        written = yaml.safe_load((tmp_path / name).read_text())["model"]["params"]["scale_factor"]
        assert written == trained.scale
    restore(toy_net(seed=6), tmp_path / "anew", tmp_path)
    anew = stage(DiffusionStage, tmp_path / "anew")
    assert anew.done == 0
    for name, average in trained.optimizer.average.items():
        assert torch.equal(anew.named[name].detach(), average.half().float()), name
    with pytest.raises(ValueError, match="choose another --state"):
        restore(toy_net(), state, tmp_path)
