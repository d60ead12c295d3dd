"""YAML becomes objects; others' files are understood; mistakes are named."""

import dataclasses
import logging

import numpy as np
import pytest
from omegaconf import OmegaConf

from gm import config
from gm.config import build_engine, instantiate, load_config, section
from gm.diffusion.denoiser import DiscreteDenoiser, EpsScaling, VScaling
from gm.diffusion.guiders import VanillaCFG
from gm.diffusion.samplers import EulerEDMSampler
from gm.targets import resolve
from tests.tiny import CONFIGS, FIXTURES

MINDONE = FIXTURES / "mindone_tiny.yaml"
TRAINING = "configs/training/sd_xl_base_finetune_textual_inversion.yaml"
SHIPPED = ["configs/inference/sd_xl_base.yaml", "configs/inference/sd_xl_refiner.yaml", TRAINING]
UNET = "model.params.network_config.params"


@dataclasses.dataclass(frozen=True)
class Optim:
    lr: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    warmup_steps: int = 0
    milestones: list[int] = dataclasses.field(default_factory=list)
    gamma: float = 0.1
    name: str | None = None


def denoiser_node():
    package = "sgm.modules.diffusionmodules"
    discretization = {"target": f"{package}.discretizer.LegacyDDPMDiscretization"}
    return {
        "target": f"{package}.denoiser.DiscreteDenoiser",
        "params": {
            "num_idx": 1000,
            "scaling_config": {"target": f"{package}.denoiser_scaling.VScaling"},
            "discretization_config": discretization,
        },
    }


def test_nodes_become_objects_from_the_inside_out():
    denoiser = instantiate(denoiser_node())
    assert isinstance(denoiser, DiscreteDenoiser) and isinstance(denoiser.scaling, VScaling)
    assert denoiser.sigmas.shape == (1000,)
    assert isinstance(instantiate(OmegaConf.create(denoiser_node())), DiscreteDenoiser)


def test_stabilitys_and_mindones_yaml_build_the_same_engine():
    sgm, mindone = build_engine(CONFIGS["base"]), build_engine(MINDONE)
    shapes = [{n: p.shape for n, p in engine.parameters_and_names()} for engine in (sgm, mindone)]
    assert shapes[0] == shapes[1] and len(shapes[0]) > 500
    np.testing.assert_array_equal(sgm.denoiser.sigmas, mindone.denoiser.sigmas)
    assert sgm.scale_factor == mindone.scale_factor == 0.13025
    for engine in (sgm, mindone):
        assert isinstance(engine.denoiser.scaling, EpsScaling)
        keys = [embedder.input_key for embedder in engine.conditioner.embedders]
        assert keys[:3] == ["txt", "txt", "original_size_as_tuple"] and len(keys) == 5
    np.testing.assert_array_equal(mindone.loss_fn.sigma_sampler.sigmas, mindone.denoiser.sigmas)


def test_mindones_optimizer_schedule_and_data_become_flat_sections():
    cfg = load_config(MINDONE)
    args = section(cfg, "optim", Optim)
    assert args == Optim(5e-4, 0.9, 0.98, 1e-6, 0.02, 0, [300, 600], 0.5)
    assert cfg.data == {"per_batch_size": 2, "total_step": 1000, "target_size": 64}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"optimizer_config": {"target": "mindspore.nn.SGD"}}, "optimizer_config.target: 'mindspore.nn.SGD'"),
        (
            {"optimizer_config": {"target": "mindspore.nn.AdamWeightDecay", "params": {"beta": 1}}},
            r"optimizer_config.params.beta: unknown key; the nearest known one is 'beta\d'",
        ),
        (
            {"scheduler_config": {"target": "gm.lr_scheduler.MultistepLR"}},
            "nearest known one is 'MultiStepLR'",
        ),
    ],
)
def test_an_optimizer_or_schedule_that_is_not_known_is_refused(tmp_path, change, message):
    cfg = OmegaConf.load(MINDONE)
    cfg.optim.update(change)
    OmegaConf.save(cfg, tmp_path / "changed.yaml")
    with pytest.raises(ValueError, match=message):
        load_config(tmp_path / "changed.yaml")


def test_mindones_warm_up_and_sgms_data_are_understood(tmp_path):
    warm_up = {"target": "gm.lr_scheduler.LambdaWarmUpScheduler", "params": {"warm_up_steps": 7}}
    optim = {"base_learning_rate": 1.0, "scheduler_config": warm_up}
    data = {"target": "sgm.data.dataset.StableDataModuleFromConfig", "params": {"train": {}}}
    OmegaConf.save(OmegaConf.create({"optim": optim, "data": data, "lightning": {}}), tmp_path / "a.yaml")
    cfg = load_config(tmp_path / "a.yaml")
    assert section(cfg, "optim", Optim) == Optim(lr=1.0, warmup_steps=7)
    assert cfg.data == {} and "lightning" not in cfg


@pytest.mark.parametrize(
    "target, cls",
    [
        ("sgm.modules.diffusionmodules.sampling.EulerEDMSampler", EulerEDMSampler),
        ("gm.modules.diffusionmodules.sampler.EulerEDMSampler", EulerEDMSampler),
        ("gm.diffusion.samplers.EulerEDMSampler", EulerEDMSampler),
        ("sgm.modules.diffusionmodules.guiders.VanillaCFG", VanillaCFG),
        ("ldm.modules.diffusionmodules.denoiser.DiscreteDenoiser", DiscreteDenoiser),
    ],
)
def test_one_class_has_many_names(target, cls):
    assert resolve(target, "") is cls


def test_every_name_in_the_table_leads_to_a_class():
    from gm.targets import _TABLE

    assert len(_TABLE) > 100
    assert all(isinstance(resolve(target, ""), type) for target in _TABLE)


def with_value(key, value):
    return load_config(CONFIGS["base"], [f"{key}={value}"])


@pytest.mark.parametrize(
    "key, value, message",
    [
        (f"{UNET}.channel_mul", "3", f"{UNET}.channel_mul: UNetModel takes no 'channel_mul'.*'channel_mult'"),
        (f"{UNET}.legacyy", "1", f"{UNET}.legacyy: UNetModel takes no 'legacyy'"),
        (f"{UNET}.dropout", "0.1", f"{UNET}.dropout: 0.1 is not supported, only 0"),
        (f"{UNET}.context_dim", "[80, 96]", f"{UNET}.context_dim: .* different widths"),
        (f"{UNET}.num_head_channels", "17", "model.params.network_config: .*17"),
        (
            "model.params.network_config.target",
            "sgm.modules.UNet",
            "network_config.target: unknown target 'sgm",
        ),
        (
            "model.target",
            "sgm.models.diffusion.DiffusionEngin",
            "nearest known one is 'sgm.models.diffusion.Dif",
        ),
        ("model.params.scaling_factor", "1", "takes no 'scaling_factor'.*'scale_factor'"),
        (
            "model.params.conditioner_config.params.emb_models.4.params.outdimm",
            "1",
            r"emb_models\.4\.params\.outd",
        ),
        (
            "model.params.conditioner_config.params.emb_models.1.inputkey",
            "1",
            "emb_models.1.inputkey: .*'input_key'",
        ),
        (
            "model.params.first_stage_config.params.ddconfig.chmult",
            "[1]",
            "ddconfig.chmult: unknown key.*'ch_mult'",
        ),
        (
            "model.params.first_stage_config.params.ddconfig.tanh_out",
            "true",
            "tanh_out: True is not supported",
        ),
        ("model.params.denoiser_config", "3", "model.params.denoiser_config: expected an entry"),
    ],
)
def test_a_mistake_is_named_with_its_path_and_the_nearest_known_name(key, value, message):
    with pytest.raises(ValueError, match=message):
        build_engine(with_value(key, value))


def test_a_missing_parameter_is_named():
    node = denoiser_node()
    del node["params"]["num_idx"]
    with pytest.raises(ValueError, match=r"denoiser.params: DiscreteDenoiser needs num_idx"):
        instantiate(node, "denoiser")
    cfg = load_config(CONFIGS["base"])
    del cfg.model.params.first_stage_config.params.ddconfig.ch
    with pytest.raises(ValueError, match="ddconfig: ch is missing"):
        build_engine(cfg)


def test_what_is_no_node_is_refused():
    for node in ({"params": {}}, {"target": "gm.engine.DiffusionEngine", "params": [1]}):
        with pytest.raises(ValueError, match="model: expected an entry with 'target'"):
            instantiate(OmegaConf.create(node), "model")


def test_keys_without_effect_are_logged_once_with_the_reason(caplog, monkeypatch):
    monkeypatch.setattr(config, "_logged", set())
    with caplog.at_level(logging.INFO, logger="gm.config"):
        build_engine(CONFIGS["base"])
        build_engine(CONFIGS["base"])
    lines = [r.getMessage() for r in caplog.records if "disable_first_stage_autocast" in r.getMessage()]
    assert lines == [
        "model.params.disable_first_stage_autocast in the config has no effect: "
        "the autoencoder computes in float32, and its decoder in bfloat16 with --ms_amp_level bf16."
    ]


def test_overrides_reach_into_sections_and_lists():
    key = "model.params.conditioner_config.params.emb_models.2.input_key"
    cfg = load_config(CONFIGS["base"], ["model.params.scale_factor=0.5", f"{key}=size", "optim.lr=1e-3"])
    assert cfg.model.params.scale_factor == 0.5
    assert cfg.model.params.conditioner_config.params.emb_models[2].input_key == "size"
    assert section(cfg, "optim", Optim).lr == 1e-3
    for wrong in ("lr", "=3", "optim.lr=[1"):
        with pytest.raises(ValueError, match="Override"):
            load_config(CONFIGS["base"], [wrong])


@pytest.mark.parametrize(
    "text, message",
    [
        ("model: [1, 2", "is not a YAML file"),
        ("- 1\n- 2\n", "holds no sections"),
        ("modle: {}\n", "unknown section 'modle'; the nearest known one is 'model'"),
    ],
)
def test_a_broken_file_is_refused(tmp_path, text, message):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_config(tmp_path / "a.yaml")


def test_a_missing_file_or_section_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.yaml"):
        load_config(tmp_path / "nowhere.yaml")
    (tmp_path / "a.yaml").write_text("optim: {lr: 1}\n")
    with pytest.raises(ValueError, match="no section 'model'"):
        build_engine(tmp_path / "a.yaml")


def test_a_section_is_a_checked_dataclass():
    cfg = OmegaConf.create({"optim": {"lr": 3, "milestones": [5], "name": "x"}})
    args = section(cfg, "optim", Optim)
    assert args == Optim(lr=3.0, milestones=[5], name="x") and isinstance(args.lr, float)
    assert section(OmegaConf.create({}), "optim", Optim) == Optim()
    with pytest.raises(ValueError, match="optim.lrr: unknown key; the nearest known one is 'lr'"):
        section(OmegaConf.create({"optim": {"lrr": 3}}), "optim", Optim)
    with pytest.raises(ValueError, match="optim.lr: .*'fast'"):
        section(OmegaConf.create({"optim": {"lr": "fast"}}), "optim", Optim)


@pytest.mark.parametrize("path", SHIPPED)
def test_shipped_configs_open_with_the_command_that_uses_them(path):
    opening = open(path).read().partition("\nmodel:")[0]
    assert all(line.startswith("#") or not line for line in opening.splitlines())
    assert "python " in opening and "--config configs/" in opening
    assert "model" in load_config(path)


def test_the_training_config_describes_the_same_model_as_the_sampling_config():
    training, sampling = (OmegaConf.to_container(load_config(SHIPPED[i]).model) for i in (2, 0))
    assert training["params"].pop("loss_fn_config")
    assert training == sampling


def test_the_training_config_has_flat_sections():
    args = section(load_config(TRAINING), "optim", Optim)
    assert args.lr > 0 and args.milestones == sorted(args.milestones)
