"""Where SDXL's tensors are in a diffusers folder, and the folder's other files.

A folder has a component a network (unet, vae, text_encoder, text_encoder_2), each with its own names.
Modules are paired in tables, original name and diffusers name, which are read in either direction; what is
not in a table has one name in both. Some tensors also differ in form: OpenCLIP packs query, key and value
into one (in_proj), its text_projection is transposed, its position table is a parameter of its own, and the
autoencoder's attention is a 1x1 convolution where diffusers has a Linear.
"""

import json
import re
from pathlib import Path

import numpy as np

from gm.weight_files import LazyTensor, open_weights

UNET, VAE, TEXT, TEXT_2 = "unet", "vae", "text_encoder", "text_encoder_2"
FILE_STEM = {UNET: "diffusion_pytorch_model", VAE: "diffusion_pytorch_model", TEXT: "model", TEXT_2: "model"}

_UNET_MODULES = [
    ("time_embed.0", "time_embedding.linear_1"),
    ("time_embed.2", "time_embedding.linear_2"),
    ("label_emb.0.0", "add_embedding.linear_1"),
    ("label_emb.0.2", "add_embedding.linear_2"),
    ("input_blocks.0.0", "conv_in"),
    ("out.0", "conv_norm_out"),
    ("out.2", "conv_out"),
]
_UNET_RES_BLOCK = [
    ("in_layers.0", "norm1"),
    ("in_layers.2", "conv1"),
    ("emb_layers.1", "time_emb_proj"),
    ("out_layers.0", "norm2"),
    ("out_layers.3", "conv2"),
    ("skip_connection", "conv_shortcut"),
]
_VAE_RES_BLOCK = [(n, n) for n in ("norm1", "conv1", "norm2", "conv2")] + [("nin_shortcut", "conv_shortcut")]
_VAE_ATTENTION = [
    ("norm", "group_norm"),
    ("q", "to_q"),
    ("k", "to_k"),
    ("v", "to_v"),
    ("proj_out", "to_out.0"),
]
# Attention of the autoencoder in folders written before diffusers 0.17.
_OLD_VAE_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_TEXT_2_LAYER = [
    ("ln_1", "layer_norm1"),
    ("ln_2", "layer_norm2"),
    ("mlp.c_fc", "mlp.fc1"),
    ("mlp.c_proj", "mlp.fc2"),
    ("attn.out_proj", "self_attn.out_proj"),
]


def _nested(original, diffusers, pairs):
    return [(f"{original}.{a}", f"{diffusers}.{b}") for a, b in pairs]


def unet_modules(levels, res_blocks, attention_levels):
    """Pairs of module names of a UNet.

    Args:
        levels: entries of channel_mult.
        res_blocks: ResBlocks a level on the way down.
        attention_levels: the levels with transformers.
    """
    pairs = list(_UNET_MODULES)
    per_level = res_blocks + 1
    for level in range(levels):
        down, up = f"down_blocks.{level}", f"up_blocks.{levels - 1 - level}"
        for i in range(res_blocks):
            block = f"input_blocks.{1 + level * per_level + i}"
            pairs += _nested(f"{block}.0", f"{down}.resnets.{i}", _UNET_RES_BLOCK)
            pairs.append((f"{block}.1", f"{down}.attentions.{i}"))
        pairs.append((f"input_blocks.{(level + 1) * per_level}.0.op", f"{down}.downsamplers.0.conv"))
        for i in range(per_level):
            block = f"output_blocks.{(levels - 1 - level) * per_level + i}"
            pairs += _nested(f"{block}.0", f"{up}.resnets.{i}", _UNET_RES_BLOCK)
            pairs.append((f"{block}.1", f"{up}.attentions.{i}"))
        upsampler = f"{block}.{2 if level in attention_levels else 1}.conv"
        pairs.append((upsampler, f"{up}.upsamplers.0.conv"))
    pairs += _nested("middle_block.0", "mid_block.resnets.0", _UNET_RES_BLOCK)
    pairs += _nested("middle_block.2", "mid_block.resnets.1", _UNET_RES_BLOCK)
    pairs.append(("middle_block.1", "mid_block.attentions.0"))
    return pairs


def vae_modules(levels, res_blocks):
    """Pairs of module names of an autoencoder.

    Args:
        levels: entries of ch_mult.
        res_blocks: ResBlocks a level of the encoder.
    """
    pairs = []
    for half in ("encoder", "decoder"):
        mid = f"{half}.mid"
        pairs += _nested(f"{mid}.block_1", f"{half}.mid_block.resnets.0", _VAE_RES_BLOCK)
        pairs += _nested(f"{mid}.block_2", f"{half}.mid_block.resnets.1", _VAE_RES_BLOCK)
        pairs += _nested(f"{mid}.attn_1", f"{half}.mid_block.attentions.0", _VAE_ATTENTION)
        pairs.append((f"{half}.norm_out", f"{half}.conv_norm_out"))
    for level in range(levels):
        down, up = f"encoder.down_blocks.{level}", f"decoder.up_blocks.{levels - 1 - level}"
        for i in range(res_blocks):
            pairs += _nested(f"encoder.down.{level}.block.{i}", f"{down}.resnets.{i}", _VAE_RES_BLOCK)
        for i in range(res_blocks + 1):
            pairs += _nested(f"decoder.up.{level}.block.{i}", f"{up}.resnets.{i}", _VAE_RES_BLOCK)
        pairs.append((f"encoder.down.{level}.downsample.conv", f"{down}.downsamplers.0.conv"))
        pairs.append((f"decoder.up.{level}.upsample.conv", f"{up}.upsamplers.0.conv"))
    return pairs


def text_2_modules(layers):
    """Pairs of module names of the OpenCLIP text encoder, without what differs in form."""
    pairs = [
        ("token_embedding", "text_model.embeddings.token_embedding"),
        ("ln_final", "text_model.final_layer_norm"),
    ]
    for i in range(layers):
        pairs += _nested(f"transformer.resblocks.{i}", f"text_model.encoder.layers.{i}", _TEXT_2_LAYER)
    return pairs


def _rename(name, table):
    """The name with its longest known module prefix replaced."""
    parts = name.split(".")
    for n in range(len(parts) - 1, 0, -1):
        prefix = ".".join(parts[:n])
        if prefix in table:
            return ".".join([table[prefix], *parts[n:]])
    return name


def _count(names, pattern):
    """One more than the largest number that a pattern catches."""
    return 1 + max((int(m[1]) for name in names if (m := re.match(pattern, name))), default=-1)


def _numbers(names, pattern):
    return {int(m[1]) for name in names if (m := re.match(pattern, name))}


# ---------------------------------------------------------------- diffusers -> original


def read_folder(folder):
    """The tensors of a diffusers folder under their original names.

    Returns:
        dict of name -> LazyTensor.

    Raises:
        FileNotFoundError, ValueError: no SDXL folder, a missing or damaged file.
    """
    folder = Path(folder)
    if not (folder / UNET).is_dir():
        raise ValueError(
            f"{folder} is a folder without '{UNET}/'; a diffusers model has {', '.join(FILE_STEM)}."
        )
    components = {name: _read_component(folder / name) for name in FILE_STEM if (folder / name).is_dir()}
    number = 1 if TEXT in components else 0
    tensors = {}
    for component, found in components.items():
        prefix, convert = {
            UNET: ("model.diffusion_model", _unet_to_original),
            VAE: ("first_stage_model", _vae_to_original),
            TEXT: ("conditioner.embedders.0.transformer", _text_to_original),
            TEXT_2: (f"conditioner.embedders.{number}.model", _text_2_to_original),
        }[component]
        tensors.update({f"{prefix}.{name}": tensor for name, tensor in convert(found).items()})
    return tensors


def _read_component(folder):
    stem = FILE_STEM[folder.name]
    for variant in ("", ".fp16"):
        index = folder / f"{stem}.safetensors.index{variant}.json"
        single = folder / f"{stem}{variant}.safetensors"
        if single.is_file():
            return open_weights(single)
        if index.is_file():
            try:
                files = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
                shards = {name: open_weights(folder / Path(name).name) for name in set(files.values())}
                return {name: shards[file][name] for name, file in files.items()}
            except (ValueError, KeyError, TypeError, AttributeError) as e:
                raise ValueError(f"{index} does not fit the files beside it: {e!r}.") from e
    raise FileNotFoundError(f"{folder} holds no {stem}.safetensors (other formats are not read).")


def _unet_to_original(found):
    attention = _numbers(found, r"down_blocks\.(\d+)\.attentions\.")
    pairs = unet_modules(
        _count(found, r"down_blocks\.(\d+)\."), _count(found, r"down_blocks\.0\.resnets\.(\d+)\."), attention
    )
    table = {b: a for a, b in pairs}
    return {_rename(name, table): tensor for name, tensor in found.items()}


def _vae_to_original(found):
    pairs = vae_modules(
        _count(found, r"encoder\.down_blocks\.(\d+)\."),
        _count(found, r"encoder\.down_blocks\.0\.resnets\.(\d+)\."),
    )
    table = {b: a for a, b in pairs}
    for a, b in _OLD_VAE_ATTENTION.items():
        table.update(
            {name.replace(b, a): table[name] for name in list(table) if name.endswith(f"attentions.0.{b}")}
        )
    tensors = {}
    for name, tensor in found.items():
        name = _rename(name, table)
        if ".attn_1." in name and len(tensor.shape) == 2:
            tensor = _reshaped(tensor, (*tensor.shape, 1, 1))
        tensors[name] = tensor
    return tensors


def _text_to_original(found):
    # transformers 5 may leave the prefix out
    return {name if name.startswith("text_model.") else f"text_model.{name}": t for name, t in found.items()}


def _text_2_to_original(found):
    found = {
        n if n.startswith(("text_model.", "text_projection")) else f"text_model.{n}": t
        for n, t in found.items()
    }
    layers = _count(found, r"text_model\.encoder\.layers\.(\d+)\.")
    table = {b: a for a, b in text_2_modules(layers)}
    tensors = {}
    for i in range(layers):
        for kind in ("weight", "bias"):
            names = [f"text_model.encoder.layers.{i}.self_attn.{p}_proj.{kind}" for p in "qkv"]
            if all(name in found for name in names):
                packed = _concatenated([found.pop(name) for name in names])
                tensors[f"transformer.resblocks.{i}.attn.in_proj_{kind}"] = packed
    for name, tensor in found.items():
        if name == "text_projection.weight":
            tensors["text_projection"] = _transposed(tensor)
        elif name == "text_model.embeddings.position_embedding.weight":
            tensors["positional_embedding"] = tensor
        else:
            tensors[_rename(name, table)] = tensor
    return tensors


# ---------------------------------------------------------------- original -> diffusers


def to_components(tensors):
    """The tensors of an original SDXL file as component -> name -> LazyTensor of a diffusers folder.

    logit_scale and position_ids have no place in a folder, and are left out.
    """
    text_2 = next(name.rpartition(".")[0] for name in tensors if name.endswith(".model.text_projection"))

    def under(prefix):
        return {name[len(prefix) + 1 :]: t for name, t in tensors.items() if name.startswith(f"{prefix}.")}

    components = {
        UNET: _unet_to_diffusers(under("model.diffusion_model")),
        VAE: _vae_to_diffusers(under("first_stage_model")),
        TEXT: {
            name: tensor
            for name, tensor in under("conditioner.embedders.0.transformer").items()
            if not name.endswith("position_ids")
        },
        TEXT_2: _text_2_to_diffusers(under(text_2)),
    }
    return {name: found for name, found in components.items() if found}


def _unet_structure(found):
    """(levels, res_blocks, attention_levels) of a UNet with original names."""
    res_blocks = min(_numbers(found, r"input_blocks\.(\d+)\.0\.op\.")) - 1
    levels = _count(found, r"input_blocks\.(\d+)\.") // (res_blocks + 1)
    blocks = _numbers(found, r"input_blocks\.(\d+)\.1\.")
    return levels, res_blocks, sorted({(block - 1) // (res_blocks + 1) for block in blocks})


def _unet_to_diffusers(found):
    table = dict(unet_modules(*_unet_structure(found)))
    return {_rename(name, table): tensor for name, tensor in found.items()}


def _vae_structure(found):
    return _count(found, r"encoder\.down\.(\d+)\."), _count(found, r"encoder\.down\.0\.block\.(\d+)\.")


def _vae_to_diffusers(found):
    table = dict(vae_modules(*_vae_structure(found)))
    tensors = {}
    for name, tensor in found.items():
        if ".attn_1." in name and len(tensor.shape) == 4:
            tensor = _reshaped(tensor, tensor.shape[:2])
        tensors[_rename(name, table)] = tensor
    return tensors


def _text_2_to_diffusers(found):
    table = dict(text_2_modules(_count(found, r"transformer\.resblocks\.(\d+)\.")))
    tensors = {}
    for name, tensor in found.items():
        if match := re.fullmatch(r"transformer\.resblocks\.(\d+)\.attn\.in_proj_(weight|bias)", name):
            for i, projection in enumerate("qkv"):
                at = f"text_model.encoder.layers.{match[1]}.self_attn.{projection}_proj.{match[2]}"
                tensors[at] = _third(tensor, i)
        elif name == "text_projection":
            tensors["text_projection.weight"] = _transposed(tensor)
        elif name == "positional_embedding":
            tensors["text_model.embeddings.position_embedding.weight"] = tensor
        elif name != "logit_scale":
            tensors[_rename(name, table)] = tensor
    return tensors


def _reshaped(tensor, shape):
    return tensor.map(lambda values: values.reshape(shape), shape)


def _transposed(tensor):
    return tensor.map(lambda values: np.ascontiguousarray(values.T), tensor.shape[::-1])


def _third(tensor, i):
    rows = tensor.shape[0] // 3
    return tensor.map(lambda values: values[i * rows : (i + 1) * rows], (rows, *tensor.shape[1:]))


def _concatenated(tensors):
    first = tensors[0]
    shape = (sum(t.shape[0] for t in tensors), *first.shape[1:])
    return LazyTensor(shape, first.dtype, lambda: np.concatenate([t.read() for t in tensors]), stored=first.stored)


# ---------------------------------------------------------------- the folder's other files


def folder_configs(components, *, head_width, heads, scale_factor, transformer_depth, version):
    """The settings in a folder: relative path -> content of a JSON file.

    Sizes are read off the tensors; the arguments are what tensors do not tell.

    Args:
        components: from `to_components`.
        head_width: num_head_channels of the UNet.
        heads: attention heads of each text encoder; a refiner has one encoder.
        scale_factor: of the latents.
        transformer_depth: transformer blocks a level, as in SGM's YAML.
        version: of diffusers whose format this is.
    """
    unet = {name: tensor.shape for name, tensor in components[UNET].items()}
    levels = _count(unet, r"down_blocks\.(\d+)\.")
    widths = [unet[f"down_blocks.{level}.resnets.0.conv2.weight"][0] for level in range(levels)]
    attention = _numbers(unet, r"down_blocks\.(\d+)\.attentions\.")
    kinds = ["CrossAttn" if level in attention else "" for level in range(levels)]
    vae = {name: tensor.shape for name, tensor in components[VAE].items()}
    vae_levels = _count(vae, r"encoder\.down_blocks\.(\d+)\.")
    configs = {
        "unet/config.json": {
            "_class_name": "UNet2DConditionModel",
            "_diffusers_version": version,
            "sample_size": 128,
            "in_channels": unet["conv_in.weight"][1],
            "out_channels": unet["conv_out.weight"][0],
            "block_out_channels": widths,
            "layers_per_block": _count(unet, r"down_blocks\.0\.resnets\.(\d+)\."),
            "down_block_types": [f"{kind}DownBlock2D" for kind in kinds],
            "mid_block_type": "UNetMidBlock2DCrossAttn",
            "up_block_types": [f"{kind}UpBlock2D" for kind in reversed(kinds)],
            "transformer_layers_per_block": list(transformer_depth),
            "attention_head_dim": [width // head_width for width in widths],  # the number of heads, in SDXL
            "cross_attention_dim": unet["mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"][1],
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": unet["add_embedding.linear_1.weight"][1],
        },
        "vae/config.json": {
            "_class_name": "AutoencoderKL",
            "_diffusers_version": version,
            "sample_size": 1024,
            "in_channels": vae["encoder.conv_in.weight"][1],
            "out_channels": vae["decoder.conv_out.weight"][0],
            "latent_channels": vae["post_quant_conv.weight"][1],
            "block_out_channels": [
                vae[f"encoder.down_blocks.{level}.resnets.0.conv2.weight"][0] for level in range(vae_levels)
            ],
            "layers_per_block": _count(vae, r"encoder\.down_blocks\.0\.resnets\.(\d+)\."),
            "down_block_types": ["DownEncoderBlock2D"] * vae_levels,
            "up_block_types": ["UpDecoderBlock2D"] * vae_levels,
            "act_fn": "silu",
            "norm_num_groups": 32,
            "scaling_factor": scale_factor,
            "force_upcast": True,
        },
        "scheduler/scheduler_config.json": {
            "_class_name": "EulerDiscreteScheduler",
            "_diffusers_version": version,
            "num_train_timesteps": 1000,
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "beta_schedule": "scaled_linear",
            "prediction_type": "epsilon",
            "timestep_spacing": "leading",
            "steps_offset": 1,
        },
        f"{TEXT_2}/config.json": _text_config(
            components[TEXT_2], "CLIPTextModelWithProjection", "gelu", heads[-1]
        ),
        "model_index.json": _model_index(TEXT not in components, version),
    }
    if TEXT in components:
        configs[f"{TEXT}/config.json"] = _text_config(
            components[TEXT], "CLIPTextModel", "quick_gelu", heads[0]
        )
    return configs


def _text_config(tensors, architecture, activation, heads):
    shapes = {name.removeprefix("text_model."): tensor.shape for name, tensor in tensors.items()}
    vocab_size, width = shapes["embeddings.token_embedding.weight"]
    return {
        "architectures": [architecture],
        "model_type": "clip_text_model",
        "vocab_size": vocab_size,
        "hidden_size": width,
        "intermediate_size": shapes["encoder.layers.0.mlp.fc1.weight"][0],
        "num_hidden_layers": _count(shapes, r"encoder\.layers\.(\d+)\."),
        "num_attention_heads": heads,
        "max_position_embeddings": shapes["embeddings.position_embedding.weight"][0],
        "projection_dim": shapes.get("text_projection.weight", (width,))[0],
        "hidden_act": activation,
        "layer_norm_eps": 1e-05,
        # The end of text is CLIP's last token. (With the 2 of the published folder, pooling takes the largest
        # id, which goes wrong once words are added behind it.)
        "bos_token_id": vocab_size - 2,
        "eos_token_id": vocab_size - 1,
        "pad_token_id": 1,
    }


def _model_index(is_refiner, version):
    absent = [None, None]
    index = {
        "_class_name": "StableDiffusionXLImg2ImgPipeline" if is_refiner else "StableDiffusionXLPipeline",
        "_diffusers_version": version,
        "force_zeros_for_empty_prompt": not is_refiner,
        "scheduler": ["diffusers", "EulerDiscreteScheduler"],
        "text_encoder": absent if is_refiner else ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer": absent if is_refiner else ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "image_encoder": absent,
        "feature_extractor": absent,
    }
    return {**index, "requires_aesthetics_score": True} if is_refiner else index


def tokenizer_files(tokenizer, pad_token, max_length):
    """The files of a tokenizer's folder: name -> text.

    Args:
        tokenizer: transformers' CLIPTokenizer.
        pad_token: what prompts are padded with.
        max_length: tokens in a prompt.
    """
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    tokens = {
        "bos_token": tokenizer.bos_token,
        "eos_token": tokenizer.eos_token,
        "unk_token": tokenizer.eos_token,
    }
    tokens["pad_token"] = pad_token
    config = {
        **tokens,
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": max_length,
        "do_lower_case": True,
        "add_prefix_space": False,
        "errors": "replace",
    }
    return {
        "vocab.json": json.dumps(model["vocab"], ensure_ascii=False),
        "merges.txt": "\n".join(["#version: 0.2", *merges, ""]),
        "special_tokens_map.json": json.dumps(tokens, indent=2),
        "tokenizer_config.json": json.dumps(config, indent=2),
    }
