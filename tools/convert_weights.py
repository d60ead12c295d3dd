"""Convert SDXL weights: original .safetensors <-> MindSpore .ckpt <-> diffusers folder, base and refiner.

    python tools/convert_weights.py --src sd_xl_base_1.0.safetensors --dst sd_xl_base_1.0_ms.ckpt
    python tools/convert_weights.py --src sdxl_folder --dst sd_xl_base_1.0.safetensors --dtype fp16

What --dst becomes is told by its name: .safetensors, .ckpt, or, without such a suffix, a diffusers folder.
Every key and shape is checked against the config first. Tensors are converted one at a time, so memory
stays small, and values stay bit for bit what they were unless --dtype changes their type. The one exception
is logit_scale, which SDXL does not use and a diffusers folder cannot hold: coming back from one, it is ln
100, CLIP's bound for it.

Weights in the type that they will be computed with need not be read to be loaded, so that a run starts sooner:
--dtype bf16 for --ms_amp_level bf16, --dtype fp32 for a CPU otherwise, --dtype fp16 for Ascend.
"""

import argparse
import inspect
import json
import logging
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from gm import checkpoint, diffusers_layout, weight_files  # noqa: E402
from gm.atomic_file import atomic_file  # noqa: E402
from gm.bfloat16 import BFLOAT16  # noqa: E402
from gm.conditioning.embedders import OPEN_CLIP_WEIGHTS  # noqa: E402
from gm.conditioning.tokenizer import load_clip_tokenizer  # noqa: E402
from gm.config import instantiate, load_config  # noqa: E402
from gm.models.layers import file_layouts  # noqa: E402
from gm.targets import resolve  # noqa: E402

CONFIGS = {
    "the SDXL base": ROOT / "configs/inference/sd_xl_base.yaml",
    "the SDXL refiner": ROOT / "configs/inference/sd_xl_refiner.yaml",
}
DTYPES = {"keep": None, "fp16": np.float16, "bf16": BFLOAT16, "fp32": np.float32}
DIFFUSERS_VERSION = "0.30.0"  # whose form of config.json is written


def convert(src, dst, *, config=None, dtype="keep", overwrite=False):
    """Convert one model.

    Args:
        src: .safetensors, .ckpt or diffusers folder.
        dst: the same kinds, told by the suffix.
        config: YAML of the model; by default that of SDXL base or refiner, whichever the tensors' names say.
        dtype: "keep", "fp16", "bf16" or "fp32", of the floating-point tensors.
        overwrite: replace dst, or files in it.

    Raises:
        FileNotFoundError, ValueError: src is missing, damaged or of another model; dst exists; a value is too
            large for the type.
    """
    src, dst = Path(src), Path(dst)
    if src.resolve() == dst.resolve():
        raise ValueError(f"--src and --dst are both {src}.")
    occupied = any(dst.iterdir()) if dst.is_dir() else dst.exists()
    if occupied and not overwrite:
        raise ValueError(f"{dst} exists; give --overwrite to replace it.")
    tensors = checkpoint.read_weights(src)
    model = load_config(config or _config_for(tensors, src)).model
    expected = {name: layout.shape for name, layout in file_layouts(instantiate(model, "model")).items()}
    checkpoint.check_weights({name: t.shape for name, t in tensors.items()}, expected, src)
    full = checkpoint.with_unused({name: tensors[name] for name in expected})
    full = {name: tensors.get(name, tensor) for name, tensor in full.items()}
    full = {name: tensor.astype(DTYPES[dtype] or tensor.stored or tensor.dtype) for name, tensor in full.items()}
    if dst.suffix in (".safetensors", ".ckpt"):
        dst.parent.mkdir(parents=True, exist_ok=True)
        with tqdm(total=len(full), desc=dst.name, unit=" tensors") as bar:
            checkpoint.write_weights(dst, _counted(full, bar), metadata={"format": "pt"})
    else:
        _write_folder(dst, full, model)


def _config_for(tensors, src):
    kind = checkpoint.kind_of(tensors)
    if kind not in CONFIGS:
        raise ValueError(f"{src} is {kind or 'of an unknown kind'}, neither SDXL base nor SDXL refiner.")
    return CONFIGS[kind]


def _counted(tensors, bar):
    def count(values):
        bar.update()
        return values

    return {name: tensor.map(count) for name, tensor in tensors.items()}


def _write_folder(folder, tensors, model):
    network = _arguments(model.params.network_config)
    texts = [_arguments(e) for e in model.params.conditioner_config.params.emb_models if e.input_key == "txt"]
    depth = network["transformer_depth"]
    components = diffusers_layout.to_components(tensors)
    files = diffusers_layout.folder_configs(
        components,
        head_width=network["num_head_channels"],
        heads=[text["heads"] for text in texts],
        scale_factor=model.params.scale_factor,
        transformer_depth=[depth] * len(network["channel_mult"]) if isinstance(depth, int) else list(depth),
        version=DIFFUSERS_VERSION,
    )
    with tqdm(total=sum(map(len, components.values())), desc=folder.name, unit=" tensors") as bar:
        for component, found in components.items():
            path = folder / component / f"{diffusers_layout.FILE_STEM[component]}.safetensors"
            path.parent.mkdir(parents=True, exist_ok=True)
            weight_files.write_safetensors(path, _counted(found, bar), metadata={"format": "pt"})
    files = {name: json.dumps(content, indent=2) for name, content in files.items()}
    for text, name in zip(reversed(texts), ("tokenizer_2", "tokenizer"), strict=False):
        tokenizer = load_clip_tokenizer(None if text["version"] == OPEN_CLIP_WEIGHTS else text["version"])
        pad_token = "!" if name == "tokenizer_2" else tokenizer.eos_token  # "!" is id 0
        found = diffusers_layout.tokenizer_files(tokenizer, pad_token, text["max_length"])
        files.update({f"{name}/{file}": content for file, content in found.items()})
    # model_index.json, by which a folder is recognised, comes last.
    for name in sorted(files, key=lambda name: name == "model_index.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(folder / name) as file:
            file.write(files[name].encode("utf-8"))


def _arguments(node):
    """A node's arguments, those that are left out by their defaults."""
    defaults = inspect.signature(resolve(node.target, "target")).parameters
    return {name: p.default for name, p in defaults.items()} | dict(node.params)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--src", required=True, help=".safetensors, MindSpore .ckpt or diffusers folder")
    parser.add_argument("--dst", required=True, help="where to; its suffix tells the format")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="keep", help="type of the weights (default: as they are)"
    )
    parser.add_argument(
        "--config", help="YAML of the model (default: SDXL base or refiner, as the weights say)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what is at --dst")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        convert(args.src, args.dst, config=args.config, dtype=args.dtype, overwrite=args.overwrite)
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")


if __name__ == "__main__":
    main()
