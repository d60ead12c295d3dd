r"""Draw pictures in a browser, with words that were learned.

    streamlit run demo/sampling.py --server.port 8501

Started from the repository's root. The page offers the models of VERSION2SPECS and the learned words under
runs/; it reads no other files than these. .streamlit/config.toml says who can reach it and how large uploads
may be. Options of the runtime follow a double dash:

    streamlit run demo/sampling.py --server.port 8501 -- --device_target Ascend --ms_amp_level O2
"""

import argparse
import json
import logging
import re
import sys
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import streamlit as st

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone is enough: gm need not be installed

from gm import sampling  # noqa: E402
from gm.checkpoint import load_weights  # noqa: E402
from gm.config import build_engine  # noqa: E402
from gm.data.images import decode_picture  # noqa: E402
from gm.models.layers import parameter_dtype  # noqa: E402
from gm.models.native import use_flash_attention  # noqa: E402
from gm.runtime import add_runtime_flags, runtime_args, start_runtime  # noqa: E402
from gm.textual_inversion.concept import replace_words  # noqa: E402
from gm.textual_inversion.embedding_file import read_embedding  # noqa: E402

# The models that the page offers; the first whose weights are there is chosen at the start.
VERSION2SPECS = {
    "SDXL-base-1.0": {
        "H": 1024,  # height and width, in pixels, of pictures unless someone asks for others
        "W": 1024,
        "C": 4,  # channels of the latents
        "f": 8,  # pixels a side of one latent
        "is_legacy": False,  # True, for models before SDXL, is not supported
        "config": "configs/inference/sd_xl_base.yaml",
        "ckpt": ["checkpoints/sd_xl_base_1.0_ms.ckpt", "checkpoints/sd_xl_base_1.0.safetensors"],  # or one
        "textual_inversion_weight": [],  # files of learned words, besides those under runs/
    },
    "SDXL-small": {
        "H": 64,
        "W": 64,
        "C": 4,
        "f": 4,
        "is_legacy": False,
        "config": "configs/inference/sd_xl_small.yaml",
        "ckpt": "checkpoints/sd_xl_small.safetensors",
        "textual_inversion_weight": [],
    },
}
RUNS = "runs"  # where training puts learned words

WORD_SUFFIXES = (".ckpt", ".safetensors", ".pt", ".bin", ".pti")
ROOM = 512  # vectors of all chosen words together
MAX_PARTS = 4  # of 75 tokens, of a prompt
MAX_CHARACTERS = 4000
MAX_SIDE = 2048  # pixels
MAX_PICTURES = 16
MAX_STEPS = 200
MAX_UPLOAD_PIXELS = 40_000_000
SPEC_KEYS = ("H", "W", "C", "f", "is_legacy", "config", "ckpt", "textual_inversion_weight")


def main(versions, *, runs):
    """The page, from top to bottom; Streamlit runs it anew after each thing that a person does.

    Args:
        versions: like VERSION2SPECS.
        runs: folder of learned words.
    """
    st.set_page_config(page_title="Textual inversion", layout="wide", initial_sidebar_state=440)
    order, problems = None, []
    with st.sidebar:
        with errors_into(problems):
            order = ask(versions, runs)
        for text in problems:
            st.error(plain(text))
    if order is not None:
        drawing = st.session_state["drawing"] = Drawing(num_cols=2 if order.instead is not None else 0)
        place = st.empty()
        with errors_into(drawing.errors), place.container():
            fill(drawing, order)
        place.empty()
    elif "drawing" not in st.session_state:
        st.info("Pictures appear here. Write a prompt, choose learned words if you like, and press Draw.")
    if drawing := st.session_state.get("drawing"):
        show(drawing)


# ---------------------------------------------------------------- what a person asks for


@dataclass(frozen=True)
class Order:
    """All that decides a drawing."""

    spec: dict
    words: list  # paths
    prompt: str
    args: sampling.SamplingArgs
    seed: int  # of the first picture; the next ones count up
    num_pictures: int
    picture: object = None  # PIL image to start from
    strength: float = 1.0
    instead: dict | None = None  # learned word -> what stands there in the second picture of each pair


def ask(versions, runs):
    """The side of the page where a person chooses -> the Order, or None until Draw is pressed.

    Raises:
        ValueError: what was chosen cannot be drawn.
    """
    st.header("Textual inversion", anchor=False)
    names = list(versions)
    ready = [name for name in names if find_weights(versions[name])]
    name = st.selectbox("Model", names, index=names.index(ready[0]) if ready else 0)
    spec = versions[name]
    check_spec(name, spec)

    labels = find_words(runs, spec["textual_inversion_weight"])
    words = st.multiselect(
        "Learned words", list(labels), default=as_list(spec["textual_inversion_weight"]),
        format_func=lambda path: labels.get(path, path),
        placeholder="None chosen" if labels else f"None found under {runs}/",
        help=f"Files under {runs}/, where training writes them. Write the words themselves in the prompt.",
    )  # fmt: skip
    tokens = list(dict.fromkeys(token for path in words if (token := read_token(path)[0])))
    if tokens:
        st.markdown("Write in the prompt: " + " ".join(f"`{token}`" for token in tokens))
    compare = bool(tokens) and st.toggle(
        "Compare with and without", help="Each seed twice: with the learned words, and with others instead."
    )
    start = st.radio("Start from", ["noise", "a picture"], horizontal=True)
    picture = ask_picture() if start == "a picture" else None
    order = ask_form(spec, words, tokens if compare else None, picture)
    if order is not None and start == "a picture" and picture is None:
        raise ValueError("Choose a picture to start from.")
    return order


def ask_picture():
    """An uploaded picture as a PIL image, or None where there is none that can be used."""
    upload = st.file_uploader("Picture", type=["jpg", "jpeg", "png", "webp", "bmp"])
    if upload is None:
        return None
    try:
        picture = decode_upload(upload.getvalue())
    except ValueError as error:
        st.error(plain(f"{upload.name} cannot be used: {error}."))
        return None
    st.image(picture, width=160)
    return picture


@st.cache_data(max_entries=4, show_spinner=False)
def decode_upload(data):
    return decode_picture(data, max_pixels=MAX_UPLOAD_PIXELS)


def ask_form(spec, words, compared, picture):
    """What is sent together by Draw, so that changing it meanwhile does not interrupt a drawing."""
    height, width = (spec["H"], spec["W"])
    if picture is not None:
        height, width = sampling.size_like(picture, (height, width))
    default = sampling.SamplingArgs()
    with st.form("order", border=False, enter_to_submit=False):
        prompt = st.text_area("Prompt", key="prompt", max_chars=MAX_CHARACTERS, help="(word:1.3) weighs.")
        negative = st.text_input("Negative prompt", key="negative", max_chars=MAX_CHARACTERS)
        instead = None
        if compared is not None:
            hint = "nothing, or a word such as cat"
            instead = {
                token: st.text_input(f"Instead of {plain(token)}", placeholder=hint, max_chars=100)
                for token in compared
            }
        columns = st.columns(3)
        side = dict(min_value=sampling.SIDE_MULTIPLE, max_value=MAX_SIDE, step=sampling.SIDE_MULTIPLE)
        width = columns[0].number_input("Width", value=width, **side)
        height = columns[1].number_input("Height", value=height, **side)
        seed = columns[2].number_input(
            "Seed", 0, 2**32 - MAX_PICTURES, 42, help="Of the first picture; the next ones count up."
        )
        sampler = columns[0].selectbox("Sampler", list(sampling.SAMPLERS))
        steps = columns[1].number_input("Steps", 1, MAX_STEPS, default.steps)
        scale = columns[2].number_input(
            "Guidance",
            0.0,
            50.0,
            default.guidance_scale,
            step=0.5,
            help="How closely prompts are kept; 1: none.",
        )
        count = columns[0].number_input("Pictures", 1, MAX_PICTURES, 1)
        strength = 1.0
        if picture is not None:
            strength = columns[1].number_input(
                "Strength", 0.05, 1.0, 0.75, step=0.05, help="How much of the picture is lost."
            )
        if not st.form_submit_button("Draw", type="primary", width="stretch"):
            return None
    args = sampling.SamplingArgs(
        height=height,
        width=width,
        negative_prompt=negative,
        sampler=sampler,
        steps=steps,
        guidance_scale=scale,
    )
    return Order(spec, words, prompt, args, seed, count, picture, strength, instead)


# ---------------------------------------------------------------- files


def check_spec(name, spec):
    """ValueError if an entry of VERSION2SPECS is not of the form that is used here."""
    if wrong := set(SPEC_KEYS) ^ set(spec):
        raise ValueError(
            f"VERSION2SPECS['{name}'] must have {', '.join(SPEC_KEYS)}; not so: {', '.join(wrong)}."
        )
    if spec["is_legacy"]:
        raise ValueError(f"VERSION2SPECS['{name}'] has is_legacy: True; only SDXL models can be drawn with.")


def as_list(paths):
    """Nothing, a path or several, as people write them -> list of str."""
    return [str(path) for path in ([paths] if isinstance(paths, (str, Path)) else paths or [])]


def find_weights(spec):
    """The first of a model's weights that is there, or None."""
    return next((path for path in as_list(spec["ckpt"]) if Path(path).exists()), None)


def find_words(runs, more):
    """Files of learned words: path -> label. First those of VERSION2SPECS, then a run's newest first."""
    root = Path(runs).resolve()
    found = {str(path): read_token(str(path)) for path in Path(runs).rglob("*") if is_word_file(path, root)}
    newest = sorted(found, key=lambda path: (str(Path(path).parent), -(found[path][1] or 0), path))
    labels = {path: f"{read_token(path)[0] or 'damaged'} · {path}" for path in as_list(more)}
    for path in newest:
        token, step = found[path]
        at = "" if step is None else f" · step {step}"
        labels.setdefault(path, f"{token or 'damaged'}{at} · {Path(path).relative_to(runs)}")
    return labels


def is_word_file(path, root):
    """Whether a path looks like a learned word and really lies under `root`: links may lead elsewhere."""
    if path.suffix not in WORD_SUFFIXES or path.stem == "learned_embeds_2":  # read with diffusers' first
        return False
    return path.is_file() and root in path.resolve().parents


def read_token(path):
    """(word, training step or None) of a file, or (None, None) if it cannot be read: Draw then says why."""
    try:
        return _read_token(path, Path(path).stat().st_mtime_ns)
    except OSError:
        return None, None


@st.cache_data(max_entries=10_000, show_spinner=False)
def _read_token(path, changed):
    try:
        word = read_embedding(path)
    except ValueError:
        return None, None
    return word.token, word.step


# ---------------------------------------------------------------- drawing


@dataclass
class Picture:
    prompt: str
    seed: int
    pixels: np.ndarray  # (H, W, 3) uint8
    text: dict  # PNG metadata


@dataclass
class Drawing:
    """What there is to see; a rerun of the page shows it again."""

    num_cols: int
    pictures: list = field(default_factory=list)
    warnings: list = field(default_factory=list)
    errors: list = field(default_factory=list)


def fill(drawing, order):
    """Draw what was asked for, showing progress."""
    st.button("Stop")  # any click starts the page's next run; it ends this one, and with it the drawing
    bar = st.progress(0.0, "Waiting for another drawing to end" if lock().locked() else "Loading the model")
    place = st.empty()
    with lock(), warnings_of("gm") as drawing.warnings:
        engine = prepare(order)
        for picture in draw(engine, order, bar.progress):
            drawing.pictures.append(picture)
            place.image(grid_of(drawing), width="stretch")


@st.cache_resource(show_spinner=False)
def lock():
    """MindSpore computes for one browser tab at a time."""
    return threading.Lock()


@st.cache_resource(max_entries=1, show_spinner=False)  # one model in memory
def load_model(config, weights, changed):
    """The engine with its weights; `changed`, the files' times, makes edited files load again."""
    with parameter_dtype(start().dtype):
        engine = build_engine(config)
    load_weights(engine, weights)
    replace_words(engine.conditioner, [], room=ROOM)
    return engine


@st.cache_resource(show_spinner=False)
def start():
    """MindSpore as the options after the double dash want it -> gm.runtime.Runtime."""
    parser = argparse.ArgumentParser(prog="streamlit run demo/sampling.py --")
    add_runtime_flags(parser)
    try:
        args = runtime_args(parser.parse_args())
    except SystemExit as error:
        raise ValueError("The options after -- are wrong; the terminal says which.") from error
    use_flash_attention(args.flash_attention)
    return start_runtime(args)


def prepare(order):
    """The engine of an order, with its words and no others.

    Raises:
        FileNotFoundError: weights, config or a learned word are not there.
        ValueError: they are no good, or of another model.
    """
    spec, args = order.spec, order.args
    weights = find_weights(spec)
    if weights is None:
        names = " or ".join(as_list(spec["ckpt"]))
        raise FileNotFoundError(f"There are no weights {names}; put them there or choose another model.")
    if not Path(spec["config"]).is_file():
        raise FileNotFoundError(f"The config {spec['config']} does not exist.")
    changed = [Path(path).stat().st_mtime_ns for path in (spec["config"], weights)]
    engine = load_model(spec["config"], weights, changed)
    expected = spec["C"], args.height // spec["f"], args.width // spec["f"]
    if sampling.latent_shape(engine, args) != expected:
        raise ValueError(f"C and f in VERSION2SPECS do not fit {spec['config']}.")

    tokens = [read_token(path)[0] for path in order.words]
    if twice := next((token for token in tokens if token and tokens.count(token) > 1), None):
        raise ValueError(f"Several of the chosen files hold {twice}; choose one of them.")
    conditioner = engine.conditioner
    replace_words(conditioner, [], room=ROOM)
    words = sampling.read_words(conditioner, order.words)
    replace_words(conditioner, [(word.token, (word.clip_l, word.clip_g)) for word in words], room=ROOM)
    sampling.warn_about_words(conditioner, [order.prompt, args.negative_prompt])
    tokenizer = conditioner.text_embedders[0].tokenizer
    for name, text in (("prompt", order.prompt), ("negative prompt", args.negative_prompt)):
        parts = tokenizer.encode_weighted([text])[0].shape[1]
        if parts > MAX_PARTS:
            raise ValueError(
                f"The {name} is too long: its {len(tokenizer.ids(text))} tokens fill {parts} parts of "
                f"{tokenizer.room}, and {MAX_PARTS} at most are read here. Shorten it."
            )
    return engine


def draw(engine, order, report):
    """Yield Picture after Picture; one at a time, so that no number of them compiles anything again.

    Args:
        report: called with (share of the work that is done, text).
    """
    args, tokenizer = order.args, engine.conditioner.text_embedders[0].tokenizer
    texts = [(order.prompt, args)]
    if order.instead is not None:
        negative = tokenizer.replace_placeholders(args.negative_prompt, order.instead)
        without = tokenizer.replace_placeholders(order.prompt, order.instead)
        texts.append((without, replace(args, negative_prompt=negative)))
    report(0.0, "Preparing; the first picture of a size takes longer, as its networks are compiled")
    part, made_with = sampling.WHOLE, {"task": "txt2img", "weight": Path(find_weights(order.spec)).name}
    made_with["words"] = [Path(path).name for path in order.words]
    if order.picture is not None:
        part = sampling.Part(sampling.encode_picture(engine, order.picture, args), order.strength)
        made_with |= {"task": "img2img", "strength": order.strength}
    conditions = [sampling.condition(engine, prompt, args) for prompt, args in texts]

    total = order.num_pictures * len(texts)
    for i in range(total):
        seed, (prompt, args) = order.seed + i // len(texts), texts[i % len(texts)]

        def step_done(step, steps, i=i):
            report((i + step / steps) / total, f"Picture {i + 1} of {total}, step {step} of {steps}")

        latents = sampling.draw_latents(
            engine, conditions[i % len(texts)], [seed], args, part=part, callback=step_done
        )
        report((i + 1) / total, f"Picture {i + 1} of {total}, decoding")
        pixels = sampling.decode(engine, latents)[0]
        yield Picture(prompt, seed, pixels, sampling.png_text(prompt, seed, args, made_with))


# ---------------------------------------------------------------- what a person sees


def show(drawing):
    """Messages, pictures, and all that can be downloaded."""
    for text in drawing.errors:
        st.error(plain(text))
    for text in drawing.warnings:
        st.warning(plain(text))
    if not drawing.pictures:
        return
    pictures = drawing.pictures
    columns = st.columns(drawing.num_cols or min(len(pictures), 4))
    for i, picture in enumerate(pictures):
        with columns[i % len(columns)]:
            png = sampling.encode_png(picture.pixels, picture.text)
            caption = plain(f"{picture.prompt}, seed {picture.seed}")
            st.image(png, caption=caption, width="stretch", output_format="PNG")
            name = f"{i + 1:02d}_seed{picture.seed}.png"
            st.download_button("PNG", png, name, key=name, on_click="ignore", help="Its settings are in it.")
    settings = [{**picture.text, "settings": json.loads(picture.text["settings"])} for picture in pictures]
    with st.container(horizontal=True):
        text = json.dumps(settings, ensure_ascii=False, indent=2)
        st.download_button("Settings (JSON)", text, "settings.json", "application/json", on_click="ignore")
        if len(pictures) > 1:
            png = sampling.encode_png(grid_of(drawing), {"settings": json.dumps(settings)})
            st.download_button("Grid (PNG)", png, "grid.png", on_click="ignore")


def grid_of(drawing):
    """All pictures of a drawing in one, (H, W, 3); places still empty are white."""
    pictures = [picture.pixels for picture in drawing.pictures]
    num_cols = drawing.num_cols or min(len(pictures), 4)
    empty = np.full_like(pictures[0], 255)
    return sampling.make_grid(pictures + [empty] * (-len(pictures) % num_cols), num_cols)


@contextmanager
def errors_into(texts):
    """What a person can do something about becomes a message, not a traceback."""
    try:
        yield
    except (ValueError, OSError) as error:
        texts.append(str(error))
    except (RuntimeError, MemoryError) as error:
        logging.getLogger("sampling").exception("drawing failed")
        reason = next(iter(str(error).splitlines()), "not enough memory")
        texts.append(f"MindSpore could not compute this: {reason}")


@contextmanager
def warnings_of(name):
    """A list that collects what a logger warns of meanwhile, in this thread."""
    texts, thread = [], threading.get_ident()
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: record.thread == thread and texts.append(record.getMessage())
    logger = logging.getLogger(name)
    logger.addHandler(handler)
    try:
        yield texts
    finally:
        logger.removeHandler(handler)


def plain(text):
    """Text as Markdown that shows it as it is."""
    return re.sub(r"([\\`*_{}\[\]()<>#+\-.!$~:|&])", r"\\\1", text)


if __name__ == "__main__":
    main(VERSION2SPECS, runs=RUNS)
