r"""Draw pictures from prompts, with words that were learned.

    python demo/sampling_without_streamlit.py --task txt2img \
        --config configs/training/sd_xl_base_finetune_textual_inversion.yaml \
        --weight checkpoints/sd_xl_base_1.0_ms.ckpt \
        --textual_inversion_weight runs/cat_toy/SD-XL-base-1.0_3000_ti.ckpt \
        --prompt "a <cat-toy> backpack" --device_target Ascend --num_cols 4

Each picture becomes a PNG under --save_path, with prompt, seed and settings in its metadata, beside a grid of
all. A prompt's first picture has the seed --seed, the next ones count up; drawn alone, a seed gives the same.
"""

import argparse
import logging
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone is enough: gm need not be installed

from gm import sampling  # noqa: E402
from gm.checkpoint import load_weights, open_fitting  # noqa: E402
from gm.config import build_engine, load_config  # noqa: E402
from gm.data.images import read_picture  # noqa: E402
from gm.models.layers import parameter_dtype  # noqa: E402
from gm.models.native import use_flash_attention  # noqa: E402
from gm.runtime import add_runtime_flags, describe, flag, runtime_args, start_runtime  # noqa: E402

logger = logging.getLogger("sampling")


def main(argv=None):
    """Run the command; returns the paths of the pictures and, last, of the grid."""
    args = parse_args(argv)
    check(args)
    runtime = start_runtime(runtime_args(args))
    logger.info(describe(runtime, runtime_args(args)))

    # 1. What to draw. All that can be wrong with it is found here and in 2, before weights are loaded.
    config = load_config(args.config)
    prompts = sampling.read_prompts(args.prompt)
    picture = read_picture(args.img)[0] if args.img else None
    settings = sampling_args(args, config, picture)
    part = sampling.Part(
        strength=args.strength if args.img else 1.0,
        stop=args.stage2strength if args.add_pipeline and args.finish_denoising else 0.0,
    )
    sampling.num_steps(settings, part)

    # 2. A frozen SDXL, and words that were learned for it. Without weights, a network takes no memory.
    engine = build(config, args, runtime)
    if args.add_pipeline:
        refiner = build(load_config(args.pipeline_config), args, runtime)
        open_fitting(refiner, args.pipeline_weight)
    noise = read_noise(args, sampling.latent_shape(engine, settings))
    files = args.textual_inversion_weight
    words = sampling.read_words(
        engine.conditioner, files, tokens=args.placeholder_token, num_vectors=args.num_vectors
    )
    load_weights(engine, args.weight)
    sampling.add_words(engine.conditioner, words)
    sampling.warn_about_words(engine.conditioner, [*prompts, args.negative_prompt])

    # 3. From noise, or from a picture, to latents: a row of the grid at a time.
    if picture:
        part = replace(part, init=sampling.encode_picture(engine, picture, settings))
    rows = sampling.draw(
        engine, prompts, settings, seed=args.seed, num_rows=args.num_rows, num_cols=args.num_cols, part=part,
        first_noise=noise,
    )  # fmt: skip

    # 4. The refiner goes the last part of the way. In memory it takes the place of the base.
    if args.add_pipeline:
        rows = list(rows)
        engine = refiner
        load_weights(engine, args.pipeline_weight)
        sampling.add_words(engine.conditioner, words)
        rows = sampling.refine(
            engine, rows, settings, strength=args.stage2strength, add_noise=not args.finish_denoising
        )

    # 5. From latents to pictures, saved as they come.
    return save(args, settings, rows, engine)


def build(config, args, runtime):
    use_flash_attention(args.flash_attention)
    with parameter_dtype(runtime.dtype):
        return build_engine(config)


def save(args, settings, rows, engine):
    folder = Path(args.save_path)
    number = sampling.next_number(folder)
    made_with = {"task": args.task, "weight": Path(args.weight).name}
    made_with["words"] = [Path(path).name for path in args.textual_inversion_weight]
    if args.img:
        made_with |= {"img": Path(args.img).name, "strength": args.strength}
    if args.add_pipeline:
        made_with |= {"refiner": Path(args.pipeline_weight).name, "stage2strength": args.stage2strength}
        made_with["finish_denoising"] = args.finish_denoising

    pictures, paths = [], []
    for row in rows:
        for seed, pixels in zip(row.seeds, sampling.decode(engine, row.latents), strict=True):
            paths.append(folder / f"{number:04d}_{len(paths) + 1:02d}_seed{seed}.png")
            sampling.save_png(paths[-1], pixels, sampling.png_text(row.prompt, seed, settings, made_with))
            pictures.append(pixels)
    paths.append(folder / f"{number:04d}_grid.png")
    grid = sampling.make_grid(pictures, args.num_cols)
    sampling.save_png(paths[-1], grid, sampling.png_text(args.prompt, args.seed, settings, made_with))
    logger.info("%d pictures and %s", len(pictures), paths[-1])
    return paths


def read_noise(args, shape):
    """The array of --init_latent_path as (pictures of a prompt, channels, h, w), or None."""
    if args.init_latent_path is None:
        return None
    flag = f"--init_latent_path {args.init_latent_path}"
    try:
        noise = np.load(args.init_latent_path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{flag} is no .npy file of numbers: {error}") from error
    wanted = (args.num_rows * args.num_cols, *shape)
    if noise.shape not in (wanted, wanted[wanted[0] == 1 :]):
        raise ValueError(f"{flag} has the shape {noise.shape}; these pictures need {wanted}.")
    return noise.reshape(wanted).astype(np.float32)


def sampling_args(args, config, picture):
    """SamplingArgs from flags; what they leave out comes from the picture to start from, or the config."""
    if args.sd_xl_base_ratios is not None:
        height, width = sampling.parse_size(args.sd_xl_base_ratios)
    elif picture is not None:
        height, width = sampling.size_like(picture, sampling.default_size(config))
    else:
        height, width = sampling.default_size(config)
    return sampling.SamplingArgs(
        height=height,
        width=width,
        negative_prompt=args.negative_prompt,
        sampler=args.sampler,
        guider=args.guider,
        guidance_scale=args.guidance_scale,
        steps=args.sample_step,
        discretization=args.discretization,
        original_size=(args.orig_height or height, args.orig_width or width),
        target_size=(args.target_height or height, args.target_width or width),
        crop_coords_top_left=(args.crop_coords_top, args.crop_coords_left),
        aesthetic_score=args.aesthetic_score,
        negative_aesthetic_score=args.negative_aesthetic_score,
    )


def check(args):
    """Flags that do not go together, and files that are not there; makes the folder for pictures."""
    if (args.task == "img2img") != (args.img is not None):
        raise ValueError("--task img2img and --img, the picture to start from, go together.")
    for name in ("num_rows", "num_cols"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)}: at least 1.")
    if not 0 <= args.seed < 2**32:
        raise ValueError(f"--seed {args.seed}: 0 to {2**32 - 1}.")
    files = {name: [getattr(args, name)] for name in ("config", "weight", "img", "init_latent_path")}
    files["textual_inversion_weight"] = args.textual_inversion_weight
    if args.add_pipeline:
        files |= {name: [getattr(args, name)] for name in ("pipeline_config", "pipeline_weight")}
    for name, paths in files.items():
        for path in paths:
            if path is not None and not Path(path).exists():
                raise FileNotFoundError(f"--{name} '{path}' does not exist.")
    Path(args.save_path).mkdir(parents=True, exist_ok=True)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Says every flag's default, unless there is none or its help does."""

    def _get_help_string(self, action):
        known = action.default in (None, [], "") or "default" in action.help
        return action.help if known else super()._get_help_string(action)


def parse_args(argv):
    default = sampling.SamplingArgs()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--task", choices=("txt2img", "img2img"), default="txt2img", help="from noise, or from a picture")
    add("--config", default="configs/inference/sd_xl_base.yaml", help="YAML of the model")
    add("--weight", default="checkpoints/sd_xl_base_1.0.safetensors", help="or a .ckpt or diffusers folder")
    add("--save_path", default="outputs/demo", help="folder for pictures")

    add = parser.add_argument_group("learned words").add_argument
    add("--textual_inversion_weight", nargs="+", default=[], metavar="FILE", help="learned words")
    add("--placeholder_token", nargs="+", default=[], metavar="WORD", help="instead of a file's own")
    add("--num_vectors", nargs="+", type=int, default=[], metavar="N", help="of each file, checked")

    add = parser.add_argument_group("what to draw").add_argument
    add("--prompt", required=True, help="a text, or a file with a prompt a line; (word:1.3) weighs words")
    add("--negative_prompt", default="", help="what to keep away from")
    add("--num_rows", type=int, default=1, help="rows of pictures a prompt")
    add("--num_cols", type=int, default=1, help="pictures a row; they are drawn together")
    size = "such as 1.0 or 1.46 (width / height), or WIDTHxHEIGHT (default: the config's data.target_size or"
    add("--sd_xl_base_ratios", metavar="SIZE", help=f"{size} 1024x1024; img2img: the picture's)")
    for side in ("width", "height"):
        add(f"--orig_{side}", type=int, help="size conditioning: before resizing (default: of the picture)")
        add(f"--target_{side}", type=int, help="size conditioning: in the end (default: of the picture)")
    for side in ("top", "left"):
        add(f"--crop_coords_{side}", type=int, default=0, help="size conditioning: how much is cropped away")
    add("--aesthetic_score", type=float, default=default.aesthetic_score, help="the refiner's conditioning")
    add("--negative_aesthetic_score", type=float, default=default.negative_aesthetic_score, help="likewise")

    add = parser.add_argument_group("how to draw").add_argument
    add("--sampler", default=default.sampler, help=", ".join(sampling.SAMPLERS))
    add("--sample_step", type=int, default=default.steps, help="number of steps")
    add("--guider", default=default.guider, help=", ".join(sampling.GUIDERS))
    add("--guidance_scale", type=float, default=default.guidance_scale, help="1 is no guidance")
    add(
        "--discretization",
        help=", ".join(sampling.DISCRETIZATIONS) + " (default: the first; for LCM its own)",
    )
    add(
        "--init_latent_path", metavar="NPY", help="first noise: (pictures a prompt, 4, height / 8, width / 8)"
    )

    add = parser.add_argument_group("img2img").add_argument
    add("--img", help="the picture to start from")
    add("--strength", type=float, default=0.75, help="0 keeps the picture, 1 forgets it")

    add = parser.add_argument_group("refiner").add_argument
    add("--add_pipeline", type=flag, default=False, metavar="True|False", help="run it after the base")
    add("--pipeline_config", default="configs/inference/sd_xl_refiner.yaml", help="its YAML")
    add("--pipeline_weight", default="checkpoints/sd_xl_refiner_1.0.safetensors", help="as --weight")
    add("--stage2strength", type=float, default=0.15, help="its share of the way to the picture")
    again = "True: the base leaves that share to it; False: it does that share of a finished picture again"
    add("--finish_denoising", type=flag, default=True, metavar="True|False", help=again)

    add_runtime_flags(parser)
    return parser.parse_args(argv)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
