"""What every test shares."""

import os

os.environ.setdefault("GLOG_v", "3")  # MindSpore warns about every CPU fallback otherwise
os.environ.setdefault("MS_COMPILER_CACHE_ENABLE", "0")  # tests compile, and leave the user's cache alone

import mindspore as ms
import pytest

ms.set_device("CPU")
ms.set_context(mode=ms.GRAPH_MODE)  # the default is PyNative, many times slower


@pytest.fixture(params=["graph", "pynative"])
def mode(request):
    """Runs a test in both of MindSpore's execution modes."""
    ms.set_context(mode=ms.GRAPH_MODE if request.param == "graph" else ms.PYNATIVE_MODE)
    yield request.param
    ms.set_context(mode=ms.GRAPH_MODE)
