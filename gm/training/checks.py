"""What can be wrong with a run before it starts, all of it at once."""

import shutil
import tempfile
from pathlib import Path

from gm.data.images import check_pictures, make_views, scan_folder
from gm.sampling import SamplingArgs
from gm.textual_inversion.concept import check_num_vectors
from gm.textual_inversion.embedding_file import file_stem, read_embedding
from gm.textual_inversion.templates import caption_templates, picture_templates
from gm.training.args import find_weights
from gm.training.state import load_state

ROOM_NEEDED = 64 * 2**20  # bytes; rows, states and previews of a run take less


def check_run(args, engine):
    """Check weights, pictures, captions, the word, the run to resume, the folder to write to.

    Args:
        args: TrainArgs.
        engine: DiffusionEngine; weights need not be loaded.

    Raises:
        ValueError: names everything that is wrong.
    """
    problems = []

    def attempt(check, *values):
        try:
            return check(*values)
        except (ValueError, OSError) as e:
            problems.append(str(e))

    attempt(find_weights, args.weight, args.version)
    attempt(_check_pictures, args)
    attempt(lambda: make_views(args.data.crop, num_crops=args.data.num_crops, flip=args.data.flip, seed=0))
    attempt(_check_captions, args, engine.conditioner.text_embedders[0].tokenizer)
    for embedder in engine.conditioner.text_embedders:
        attempt(embedder.tokenizer.check_placeholder, args.placeholder_token)
    attempt(_check_word_as_file, args.placeholder_token)
    attempt(_check_sizes, args, engine)
    attempt(_check_folder, args.save_path)
    if args.resume:
        attempt(load_state, args.resume)
    if args.initializer_embedding:
        attempt(_check_initializer, args, engine)
    if args.total_updates == 0:
        problems.append(
            f"--total_step {args.total_step} is less than --gradient_accumulation_steps {args.accumulation_steps}: "
            "nothing would be learned. Steps are forward and backward passes; give more of them."
        )
    if args.initializer_token and args.initializer_embedding:
        problems.append("--initializer_token and --initializer_embedding exclude each other; give one of them.")
    if args.infer_during_train:
        height, width = args.data.size
        attempt(lambda: SamplingArgs(height=height, width=width, guidance_scale=args.guidance_scale))
    word = args.placeholder_token.strip().lower()
    for prompt in args.validation_prompts if args.infer_during_train else ():
        if word not in prompt.lower():
            problems.append(f"--validation_prompt '{prompt}' has no {args.placeholder_token} in it.")
    problems = list(dict.fromkeys(problems))  # both encoders' tokenizers say the same
    if len(problems) == 1:
        raise ValueError(problems[0])
    if problems:
        raise ValueError("this run cannot start:\n" + "\n".join(f"- {problem}" for problem in problems))


def _check_pictures(args):
    check_pictures(scan_folder(args.data_path, target_size=args.data.size))


def _check_captions(args, tokenizer):
    templates = caption_templates(args.learnable_property, template_file=args.template_file)
    try:
        paths = [picture.path for picture in scan_folder(args.data_path)]
    except (ValueError, OSError):  # reported by _check_pictures
        paths = []
    own = picture_templates(paths, templates, token=args.placeholder_token)
    used = list(dict.fromkeys([*templates, *(template for choices in own for template in choices)]))
    check_num_vectors(args.num_vectors, templates=used, tokenizer=tokenizer)


def _check_word_as_file(token):
    try:
        file_stem(token)
    except ValueError as e:
        raise ValueError(f"--placeholder_token '{token}' names a file of the run, too; use letters and digits.") from e


def _check_initializer(args, engine):
    widths = [embedder.width for embedder in engine.conditioner.text_embedders]
    start = read_embedding(args.initializer_embedding, token=args.placeholder_token, expect_widths=widths)
    if len(start.clip_l) != args.num_vectors:
        raise ValueError(
            f"--initializer_embedding '{args.initializer_embedding}' holds {len(start.clip_l)} vectors; "
            f"give --num_vectors {len(start.clip_l)}."
        )


def _check_sizes(args, engine):
    blocks = engine.model.diffusion_model.input_blocks
    levels = sum(block.takes == ("map",) for block in blocks) - 1  # the first of them is the input's convolution
    multiple = engine.first_stage_model.downsampling * 2**levels
    if any(side < multiple or side % multiple for side in args.data.size):
        raise ValueError(f"data.target_size {args.data.size}: both sides must be multiples of {multiple} pixels.")


def _check_folder(folder):
    """That files can be written there."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"0")
    except OSError as e:
        raise ValueError(f"--save_path '{folder}' cannot be written to: {e.strerror}.") from e
    free = shutil.disk_usage(folder).free
    if free < ROOM_NEEDED:
        raise ValueError(f"--save_path '{folder}': only {free // 2**20} MiB are free on its disk; make room.")

