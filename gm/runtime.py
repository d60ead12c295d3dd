"""How a command runs: device, execution mode, precision, seed, ranks and logging. Knows nothing of models."""

import argparse
import logging
import random
from dataclasses import dataclass

import mindspore as ms
import numpy as np
from mindspore import ops

logger = logging.getLogger(__name__)

AMP_LEVELS = ("auto", "O0", "O2", "bf16")


def flag(text):
    """True or False as users write them on the command line."""
    values = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.strip().lower() not in values:
        raise argparse.ArgumentTypeError(f"'{text}' is neither True nor False")
    return values[text.strip().lower()]


def mode_name(text):
    """MindSpore's number of an execution mode, or its name."""
    names = {"0": "graph", "1": "pynative", "graph": "graph", "pynative": "pynative"}
    if text.strip().lower() not in names:
        raise argparse.ArgumentTypeError(f"'{text}' is no mode; give 0 (graph) or 1 (PyNative)")
    return names[text.strip().lower()]


@dataclass(frozen=True)
class RuntimeArgs:
    device_target: str = "auto"  # CPU, Ascend, or auto: Ascend where there is one
    ms_mode: str = "graph"  # graph (compiled) or pynative (operator by operator, for debugging)
    jit_level: str | None = None  # MindSpore's O0, O1 or O2 graph optimisation; None is its default
    # O0: float32; O2: float16 text encoders and UNet; bf16, CPU only: their matrices and the decoder's in bfloat16;
    # auto: O2 on Ascend, O0 on CPU
    ms_amp_level: str = "auto"
    is_parallel: bool = False  # one process of several, started by mpirun or msrun
    flash_attention: bool = False  # Ascend's fused attention kernel
    seed: int = 42


def add_runtime_flags(parser):
    """The flags of RuntimeArgs, the same in every command."""
    group = parser.add_argument_group("runtime")
    default = RuntimeArgs()
    group.add_argument("--device_target", choices=("CPU", "Ascend", "auto"), default=default.device_target,
                       help="where to compute (default: Ascend if there is one, else CPU)")  # fmt: skip
    group.add_argument("--ms_mode", type=mode_name, default=default.ms_mode,
                       help="0: graph mode, compiled; 1: PyNative, for debugging (default 0)")  # fmt: skip
    group.add_argument("--jit_level", choices=("O0", "O1", "O2"), default=None, help="MindSpore's graph optimisation")
    group.add_argument("--ms_amp_level", choices=AMP_LEVELS, default=default.ms_amp_level,
                       help="O0: float32; O2: float16, the autoencoder float32; bf16 (CPU): matrices in bfloat16, the "
                       "autoencoder's encoder float32 (default: O2 on Ascend, O0 on CPU)")  # fmt: skip
    group.add_argument("--flash_attention", type=flag, default=False, help="Ascend's fused attention (default False)")
    group.add_argument("--seed", type=int, default=default.seed, help=f"default {default.seed}")
    return group


def runtime_args(namespace):
    """RuntimeArgs from parsed flags."""
    fields = RuntimeArgs.__dataclass_fields__
    return RuntimeArgs(**{name: getattr(namespace, name) for name in fields if hasattr(namespace, name)})


@dataclass(frozen=True)
class Runtime:
    """What a started process knows of itself."""

    device: str  # CPU or Ascend
    dtype: object  # ms.float32, ms.float16 or ms.bfloat16, for gm.models.layers.parameter_dtype
    seed: int
    rank: int = 0
    world_size: int = 1

    @property
    def is_main(self):
        """Whether this process reports and writes."""
        return self.rank == 0

    @property
    def half_precision(self):
        return self.dtype == ms.float16

    def main_first(self, work):
        """Call `work` on rank 0, then on the others, which find on disk what it wrote."""
        if self.world_size == 1:
            return work()
        result = work() if self.is_main else None
        self.any_rank(False)  # all wait for rank 0
        return result if self.is_main else work()

    def any_rank(self, flag):
        """Whether `flag` is true on one of the ranks, the same answer on all; waits for every rank to ask."""
        if self.world_size == 1:
            return flag
        return bool(ops.AllReduce()(ms.Tensor([float(flag)], ms.float32)).asnumpy()[0] > 0)


def start_runtime(args):
    """Set MindSpore up; call once, before any network is built.

    Returns:
        Runtime.

    Raises:
        ValueError: the device is not there, or the settings do not go together.
    """
    device = _device(args.device_target)
    ms.set_context(mode=ms.GRAPH_MODE if args.ms_mode == "graph" else ms.PYNATIVE_MODE)
    if args.jit_level:
        ms.set_context(jit_config={"jit_level": args.jit_level})
    rank, world_size = 0, 1
    if args.is_parallel:
        from gm.cluster import join  # starts helper processes: only where asked for

        rank, world_size = join(device)
    start_logging(rank)
    ms.set_seed(args.seed)
    np.random.seed(args.seed)
    random.seed(args.seed)
    if args.flash_attention and device != "Ascend":
        raise ValueError("--flash_attention True needs an Ascend device; leave it out on a CPU.")
    return Runtime(device, _dtype(args.ms_amp_level, device), args.seed, rank, world_size)


def _dtype(amp_level, device):
    """What text encoders and UNet compute in."""
    if amp_level == "auto":
        amp_level = "O2" if device == "Ascend" else "O0"
    if amp_level == "bf16":
        if device == "Ascend":
            raise ValueError("--ms_amp_level bf16 is for a CPU; on Ascend use O2.")
        from gm.models import fused  # only here: the kernels may have to be compiled

        if not fused.available():
            logger.warning("Going on in float32: --ms_amp_level bf16 needs the fused kernels.")
            return ms.float32
        if not fused.fast_bfloat16():
            logger.warning("This processor has no instructions for bfloat16: float32 may be faster.")
        return ms.bfloat16
    return ms.float16 if amp_level == "O2" else ms.float32


def _device(target):
    """Choose the device and check that it is there."""
    if target == "auto":
        target = "Ascend" if has_ascend() else "CPU"
    elif target == "Ascend" and not has_ascend():
        raise ValueError(
            "--device_target Ascend, but MindSpore finds no Ascend device here (is the CANN toolkit installed and "
            "its set_env.sh sourced?). Use --device_target CPU to run on the processor."
        )
    ms.set_device(target)
    return target


def has_ascend():
    """Whether MindSpore finds an Ascend device here."""
    logging.getLogger("mindspore").setLevel(logging.ERROR)  # it warns at length where there is none
    try:
        return ms.hal.is_available("Ascend")
    except ValueError:  # this build of MindSpore cannot drive one
        return False


def start_logging(rank=0):
    """Log to the terminal; ranks other than 0 only warn."""
    logging.basicConfig(format="%(message)s", level=logging.INFO if rank == 0 else logging.WARNING, force=True)


def describe(runtime, args):
    """One line for the log."""
    precision = {
        ms.float16: "float16 (autoencoder float32)",
        ms.bfloat16: "matrices in bfloat16 (the autoencoder's encoder float32)",
    }.get(runtime.dtype, "float32")
    ranks = f", {runtime.world_size} processes" if runtime.world_size > 1 else ""
    return f"{runtime.device}, {args.ms_mode} mode, {precision}, seed {runtime.seed}{ranks}; MindSpore {ms.__version__}"
