"""A file appears under its final name only when it is whole."""

import os
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_file(path):
    """Open a binary file for writing that replaces `path` when the block ends without an error.

    The bytes go to a file beside it and are flushed to the disk before the rename, so a crash leaves
    either the old file or the new one. After an error nothing is left behind.
    """
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(beside, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name, too, survives a power cut
    finally:
        os.close(folder)
