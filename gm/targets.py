"""What the `target` strings of SDXL's YAML files mean here, and which of their keys mean nothing here.

Stability's files (packages `sgm` and, earlier, `ldm`) and mindone's (`gm`) name the same classes by
different paths. Classes are imported when they are asked for.
"""

import difflib
import importlib

_DIFFUSION = "modules.diffusionmodules"

# our module -> class -> other paths to it, without their package's name
_MODULES = {
    "gm.engine": {"DiffusionEngine": ["models.diffusion"]},
    "gm.models.unet": {"UNetModel": [f"{_DIFFUSION}.openaimodel"]},
    "gm.models.autoencoder": {
        "AutoencoderKL": ["models.autoencoder", "models.autoencoder.AutoencoderKLInferenceWrapper"],
    },
    "gm.conditioning.conditioner": {
        "GeneralConditioner": ["modules", "modules.encoders.modules", "modules.embedders.modules"],
    },
    "gm.conditioning.embedders": {
        name: ["modules.encoders.modules", "modules.embedders.modules"]
        for name in ("FrozenCLIPEmbedder", "FrozenOpenCLIPEmbedder2", "ConcatTimestepEmbedderND")
    },
    "gm.diffusion.denoiser": {
        **{name: [f"{_DIFFUSION}.denoiser"] for name in ("Denoiser", "DiscreteDenoiser")},
        **{
            name: [f"{_DIFFUSION}.denoiser_scaling"]
            for name in ("EpsScaling", "VScaling", "VScalingWithEDMcNoise", "EDMScaling")
        },
        **{
            name: [f"{_DIFFUSION}.denoiser_weighting", f"{_DIFFUSION}.loss_weighting"]
            for name in ("UnitWeighting", "EpsWeighting", "VWeighting", "EDMWeighting")
        },
    },
    "gm.diffusion.discretizer": {
        name: [f"{_DIFFUSION}.discretizer"]
        for name in (
            "LegacyDDPMDiscretization", "DiffusersDDPMDiscretization", "EDMDiscretization",
            "LCMDiscretization",
        )
    },
    "gm.diffusion.loss": {
        "StandardDiffusionLoss": [f"{_DIFFUSION}.loss"],
        "DiscreteSampling": [f"{_DIFFUSION}.sigma_sampling"],
        "EDMSampling": [f"{_DIFFUSION}.sigma_sampling"],
    },
    "gm.diffusion.guiders": {
        **{name: [f"{_DIFFUSION}.guiders"] for name in ("IdentityGuider", "VanillaCFG")},
        **{n: [f"{_DIFFUSION}.sampling_utils"] for n in ("NoDynamicThresholding", "DynamicThresholding")},
    },
    "gm.diffusion.samplers": {
        name: [f"{_DIFFUSION}.sampling", f"{_DIFFUSION}.sampler"]
        for name in (
            "EulerEDMSampler", "HeunEDMSampler", "EulerAncestralSampler", "DPMPP2SAncestralSampler",
            "DPMPP2MSampler", "DPMPP2MSDESampler", "LinearMultistepSampler", "LCMSampler",
        )
    },
}  # fmt: skip

PACKAGES = ("sgm", "gm", "ldm")


def _alias_table():
    table = {}
    for module, classes in _MODULES.items():
        for name, paths in classes.items():
            table[f"{module}.{name}"] = (module, name)
            for path in paths:
                full = path if path.rpartition(".")[2][0].isupper() else f"{path}.{name}"
                table.update({f"{package}.{full}": (module, name) for package in PACKAGES})
    return table


_TABLE = _alias_table()


def resolve(target, path):
    """The class that a target string names.

    Args:
        target: for example "sgm.models.diffusion.DiffusionEngine".
        path: where it stands in the YAML, for the error.

    Raises:
        ValueError: unknown target; names the nearest known one.
    """
    if target not in _TABLE:
        raise ValueError(f"{path}: unknown target '{target}'{nearest(str(target), _TABLE)}.")
    module, name = _TABLE[target]
    return getattr(importlib.import_module(module), name)


def nearest(name, known):
    """ "; did you mean 'x'?" for an error message, or what there is when nothing is near."""
    near = difflib.get_close_matches(name, known, n=1)
    if near:
        return f"; the nearest known one is '{near[0]}'"
    return f"; known are {', '.join(sorted(known))}" if len(known) <= 40 else ""


ANYTHING = object()
_OTHER_RUN = "it belongs to the other project's way of running"
_OTHER_UNET = "only SDXL's form of the network is built"
_FP32 = "the autoencoder computes in float32, and its decoder in bfloat16 with --ms_amp_level bf16"
_FROZEN = "all weights but the learned rows are frozen"
_SEPARATE = "weights are loaded by --weight"
_NO_DROP = "captions are not dropped when a word is learned"
_BY_DEVICE = "the form of attention is chosen by device"

_EMBEDDER = {
    "is_trainable": (ANYTHING, _FROZEN),
    "freeze": (ANYTHING, _FROZEN),
    "ucg_rate": (ANYTHING, _NO_DROP),
    "legacy_ucg_value": (ANYTHING, _NO_DROP),
    "device": (ANYTHING, _OTHER_RUN),
    "pretrained": (ANYTHING, _SEPARATE),
    "require_pretrained": (ANYTHING, _SEPARATE),
}

# class -> key -> (the values that it may have, or ANYTHING; why it has no effect here).
# Only keys that the class does not take itself are looked up; any other one is an error.
IGNORED = {
    "DiffusionEngine": {
        "disable_first_stage_autocast": (ANYTHING, _FP32),
        "disable_first_stage_amp": (ANYTHING, _FP32),
        "en_and_decode_n_samples_a_time": (ANYTHING, _OTHER_RUN),
        "ckpt_path": (ANYTHING, _SEPARATE),
        "use_ema": (ANYTHING, "the learned rows are not averaged"),
        "ema_decay_rate": (ANYTHING, "the learned rows are not averaged"),
        "base_learning_rate": (ANYTHING, "the optimizer stands in the section 'optim'"),
        "optimizer_config": (ANYTHING, "the optimizer stands in the section 'optim'"),
        "scheduler_config": (ANYTHING, "the learning rate's schedule stands in the section 'optim'"),
        "network_wrapper": (ANYTHING, _OTHER_RUN),
        "compile_model": (ANYTHING, _OTHER_RUN),
        "input_key": (ANYTHING, _OTHER_RUN),
        "log_keys": (ANYTHING, _OTHER_RUN),
        "no_cond_log": (ANYTHING, _OTHER_RUN),
        "monitor": (ANYTHING, _OTHER_RUN),
        "load_first_stage_model": ([True], "the autoencoder is always needed"),
        "load_conditioner": ([True], "the text encoders are always needed"),
        "latents_mean": ([None], "latents are scaled by scale_factor alone"),
        "latents_std": ([None], "latents are scaled by scale_factor alone"),
    },
    "UNetModel": {
        "use_checkpoint": (ANYTHING, "use_recompute is this project's name for it"),
        "offload_to_cpu": (ANYTHING, _OTHER_RUN),
        "use_fp16": (ANYTHING, "precision is an option of the command, --ms_amp_level"),
        "spatial_transformer_attn_type": (ANYTHING, _BY_DEVICE),
        "legacy": (ANYTHING, "num_head_channels alone gives the width of a head"),
        "image_size": (ANYTHING, "the network takes any size"),
        "use_spatial_transformer": ([True], _OTHER_UNET),
        "conv_resample": ([True], _OTHER_UNET),
        "dims": ([2], _OTHER_UNET),
        "dropout": ([0], _OTHER_UNET),
        "use_scale_shift_norm": ([False], _OTHER_UNET),
        "resblock_updown": ([False], _OTHER_UNET),
        "use_new_attention_order": ([False], _OTHER_UNET),
        "num_heads": ([-1], _OTHER_UNET),
        "num_heads_upsample": ([-1], _OTHER_UNET),
        "n_embed": ([None], _OTHER_UNET),
        "disable_self_attentions": ([None], _OTHER_UNET),
        "disable_middle_self_attn": ([False], _OTHER_UNET),
        "num_attention_blocks": ([None], _OTHER_UNET),
        "transformer_depth_middle": ([None], _OTHER_UNET),
    },
    "AutoencoderKL": {
        "monitor": (ANYTHING, _OTHER_RUN),
        "lossconfig": (ANYTHING, "the autoencoder is not trained here"),
        "ckpt_path": (ANYTHING, _SEPARATE),
        "ckpt_engine": (ANYTHING, _SEPARATE),
        "ignore_keys": (ANYTHING, _SEPARATE),
        "image_key": (ANYTHING, _OTHER_RUN),
        "input_key": (ANYTHING, _OTHER_RUN),
        "colorize_nlabels": (ANYTHING, _OTHER_RUN),
    },
    "FrozenCLIPEmbedder": {
        **_EMBEDDER,
        "always_return_pooled": ([False], "SDXL's pooled vector is encoder 2's"),
    },
    "FrozenOpenCLIPEmbedder2": {
        **_EMBEDDER,
        "arch": (
            ["ViT-bigG-14", "ViT-bigG-14-Text"],
            "a smaller encoder has its width, layers and heads given",
        ),
        "always_return_pooled": ([True], "the pooled vector is always returned"),
        "legacy": ([False], "both the penultimate state and the pooled vector are returned"),
    },
    "ConcatTimestepEmbedderND": _EMBEDDER,
    # not a class of its own: the mapping that AutoencoderKL takes
    "ddconfig": {
        "attn_type": (ANYTHING, _BY_DEVICE),
        "decoder_attn_dtype": (ANYTHING, _FP32),
        "resolution": (ANYTHING, "the autoencoder takes any size"),
        "resamp_with_conv": ([True], "resizing always has a convolution"),
        "use_linear_attn": ([False], "attention is always exact"),
        "tanh_out": ([False], "pixels are not squashed"),
    },
}
BESIDE_PARAMS = ("input_key",)  # arguments that stand beside target and params, in entries of emb_models
DDCONFIG = ("ch", "ch_mult", "num_res_blocks", "in_channels", "out_ch", "z_channels")
DDCONFIG_OPTIONAL = ("double_z", "attn_resolutions", "dropout", "norm_num_groups")

IGNORED_SECTIONS = {
    "version": "the model is recognised by its weights",
    "lightning": _OTHER_RUN,
}

# ---------------------------------------------------------------- mindone's sections optim and data

OPTIMIZERS = ("mindspore.nn.AdamWeightDecay", "mindspore.nn.AdamW", "torch.optim.AdamW")
OPTIMIZER_KEYS = ("beta1", "beta2", "eps", "weight_decay")
# class -> its parameter -> ours; None: no effect
SCHEDULERS = {
    "MultiStepLR": {"milestones": "milestones", "gamma": "gamma", "verbose": None},
    "LambdaWarmUpScheduler": {"warm_up_steps": "warmup_steps"},
}
_FIT = "pictures are resized to cover target_size and cropped; data.crop and data.flip say how"
_STREAM = "pictures are read and encoded once, before the first step"
IGNORED_DATA = {
    "num_parallel_workers": _STREAM,
    "python_multiprocessing": _STREAM,
    "drop_remainder": "batches have no end",
    "shuffle": "every epoch is shuffled",
    "transforms": _FIT,
    "batched_transforms": _FIT,
}
