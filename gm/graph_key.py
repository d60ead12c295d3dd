"""What a compiled graph is made from, as a text: gm.compile_cache keeps graphs under its digest.

That is this project's sources, versions, the network's structure, constants and parameters (not their values), and the
inputs' shapes. For it to be all, a cell's `construct` reads nothing of its attributes but numbers, texts, tensors,
operators and other cells, and nothing else of its module.
"""

import hashlib
import os
import sys
import types
from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

# Of what MindSpore itself keeps in a Cell, this changes its graph; the rest is names, times and hooks.
CELL_SETTINGS = (
    "training", "mixed_precision_type", "_amp_level", "_jit_config_dict", "_has_config_recompute", "_func_graph_flags",
)  # fmt: skip
CELL_NOTES = frozenset(vars(nn.Cell())) | {  # and these appear when it is compiled
    "__compile_cell_hook__", "__parse_method__", "_func_graph_flags", "current_phase", "sequence_modified",
}  # fmt: skip
MODULE_SETTINGS = (bool, int, float, str, type(None), Tensor, ops.Primitive, ms.Type)


def describe(cell, inputs):
    """A text that changes with everything that the cell's graph for these inputs depends on."""
    context = [ms.get_context(name) for name in ("device_target", "jit_config", "jit_syntax_level", "deterministic")]
    flags = {name: value for name, value in os.environ.items() if name.startswith("MS_")}
    lines = [SOURCES, ms.__version__, np.__version__, sys.version, _text(context), _text(flags), signature(inputs)]
    modules, parts = set(), list(cell.cells_and_names())
    numbers = {id(part): i for i, (_, part) in enumerate(parts)}  # a part may be used in several places
    for name, part in parts:
        kind = type(part)
        modules.update(base.__module__ for base in kind.__mro__ if issubclass(base, nn.Cell))
        own = {key: value for key, value in vars(part).items() if key not in CELL_NOTES}
        own |= {key: getattr(part, key, None) or None for key in CELL_SETTINGS}
        own |= {key: numbers.get(id(child)) for key, child in part._cells.items()}
        parameters = [p for _, p in part.parameters_and_names(expand=False)]
        trained = [p.requires_grad for p in parameters]
        lines.append(f"{name} {kind.__module__}.{kind.__qualname__} {_text(own)} {_text(parameters)} {trained}")
    for name in sorted(name for name in modules if name.split(".")[0] != "mindspore"):
        module = sys.modules[name]
        settings = {k: v for k, v in vars(module).items() if not k.startswith("__") and isinstance(v, MODULE_SETTINGS)}
        lines.append(f"{name} {digest(Path(module.__file__).read_bytes())} {_text(settings)}")
    return "\n".join(lines)


def undescribed(graph, cell, description):
    """What a graph refers to and its cell does not: such a parameter would be loaded as garbage."""
    from mindspore.train.mind_ir_pb2 import ModelProto  # generated code: wanted only here

    model = ModelProto.FromString(graph)
    unknown = {p.name.split(":")[-1] for p in model.graph.parameter} - set(cell.parameters_dict())
    for primitive in model.primitives:
        if primitive.op_type == "Custom":
            functions = {a.s.decode() for a in primitive.attribute if a.name == "func_name"}  # LIBRARY:NAME
            unknown |= {function for function in functions if function.rsplit(":", 1)[0] not in description}
    return sorted(unknown)


def _text(value, depth=8):
    """A value as a text that is the same in every process."""
    if isinstance(value, Parameter):
        return f"Parameter({value.name}, {value.shape}, {value.dtype})"
    if isinstance(value, Tensor):
        return f"Tensor({value.dtype}, {_text(value.asnumpy())})"
    if isinstance(value, np.ndarray):
        return f"array({value.shape}, {value.dtype}, {digest(value.tobytes())})"
    if depth == 0 or isinstance(value, nn.Cell):  # a cell has its own line in the description
        return type(value).__qualname__
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_text(value[key], depth - 1)}" for key in sorted(value, key=str)) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_text(item, depth - 1) for item in value) + "]"
    if isinstance(value, ops.Primitive):
        return f"{value.name}{_text(vars(value), depth - 1)}"
    if isinstance(value, types.FunctionType):
        ours = not value.__module__.startswith("mindspore.")  # theirs hold names and times
        closure = [cell.cell_contents for cell in value.__closure__ or () if ours]
        return f"{value.__module__}.{value.__qualname__}{_text(closure, depth - 1)}"
    text = repr(value)  # numbers, texts, types
    return type(value).__qualname__ if " at 0x" in text else text  # some object of the host's, such as a tokenizer


def signature(inputs):
    """Shapes and types of tensors; anything else is a constant of the graph."""
    return _text([f"{x.shape} {x.dtype}" if isinstance(x, Tensor) else x for x in inputs])


def digest(data):
    return hashlib.sha256(data).hexdigest()[:32]


def sources():
    """Digest of this package's files as they are now."""
    package = Path(__file__).parent
    files = sorted(path for path in package.rglob("*") if path.suffix in (".py", ".cc", ".h"))
    return digest(b"".join(f"{path.relative_to(package)} ".encode() + path.read_bytes() for path in files))


SOURCES = sources()  # as they were imported: a file that is edited later is no part of what runs here
