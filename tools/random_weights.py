"""Write a weight file of random numbers for a config: the whole program runs on it, only the pictures are noise.

    python tools/random_weights.py --config configs/inference/sd_xl_base.yaml --dst checkpoints/random.safetensors

Full-size SDXL base takes 7 GB on disk in fp16. Tensors are written one at a time.
"""

import argparse
import math
import sys
import zlib
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from gm import checkpoint  # noqa: E402
from gm.bfloat16 import BFLOAT16  # noqa: E402
from gm.config import build_engine  # noqa: E402
from gm.models.layers import file_layouts  # noqa: E402
from gm.weight_files import LazyTensor  # noqa: E402

DTYPES = {"fp16": np.float16, "bf16": BFLOAT16, "fp32": np.float32}
PERIOD = 1 << 20  # numbers drawn a tensor; a larger tensor repeats them


def random_values(name, shape, seed):
    """Float32 that keeps activations near unit size: N(0, 1 / inputs) for matrices, 1 and 0 for norms and biases."""
    if len(shape) == 1:
        return np.full(shape, 1.0 if name.endswith(".weight") else 0.0, np.float32)
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    std = 1 / math.sqrt(math.prod(shape[1:]))
    values = np.empty(math.prod(shape), np.float32)
    drawn = np.float32(std) * rng.standard_normal(min(values.size, PERIOD), np.float32)
    for start in range(0, values.size, PERIOD):
        part = values[start : start + PERIOD]
        part[:] = drawn[: part.size]
    return values.reshape(shape)


def random_weights(config, dst, *, dtype="fp16", seed=0):
    """Write the file; see the module's docstring.

    Args:
        config: YAML of the model.
        dst: path ending in .safetensors or .ckpt.
        dtype: "fp16", "bf16" or "fp32".
    """

    def lazy(name, shape):
        values = LazyTensor(shape, np.dtype(np.float32), lambda: random_values(name, shape, seed))
        return values.astype(DTYPES[dtype])

    layouts = file_layouts(build_engine(config))
    checkpoint.write_weights(dst, {name: lazy(name, layout.shape) for name, layout in layouts.items()})


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "configs/inference/sd_xl_base.yaml")
    parser.add_argument("--dst", type=Path, required=True, help=".safetensors or .ckpt; must not exist yet")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="fp16")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.dst.exists():
        raise FileExistsError(f"--dst '{args.dst}' exists already; remove it or choose another name.")
    random_weights(args.config, args.dst, dtype=args.dtype, seed=args.seed)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
