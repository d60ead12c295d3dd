"""Compiled graphs are kept between runs: the second run of a command takes them from the user's cache folder.

MindSpore's own compile cache asks for graphs by a running number in one folder, and takes what it finds there. So each
process gets an empty folder, and before a cell is compiled the one graph that has its key is laid there under the
number that is next. The key is made from all that the graph is made from (gm.graph_key).

Used on a CPU, in graph mode, by a process alone; `MS_COMPILER_CACHE_ENABLE=0` in the environment turns it off.
"""

import atexit
import ctypes
import importlib
import logging
import os
import shutil
import tempfile
import threading
import time
import weakref
from contextlib import contextmanager, suppress
from pathlib import Path

import mindspore as ms
from mindspore.communication import GlobalComm

from gm.atomic_file import atomic_file
from gm.graph_key import SOURCES, describe, digest, signature, sources, undescribed

logger = logging.getLogger(__name__)

SWITCH = "MS_COMPILER_CACHE_ENABLE"
MAX_BYTES = 2 * 2**30  # of all graphs together; those longest unused go first

_lock = threading.Lock()
_called = weakref.WeakKeyDictionary()  # cell -> the input signatures that it was compiled for
_cache = None  # of this process; False when it had to be given up


def call(cell, *inputs):
    """`cell(*inputs)`; where this compiles the cell, its graph comes from the cache or goes there."""
    with _lock:  # a graph that another thread compiles meanwhile would take a number, too
        if _is_used():
            compiled, shapes = _called.setdefault(cell, set()), signature(inputs)
            if shapes not in compiled:
                _compile(cell, inputs)
                compiled.add(shapes)
                _trim()
    return cell(*inputs)


def cache_folder():
    """Where the graphs are."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "textual_inversion_mindspore" / "graphs"


def _is_used():
    if SWITCH in os.environ or _cache is False or GlobalComm.INITED:
        return False
    return ms.get_context("mode") == ms.GRAPH_MODE and ms.get_context("device_target") == "CPU"


def _compile(cell, inputs):
    """Compile with the cache, or leave the cell uncompiled if the cache is out of order."""
    global _cache
    try:
        if _cache is None:
            _cache = _Cache(cache_folder())
        _cache.compile(cell, inputs)
    except (OSError, AttributeError, ImportError, _Unusable) as e:  # a folder, or another MindSpore
        logger.warning("compiled graphs are not kept from here on: %s", e)
        _cache = False


def _trim():
    """Return to the system what compiling has freed: the C library keeps it, and activations would come on top."""
    with suppress(AttributeError):  # only glibc has the function
        ctypes.CDLL(None).malloc_trim(0)


class _Unusable(Exception):
    """MindSpore's cache did not do what was expected of it."""


class _Cache:
    """The folder of graphs, each a file KEY-DIGEST.mindir, and this process's own folder in it."""

    def __init__(self, folder):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.own = Path(tempfile.mkdtemp(prefix="process-", dir=folder))
        atexit.register(shutil.rmtree, self.own, ignore_errors=True)
        self.graphs = self.own / "rank_0" / "graph_cache"
        self.graphs.mkdir(parents=True)
        ms.set_context(compile_cache_path=str(self.own))  # MindSpore reads it once
        self.number = 0  # of the next graph, as MindSpore counts

    def compile(self, cell, inputs):
        name, started = type(cell).__name__, time.perf_counter()
        description = describe(cell, inputs)
        key = digest(description.encode())
        graph = self.find(key)
        file = self.graphs / f"compile_cache_{self.number}.mindir"
        self.number += 1
        if graph:
            file.write_bytes(graph)
            os.utime(file, (0, 0))  # if MindSpore compiles all the same, it writes the file
        try:
            with _mindspore_cache():
                cell.compile(*inputs)
        except Exception as e:
            if not graph:
                raise
            for path in self.folder.glob(f"{key}-*.mindir"):
                path.unlink(missing_ok=True)
            raise _Unusable(f"the graph of {name} was of no use: {e}") from e
        if [path.name for path in self.graphs.glob("*.mindir")] != [file.name]:
            raise _Unusable(f"MindSpore {ms.__version__} numbers its graphs in another way.")
        if file.stat().st_mtime == 0:
            logger.info("%s: compiled graph taken from %s", name, self.folder)
        else:
            seconds = time.perf_counter() - started
            kept = self.keep(key, file.read_bytes(), cell, description)
            logger.info("%s: compiled in %.0f s%s", name, seconds, f", kept in {self.folder}" if kept else "")
        file.unlink()

    def find(self, key):
        """A key's graph, or None."""
        for path in self.folder.glob(f"{key}-*.mindir"):
            with suppress(FileNotFoundError):  # another process removed it
                graph = path.read_bytes()
                if path.stem == f"{key}-{digest(graph)}":
                    os.utime(path)  # the time of its last use
                    return graph
                logger.warning("the compiled graph %s is damaged, and is made again", path)
                path.unlink()
        return None

    def keep(self, key, graph, cell, description):
        """Add a graph, unless it depends on more than its key tells."""
        unknown = undescribed(graph, cell, description)
        if unknown or sources() != SOURCES:
            logger.warning("%s: its graph is not kept: %s", type(cell).__name__, unknown or "sources have changed")
            return False
        with atomic_file(self.folder / f"{key}-{digest(graph)}.mindir") as file:
            file.write(graph)
        prune(self.folder)
        return True


def prune(folder):
    """Remove the graphs that were longest unused, and what killed processes left."""
    entries = []
    for path in folder.iterdir():
        with suppress(FileNotFoundError):  # another process was faster
            entries.append((path.stat().st_mtime, path.stat().st_size, path))
    total = 0
    for modified, size, path in sorted(entries, reverse=True):
        if path.suffix == ".mindir":
            total += size
            if total > MAX_BYTES:
                path.unlink(missing_ok=True)
        elif modified < time.time() - 7 * 86400:
            shutil.rmtree(path, ignore_errors=True)


@contextmanager
def _mindspore_cache():
    """What is compiled inside is looked for in MindSpore's cache, and written there."""
    api = importlib.import_module("mindspore.graph.api")
    compared_files = api._get_compile_cache_dep_files
    api._get_compile_cache_dep_files = list  # with none to compare, it takes the graph: our key has decided already
    os.environ[SWITCH] = "1"
    try:
        yield
    finally:
        del os.environ[SWITCH]
        api._get_compile_cache_dep_files = compared_files
