"""Prompts -> token ids: CLIP's byte-pair tokenizer, plus learned words, prompt weights and long prompts."""

import functools
import gzip
import importlib.metadata
import itertools
import json
import logging
import re
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
from huggingface_hub import constants, hf_hub_download
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTokenizer

logger = logging.getLogger(__name__)

CLIP_NAME = "openai/clip-vit-large-patch14"  # both text encoders of SDXL have this vocabulary
NUM_CLIP_MERGES = 48894
HUB_TIMEOUT = 5  # seconds
FILES = ("vocab.json", "merges.txt")


# ---------------------------------------------------------------- where the vocabulary comes from


@functools.cache
def load_clip_tokenizer(version=None):
    """CLIP's tokenizer.

    Args:
        version: a folder with vocab.json and merges.txt, a name on the Hugging Face hub, or None: CLIP's own.

    A name is looked up in the hub's cache, then on the hub; without a network, the vocabulary inside an
    installed open_clip_torch is read.

    Raises:
        FileNotFoundError: none of these is there.
    """
    if version is not None and Path(version).is_dir():
        missing = [name for name in FILES if not (Path(version) / name).is_file()]
        if missing:
            raise FileNotFoundError(f"The tokenizer folder '{version}' has no {' and no '.join(missing)}.")
        return _from_files(*(Path(version) / name for name in FILES))
    name = version or CLIP_NAME
    tokenizer = _from_hub(name, local_files_only=True) or _from_hub(name, local_files_only=False)
    if tokenizer is None:
        tokenizer = _from_open_clip()
        if tokenizer is not None and name != CLIP_NAME:
            logger.warning("The hub does not give the tokenizer '%s'; open_clip_torch's is taken.", name)
    if tokenizer is None:
        raise FileNotFoundError(
            f"No tokenizer for version '{name}': it is no folder, and the Hugging Face hub does not give it. "
            "Do one of these: set the text encoders' `version` in the YAML to a folder with vocab.json and "
            "merges.txt; connect to the hub; or `pip install --no-deps open_clip_torch`, which brings the "
            "vocabulary along."
        )
    return tokenizer


def _from_files(vocab, merges):
    lines = Path(merges).read_text(encoding="utf-8").splitlines()
    pairs = [tuple(line.split()) for line in lines if line and not line.startswith("#version")]
    return CLIPTokenizer(vocab=json.loads(Path(vocab).read_text(encoding="utf-8")), merges=pairs)


def _from_hub(name, *, local_files_only):
    # The hub's own client retries for minutes when there is no network.
    if not local_files_only and not _hub_answers():
        return None
    try:
        paths = [hf_hub_download(name, file, local_files_only=local_files_only) for file in FILES]
    except (OSError, ValueError):  # not there, or not a name of the form that the hub has
        return None
    return _from_files(*paths)


def _hub_answers():
    request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=HUB_TIMEOUT).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


def _from_open_clip():
    """From the merges that open_clip_torch ships; the package itself is not imported (it needs torch)."""
    try:
        files = importlib.metadata.files("open_clip_torch") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    path = next((file.locate() for file in files if file.name == "bpe_simple_vocab_16e6.txt.gz"), None)
    if path is None:
        return None
    lines = gzip.decompress(Path(path).read_bytes()).decode("utf-8").split("\n")
    merges = [tuple(line.split()) for line in lines[1 : NUM_CLIP_MERGES + 1]]
    characters = sorted(ByteLevel.alphabet())  # by code point, which is the order of CLIP's ids
    tokens = [
        *characters,
        *(character + "</w>" for character in characters),
        *("".join(pair) for pair in merges),
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=merges)


# ---------------------------------------------------------------- prompt weights


_GRAMMAR = r"(?P<escape>\\[\\()\[\]]?)|(?P<bracket>[(\[\])])|:\s*(?P<weight>[+-]?(?:\d+\.?\d*|\.\d+))\s*\)"


def parse_weights(prompt, *, atoms=None):
    r"""Split a prompt at AUTOMATIC1111's attention brackets.

    (x) is 1.1 times as strong, [x] 1/1.1 times, (x:1.3) 1.3 times; they nest. \( \) \[ \] \\ are literal, any
    other backslash is dropped. A bracket that is never closed reaches to the end; an unopened one is literal.

    Args:
        atoms: regular expression of words to keep whole, whatever brackets they contain.

    Returns:
        list of (text, weight).
    """
    pieces = []  # [text, weight]
    opened = {"(": [], "[": []}  # bracket -> where its contents begin in `pieces`
    join = False

    def scale(bracket, factor):
        for piece in pieces[opened[bracket].pop() :]:
            piece[1] *= factor

    for match in re.finditer(f"(?P<atom>{atoms or '(?!)'})|{_GRAMMAR}|.", prompt, re.DOTALL):
        text, bracket, weight = match.group(), match["bracket"], match["weight"]
        if bracket in opened:
            opened[bracket].append(len(pieces))
        elif weight and opened["("]:
            scale("(", float(weight))
        elif bracket == ")" and opened["("]:
            scale("(", 1.1)
        elif bracket == "]" and opened["["]:
            scale("[", 1 / 1.1)
        else:
            text = text[1:] if match["escape"] else text
            if join:
                pieces[-1][0] += text
            else:
                pieces.append([text, 1.0])
            join = True
            continue
        join = False
    for bracket, factor in (("(", 1.1), ("[", 1 / 1.1)):
        while opened[bracket]:
            scale(bracket, factor)
    return [(text, weight) for text, weight in pieces]


# ---------------------------------------------------------------- the tokenizer


def _alone(word):
    """Regular expression of a word: where it begins or ends in a letter or digit, not within a longer one."""
    before = r"(?<!\w)" if re.match(r"\w", word) else ""
    after = r"(?!\w)" if re.search(r"\w$", word) else ""
    return before + re.escape(word) + after


class Tokenizer:
    """CLIP's tokenizer with learned words.

    Args:
        version: see `load_clip_tokenizer`.
        max_length: ids in a chunk, the start and the end of the text included.
        pad: what follows the end of the text: "eos", or an id.
    """

    def __init__(self, version=None, *, max_length=77, pad="eos"):
        self._clip = load_clip_tokenizer(version)
        self.vocab_size = len(self._clip)
        self.bos_id, self.eos_id = self._clip.bos_token_id, self._clip.eos_token_id
        self.pad_id = self.eos_id if pad == "eos" else pad
        self.max_length = max_length
        self.room = max_length - 2  # ids of the prompt itself in a chunk
        self.placeholders = {}  # normalised word -> its ids
        self._cut = set()

    def normalize(self, text):
        """Text as CLIP reads it: composed Unicode, single spaces, lower case."""
        return self._clip.backend_tokenizer.normalizer.normalize_str(text)

    def check_placeholder(self, token):
        """A learned word as it will be matched.

        Raises:
            ValueError: it is empty, has a space in it, is a token of CLIP, or has been added before.
        """
        word = self.normalize(token.strip())
        if not word or " " in word:
            raise ValueError(f"--placeholder_token '{token}' must be one word, such as '<my-cat>'.")
        if word in self.placeholders:
            raise ValueError(f"--placeholder_token '{token}' was added before; choose another word.")
        ids = self._plain_ids(word)
        if len(ids) == 1:
            raise ValueError(
                f"--placeholder_token '{token}' is already a CLIP token (id {ids[0]}); "
                "choose a word the model does not know, such as '<my-cat>'."
            )
        return word

    def add_placeholder(self, token, num_vectors):
        """From now on `token`, in upper or lower case, stands for `num_vectors` ids of its own.

        Returns:
            the ids: consecutive, the first word's from `vocab_size` on.

        Raises:
            ValueError: as `check_placeholder`, or if a prompt cannot hold that many.
        """
        word = self.check_placeholder(token)
        if not 1 <= num_vectors <= self.room:
            raise ValueError(f"--num_vectors {num_vectors}: a prompt holds 1 to {self.room}.")
        first = self.vocab_size + sum(map(len, self.placeholders.values()))
        self.placeholders[word] = list(range(first, first + num_vectors))
        return self.placeholders[word]

    def clear_placeholders(self):
        """Know no learned words any more."""
        self.placeholders = {}
        self._cut.clear()

    def replace_placeholders(self, text, instead):
        """A text, normalised, with other words in place of learned ones.

        Args:
            instead: learned word -> what to write; a word that is not in it stays.
        """
        instead = {self.normalize(word.strip()): other for word, other in instead.items()}
        text = self.normalize(text)
        if self.placeholders:
            text = re.sub(self._pattern(), lambda match: instead.get(match[0], match[0]), text)
        return self.normalize(text).strip()

    def ids(self, text):
        """Ids of a text, learned words expanded, without start, end and padding."""
        return [i for word in self._words(text) for i in word]

    def text(self, ids):
        """Readable form of ids; ids of a learned word show as that word."""
        names = {i: word for word, own in self.placeholders.items() for i in own}
        parts = itertools.groupby(ids, names.get)
        return " ".join(name or self._clip.decode(list(group)) for name, group in parts)

    def encode(self, prompts):
        """Ids for training: one chunk a prompt, brackets literal. What does not fit is cut, and logged.

        Returns:
            (B, 1, max_length) int32.
        """
        rows = []
        for prompt in prompts:
            ids = self.ids(prompt)
            if len(ids) > self.room and prompt not in self._cut:
                self._cut.add(prompt)
                lost = self.text(ids[self.room :])
                logger.warning("'%s' has %d tokens, and %d fit; lost: %s", prompt, len(ids), self.room, lost)
            rows.append([self._chunk(ids[: self.room])])
        return np.array(rows, np.int32)

    def encode_weighted(self, prompts):
        """Ids and weights for sampling: prompts of any length and with `parse_weights`' brackets.

        All prompts get as many chunks as the longest needs. A learned word is never split between two chunks.

        Returns:
            ids (B, chunks, max_length) int32, weights (B, chunks, max_length) float32.
        """
        prompts = [self._chunks(prompt) for prompt in prompts]
        shape = (len(prompts), max(map(len, prompts)), self.max_length)
        ids, weights = np.empty(shape, np.int32), np.ones(shape, np.float32)
        ids[:] = self._chunk([])
        for b, chunks in enumerate(prompts):
            for c, chunk in enumerate(chunks):
                ids[b, c] = self._chunk([i for i, _ in chunk])
                weights[b, c, 1 : 1 + len(chunk)] = [weight for _, weight in chunk]
        return ids, weights

    def _chunks(self, prompt):
        """A prompt as lists of at most `room` pairs (id, weight)."""
        chunks = [[]]
        for piece, weight in parse_weights(self.normalize(prompt), atoms=self._pattern()):
            for word in self._words(piece):
                if len(chunks[-1]) + len(word) > self.room:
                    chunks.append([])
                chunks[-1] += [(i, weight) for i in word]
        return chunks

    def _chunk(self, ids):
        return [self.bos_id, *ids, self.eos_id] + [self.pad_id] * (self.room - len(ids))

    def _words(self, text):
        """Ids that belong together: all of a learned word's, else one by one."""
        text = self.normalize(text)
        pattern = self._pattern()
        for part in re.split(f"({pattern})", text) if pattern else [text]:
            own = self.placeholders.get(part)
            yield from [own] if own else ([i] for i in self._plain_ids(part))

    def _pattern(self):
        """Regular expression of all learned words, longest first: one may begin like another."""
        words = sorted(self.placeholders, key=len, reverse=True)
        return "|".join(_alone(word) for word in words)

    def _plain_ids(self, text):
        return self._clip.backend_tokenizer.encode(text, add_special_tokens=False).ids
