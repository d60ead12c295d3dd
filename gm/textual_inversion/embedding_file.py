"""A learned word on disk: one reader for every ecosystem's format, one writer for each.

| format      | who reads it                      | content                                             |
|-------------|-----------------------------------|-----------------------------------------------------|
| `ckpt`      | this project, mindone             | .ckpt: two tables, placeholder_token, num_vectors   |
| `webui`     | A1111, ComfyUI, kohya, OneTrainer | .safetensors (or .pt): clip_l, clip_g               |
| `diffusers` | diffusers                         | learned_embeds(_2).safetensors, one table each      |
| `pti`       | cog-sdxl                          | embeddings.pti: text_encoders_0, text_encoders_1    |

The reader goes by content, never by suffix, and treats every file as hostile: it runs nothing, checks each
declared size against the file, and answers with a usable embedding or a ValueError.
"""

import hashlib
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from gm.ckpt_format import read_ckpt_entry, read_ckpt_index, read_ckpt_metadata, write_ckpt
from gm.safetensors_format import read_safetensors_entry, read_safetensors_index
from gm.torch_format import TorchTensor, read_torch_file, read_torch_tensor
from gm.weight_files import in_memory, write_safetensors

log = logging.getLogger(__name__)

FORMATS = ("ckpt", "webui", "diffusers", "pti")
_TABLES = (
    "conditioner.embedders.0.transformer.text_model.embeddings.token_embedding.embedding_table",
    "conditioner.embedders.1.model.token_embedding.embedding_table",
)
_CKPT_VALUES = ("placeholder_token", "num_vectors")
# The pair of names that holds the rows of encoder 1 and 2.
_PAIRS = {"ckpt": _TABLES, "webui": ("clip_l", "clip_g"), "pti": ("text_encoders_0", "text_encoders_1")}
_LEARNED_EMBEDS = ("learned_embeds", "learned_embeds_2")
_SDXL_WIDTHS = (768, 1280)

MAX_VECTORS = 75  # what a prompt has room for
_MAX_WIDTH = 1 << 14
_MAX_FILE = 16 << 20  # bytes; 75 vectors in double precision have 1.2 million
_MAX_HEADER = 1 << 20
_MAX_VALUE = 65504.0  # half precision's largest: a larger number is damage, and would become infinite there


@dataclass(frozen=True, eq=False)
class Embedding:
    """A learned word.

    Attributes:
        token: the word as prompts write it, such as "<cat-toy>"; it stands for all vectors.
        clip_l: (n, 768) float32, rows for text encoder 1 (other models: another width).
        clip_g: (n, 1280) float32, rows for text encoder 2.
        step: training steps behind it, if known.
        base_model: name of the model that it was trained on, if known.
        metadata: further facts, text to text, such as training settings. `modelspec.*` keys are kept.
        format: the format that it was read from, None for one that was not read.

    Raises:
        ValueError: the rows are not two finite tables of the same 1 to 75 vectors, or the token is no word.
    """

    token: str
    clip_l: np.ndarray
    clip_g: np.ndarray
    step: int | None = None
    base_model: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    format: str | None = None

    def __post_init__(self):
        if not isinstance(self.token, str) or not 1 <= len(self.token) <= 200:
            raise ValueError("The token is no text of 1 to 200 characters; name one yourself.")
        if not self.token.isprintable() or self.token != self.token.strip():
            raise ValueError(f"{self.token!r} is no word: a token is printable text, no spaces around it.")
        for name in ("clip_l", "clip_g"):
            object.__setattr__(self, name, _checked_rows(getattr(self, name), name))
        if len(self.clip_l) != len(self.clip_g):
            raise ValueError(
                "The two text encoders have different numbers of vectors: "
                f"{len(self.clip_l)} and {len(self.clip_g)}."
            )
        if self.step is not None and self.step < 0:
            raise ValueError(f"The step is {self.step}; it counts from 0.")
        if not all(isinstance(text, str) for pair in self.metadata.items() for text in pair):
            raise ValueError("metadata holds text alone; write numbers as text.")

    @property
    def num_vectors(self):
        return len(self.clip_l)

    @property
    def widths(self):
        return self.clip_l.shape[1], self.clip_g.shape[1]


def read_embedding(path, *, token=None, expect_widths=None):
    """Read an embedding of any known format.

    Args:
        path: the file; of diffusers' pair either file or the folder.
        token: the word to use; by default the file's own, or its name where the format holds none
            (A1111, ComfyUI and kohya take the word from the file's name too).
        expect_widths: (width of encoder 1, width of encoder 2) of the model, to refuse another model's rows.

    Returns:
        Embedding.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: the file is damaged, unsafe, of an unknown format, or for another model.
    """
    path = Path(path)
    if path.is_dir():
        path = _in_folder(path)
    content = _read_content(path)
    try:
        embedding = _recognise(path, content, token)
        if expect_widths is not None and embedding.widths != tuple(expect_widths):
            raise ValueError(
                f"its vectors are {embedding.widths[0]} and {embedding.widths[1]} wide, the model's text "
                f"encoders {expect_widths[0]} and {expect_widths[1]}: it was learned for another model"
            )
    except ValueError as error:
        if str(path) in str(error):
            raise
        raise ValueError(f"{path}: {str(error).removesuffix('.')}.") from error
    return embedding


def write_embedding(path, embedding, *, format, overwrite=False):
    """Write an embedding; each file appears under its name only when it is whole.

    Token, step, base model and metadata go with it, in the safetensors header or, for `ckpt`, where
    MindSpore's and mindone's readers do not look.

    Args:
        path: the file; for `diffusers` the folder, which is made if it is missing.
        embedding: Embedding.
        format: one of FORMATS.
        overwrite: replace what is there.

    Returns:
        list of the files written.

    Raises:
        ValueError: a file exists already and overwrite is off, or the format is unknown.
    """
    path = Path(path)
    if format not in FORMATS:
        raise ValueError(f"'{format}' is no embedding format; choose one of {', '.join(FORMATS)}.")
    if format == "diffusers":
        files = [path / f"{name}.safetensors" for name in _LEARNED_EMBEDS]
    else:
        files = [path]
    for file in files:
        if file.exists() and not overwrite:
            raise ValueError(f"{file} exists; ask for overwriting or choose another name.")
        file.parent.mkdir(parents=True, exist_ok=True)
    rows = (embedding.clip_l, embedding.clip_g)
    if format == "ckpt":
        values = [*zip(_TABLES, rows, strict=True)]
        values += [("placeholder_token", embedding.token), ("num_vectors", embedding.num_vectors)]
        write_ckpt(path, values, metadata=_to_metadata(embedding))
    elif format == "diffusers":
        for file, table in zip(files, rows, strict=True):
            _write_safetensors(file, {embedding.token: table}, embedding)
    else:
        _write_safetensors(path, dict(zip(_PAIRS[format], rows, strict=True)), embedding)
    return files


def learned_file_name(model_name, step):
    """What training calls its learned file: ("SD-XL-base-1.0", 3000) -> "SD-XL-base-1.0_3000_ti.ckpt"."""
    return f"{model_name}_{step}_ti.ckpt"


def file_stem(token):
    """The file name, without suffix, for a token: "<cat-toy>" -> "cat-toy".

    A1111, ComfyUI and kohya take a file's name for the word, and Windows has no angle brackets in names.

    Raises:
        ValueError: what remains cannot be a file name everywhere, such as one with path separators.
    """
    stem = token.strip("<>")
    if not re.fullmatch(r"[^\x00-\x1f<>:\"/\\|?*]+", stem) or stem[0] in ". " or stem[-1] in ". ":
        raise ValueError(f"The token {token!r} cannot name a file; give the file's name yourself.")
    return stem


# ---- reading


@dataclass(frozen=True)
class _Content:
    """What a file holds: tensors by name as (shape, function that reads it), other values, metadata."""

    tensors: dict
    values: dict
    metadata: dict


def _read_content(path):
    if not path.is_file():
        raise FileNotFoundError(f"There is no embedding at {path}.")
    size = path.stat().st_size
    if size > _MAX_FILE:
        raise ValueError(
            f"{path} has {size >> 20} MiB, more than any embedding; a model's weights are given as --weight."
        )
    with open(path, "rb") as file:
        start = file.read(9)
    if start[:2] == b"PK":
        saved = read_torch_file(path)
        if not isinstance(saved, dict):
            raise ValueError(f"{path} holds no table of tensors by name.")
        tensors = {
            name: (value.shape, lambda value=value: read_torch_tensor(path, value))
            for name, value in saved.items()
            if isinstance(name, str) and isinstance(value, TorchTensor)
        }
        # Names alone where the value is nested: nothing below needs more.
        values = {name: value if isinstance(value, str | int) else None for name, value in saved.items()}
        return _Content(tensors, {name: value for name, value in values.items() if name not in tensors}, {})
    if start[4:] == b"\0\0\0\0{":  # the upper half of the header's length, and the header
        index, metadata = read_safetensors_index(path, max_header=_MAX_HEADER)
        tensors = {
            name: (entry.shape, lambda entry=entry: read_safetensors_entry(path, entry))
            for name, entry in index.items()
        }
        _check_hash(path, metadata)
        return _Content(tensors, {}, metadata)
    if start[:1] == b"\x0a":  # field 1 of the protobuf message
        index = read_ckpt_index(path)
        tensors = {
            name: (entry.shape, lambda entry=entry: read_ckpt_entry(path, entry))
            for name, entry in index.items()
            if name not in _CKPT_VALUES
        }
        values = {
            name: read_ckpt_entry(path, index[name])
            for name in _CKPT_VALUES
            if name in index and not index[name].shape
        }
        return _Content(tensors, values, read_ckpt_metadata(path))
    if start[:1] == b"\x80":
        raise ValueError(
            f"{path} is a bare pickle, as torch wrote before version 1.6; it is not read, because it may run "
            "code. Save it again with a newer torch, or as safetensors."
        )
    what = "empty" if size == 0 else "no MindSpore .ckpt, no .safetensors and no torch .pt"
    raise ValueError(f"{path} is {what}; it holds no embedding.")


def _recognise(path, content, token):
    tensors = {_ckpt_name(name): tensor for name, tensor in content.tensors.items()}
    metadata = dict(content.metadata)
    found = [format for format, names in _PAIRS.items() if any(name in tensors for name in names)]
    if "string_to_param" in content.values or "string_to_param" in tensors:
        raise ValueError(
            "this is an embedding for Stable Diffusion 1 or 2 (string_to_param), which has one text encoder; "
            "SDXL needs vectors for two and cannot use it"
        )
    if len(tensors) < len(content.tensors):
        raise ValueError("it holds a text encoder's table twice, as embedding_table and as weight")
    if len(found) > 1:
        raise ValueError(f"it holds tensors of several formats: {_shown(tensors)}")
    if found:
        format = found[0]
        missing = [name for name in _PAIRS[format] if name not in tensors]
        if missing:
            raise ValueError(f"it holds one text encoder's vectors only; '{missing[0]}' is missing")
        clip_l, clip_g = (_read_rows(name, tensors[name]) for name in _PAIRS[format])
        if format == "ckpt" and token is None and not set(_CKPT_VALUES) <= set(content.values):
            raise ValueError(
                "it lacks placeholder_token or num_vectors; if it is whole, name the token yourself"
            )
        token = token or content.values.get("placeholder_token") or metadata.get("ti.token") or path.stem
    elif len(tensors) == 1:
        format = "diffusers"
        (own_token,) = tensors
        clip_l, clip_g = _read_pair(path, own_token, tensors[own_token])
        token = token or own_token
    else:
        raise ValueError(f"it is no embedding of a known format; its tensors: {_shown(tensors)}")
    num_vectors = content.values.get("num_vectors", len(clip_l))
    if num_vectors != len(clip_l):
        raise ValueError(f"num_vectors says {num_vectors}, and it holds {len(clip_l)} vectors")
    return Embedding(
        token,
        clip_l,
        clip_g,
        step=_read_step(path, content),
        base_model=metadata.get("ti.base_model"),
        metadata={key: text for key, text in metadata.items() if not _is_written_anew(key)},
        format=format,
    )


def _read_rows(name, tensor):
    """Rows of one encoder from (shape, function that reads)."""
    shape, read = tensor
    if len(shape) == 1:  # diffusers' older files hold one vector without the axis of rows
        shape = (1, *shape)
    if len(shape) != 2:
        raise ValueError(f"{name!r} has the shape {list(shape)}, not [vectors, width]")
    if shape[0] > MAX_VECTORS:
        raise ValueError(
            f"{name!r} has {shape[0]} vectors, and a prompt has room for {MAX_VECTORS}; if it is a model's "
            "weight file, give it as --weight"
        )
    if shape[1] > _MAX_WIDTH:
        raise ValueError(f"{name!r} is {shape[1]} wide, more than any text encoder")
    return read().reshape(shape)


def _checked_rows(rows, name):
    rows = np.asarray(rows)
    if rows.ndim != 2 or rows.dtype.kind != "f":
        raise ValueError(f"{name!r} is {rows.dtype} {list(rows.shape)}, not floating-point [vectors, width].")
    if not 1 <= len(rows) <= MAX_VECTORS or not 1 <= rows.shape[1] <= _MAX_WIDTH:
        raise ValueError(
            f"{name!r} has {rows.shape[0]} vectors of width {rows.shape[1]}; "
            f"1 to {MAX_VECTORS} vectors of width 1 to {_MAX_WIDTH} are possible."
        )
    usable = (np.abs(rows) <= _MAX_VALUE).all(axis=1)  # NaN compares as False
    if not usable.all():
        raise ValueError(f"Vector {usable.argmin()} of {name} holds NaN, infinite or absurd numbers.")
    return np.ascontiguousarray(rows, np.float32)


def _read_pair(path, own_token, tensor):
    """Both halves of diffusers' pair, found from one of them."""
    partner = _partner(path)
    if partner is None or not partner.is_file():
        wanted = f"its partner {partner.name} is missing" if partner else "its name tells of no other half"
        raise ValueError(
            f"it holds one table of shape {list(tensor[0])}, half of an SDXL embedding (or one for Stable "
            f"Diffusion 1 or 2), and {wanted}; give a folder with learned_embeds and learned_embeds_2"
        )
    other = _read_content(partner).tensors
    if list(other) != [own_token]:
        raise ValueError(f"its token is {own_token!r}, and {partner.name} holds: {_shown(other)}")
    halves = _read_rows(own_token, tensor), _read_rows(own_token, other[own_token])
    return halves[::-1] if _is_second(path) else halves


def _shown(names):
    return ", ".join(repr(name[:60]) for name in list(names)[:5]) or "none"


def _is_second(path):
    return re.match(r"learned_embeds_2(?![0-9])", path.name) is not None


def _partner(path):
    first, second = _LEARNED_EMBEDS
    if _is_second(path):
        return path.with_name(first + path.name[len(second) :])
    if path.name.startswith(first):
        return path.with_name(second + path.name[len(first) :])
    return None


def _in_folder(folder):
    for suffix in (".safetensors", ".bin"):
        file = folder / (_LEARNED_EMBEDS[0] + suffix)
        if file.is_file():
            return file
    raise FileNotFoundError(f"The folder {folder} holds no learned_embeds.safetensors, diffusers' embedding.")


def _ckpt_name(name):
    """mindone's and this project's name of a table, where a file has torch's tail `weight`."""
    for table in _TABLES:
        if name == table.removesuffix("embedding_table") + "weight":
            return table
    return name


def _read_step(path, content):
    named = re.search(r"_([0-9]{1,9})_ti\.ckpt$", path.name)  # learned_file_name
    step = content.metadata.get("ti.step", content.values.get("step", named and named[1]))
    if isinstance(step, str):
        step = int(step) if re.fullmatch(r"[0-9]{1,12}", step) else None
    return step if type(step) is int and step >= 0 else None


# ---- metadata


def _is_written_anew(key):
    return key.startswith("ti.") or key in ("format", "modelspec.hash_sha256", "modelspec.trigger_phrase")


def _to_metadata(embedding):
    own = {"ti.token": embedding.token, "ti.step": embedding.step, "ti.base_model": embedding.base_model}
    return {**embedding.metadata, **{key: str(value) for key, value in own.items() if value is not None}}


def _write_safetensors(path, tensors, embedding):
    metadata = _to_metadata(embedding)
    if embedding.widths == _SDXL_WIDTHS:
        # ModelSpec 1.0.0: a trainer keeps the keys that are there and adds those that it knows.
        modelspec = {
            "modelspec.sai_model_spec": "1.0.0",
            "modelspec.architecture": "stable-diffusion-xl-v1-base/textual-inversion",
            "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
            "modelspec.title": embedding.token.strip("<>") or embedding.token,
            "modelspec.resolution": "1024x1024",
            "modelspec.prediction_type": "epsilon",
            "modelspec.trigger_phrase": embedding.token,
        }
        metadata = {**modelspec, **metadata}
        metadata["modelspec.hash_sha256"] = _hash(tensors[name] for name in sorted(tensors))
    tensors = {name: in_memory(table) for name, table in tensors.items()}
    write_safetensors(path, tensors, metadata={**metadata, "format": "pt"})


def _hash(tables):
    """ModelSpec's hash: SHA-256 of all that follows the header, where tensors stand in the order of names."""
    digest = hashlib.sha256()
    for table in tables:
        digest.update(table.tobytes())
    return "0x" + digest.hexdigest()


def _check_hash(path, metadata):
    expected = metadata.get("modelspec.hash_sha256")
    if expected is None:
        return
    with open(path, "rb") as file:
        file.seek(8 + int.from_bytes(file.read(8), "little"))
        digest = hashlib.sha256(file.read()).hexdigest()
    if expected.removeprefix("0x") != digest:
        log.warning("%s: its numbers are not those that its metadata promises (hash_sha256).", path)
