"""Compiled graphs between processes: taken again with the same numbers, bit for bit, and only where nothing changed."""

import functools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops

from gm import compile_cache, graph_key
from gm.models.layers import Linear

ROOT = Path(__file__).parents[1]
TAKEN, COMPILED = "compiled graph taken", "compiled in"


class Process:
    """tests/cached_graphs.py, with the cache in a folder."""

    def __init__(self, folder, *what, root=ROOT, **env):
        outside = {name: value for name, value in os.environ.items() if name != compile_cache.SWITCH}
        env = {**outside, "PYTHONPATH": str(root), **env}
        command = [sys.executable, "-m", "tests.cached_graphs", str(folder), *map(str, what)]
        self.process = subprocess.Popen(
            command, cwd=root, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    @functools.cached_property
    def output(self):
        text = self.process.communicate(timeout=600)[0]
        assert self.process.returncode == 0, text
        return text

    @property
    def digests(self):
        return re.findall(r"^digest (.*)$", self.output, re.M)

    @property
    def facts(self):
        """Of each graph, in order, whether it was taken or compiled."""
        return re.findall(f"{TAKEN}|{COMPILED}", self.output)


def graphs(folder):
    return sorted(folder.glob("*.mindir"))


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    """A cache folder with two graphs, and the digests of what they gave."""
    folder = tmp_path_factory.mktemp("filled")
    process = Process(folder, 2, 3)
    assert process.facts == [COMPILED, COMPILED]
    assert len(graphs(folder)) == 2
    return folder, process.digests


def copied(filled, tmp_path):
    folder = tmp_path / "cache"
    shutil.copytree(filled[0], folder)
    return folder, filled[1]


def test_a_second_process_takes_the_graphs_and_gets_the_same_bits(filled, tmp_path):
    folder, (two, three) = copied(filled, tmp_path)
    plain = Process(tmp_path / "unused", 2, 3, **{compile_cache.SWITCH: "0"})
    assert plain.digests == [two, three] and plain.facts == [] and not (tmp_path / "unused").exists()
    second = Process(folder, 3, 5, 2)  # another order, and a shape that is new
    assert second.facts == [TAKEN, COMPILED, TAKEN]
    assert [second.digests[0], second.digests[2]] == [three, two]
    assert len(graphs(folder)) == len(list(folder.iterdir())) == 3  # and nothing else is left


def test_every_graph_of_a_model_is_taken(tmp_path):
    first = Process(tmp_path, "micro")
    assert first.facts == [COMPILED] * 5
    second = Process(tmp_path, "micro")
    assert second.facts == [TAKEN] * 5 and second.digests == first.digests


def test_changed_source_is_compiled(filled, tmp_path):
    for folder in ("gm", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__", "fixtures"))
    folder, (two, _) = copied(filled, tmp_path)
    assert Process(folder, 2, root=tmp_path).facts == [TAKEN]  # where the source lies is all the same
    for name in ("gm/models/layers.py", "tests/cached_graphs.py"):
        with open(tmp_path / name, "a") as file:
            file.write("# changed\n")
        changed = Process(folder, 2, root=tmp_path)
        assert changed.facts == [COMPILED] and changed.digests == [two]


def test_damaged_and_unusable_graphs_are_compiled(filled, tmp_path):
    folder, digests = copied(filled, tmp_path)
    for path in graphs(folder):
        path.write_bytes(path.read_bytes()[:1000])
    damaged = Process(folder, 2, 3)
    assert damaged.facts == [COMPILED, COMPILED] and damaged.output.count("is damaged") == 2
    assert damaged.digests == digests
    assert Process(folder, 2, 3).facts == [TAKEN, TAKEN]
    for path in graphs(folder):  # whole, and of no use to MindSpore
        path.rename(path.with_name(f"{path.stem.split('-')[0]}-{graph_key.digest(b'no graph')}.mindir"))
    for path in graphs(folder):
        path.write_bytes(b"no graph")
    unusable = Process(folder, 2, 3)
    assert unusable.digests == digests and TAKEN not in unusable.facts


def test_without_a_folder_it_compiles(filled, tmp_path):
    (tmp_path / "file").touch()
    process = Process(tmp_path / "file", 2, 3)
    assert process.digests == filled[1] and process.facts == []
    assert process.output.count("compiled graphs are not kept from here on: ") == 1


def test_processes_at_the_same_time(filled, tmp_path):
    both = [Process(tmp_path, 2, 3) for _ in range(2)]
    assert both[0].digests == both[1].digests == filled[1]
    assert Process(tmp_path, 2, 3).facts == [TAKEN, TAKEN]


def test_a_graph_with_parameters_that_its_cell_does_not_know_is_not_kept(tmp_path):
    process = Process(tmp_path, "hidden")
    assert re.search("its graph is not kept: .*'linear.weight'", process.output) and not graphs(tmp_path)


# ---------------------------------------------------------------- what a graph is made from


class Scaled(nn.Cell):
    def __init__(self, width=4, factor=2.0, constant=(1.0, 2.0), shared=False):
        super().__init__()
        self.factor, self.constant = factor, Tensor(np.array(constant, np.float32))
        self.split = ops.Split(-1, 2)
        self.cells_in_a_row = nn.CellList([Linear(width, width) for _ in range(2)])
        self.last = self.cells_in_a_row[int(shared)]

    def construct(self, x):
        return self.last(x) * self.factor


X = np.zeros((2, 4), np.float32)


def description(x=X, **settings):
    return graph_key.describe(Scaled(**settings), [Tensor(x)])


def test_equal_cells_have_one_description_before_and_after_compiling():
    cell = Scaled()
    before = graph_key.describe(cell, [Tensor(X)])
    cell(Tensor(X))
    assert before == graph_key.describe(cell, [Tensor(X)]) == description(X + 1)


@pytest.mark.parametrize(
    "change",
    [{"width": 5}, {"factor": 3.0}, {"factor": 2}, {"constant": (1.0, 3.0)}, {"shared": True}, {"x": X[:1]},
     {"x": X.astype(np.float16)}],
    ids=str,
)  # fmt: skip
def test_what_changes_a_graph_changes_its_description(change):
    assert description(**change) != description()


@pytest.mark.parametrize(
    "target, value",
    [("mindspore.__version__", "0"), ("sys.version", "0"), ("numpy.__version__", "0"),
     ("tests.test_compile_cache.PI", 3), ("gm.graph_key.SOURCES", "0")],
)  # fmt: skip
def test_versions_and_settings_change_the_description(target, value, monkeypatch):
    before = description()
    monkeypatch.setattr(target, value)
    assert description() != before


PI = 3.14


def test_precision_and_training_change_the_description(monkeypatch):
    before = description()
    trained, half = Scaled().set_train(True), Scaled()
    half.last.weight.set_dtype(ms.float16)
    assert len({before, *(graph_key.describe(cell, [Tensor(X)]) for cell in (trained, half))}) == 3
    monkeypatch.setenv("MS_SOMETHING", "1")
    assert description() != before


def test_the_folder_is_the_users(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert compile_cache.cache_folder() == Path("/elsewhere/textual_inversion_mindspore/graphs")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert compile_cache.cache_folder() == Path.home() / ".cache/textual_inversion_mindspore/graphs"


def test_the_longest_unused_graphs_go(tmp_path, monkeypatch):
    monkeypatch.setattr(compile_cache, "MAX_BYTES", 250)
    for i in range(4):
        (tmp_path / f"{i}.mindir").write_bytes(bytes(100))
        os.utime(tmp_path / f"{i}.mindir", (1e9 + i, 1e9 + i))
    for name, age in (("process-old", 1e9), ("process-new", None)):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, age and (age, age))
    compile_cache.prune(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2.mindir", "3.mindir", "process-new"]
