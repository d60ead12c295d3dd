"""Files of torch.save's shape, written without torch, so that they can also be wrong."""

import io
import pickle
import zipfile

import numpy as np


def torch_file(path, pickled, records=(), compression=zipfile.ZIP_STORED, byteorder=b"little"):
    """A zip of torch.save's shape."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/byteorder", byteorder)
        for key, content in dict(records).items():
            archive.writestr(f"archive/data/{key}", content)


class Named:
    """Pickles as a reference to a global of another module, such as torch's."""

    def __init__(self, module, name):
        self.module, self.name = module, name


class Tensor:
    def __init__(self, key, shape, kind="FloatStorage", strides=None, offset=0):
        self.strides = strides or tuple(int(np.prod(shape[i + 1 :])) for i in range(len(shape)))
        self.key, self.shape, self.kind, self.offset = key, shape, kind, offset


class TorchPickler(pickle._Pickler):
    """Writes tensors with the instructions that torch.save uses."""

    def persistent_id(self, obj):
        return obj.persistent if isinstance(obj, Storage) else None

    def save(self, obj, save_persistent_id=True):
        if isinstance(obj, Named):
            self.write(pickle.GLOBAL + f"{obj.module}\n{obj.name}\n".encode())
        elif isinstance(obj, Tensor):
            self.save(Named("torch._utils", "_rebuild_tensor_v2"))
            storage = Storage(("storage", Named("torch", obj.kind), obj.key, "cpu", 0))
            self.save((storage, obj.offset, obj.shape, obj.strides, False, {}))
            self.write(pickle.REDUCE)
        else:
            super().save(obj, save_persistent_id)


class Storage:
    def __init__(self, persistent):
        self.persistent = persistent


def torch_pickle(obj):
    out = io.BytesIO()
    TorchPickler(out, protocol=2).dump(obj)
    return out.getvalue()
