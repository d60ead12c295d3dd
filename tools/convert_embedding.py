"""Convert a learned word between this project and mindone, A1111, ComfyUI, kohya, diffusers and cog-sdxl.

    python tools/convert_embedding.py --src runs/cat_toy/SD-XL-base-1.0_3000_ti.ckpt --dst cat-toy.safetensors
    python tools/convert_embedding.py --src cat-toy.safetensors --dst cat_toy_diffusers
    python tools/convert_embedding.py --src embeddings.pti --dst word.ckpt --token "<my-cat>"

What --src is, its content tells; of diffusers' pair either file or the folder will do. What --dst becomes,
its name tells: .ckpt (this project, mindone), .safetensors (A1111, ComfyUI, kohya, OneTrainer), .pti (cog-
sdxl), a folder (diffusers). With `--to webui` and a folder, the file is named by the word, which is what
A1111, ComfyUI and kohya take the word from. Token, step, base model and training settings go along.
"""

import argparse
import dataclasses
import logging
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from gm.textual_inversion.embedding_file import FORMATS, file_stem, read_embedding, write_embedding  # noqa: E402

SUFFIXES = {".ckpt": "ckpt", ".safetensors": "webui", ".pti": "pti", "": "diffusers"}


def convert(src, dst, *, to=None, token=None, step=None, base_model=None, overwrite=False):
    """Convert one embedding.

    Args:
        src: file of any format, or diffusers' folder.
        dst: file or folder; its suffix names the format where `to` is None.
        to: one of FORMATS.
        token, step, base_model: what to write instead of what the file says.
        overwrite: replace what is there.

    Returns:
        the Embedding and the list of files written.

    Raises:
        FileNotFoundError, ValueError: src is missing, damaged or unsafe; dst exists or is of unclear format.
    """
    dst = Path(dst)
    if to is None and dst.suffix not in SUFFIXES:
        raise ValueError(f"--dst ends in '{dst.suffix}', which names no format; give --to.")
    to = to or SUFFIXES[dst.suffix]
    given = {"step": step, "base_model": base_model}
    embedding = read_embedding(src, token=token)
    embedding = dataclasses.replace(embedding, **{k: v for k, v in given.items() if v is not None})
    if to == "webui" and dst.suffix == "":
        dst = dst / f"{file_stem(embedding.token)}.safetensors"
    return embedding, write_embedding(dst, embedding, format=to, overwrite=overwrite)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--src", required=True, help="embedding of any known format")
    parser.add_argument("--dst", required=True, help="where to; its suffix tells the format")
    parser.add_argument("--to", choices=FORMATS, help="the format, where --dst does not tell it")
    parser.add_argument("--token", help="the word to write (default: the file's own, else its name)")
    parser.add_argument("--step", type=int, help="training steps to note (default: the file's own)")
    parser.add_argument("--base_model", help="base model to note (default: the file's own)")
    parser.add_argument("--overwrite", action="store_true", help="replace what is at --dst")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        embedding, files = convert(
            args.src,
            args.dst,
            to=args.to,
            token=args.token,
            step=args.step,
            base_model=args.base_model,
            overwrite=args.overwrite,
        )
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    for file in files:
        print(f"{file}: {embedding.token}, {embedding.num_vectors} vectors, {embedding.widths} wide")


if __name__ == "__main__":
    main()
