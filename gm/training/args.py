"""Everything a training run is told: command-line flags over the sections `optim` and `data` of a config."""

import argparse
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gm import config as config_module
from gm.runtime import RuntimeArgs, add_runtime_flags, flag, runtime_args
from gm.training.optim import OptimArgs
from gm.training.state import run_folder

ROOT = Path(__file__).parents[2]
_OVERRIDE = re.compile(rf"({'|'.join(config_module.SECTIONS)})\.[\w.]+=")


@dataclass(frozen=True)
class Version:
    """One model that this program knows by name."""

    name: str  # prefix of the files that training writes
    config: str
    weights: tuple  # where weights are looked for, in this order


VERSIONS = {
    "SDXL-base-1.0": Version(
        "SD-XL-base-1.0",
        "configs/training/sd_xl_base_finetune_textual_inversion.yaml",
        ("checkpoints/sd_xl_base_1.0_ms.ckpt", "checkpoints/sd_xl_base_1.0.safetensors"),
    ),
    "SDXL-small": Version(
        "SD-XL-small",
        "configs/training/sd_xl_small_textual_inversion.yaml",
        ("checkpoints/sd_xl_small.safetensors",),
    ),
}


@dataclass(frozen=True)
class DataArgs:
    """The section `data` of a config."""

    per_batch_size: int = 1
    total_step: int = 1000
    target_size: Any = 1024  # height and width of what the network sees, or [height, width]
    crop: Any = "center"  # or "random", or [y, x] from 0 (top, left) to 1
    num_crops: int = 1  # places that crop: random takes of a picture
    flip: bool = False  # also learn from mirrored pictures

    def __post_init__(self):
        for name in ("per_batch_size", "total_step"):
            if getattr(self, name) < 1:
                raise ValueError(f"data.{name} is {getattr(self, name)}; it must be at least 1.")
        sides = self.target_size if isinstance(self.target_size, list) else [self.target_size] * 2
        if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
            raise ValueError(f"data.target_size is {self.target_size}; give pixels, or [height, width].")

    @property
    def size(self):
        """(height, width)."""
        if isinstance(self.target_size, int):
            return self.target_size, self.target_size
        return tuple(self.target_size)


@dataclass(frozen=True)
class TrainArgs:
    version: Version
    config_path: Path
    weight: Path | None  # None: where the version's weights are kept, see find_weights
    data_path: Path
    save_path: Path
    placeholder_token: str
    num_vectors: int
    initializer_token: str | None
    initializer_embedding: Path | None
    learnable_property: str
    template_file: Path | None
    total_step: int
    batch_size: int
    accumulation_steps: int
    log_interval: int
    save_interval: int
    max_num_ckpt: int
    infer_during_train: bool
    infer_interval: int
    validation_prompts: tuple
    guidance_scale: float
    resume: Path | None
    dry_run: bool
    runtime: RuntimeArgs
    optim: OptimArgs
    data: DataArgs
    config: Any  # the whole config, overrides applied

    @property
    def total_updates(self):
        return self.total_step // self.accumulation_steps


def _positive(text):
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number of at least 1")
    return int(text)


def build_parser():
    parser = argparse.ArgumentParser(
        allow_abbrev=False,  # a flag that is almost right is a wrong one
        description="Learn a new word for SDXL from a few pictures (textual inversion).",
        epilog="Values of the config can be overridden by name: optim.weight_decay=0 data.flip=True",
    )
    add = parser.add_argument

    group = parser.add_argument_group("model")
    group.add_argument("--version", choices=sorted(VERSIONS), default=None,
                       help="which model (default: that of --config, else SDXL-base-1.0)")
    group.add_argument("--config", type=Path, default=None, help="YAML of the model and the recipe")
    group.add_argument("--weight", type=Path, default=None, help=".safetensors, .ckpt or diffusers folder")

    group = parser.add_argument_group("concept")
    group.add_argument("--data_path", type=Path, required=True, help="folder of pictures of the object or style")
    group.add_argument("--placeholder_token", required=True, help='the new word, such as "<cat-toy>"')
    group.add_argument("--num_vectors", type=int, default=1, help="embedding rows of the word, 1 to 70 (default 1)")
    group.add_argument("--initializer_token", default=None, help="word or words that the rows start from")
    group.add_argument("--initializer_embedding", type=Path, default=None,
                       help="learned file of any format that the rows start from")
    group.add_argument("--learnable_property", choices=("object", "style", "face"), default="object",
                       help="which captions to train with (default object)")
    group.add_argument("--template_file", type=Path, default=None,
                       help="captions of your own, a line each, with {placeholder} for the word")

    group = parser.add_argument_group("training")
    group.add_argument("--save_path", type=Path, default=None,
                       help="folder of everything written (default: the run to resume, else runs)")
    group.add_argument("--total_step", type=_positive, default=None,
                       help="forward and backward steps; total_step / gradient_accumulation_steps updates")
    group.add_argument("--train_batch_size", type=_positive, default=None, help="pictures a step and process")
    group.add_argument("--gradient_accumulation_steps", type=_positive, default=1, help="steps an update (default 1)")
    group.add_argument("--learning_rate", type=float, default=None, help="per update (default: the config's)")
    group.add_argument("--clip_grad", type=flag, default=None, help="clip the gradient of all rows together")
    group.add_argument("--max_grad_norm", type=float, default=None, help="to this L2 norm")
    group.add_argument("--log_interval", type=_positive, default=10, help="steps between log lines (default 10)")
    group.add_argument("--save_ckpt_interval", type=_positive, default=500, help="steps between saves (default 500)")
    group.add_argument("--max_num_ckpt", type=_positive, default=None,
                       help="learned files to keep, the newest (default: all)")
    group.add_argument("--resume", type=Path, default=None,
                       help="go on with a stopped run: its --save_path, or one file of its state/")
    group.add_argument("--dry_run", type=flag, nargs="?", const=True, default=False,
                       help="check everything up to compiling, report all problems, and stop")

    group = parser.add_argument_group("previews")
    group.add_argument("--infer_during_train", type=flag, default=False, help="sample while training (default False)")
    group.add_argument("--infer_interval", type=_positive, default=500, help="steps between previews (default 500)")
    group.add_argument("--validation_prompt", nargs="+", default=None,
                       help="what to sample, one or several prompts with the word in them")
    group.add_argument("--guidance_scale", type=float, default=7.5, help="of previews (default 7.5)")

    runtime = add_runtime_flags(parser)
    runtime.add_argument("--is_parallel", type=flag, default=False, help="one of several processes (mpirun, msrun)")
    add("overrides", nargs="*", metavar="key.path=value", help="values of the config to override")
    return parser  # fmt: skip


def parse_train_args(argv=None):
    """Flags and config -> TrainArgs.

    Raises:
        SystemExit: an unknown flag or malformed value (argparse says which).
        ValueError, FileNotFoundError: the config does not fit.
    """
    ns = build_parser().parse_intermixed_args(argv)  # overrides may stand between flags
    # An override behind the prompts is not one of them.
    prompts = [text for text in ns.validation_prompt or () if not _OVERRIDE.match(text)]
    overrides = ns.overrides + [text for text in ns.validation_prompt or () if _OVERRIDE.match(text)]
    version, config_path = find_version(ns.version, ns.config)
    config = config_module.load_config(config_path, overrides=[*_flag_overrides(ns), *overrides])
    data = config_module.section(config, "data", DataArgs)
    return TrainArgs(
        version=version,
        config_path=config_path,
        weight=ns.weight,
        data_path=ns.data_path,
        save_path=ns.save_path or (run_folder(ns.resume) if ns.resume else Path("runs")),
        placeholder_token=ns.placeholder_token,
        num_vectors=ns.num_vectors,
        initializer_token=ns.initializer_token,
        initializer_embedding=ns.initializer_embedding,
        learnable_property=ns.learnable_property,
        template_file=ns.template_file,
        total_step=data.total_step,
        batch_size=data.per_batch_size,
        accumulation_steps=ns.gradient_accumulation_steps,
        log_interval=ns.log_interval,
        save_interval=ns.save_ckpt_interval,
        max_num_ckpt=ns.max_num_ckpt,
        infer_during_train=ns.infer_during_train,
        infer_interval=ns.infer_interval,
        validation_prompts=tuple(prompts or _default_prompts(ns)),
        guidance_scale=ns.guidance_scale,
        resume=ns.resume,
        dry_run=ns.dry_run,
        runtime=runtime_args(ns),
        optim=config_module.section(config, "optim", OptimArgs),
        data=data,
        config=config,
    )


def _flag_overrides(ns):
    """Flags that stand for values of the config."""
    keys = {
        "data.total_step": ns.total_step,
        "data.per_batch_size": ns.train_batch_size,
        "optim.lr": ns.learning_rate,
        "optim.clip_grad": ns.clip_grad,
        "optim.max_grad_norm": ns.max_grad_norm,
    }
    return [f"{key}={value}" for key, value in keys.items() if value is not None]


def find_version(version, config_path):
    """The Version and its config; a config alone names its version if it is one of ours."""
    if version is None:
        shipped = {Path(v.config).name: name for name, v in VERSIONS.items()}
        version = shipped.get(config_path.name if config_path else None, "SDXL-base-1.0")
    return VERSIONS[version], config_path or ROOT / VERSIONS[version].config


def find_weights(weight, version):
    """The path --weight, or else the first place where the version's weights are; FileNotFoundError if nowhere."""
    if weight is not None:
        if not weight.exists():
            raise FileNotFoundError(f"--weight '{weight}' does not exist.")
        return weight
    for place in version.weights:
        for folder in (Path(), ROOT):
            if (folder / place).exists():
                return folder / place
    raise FileNotFoundError(
        f"No weights of {version.name}: looked for {' and '.join(version.weights)}. Put the file there or name it "
        "with --weight (README, 'Weights'). To try the program without them, add --version SDXL-small."
    )


def _default_prompts(ns):
    word = ns.placeholder_token
    if ns.learnable_property == "style":
        return (f"a drawing of a house in the style of {word}", f"a portrait in the style of {word}")
    return (f"a photo of a {word}", f"a {word} on a white background")
