"""Learn a new word for SDXL from a few pictures (Gal et al. 2022, "An Image is Worth One Word").

    python train_textual_inversion.py --data_path datasets/cat_toy --save_path runs/cat_toy \
        --infer_during_train True --gradient_accumulation_steps 4 --num_vectors 10 --total_step 3000 \
        --placeholder_token "<cat-toy>" --learnable_property "object"

Everything of the model is frozen; what is learned are a few new rows of the two text encoders' vocabularies.
"""

import dataclasses
import json
import logging
import shlex
import signal
import sys
import time
from contextlib import contextmanager
from importlib import metadata

import numpy as np
import PIL
from omegaconf import OmegaConf
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from gm.atomic_file import atomic_file
from gm.checkpoint import fingerprint, load_weights
from gm.config import build_engine
from gm.data.batches import Batches
from gm.data.images import make_views, scan_folder
from gm.data.latents import encode_pictures
from gm.models.layers import parameter_dtype
from gm.models.native import use_flash_attention
from gm.runtime import describe, start_runtime
from gm.sampling import SamplingArgs
from gm.textual_inversion.concept import add_concept, vocabulary_norms
from gm.textual_inversion.embedding_file import read_embedding
from gm.textual_inversion.templates import caption_templates, fill, picture_templates
from gm.training.args import find_weights, parse_train_args
from gm.training.checks import check_run
from gm.training.preview import Previews
from gm.training.state import LearnedFiles, LossLog, load_state, run_folder, save_state, set_aside
from gm.training.step import Learner

logger = logging.getLogger("train")


def main(argv=None):
    args = parse_train_args(argv)
    runtime = start_runtime(args.runtime)
    logger.info(describe(runtime, args.runtime))

    # 1. A frozen SDXL.
    use_flash_attention(args.runtime.flash_attention)
    with parameter_dtype(runtime.dtype):
        engine = build_engine(args.config)
    check_run(args, engine)
    resumed = load_state(args.resume) if args.resume else None
    load_weights(engine, find_weights(args.weight, args.version))

    # 2. A new word that both text encoders can learn.
    concept = make_concept(args, engine)
    identity = describe_run(args, runtime, engine)
    if resumed:
        check_identity(identity, resumed[1]["identity"], args)
    log_plan(args, engine, concept)
    if args.dry_run:
        logger.info("Everything is in order; this was a dry run.")
        return

    # 3. Pictures of the concept, as latents, captioned with the new word.
    continues = resumed and run_folder(args.resume).resolve() == args.save_path.resolve()
    if runtime.is_main and not continues:
        set_aside(args.save_path, args.placeholder_token)
    write_settings(args, identity, runtime)
    latents, captions = make_data(args, runtime, engine)
    batches = Batches(
        latents, captions, draw=engine.loss_fn.draw, scale_factor=engine.scale_factor, batch_size=args.batch_size,
        seed=runtime.seed, rank=runtime.rank, world_size=runtime.world_size,
    )  # fmt: skip
    if not args.infer_during_train:
        engine.drop_first_stage()

    # 4. Learn only the new rows.
    learner = Learner(
        engine, concept.parameters(), args.optim, accumulation_steps=args.accumulation_steps,
        total_steps=args.total_step, half_precision=runtime.half_precision, world_size=runtime.world_size,
    )  # fmt: skip
    run = Run(args, runtime, engine, concept, learner, batches, identity)
    if resumed:
        run.resume(*resumed)
    run.train()


def make_concept(args, engine):
    """The new word, with rows from words, from a learned file, or from noise."""
    initializer = args.initializer_token
    if args.initializer_embedding:
        widths = [embedder.width for embedder in engine.conditioner.text_embedders]
        start = read_embedding(args.initializer_embedding, token=args.placeholder_token, expect_widths=widths)
        initializer = start.clip_l, start.clip_g
    return add_concept(
        engine.conditioner, token=args.placeholder_token, num_vectors=args.num_vectors, initializer=initializer,
        rng=np.random.default_rng([args.runtime.seed, 1]),
    )  # fmt: skip


def make_data(args, runtime, engine):
    """Latents of every picture, and the captions that each may be shown with."""
    pictures = scan_folder(args.data_path, target_size=args.data.size)
    templates = caption_templates(args.learnable_property, template_file=args.template_file)
    per_picture = picture_templates([p.path for p in pictures], templates, token=args.placeholder_token)
    captions = [[fill(template, args.placeholder_token) for template in choices] for choices in per_picture]

    def encode():
        return encode_pictures(
            pictures, engine.encode, target_size=args.data.size, cache_dir=args.save_path / "latents",
            vae_fingerprint=fingerprint(engine.first_stage_model), progress=runtime.is_main,
            views=make_views(args.data.crop, num_crops=args.data.num_crops, flip=args.data.flip, seed=runtime.seed),
        )  # fmt: skip

    return runtime.main_first(encode), captions


def describe_run(args, runtime, engine):
    """What must be the same for a run to be resumed."""
    return {
        "model": args.version.name,
        "weights_fingerprint": fingerprint(engine),
        "placeholder_token": args.placeholder_token,
        "num_vectors": args.num_vectors,
        "learnable_property": args.learnable_property,
        "train_batch_size": args.batch_size,
        "gradient_accumulation_steps": args.accumulation_steps,
        "processes": runtime.world_size,
        "seed": runtime.seed,
        **{f"optim.{name}": value for name, value in dataclasses.asdict(args.optim).items()},
    }


def check_identity(now, then, args):
    """Refuse to resume a run of other settings."""
    changed = [
        f"{key} was {then.get(key)!r} and is {value!r} now" for key, value in now.items() if then.get(key) != value
    ]
    if changed:
        raise ValueError(
            f"--resume '{args.resume}' is another run: {'; '.join(changed)}. Give the same settings, or start a new "
            "run in another --save_path (--initializer_embedding starts from learned rows)."
        )


def log_plan(args, engine, concept):
    """What is about to happen."""
    pictures = scan_folder(args.data_path)
    logger.info("%d pictures in %s, seen at %d x %d pixels", len(pictures), args.data_path, *args.data.size)
    templates = caption_templates(args.learnable_property, template_file=args.template_file)
    caption = fill(templates[0], args.placeholder_token)
    for embedder, rows, norm in zip(
        engine.conditioner.text_embedders, concept.rows(), vocabulary_norms(engine.conditioner), strict=True
    ):
        logger.info(
            "%s: '%s' is %s; %d learned rows of %d numbers, norms %.3f (vocabulary: %.3f +- %.3f)",
            embedder.rows_name, caption, embedder.tokenizer.ids(caption), *rows.shape,
            np.linalg.norm(rows, axis=1).mean(), *norm,
        )  # fmt: skip
    logger.info(
        "%d steps, each of %d picture(s), %d step(s) an update: %d updates with AdamW, learning rate %s",
        args.total_step, args.batch_size, args.accumulation_steps, args.total_updates,
        " and ".join(f"{rate:g}" for rate in dict.fromkeys(args.optim.base_rates)),
    )  # fmt: skip


def write_settings(args, identity, runtime):
    """config.yaml, as resolved, and run.json: settings and versions."""
    if not runtime.is_main:
        return
    versions = {"python": sys.version.split()[0], "mindspore": metadata.version("mindspore"), "numpy": np.__version__}
    facts = {**identity, "command": shlex.join(sys.argv), "versions": {**versions, "Pillow": PIL.__version__}}
    for name, text in (
        ("config.yaml", OmegaConf.to_yaml(args.config)),
        ("run.json", json.dumps(facts, indent=2, default=str) + "\n"),
    ):
        with atomic_file(args.save_path / name) as file:
            file.write(text.encode())


class Run:
    """The loop, and all that it writes."""

    def __init__(self, args, runtime, engine, concept, learner, batches, identity):
        self.args, self.runtime, self.engine, self.concept = args, runtime, engine, concept
        self.learner, self.batches, self.identity = learner, batches, identity
        self.step = 0
        self.losses = LossLog(args.save_path)
        settings = {key: str(value) for key, value in identity.items()}
        self.files = LearnedFiles(
            args.save_path, args.version.name, concept, metadata=settings, keep=args.max_num_ckpt
        )
        self.previews = None
        if args.infer_during_train and runtime.is_main:
            height, width = args.data.size
            sampling = SamplingArgs(height=height, width=width, guidance_scale=args.guidance_scale, steps=30)
            self.previews = Previews(
                engine, args.validation_prompts, sampling, seed=runtime.seed, folder=args.save_path
            )
        self.stop_signal = None

    def resume(self, arrays, numbers):
        self.learner.load_state_dict(arrays, numbers["learner"])
        self.batches.load_state_dict(numbers["batches"])
        self.step = numbers["step"]
        self.losses.resume(self.step, run_folder(self.args.resume))
        logger.info("resumed after step %d", self.step)

    def train(self):
        args = self.args
        if self.step >= args.total_step:
            logger.info("The run is complete: %d steps; a larger --total_step prolongs it.", self.step)
            return
        if self.previews and self.step == 0:
            self.draw_previews()
        logger.info("compiling the training step; this takes seconds for a small model, minutes for SDXL ...")
        started = time.perf_counter()
        stopping = False
        bar = tqdm(total=args.total_step, initial=self.step, unit="step", disable=not self.runtime.is_main)
        with bar, logging_redirect_tqdm(), self.stopping_gently():
            while self.step < args.total_step and not stopping:
                self.take_step(bar)
                # Ranks see a signal at different times, if at all, and must leave the loop together.
                stopping = self.runtime.any_rank(self.stop_signal is not None)
                if started is not None:
                    logger.info("first step after %.0f s", time.perf_counter() - started)
                    started = None
        if stopping:
            self.save()
        # Ranks leave when rank 0 has written: if one ends badly, the launcher kills the others at once.
        self.runtime.any_rank(False)
        if stopping:
            flags = [] if args.resume == args.save_path else ["--resume", str(args.save_path)]
            again = shlex.join(["python", *sys.argv, *flags])
            logger.info("Stopped after step %d; all is saved. Go on with:\n  %s", self.step, again)
            sys.exit(128 + (self.stop_signal or signal.SIGTERM))

    def take_step(self, bar):
        args = self.args
        batch = next(self.batches)
        try:
            result = self.learner(*self.loss_inputs(batch))
        except FloatingPointError as e:
            raise FloatingPointError(
                f"step {self.step + 1}: {e}. The rows were not changed by it. Last good file: {self.last_saved()}. "
                "Try a lower --learning_rate, or --ms_amp_level O0 if it was O2."
            ) from e
        self.step += 1
        self.losses.add(self.step, result, self.learner.updates)
        norms = [float(np.linalg.norm(rows, axis=1).mean()) for rows in self.concept.rows()]
        bar.update()
        bar.set_postfix(loss=f"{result.loss:.4f}", lr=f"{result.rate:.1e}", norm="/".join(f"{n:.2f}" for n in norms))
        if result.overflow:
            logger.info("step %d: gradients overflowed, loss scale now %g", self.step, self.learner.loss_scale.value)
        if self.step % args.log_interval == 0:
            recent = np.mean([float(row[2]) for row in self.losses.rows[-args.log_interval :]])
            logger.info(
                "step %d of %d, update %d: loss %.4f, gradient %.3g, learning rate %.2e, norms %s",
                self.step, args.total_step, self.learner.updates, recent, result.grad_norm, result.rate,
                " and ".join(f"{n:.3f}" for n in norms),
            )  # fmt: skip
        if self.step % args.save_interval == 0 or self.step == args.total_step:
            self.save()
        if self.previews and (self.step % args.infer_interval == 0 or self.step == args.total_step):
            self.draw_previews()

    def draw_previews(self):
        with self.writing():
            self.previews.draw(self.step)

    def loss_inputs(self, batch):
        """What the compiled step needs, from one batch; numpy."""
        noised = self.engine.loss_fn.prepare(self.engine.denoiser, batch.z0, eps=batch.eps, sigma=batch.sigma)
        conditioning = self.engine.conditioner.prepare(
            {
                "txt": batch.captions,
                "original_size_as_tuple": batch.original_size,
                "crop_coords_top_left": batch.crop_coords_top_left,
                "target_size_as_tuple": batch.target_size,
            }
        )
        return (*noised, *conditioning)

    def save(self):
        """Losses, learned file and state of the present step; the state last, since a run goes on from it."""
        if not self.runtime.is_main:
            return
        arrays, numbers = self.learner.state_dict()
        state = {"learner": numbers, "batches": self.batches.state_dict(), "identity": self.identity}
        with self.writing():
            self.losses.save()
            path = self.files.save(self.step, final=self.step == self.args.total_step)
            save_state(self.args.save_path / "state", self.step, arrays=arrays, numbers=state)
        logger.info("saved %s", path)

    @contextmanager
    def writing(self):
        try:
            yield
        except OSError as e:
            raise OSError(
                f"step {self.step} cannot be saved: {e}. What was saved before is whole: {self.last_saved()}. "
                f"Make room or mend the disk, then go on with --resume {self.args.save_path}."
            ) from e

    def last_saved(self):
        """Path of the newest learned file, or that there is none."""
        return self.files.newest() or "none yet"

    @contextmanager
    def stopping_gently(self):
        """Ctrl-C, or the order to end, stops the run after the present step."""
        before = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number, _frame):
        if self.stop_signal is not None:
            raise KeyboardInterrupt
        self.stop_signal = number
        logger.info("Finishing this step, then saving (once more Ctrl-C: stop at once) ...")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("Stopped at once; what was saved before is whole, and --resume goes on from there.")
