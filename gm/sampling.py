"""From prompts to pictures: all that stands between a loaded engine and PNG files.

    args = SamplingArgs(height=1024, width=1024)
    text = condition(engine, "a lighthouse at dusk", args)
    latents = draw_latents(engine, text, seeds=[42, 43], args=args)
    pictures = decode(engine, latents)

A picture is decided by prompt, seed and SamplingArgs alone: its noise comes from its own generator, so that
neither the number of pictures drawn beside it nor their order changes it.
"""

import dataclasses
import functools
import io
import json
import logging
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, PngImagePlugin
from tqdm import tqdm

from gm.atomic_file import atomic_file
from gm.data import images
from gm.diffusion import samplers
from gm.diffusion.discretizer import (
    DiffusersDDPMDiscretization,
    EDMDiscretization,
    LCMDiscretization,
    LegacyDDPMDiscretization,
)
from gm.diffusion.guiders import DynamicThresholding, IdentityGuider, VanillaCFG
from gm.textual_inversion.concept import add_concept
from gm.textual_inversion.embedding_file import read_embedding

logger = logging.getLogger(__name__)

SIDE_MULTIPLE = 64  # pixels: latents are an eighth of that, and the refiner's UNet halves them three times

# Heights and widths that SDXL was trained on (Podell et al. 2023, appendix I), upright ones; mirrored below.
_UPRIGHT = (
    (2048, 512), (1984, 512), (1920, 512), (1856, 512), (1792, 576), (1728, 576), (1664, 576),
    (1600, 640), (1536, 640), (1472, 704), (1408, 704), (1344, 704), (1344, 768), (1280, 768),
    (1216, 832), (1152, 832), (1152, 896), (1088, 896), (1088, 960), (1024, 960), (1024, 1024),
)  # fmt: skip
# SGM's names of sizes are width / height; name -> (height, width).
RATIOS = {str(round(w / h, 2)): (h, w) for size in _UPRIGHT for h, w in (size, size[::-1])}
RATIOS |= {"1.0_768": (768, 768), "1.0_512": (512, 512)}

SAMPLERS = {
    "EulerEDM": samplers.EulerEDMSampler,
    "HeunEDM": samplers.HeunEDMSampler,
    "EulerA": samplers.EulerAncestralSampler,
    "DPMPP2SAncestral": samplers.DPMPP2SAncestralSampler,
    "DPMPP2M": samplers.DPMPP2MSampler,
    "DPMPP2MSDE": samplers.DPMPP2MSDESampler,
    "LMS": samplers.LinearMultistepSampler,
    "LCM": samplers.LCMSampler,
}
GUIDERS = {
    "VanillaCFG": VanillaCFG,
    "DynamicThresholding": lambda scale: VanillaCFG(scale, DynamicThresholding()),
    "IdentityGuider": lambda scale: IdentityGuider(),
}


def _edm_within_training():
    """EDM's spacing, from the largest to the smallest noise level that SDXL knows."""
    sigmas = LegacyDDPMDiscretization().training_sigmas()
    return EDMDiscretization(sigma_min=sigmas[0], sigma_max=sigmas[-1])


DISCRETIZATIONS = {
    "LegacyDDPM": LegacyDDPMDiscretization,
    "DiffusersDDPM": DiffusersDDPMDiscretization,
    "EDM": _edm_within_training,
    "LCM": LCMDiscretization,
}


# ---------------------------------------------------------------- what is asked for


@dataclass(frozen=True)
class SamplingArgs:
    """How pictures are drawn. Sizes are (height, width) in pixels, as SDXL's size conditioning has them.

    Raises:
        ValueError: a setting is unknown or impossible; names the flag.
    """

    height: int = 1024
    width: int = 1024
    negative_prompt: str = ""
    sampler: str = "EulerEDM"
    guider: str = "VanillaCFG"
    guidance_scale: float = 5.0  # 1 is no guidance
    steps: int = 40
    discretization: str | None = None  # None: the sampler's own, LCM or LegacyDDPM
    original_size: tuple[int, int] | None = None  # None: of the picture; smaller looks like an enlarged one
    target_size: tuple[int, int] | None = None  # None: of the picture
    crop_coords_top_left: tuple[int, int] = (0, 0)
    aesthetic_score: float = 6.0  # the refiner's, 0 to 10
    negative_aesthetic_score: float = 2.5

    def __post_init__(self):
        for name in ("height", "width"):
            side = getattr(self, name)
            if side < SIDE_MULTIPLE or side % SIDE_MULTIPLE:
                raise ValueError(f"The {name} is {side} pixels; it must be a multiple of {SIDE_MULTIPLE}.")
        if not math.isfinite(self.guidance_scale):
            raise ValueError(f"--guidance_scale {self.guidance_scale} is no finite number.")
        for size in (self.original_size or (1, 1), self.target_size or (1, 1)):
            if min(size) < 1:
                raise ValueError(f"The size conditioning has the size {size}; sides are at least 1 pixel.")
        if min(self.crop_coords_top_left) < 0:
            raise ValueError(f"--crop_coords_top and _left {self.crop_coords_top_left} must not be negative.")
        num_steps(self, WHOLE)


@dataclass(frozen=True)
class Part:
    """Which part of the way from noise to a picture a model goes; by default all of it.

    init: (B or 1, 4, h, w) latents to start from.
    strength: share of the way, from its end, that `init` is sent back; how much of `init` is lost.
    stop: share of the way, from its end, that is left to another model.
    add_noise: False where `init` was left by a model that stopped here, so that its noise is still in it.
    """

    init: np.ndarray | None = None
    strength: float = 1.0
    stop: float = 0.0
    add_noise: bool = True


WHOLE = Part()


def make_sampler(args):
    """The sampler that SamplingArgs describe, with guider, number of steps and spacing of noise levels."""
    sampler = _pick(SAMPLERS, args.sampler, "sampler")
    own = "LCM" if sampler is samplers.LCMSampler else "LegacyDDPM"
    discretization = _pick(DISCRETIZATIONS, args.discretization or own, "discretization")
    guider = _pick(GUIDERS, args.guider, "guider")
    if args.steps < 1:
        raise ValueError(f"--sample_step {args.steps}: at least 1 step is needed.")
    return sampler(discretization(), num_steps=args.steps, guider=guider(args.guidance_scale))


def num_steps(args, part):
    """How many steps a part of the way takes.

    Raises:
        ValueError: strength or stop are not possible.
    """
    return len(make_sampler(args).schedule(strength=part.strength, stop=part.stop)) - 1


def _pick(table, name, flag):
    """An entry by its name here or by its class's."""
    for key, make in table.items():
        if name in (key, make.__name__, f"{key}{flag.capitalize()}"):
            return make
    raise ValueError(f"--{flag} '{name}' is not one of {', '.join(table)}.")


def parse_size(text):
    """--sd_xl_base_ratios: SGM's name of a size (its width / height), or WIDTHxHEIGHT -> (height, width)."""
    if text in RATIOS:
        return RATIOS[text]
    if sides := re.fullmatch(r"(\d{2,5})x(\d{2,5})", text):
        return int(sides[2]), int(sides[1])
    raise ValueError(
        f"--sd_xl_base_ratios '{text}' is no size; give pixels, such as 1024x768 (width x height), or one of "
        f"{', '.join(sorted(RATIOS, key=lambda name: float(name.partition('_')[0])))}."
    )


def default_size(config):
    """(height, width) that a model draws at: its config's data.target_size, else SDXL's 1024."""
    size = (config.get("data") or {}).get("target_size", 1024)
    return (size, size) if isinstance(size, int) else tuple(size)


def size_like(image, limit):
    """(height, width) near a picture's own, in multiples of 64, with at most about the area of `limit`."""
    scale = min(1.0, math.sqrt(math.prod(limit) / (image.height * image.width)))
    sides = (image.height * scale, image.width * scale)
    return tuple(max(1, round(side / SIDE_MULTIPLE)) * SIDE_MULTIPLE for side in sides)


def read_prompts(prompt):
    """--prompt: a text, or the path of a file with a prompt a line -> list of prompts.

    Raises:
        FileNotFoundError: it ends in .txt and is no file.
        ValueError: the file has no prompts or is no text.
    """
    if not os.path.isfile(prompt):
        if prompt.endswith(".txt"):
            raise FileNotFoundError(f"--prompt '{prompt}': there is no such file.")
        return [prompt]
    try:
        lines = Path(prompt).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"--prompt '{prompt}' is not a text file (UTF-8): {error}") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"--prompt '{prompt}' holds no prompts; it needs one a line.")
    return prompts


# ---------------------------------------------------------------- learned words


def read_words(conditioner, paths, *, tokens=(), num_vectors=()):
    """Learned words from files of any format, checked against a model but not yet added to it.

    Args:
        conditioner: of the model; its weights need not be loaded.
        tokens: a word a file, in place of the file's own; or none.
        num_vectors: how many vectors each file is expected to have; or none.

    Returns:
        list of Embedding.

    Raises:
        FileNotFoundError: a file is not there.
        ValueError: it is damaged or of another model, or its word is one that the model knows.
    """
    for flag, values in (("--placeholder_token", tokens), ("--num_vectors", num_vectors)):
        if values and len(values) != len(paths):
            raise ValueError(f"{flag} has {len(values)} values for {len(paths)} --textual_inversion_weight.")
    widths = [embedder.width for embedder in conditioner.text_embedders]
    words = [
        read_embedding(path, token=token, expect_widths=widths if len(widths) == 2 else None)
        for path, token in zip(paths, tokens or [None] * len(paths), strict=True)
    ]
    tokenizer = conditioner.text_embedders[0].tokenizer
    files = {}
    for path, word, expected in zip(paths, words, num_vectors or [None] * len(paths), strict=True):
        if expected not in (None, word.num_vectors):
            raise ValueError(f"--num_vectors {expected}, but {path} holds {word.num_vectors} vectors.")
        name = tokenizer.check_placeholder(word.token)
        if name in files:
            raise ValueError(
                f"{files[name]} and {path} both hold '{word.token}'; rename them by --placeholder_token."
            )
        files[name] = path
    return words


def add_words(conditioner, words):
    """Add learned words to a model, before anything compiles. The refiner takes its one encoder's rows."""
    for word in words:
        add_concept(conditioner, token=word.token, initializer=(word.clip_l, word.clip_g))
        logger.info("learned word '%s': %d vectors", word.token, word.num_vectors)


def warn_about_words(conditioner, texts):
    """Warn of learned words that no text uses, and of words in <brackets> that were not learned."""
    tokenizer = conditioner.text_embedders[0].tokenizer
    text = tokenizer.normalize(" ".join(texts))
    used = set(tokenizer.ids(text))
    for word, ids in tokenizer.placeholders.items():
        if not used.issuperset(ids):
            logger.warning("The learned word '%s' is in no prompt.", word)
    for word in sorted(set(re.findall(r"<[^<>\s]+>", text)) - set(tokenizer.placeholders)):
        logger.warning("'%s' in a prompt is no learned word and is read as it stands.", word)


# ---------------------------------------------------------------- prompts -> latents -> pictures


def condition(engine, prompt, args):
    """What a prompt and its negative become for the network.

    An empty negative prompt is zeros for SDXL base, as in its training, and an encoded empty text for the
    refiner. Both get as many chunks of 77 tokens as the longer one needs.

    Returns:
        (cond, uncond), each {"vector": (1, D), "crossattn": (1, L, C)}.
    """
    size = (args.height, args.width)
    is_refiner = any(embedder.input_key == "aesthetic_score" for embedder in engine.conditioner.embedders)
    batch = {
        "txt": [prompt, args.negative_prompt],
        "original_size_as_tuple": [args.original_size or size] * 2,
        "crop_coords_top_left": [args.crop_coords_top_left] * 2,
        "target_size_as_tuple": [args.target_size or size] * 2,
        "aesthetic_score": [(args.aesthetic_score,), (args.negative_aesthetic_score,)],
    }
    zero_text = [False, not args.negative_prompt and not is_refiner]
    vector, context = engine.conditioner.encode(batch, zero_text=zero_text)
    return tuple({"vector": vector[i : i + 1], "crossattn": context[i : i + 1]} for i in (0, 1))


def draw_latents(engine, text, seeds, args, *, part=WHOLE, first_noise=None, callback=None):
    """Draw a batch of latents for one prompt.

    Args:
        engine: DiffusionEngine.
        text: from `condition`.
        seeds: one a picture, whatever numpy's default_rng takes; as many as the batch is large.
        args: SamplingArgs.
        first_noise: (B, 4, h, w) in place of the first noise that the seeds give; what they give later stays.
        callback: called after each step with (step, number of steps), counted from 1.

    Returns:
        (B, 4, h, w) float32, times the scale factor.
    """
    cond, uncond = ({name: np.repeat(x, len(seeds), axis=0) for name, x in side.items()} for side in text)
    noise = samplers.noise_streams(seeds, latent_shape(engine, args))
    x = noise()
    x = x if first_noise is None else first_noise
    return make_sampler(args)(
        functools.partial(engine.denoiser, engine.network),
        x if part.add_noise else None,
        cond,
        uncond,
        init=None if part.init is None else np.broadcast_to(part.init, x.shape),
        strength=part.strength,
        stop=part.stop,
        noise=noise,
        callback=callback,
    )


def latent_shape(engine, args):
    """(channels, h, w) of one picture's latents."""
    vae = engine.first_stage_model
    return vae.embed_dim, args.height // vae.downsampling, args.width // vae.downsampling


def encode_picture(engine, image, args):
    """A PIL picture, scaled and cropped to `args`' size -> (1, 4, h, w) latents, the posterior's mean."""
    pixels = images.crop_picture(image, (args.height, args.width), images.View()).pixels
    mean, _ = np.split(engine.encode(pixels[None]), 2, axis=1)
    return mean * np.float32(engine.scale_factor)


def decode(engine, latents):
    """(B, 4, h, w) latents -> (B, H, W, 3) uint8. One at a time: pixels need far more memory than latents.

    Raises:
        ValueError: the latents are not finite.
    """
    if not np.isfinite(latents).all():
        raise ValueError("The network gave NaN or infinite latents; with --ms_amp_level O2, try O0.")
    pixels = np.concatenate([engine.decode(one[None]) for one in latents])
    return np.round((pixels.transpose(0, 2, 3, 1) + 1) * 127.5).astype(np.uint8)


# ---------------------------------------------------------------- a whole run


@dataclass(frozen=True)
class Drawn:
    """A row of the grid: latents (B, 4, h, w) of one prompt's pictures, and the B seeds."""

    prompt: str
    seeds: list
    latents: np.ndarray


def draw(engine, prompts, args, *, seed, num_rows=1, num_cols=1, part=WHOLE, first_noise=None):
    """Yield every row of the grid as Drawn: `num_rows` rows a prompt, each a batch of `num_cols`.

    Args:
        seed: of each prompt's first picture; the next ones count up.
        first_noise: (num_rows * num_cols, 4, h, w), as in `draw_latents`.
    """
    for prompt in prompts:
        text = condition(engine, prompt, args)
        for first in range(0, num_rows * num_cols, num_cols):
            seeds = [seed + first + i for i in range(num_cols)]
            noise = None if first_noise is None else first_noise[first : first + num_cols]
            with tqdm(desc=_title(prompt, seeds), total=num_steps(args, part), unit="step") as bar:
                latents = draw_latents(
                    engine, text, seeds, args, part=part, first_noise=noise, callback=lambda *_: bar.update()
                )
            yield Drawn(prompt, seeds, latents)


def refine(engine, rows, args, *, strength, add_noise):
    """Yield each row of `draw` after a second model, the refiner, went its last `strength` of the way.

    Args:
        add_noise: True goes back from finished latents, False continues from where `Part.stop` left them.
    """
    for row in rows:
        text = condition(engine, row.prompt, args)
        part = Part(row.latents, strength, add_noise=add_noise)
        seeds = [(seed, 2) for seed in row.seeds]  # the first model used up some of the seed's own noise
        with tqdm(desc=_title(row.prompt, row.seeds), total=num_steps(args, part), unit="step") as bar:
            latents = draw_latents(engine, text, seeds, args, part=part, callback=lambda *_: bar.update())
        yield dataclasses.replace(row, latents=latents)


def _title(prompt, seeds):
    """Names a row in its progress bar."""
    shown = prompt if len(prompt) <= 40 else f"{prompt[:37]}..."
    return f"{shown}, seed {seeds[0]}" + (f" to {seeds[-1]}" if len(seeds) > 1 else "")


# ---------------------------------------------------------------- files


def make_grid(pictures, num_cols):
    """List of (H, W, 3) pictures of one size, a multiple of num_cols -> one picture, in reading order."""
    n, (height, width, _) = len(pictures), pictures[0].shape
    assert n % num_cols == 0, (n, num_cols)
    cells = np.stack(pictures).reshape(n // num_cols, num_cols, height, width, 3)
    return cells.transpose(0, 2, 1, 3, 4).reshape(n // num_cols * height, num_cols * width, 3)


def png_text(prompt, seed, args, more):
    """What a PNG says about its picture: prompt, negative_prompt and seed, and all settings as JSON.

    Args:
        more: dict of further settings, such as the weights' name.
    """
    settings = {**dataclasses.asdict(args), **more}
    return {
        "prompt": prompt,
        "negative_prompt": settings.pop("negative_prompt"),
        "seed": str(seed),
        "settings": json.dumps(settings, ensure_ascii=False),
    }


def encode_png(pixels, text):
    """(H, W, 3) uint8 pixels, with texts by name in the metadata -> a PNG file's bytes."""
    info = PngImagePlugin.PngInfo()
    for name, value in text.items():
        info.add_text(name, value)  # tEXt, or iTXt where Latin-1 has no such letters
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", pnginfo=info)
    return file.getvalue()


def save_png(path, pixels, text):
    """Write `encode_png`'s bytes; the file appears when it is whole."""
    with atomic_file(path) as file:
        file.write(encode_png(pixels, text))


def next_number(folder):
    """A number that no picture in a folder (NUMBER_*.png) begins with yet."""
    numbers = (re.match(r"\d+(?=_)", path.name) for path in Path(folder).glob("*.png"))
    return 1 + max((int(number[0]) for number in numbers if number), default=0)
