"""Builds the small model's tokenizer: CLIP's file format, a vocabulary of its own.

    python -m tools.small_world.tokenizer checkpoints/sd_xl_small_tokenizer

Every word of the small world becomes one token; any other text splits into pieces down to single bytes, so
that nothing is ever unknown. As in CLIP, id 0 is "!", and <|startoftext|> and <|endoftext|> come last.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

from tools.small_world.captions import words

CONTEXT_LENGTH = 40  # the longest template with 20 vectors and every attribute named needs 38
START, END = "<|startoftext|>", "<|endoftext|>"


def byte_symbols() -> list[str]:
    """One printable character for each byte value, in the order of GPT-2's and CLIP's vocabularies."""
    printable = "".join(map(chr, [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]))
    return [*printable, *(chr(256 + i) for i in range(256 - len(printable)))]


def learn_merges(vocabulary: Iterable[str]) -> list[tuple[str, str]]:
    """Byte-pair merges, most frequent pair first, until each word is one symbol (Sennrich et al. 2016)."""
    pieces = {word: [*word[:-1], word[-1] + "</w>"] for word in vocabulary}
    merges = []
    while pairs := Counter(pair for p in pieces.values() for pair in pairwise(p)):
        left, right = best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for p in pieces.values():
            i = 0
            while i < len(p) - 1:
                if (p[i], p[i + 1]) == best:
                    p[i : i + 2] = [left + right]
                i += 1
    return merges


def build(folder: str | Path) -> int:
    """Write vocab.json, merges.txt and two settings files into a folder; returns the vocabulary's size."""
    merges = learn_merges(words())
    symbols = byte_symbols()
    tokens = [*symbols, *(s + "</w>" for s in symbols), *(a + b for a, b in merges), START, END]

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    ids = {token: i for i, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(ids, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "merges.txt").write_text(
        "\n".join(["#version: 0.2", *(f"{a} {b}" for a, b in merges)]) + "\n", encoding="utf-8"
    )
    special = {"bos_token": START, "eos_token": END, "pad_token": END, "unk_token": END}
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": CONTEXT_LENGTH, "do_lower_case": True}
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, **special}, indent=2) + "\n")
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n")
    return len(tokens)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    print(f"{build(parser.parse_args().folder)} tokens")


if __name__ == "__main__":
    main()
