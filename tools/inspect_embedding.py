"""Look into a learned word: what the file holds, and where its vectors lie among the model's own words.

    python tools/inspect_embedding.py runs/cat_toy/SD-XL-base-1.0_3000_ti.ckpt
    python tools/inspect_embedding.py cat_toy.safetensors --weight checkpoints/sd_xl_base_1.0_ms.ckpt --json

With --weight, each vector's norm stands beside the vocabulary's, and the nearest words (by cosine) are
listed for each text encoder. Norms far above the vocabulary's mean that the vectors dominate every prompt
they stand in: fewer steps or a smaller learning rate help. Of the weights only the two token tables are
read.
"""

import argparse
import json
import logging
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from gm.textual_inversion.embedding_file import read_embedding  # noqa: E402

TABLES = {
    "clip_l": "conditioner.embedders.0.transformer.text_model.embeddings.token_embedding.weight",
    "clip_g": "conditioner.embedders.1.model.token_embedding.weight",
}
PERCENTILES = (5, 50, 95)
BLOCK = 4096  # rows of a vocabulary in float32 at a time


def inspect_embedding(path, *, token=None, weight=None, tokenizer=None, count=5):
    """Describe an embedding.

    Args:
        path: embedding of any format.
        token: the word, where the file's own is not wanted.
        weight: base weights (.safetensors, .ckpt or diffusers folder) to compare with; None compares nothing.
        tokenizer: folder with vocab.json and merges.txt, or a hub name; None for CLIP's own.
        count: how many nearest words a vector.

    Returns:
        dict that JSON can hold: file, format, token, num_vectors, widths, step, base_model, metadata, and for
        each encoder the vectors' norms and, with weight, `vocabulary` (percentile of norms -> norm) and
        `nearest` (for each vector a list of [word, cosine]).

    Raises:
        FileNotFoundError, ValueError: a file is missing or damaged, or the embedding is for another model.
    """
    tables = {} if weight is None else _read_tables(weight)
    widths = tuple(table.shape[1] for table in tables.values()) or None
    embedding = read_embedding(path, token=token, expect_widths=widths)
    report = {
        "file": str(path),
        "format": embedding.format,
        "token": embedding.token,
        "num_vectors": embedding.num_vectors,
        "widths": list(embedding.widths),
        "step": embedding.step,
        "base_model": embedding.base_model,
        "metadata": dict(embedding.metadata),
        "encoders": {
            name: {"norms": _rounded(np.linalg.norm(getattr(embedding, name), axis=1))} for name in TABLES
        },
    }
    words = _read_words(tokenizer) if tables else []
    for name, table in tables.items():
        if len(words) != table.shape[0]:
            raise ValueError(
                f"The tokenizer has {len(words)} words, the table of {weight} {table.shape[0]} rows; "
                "give the model's own --tokenizer."
            )
        report["encoders"][name] |= _compare(getattr(embedding, name), table.read(), words, count)
    return report


def _read_tables(weight):
    # MindSpore, which the import brings along, takes seconds; without --weight nobody needs it.
    from gm.checkpoint import read_weights

    tensors = read_weights(weight)
    missing = [name for name in TABLES.values() if name not in tensors]
    if missing:
        raise ValueError(f"{weight} is no SDXL base: it has no {missing[0]}.")
    return {name: tensors[key] for name, key in TABLES.items()}


def _read_words(version):
    from gm.conditioning.tokenizer import load_clip_tokenizer

    tokenizer = load_clip_tokenizer(version)
    return [
        _shown(tokenizer, *pair) for pair in sorted(tokenizer.get_vocab().items(), key=lambda pair: pair[1])
    ]


def _shown(tokenizer, token, i):
    """A vocabulary entry as people write it; a piece that does not end a word is shown with a dash."""
    text = tokenizer.decode([i]).strip()
    if "\ufffd" in text:  # part of a character
        text = token.removesuffix("</w>")
    return text + ("" if token.endswith(("</w>", "|>")) else "-")


def _compare(rows, table, words, count):
    """The vocabulary's norms, and each row's nearest words by cosine."""
    directions = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    norms, cosines = np.empty(len(table)), np.empty((len(rows), len(table)), np.float32)
    for start in range(0, len(table), BLOCK):
        block = table[start : start + BLOCK].astype(np.float32)
        norms[start : start + BLOCK] = size = np.linalg.norm(block, axis=1)
        cosines[:, start : start + BLOCK] = directions @ (block / np.maximum(size, 1e-12)[:, None]).T
    best = np.argsort(-cosines, axis=1)[:, :count]
    return {
        "vocabulary": dict(
            zip(map(str, PERCENTILES), _rounded(np.percentile(norms, PERCENTILES)), strict=True)
        ),
        "nearest": [
            [[words[i], round(float(cosine[i]), 4)] for i in ids]
            for cosine, ids in zip(cosines, best, strict=True)
        ],
    }


def _rounded(values):
    return [round(float(value), 5) for value in values]


def table_of(report):
    """The report as text for people."""
    step = "unknown" if report["step"] is None else report["step"]
    lines = [
        f"{report['file']}: {report['format']} format",
        f"  token       {report['token']}",
        f"  vectors     {report['num_vectors']} x {report['widths'][0]} + {report['widths'][1]}",
        f"  step        {step}",
        f"  base model  {report['base_model'] or 'unknown'}",
        *(f"  {key[:60]!r}: {text[:100]!r}" for key, text in sorted(report["metadata"].items())),
    ]
    for name, encoder in report["encoders"].items():
        lines += ["", name]
        if "vocabulary" in encoder:
            low, middle, high = encoder["vocabulary"].values()
            lines += [f"  vocabulary's norms: {middle:.4f} (90 % lie in {low:.4f} to {high:.4f})"]
        for i, norm in enumerate(encoder["norms"]):
            nearest = encoder["nearest"][i] if "nearest" in encoder else []
            lines += [
                f"  {i:2}  norm {norm:.4f}  " + "  ".join(f"{word} {cosine:.3f}" for word, cosine in nearest)
            ]
    return "\n".join(line.rstrip() for line in lines)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", help="embedding of any known format, or diffusers' folder")
    parser.add_argument("--token", help="the word (default: the file's own, else its name)")
    parser.add_argument(
        "--weight", help="base weights to compare with: .safetensors, .ckpt or diffusers folder"
    )
    parser.add_argument("--tokenizer", help="the model's tokenizer: folder or hub name (default: CLIP's)")
    parser.add_argument("--count", type=int, default=5, help="nearest words a vector")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        report = inspect_embedding(
            args.path, token=args.token, weight=args.weight, tokenizer=args.tokenizer, count=args.count
        )
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(json.dumps(report, indent=2, ensure_ascii=False) if args.json else table_of(report))


if __name__ == "__main__":
    main()
