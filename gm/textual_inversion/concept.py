"""A new word that both text encoders can learn (Gal et al. 2022, "An Image is Worth One Word").

Each encoder gets one Parameter of learned rows beside its frozen vocabulary; a placeholder token in a prompt
expands to the ids of these rows. Nothing else of the model is trained.
"""

import logging
from dataclasses import dataclass

import numpy as np
from mindspore import Tensor

from gm.conditioning.conditioner import GeneralConditioner
from gm.textual_inversion.templates import longest_template

logger = logging.getLogger(__name__)

MAX_VECTORS = 70
INITIAL_STD = 0.01  # of rows that start from noise
ENCODERS = ("clip_l", "clip_g")


@dataclass(frozen=True)
class Concept:
    """A learned word. Rows are listed an encoder, in the conditioner's order."""

    conditioner: GeneralConditioner
    token: str
    placeholder_ids: tuple  # the same in every encoder

    @property
    def num_vectors(self):
        return len(self.placeholder_ids)

    def parameters(self):
        """Each encoder's Parameter of learned rows; it holds the rows of every concept that was added."""
        return [embedder.token_embedding.learned for embedder in self.conditioner.text_embedders]

    def parameter_names(self):
        return [parameter.name for parameter in self.parameters()]

    def rows(self):
        """This word's rows: an array [num_vectors, width] float32 an encoder."""
        rows = []
        for embedder in self.conditioner.text_embedders:
            first = self.placeholder_ids[0] - embedder.token_embedding.num_embeddings
            rows.append(embedder.token_embedding.learned.asnumpy()[first : first + self.num_vectors].copy())
        return rows


def add_concept(conditioner, *, token, num_vectors=None, initializer=None, rng=None):
    """Add a word to every text encoder of a conditioner. Call it before anything is compiled.

    Args:
        token: the placeholder, a word that CLIP does not know, such as "<my-cat>".
        num_vectors: 1 to 70; with arrays it may be None: as many as they have.
        initializer: where the rows start. One or several words: their tokens' vectors in order, repeating.
            A pair of arrays (clip_l [n, 768], clip_g [n, 1280]): these rows, as in an embedding file.
            None: N(0, 0.01^2).
        rng: numpy Generator, needed when `initializer` is None.

    Returns:
        the Concept. After another `add_concept`, `parameters()` are new objects, with both words' rows.

    Raises:
        ValueError: the token is known already, or rows do not fit an encoder or `num_vectors`.
    """
    embedders = conditioner.text_embedders
    if not _is_arrays(initializer):
        check_num_vectors(num_vectors)
    elif num_vectors is None:
        num_vectors = len(initializer[0])
    for embedder in embedders:
        embedder.tokenizer.check_placeholder(token)
    rows = [_initial_rows(embedder, num_vectors, initializer, rng) for embedder in embedders]
    for embedder, new in zip(embedders, rows, strict=True):
        ids = embedder.tokenizer.add_placeholder(token, num_vectors)
        table = embedder.token_embedding
        old = [] if table.learned is None else [table.learned.asnumpy()]
        table.set_learned(np.concatenate([*old, new]))
    return Concept(conditioner, token.strip(), tuple(ids))


def replace_words(conditioner, words, *, room):
    """Make `words` the only learned words of a conditioner. Unlike `add_concept`, also after compiling.

    Args:
        words: list of (token, (clip_l [n, 768], clip_g [n, 1280])).
        room: rows kept for all words together; the same at every call, so that nothing compiles again.

    Raises:
        ValueError: a token is known already, rows do not fit an encoder, or there are more than `room` rows.
            Call it again, with other words or none, before the conditioner is used.
    """
    embedders = conditioner.text_embedders
    for embedder in embedders:
        embedder.tokenizer.clear_placeholders()
    total = sum(len(arrays[0]) for _, arrays in words)
    if total > room:
        raise ValueError(f"The learned words have {total} vectors together, and there is room for {room}.")
    tables = [
        [_given_rows(embedder, len(arrays[0]), arrays) for _, arrays in words] for embedder in embedders
    ]
    for embedder, rows in zip(embedders, tables, strict=True):
        rows = np.concatenate([*rows, np.zeros((room - total, embedder.width), np.float32)])
        for token, arrays in words:
            embedder.tokenizer.add_placeholder(token, len(arrays[0]))
        table = embedder.token_embedding
        if table.learned is None:
            table.set_learned(rows)
        else:
            assert table.learned.shape == rows.shape, (table.learned.shape, rows.shape)
            table.learned.set_data(Tensor(rows))  # compiled graphs read the new rows


def check_num_vectors(num_vectors, *, templates=(), tokenizer=None):
    """Check that a prompt can hold a word of so many vectors.

    Args:
        templates: captions with {placeholder} in them; with these, `tokenizer` is needed.

    Raises:
        ValueError: fewer than 1, more than 70, or more than the longest template leaves room for.
    """
    if not 1 <= num_vectors <= MAX_VECTORS:
        raise ValueError(f"--num_vectors {num_vectors}: it must be 1 to {MAX_VECTORS}.")
    if not templates:
        return
    longest, places = longest_template(templates, lambda text: len(tokenizer.ids(text)), room=tokenizer.room)
    if num_vectors > places:
        raise ValueError(
            f"--num_vectors {num_vectors}: a prompt holds {tokenizer.room} tokens, and '{longest}' leaves "
            f"room for {max(places, 0)} vectors; use fewer vectors or shorter captions."
        )


def vocabulary_norms(conditioner):
    """[(mean, standard deviation)] of the L2 norms of each text encoder's frozen rows."""
    norms = [
        np.linalg.norm(embedder.token_embedding.weight.asnumpy().astype(np.float32), axis=1)
        for embedder in conditioner.text_embedders
    ]
    return [(float(norm.mean()), float(norm.std())) for norm in norms]


def _is_arrays(initializer):
    return initializer is not None and not isinstance(initializer, str)


def _initial_rows(embedder, num_vectors, initializer, rng):
    """[num_vectors, width] float32 for one encoder."""
    if _is_arrays(initializer):
        return _given_rows(embedder, num_vectors, initializer)
    if initializer is None:
        return rng.normal(0, INITIAL_STD, (num_vectors, embedder.width)).astype(np.float32)
    tokenizer = embedder.tokenizer
    ids = [i for i in tokenizer.ids(initializer) if i < tokenizer.vocab_size]
    if not ids:
        raise ValueError(f"--initializer_token '{initializer}' has no token of CLIP in it.")
    chosen = [ids[i % len(ids)] for i in range(num_vectors)]
    split = ", ".join(f"'{tokenizer.text([i])}' ({i})" for i in ids)
    logger.info("%s: '%s' splits into %s", embedder.rows_name, initializer, split)
    if len(ids) > num_vectors:
        logger.warning(
            "'%s' splits into more tokens than vectors; only the first %d are used", initializer, num_vectors
        )
    return embedder.token_embedding.weight.asnumpy()[chosen].astype(np.float32)


def _given_rows(embedder, num_vectors, initializer):
    rows = np.asarray(initializer[ENCODERS.index(embedder.rows_name)], np.float32)
    if rows.shape != (num_vectors, embedder.width):
        raise ValueError(
            f"The embedding's {embedder.rows_name} is {list(rows.shape)}, but this model needs "
            f"[{num_vectors}, {embedder.width}]; it belongs to another model or another number of vectors."
        )
    return rows
