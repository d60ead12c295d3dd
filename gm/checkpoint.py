"""SDXL's weights: from a file that people have into the networks, and back.

Read are the original single file (.safetensors), MindSpore's .ckpt (mindone's names) and a diffusers
folder. All arrive under the original names, which are the networks' own (`gm.models.layers.file_layouts`).
A file is checked as a whole, by name and shape, before anything is changed, and then loaded tensor by
tensor. A tensor that is held just as it is in the file is not read but mapped into memory.
"""

import hashlib
import logging
import re
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore import Tensor
from tqdm import tqdm

from gm import diffusers_layout, weight_files
from gm.models.layers import file_layouts
from gm.weight_files import LazyTensor, in_memory, open_weights

logger = logging.getLogger(__name__)

BLOCK = 1 << 18  # numbers that are read and converted at a time, in the processor's cache

# In real files, and without a use here (regular expressions of whole names, original ones).
UNUSED = re.compile(
    "|".join(
        [
            r"conditioner\.embedders\.\d+\.transformer\.text_model\.embeddings\.position_ids",  # 0, 1, 2, ...
            r"conditioner\.embedders\.\d+\.model\.logit_scale",  # of CLIP's own training
            r"conditioner\.embedders\.\d+\.model\.attn_mask",  # the causal mask
            r"denoiser\.(log_)?sigmas",  # follow from the config
            r"(model_)?ema\..*",  # running averages beside the weights
            r"first_stage_model\.loss\..*",  # the autoencoder's discriminator
            r"(log_one_minus_|sqrt_|sqrt_one_minus_|sqrt_recip_|sqrt_recipm1_)?alphas_cumprod(_prev)?",
            r"betas|logvar|posterior_.*",  # of the noise schedule, in merged files
            r"global_step|epoch_num|step_num",
        ]
    )
)

# What kind of model a file holds: a name that only this kind has. The first match counts.
_KINDS = [
    ("a LoRA", r"lora_|.*[._]lora[._]"),
    ("a textual-inversion embedding", r"(clip_[lg]|text_encoders_[01]|emb_params|placeholder_token|<.*>)$"),
    ("a ControlNet", r"control_model\.|.*zero_convs\.|controlnet_"),
    ("the SDXL base", r"conditioner\.embedders\.1\.model\."),
    ("the SDXL refiner", r"conditioner\.embedders\.0\.model\."),
    ("Stable Diffusion 1", r"cond_stage_model\.transformer\."),
    ("Stable Diffusion 2", r"cond_stage_model\.model\."),
    ("Stable Diffusion 3", r".*\.joint_blocks\."),
    ("one component of a diffusers folder", r"(down_blocks|encoder\.down_blocks|text_model)\."),
]
_MODELS = ("the SDXL base", "the SDXL refiner")


def load_weights(net, path):
    """Fill a network from a weight file.

    Args:
        net: DiffusionEngine, or any cell whose attribute chains are the file's names. Parameters keep their
            dtype.
        path: .safetensors (fp16, bf16 or fp32), MindSpore .ckpt, or a diffusers folder. Parts of it may stay mapped
            into memory: it may be replaced or removed later, but not written into.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is corrupt, of another type or of another model, or does not fit; names what is
            missing, unexpected or of another shape. Nothing has been changed then.
    """
    layouts, tensors = file_layouts(net), open_fitting(net, path)
    parameters = dict(net.parameters_and_names())

    def read(name):
        layout, parameter, tensor = layouts[name], parameters[name], tensors[name]
        dtype = ms.dtype_to_nptype(parameter.dtype)
        if tensor.mapped and layout.held is not None and tensor.stored == layout.held:
            return name, tensor.mapped().view(dtype)
        values = np.empty(parameter.shape, dtype)
        for index, block in tensor.astype(layout.dtype).blocks(BLOCK):
            values[index] = layout.pack(block)
        return name, values

    made = _in_threads(read, layouts)
    for name, values in tqdm(
        made, total=len(layouts), desc=f"Loading {Path(path).name}", unit=" tensors", leave=False
    ):
        # from_numpy and set_data keep this very array: weights are never there twice.
        parameters[name].set_data(Tensor.from_numpy(values))


def _in_threads(function, items, *, threads=4):
    """map(function, items) by several threads, which are at most `threads` results ahead: each may be large."""
    items, ahead = iter(items), deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            ahead.extend(pool.submit(function, item) for item in islice(items, threads))
            while ahead:
                result = ahead.popleft().result()
                ahead.extend(pool.submit(function, item) for item in islice(items, 1))
                yield result
        finally:
            for future in ahead:
                future.cancel()


def open_fitting(net, path):
    """Open a weight file as `read_weights` does, after checking that it fits a network.

    Raises:
        As `load_weights`.
    """
    tensors = read_weights(path)
    expected = {name: layout.shape for name, layout in file_layouts(net).items()}
    check_weights({name: tensor.shape for name, tensor in tensors.items()}, expected, path)
    return tensors


def fingerprint(net, *, samples=256):
    """Text that differs for networks of other weights: a hash over names, shapes and samples of every parameter."""
    digest = hashlib.sha256()
    for name, parameter in net.parameters_and_names():
        if name.endswith(".learned"):
            continue
        values = parameter.asnumpy().reshape(-1)
        digest.update(f"{name} {parameter.shape} {values.dtype}".encode())
        digest.update(np.ascontiguousarray(values[:: max(1, values.size // samples)]).tobytes())
    return digest.hexdigest()[:16]


def save_weights(net, path, *, dtype=None, metadata=None):
    """Write a network's weights under their original names.

    Args:
        net: as in `load_weights`.
        path: ends in .safetensors or .ckpt (which gets MindSpore's names of norms and embeddings).
        dtype: numpy dtype of the floating-point tensors in the file; None keeps each parameter's.
        metadata: dict of str -> str for the header of a .safetensors.
    """
    parameters = dict(net.parameters_and_names())

    def lazy(name, layout):
        parameter = parameters[name]
        tensor = LazyTensor(layout.shape, layout.dtype, lambda: layout.unpack(parameter.asnumpy()))
        return tensor if dtype is None else tensor.astype(dtype)

    write_weights(path, {name: lazy(name, x) for name, x in file_layouts(net).items()}, metadata=metadata)


def read_weights(path):
    """Open a weight file or a diffusers folder as a dict of original name -> LazyTensor."""
    if Path(path).is_dir():
        return diffusers_layout.read_folder(path)
    tensors = open_weights(path)
    return {_original_name(name): tensor for name, tensor in tensors.items()}


def write_weights(path, tensors, *, metadata=None):
    """Write original name -> LazyTensor as .safetensors or .ckpt, by the path's suffix."""
    suffix = Path(path).suffix
    if suffix == ".safetensors":
        weight_files.write_safetensors(path, tensors, metadata=metadata)
    elif suffix == ".ckpt":
        norms = {name.removesuffix(".weight") for name, t in tensors.items() if len(t.shape) == 1}
        weight_files.write_ckpt(path, {_mindspore_name(name, norms): t for name, t in tensors.items()})
    else:
        raise ValueError(f"{path}: weights are written as .safetensors or .ckpt, not '{suffix}'.")


def with_unused(tensors):
    """The tensors together with those that an original file has and other formats leave out.

    position_ids are 0, 1, 2, ...; logit_scale is ln 100, at which CLIP clips it. Neither is used in SDXL.
    """
    full = dict(tensors)
    for name, tensor in tensors.items():
        at, _, leaf = name.rpartition(".")
        if name.endswith("embeddings.position_embedding.weight"):
            ids = in_memory(np.arange(tensor.shape[0], dtype=np.int64)[None])
            full.setdefault(f"{at.rpartition('.')[0]}.position_ids", ids)
        elif leaf == "text_projection":
            full.setdefault(f"{at}.logit_scale", in_memory(np.log(100).astype(tensor.dtype)))
    return full


# ---------------------------------------------------------------- names


def _original_name(name):
    """A name of MindSpore's as the original one; original names stay."""
    name = name.replace("._backbone", "")  # a prefix that MindSpore 2.2 put into some of mindone's files
    head, _, tail = name.rpartition(".")
    tail = {"gamma": "weight", "beta": "bias", "embedding_table": "weight"}.get(tail, tail)
    return f"{head}.{tail}" if head else tail


def _mindspore_name(name, norms):
    """`norms`: heads of names whose weight is a vector, which only norms have."""
    head, _, tail = name.rpartition(".")
    if head in norms:
        tail = {"weight": "gamma", "bias": "beta"}[tail]
    elif head.endswith(("token_embedding", "position_embedding")) and tail == "weight":
        tail = "embedding_table"
    return f"{head}.{tail}" if head else tail


# ---------------------------------------------------------------- checking


def kind_of(names):
    """What the names of a file's tensors say that it is, such as "the SDXL base"; None if they do not say."""
    return next((kind for kind, pattern in _KINDS if any(re.match(pattern, name) for name in names)), None)


def check_weights(found, expected, path):
    """Hold a file against a model.

    Args:
        found, expected: dicts of original name -> shape.
        path: of the file, for the error.

    Raises:
        ValueError: the file is of another model, or tensors are missing, unexpected or of another shape.
    """
    kind, wanted = kind_of(found), kind_of(expected)
    if kind != wanted and kind is not None and wanted in _MODELS:
        hint = "give the other config, or the other file" if kind in _MODELS else "give a file of that model"
        if kind.startswith("one component"):
            hint = "give the folder itself"
        raise ValueError(f"{path} is {kind}, but the config describes {wanted}; {hint}.")
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected and not UNUSED.fullmatch(name)]
    reshaped = [
        f"{name} {list(found[name])} instead of {list(expected[name])}"
        for name in expected
        if name in found and tuple(found[name]) != tuple(expected[name])
    ]
    problems = [("missing", missing), ("unexpected", unexpected), ("of another shape", reshaped)]
    if any(names for _, names in problems):
        lines = [f"  {len(names)} {what}: {_first_few(names)}" for what, names in problems if names]
        raise ValueError("\n".join([f"{path} does not fit the model that the config describes:", *lines]))


def _first_few(names, count=5):
    more = f", and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more
