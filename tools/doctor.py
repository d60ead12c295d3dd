"""What stands between you and a run: machine, packages, weights, tokenizer, pictures. One line a finding.

    python tools/doctor.py                                     # this machine, and SDXL's weights if they are there
    python tools/doctor.py --version SDXL-small --data_path datasets/cat_toy
    python tools/doctor.py --data_path datasets/cat_toy --placeholder_token "<cat-toy>" --total_step 3000 ...

Takes every flag of train_textual_inversion.py, none is required; given a whole training command, it says what that
would do and need. Nothing is trained or loaded, and only the CPU kernels are written, where they are not compiled yet.
Exits with 1 if something has to be mended.
"""

import math
import os
import platform
import shutil
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import mindspore as ms  # noqa: E402

from gm import checkpoint, config  # noqa: E402
from gm.data.images import check_pictures, scan_folder  # noqa: E402
from gm.models import fused  # noqa: E402
from gm.models.layers import file_layouts  # noqa: E402
from gm.runtime import has_ascend  # noqa: E402
from gm.training.args import build_parser, find_version, find_weights, parse_train_args  # noqa: E402
from gm.training.checks import check_run  # noqa: E402

GIB = 2**30
OK, NOTE, BAD = "ok", "note", "mend"


@dataclass(frozen=True)
class Finding:
    level: str  # ok, note or mend
    text: str
    advice: str = ""

    def __str__(self):
        return f"{self.level:>4}  {self.text}" + (f"\n      -> {self.advice}" if self.advice else "")


def examine(argv):
    """All findings for a (maybe partial) training command, in the order in which a run would meet them."""
    parser = build_parser()
    parser.prog = "doctor.py"
    for action in parser._actions:  # argparse has no public way to make an option optional again
        action.required = False
    flags = parser.parse_args(argv)
    yield from machine()
    yield from packages()
    engine = None
    try:
        version, config_path = find_version(flags.version, flags.config)
        engine = config.build_engine(config_path)  # weights stay untouched zeros: no memory
        vocabulary = engine.conditioner.text_embedders[0].tokenizer.vocab_size
        yield Finding(OK, f"config {config_path} describes a model; its tokenizer loads, {vocabulary} tokens")
    except (ValueError, OSError) as e:
        yield Finding(BAD, str(e))
    if engine is not None:
        yield from weights(engine, flags.weight, version)
    if flags.data_path is not None:
        yield from pictures(flags.data_path)
    if engine is not None and flags.data_path is not None and flags.placeholder_token is not None:
        yield from plan(argv, engine)


def machine():
    available, total = memory()
    yield Finding(
        OK, f"{platform.machine()} {platform.system()}, {os.cpu_count()} processors, "
        f"{available / GIB:.1f} of {total / GIB:.1f} GiB of memory free",
    )  # fmt: skip
    if has_ascend():
        yield Finding(OK, f"{ms.hal.device_count('Ascend')} Ascend devices")
    else:
        advice = "for Ascend, install CANN and source its set_env.sh"
        yield Finding(NOTE, "no Ascend device: everything runs on the CPU", advice)
        yield kernels()


def kernels():
    """Whether the CPU computes with the fused kernels."""
    try:
        fused.library()
    except fused.NoKernels as e:
        return Finding(NOTE, f"no fused CPU kernels, at half the speed without: {e}", "install g++ (apt install g++)")
    half = "has" if fused.fast_bfloat16() else "lacks"
    return Finding(OK, f"fused CPU kernels; this processor {half} bfloat16 instructions (--ms_amp_level bf16)")


def memory():
    """(available, total) bytes."""
    page = os.sysconf("SC_PAGE_SIZE")
    return os.sysconf("SC_AVPHYS_PAGES") * page, os.sysconf("SC_PHYS_PAGES") * page


def packages():
    """Installed packages beside what requirements.txt asks for."""
    from packaging.requirements import Requirement

    lines = (line.partition("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines())
    found = [f"python {platform.python_version()}"]
    for requirement in (Requirement(line) for line in lines if line):
        try:
            installed = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            yield Finding(BAD, f"{requirement.name} is not installed", "pip install -r requirements.txt")
            continue
        found.append(f"{requirement.name} {installed}")
        if not requirement.specifier.contains(installed, prereleases=True):
            yield Finding(BAD, f"{requirement.name} is {installed}, needed is {requirement.specifier}",
                          "pip install -r requirements.txt")  # fmt: skip
    yield Finding(OK, ", ".join(found))


def weights(engine, path, version):
    """Whether a weight file is there, whole, and of this model; what it takes in memory."""
    layouts = file_layouts(engine)
    numbers = sum(math.prod(layout.shape) for layout in layouts.values())
    try:
        path = find_weights(path, version)
        tensors = checkpoint.read_weights(path)
        kind = checkpoint.kind_of(tensors) or "a weight file"
        checkpoint.check_weights(
            {name: tensor.shape for name, tensor in tensors.items()},
            {name: layout.shape for name, layout in layouts.items()},
            path,
        )
    except (ValueError, OSError) as e:
        yield Finding(BAD, str(e))
        return
    yield Finding(OK, f"{path} is {kind}, whole, and fits the config: {numbers / 1e6:,.1f} million numbers")
    available, _ = memory()
    needed = 4 * numbers
    if needed > available:
        yield Finding(
            BAD, f"in float32 its weights take {needed / GIB:.1f} GiB, and {available / GIB:.1f} GiB are free",
            "close other programs, use a machine with more memory, or --version SDXL-small",
        )  # fmt: skip
    else:
        yield Finding(OK, f"in float32 its weights take {needed / GIB:.2f} GiB of memory")


def pictures(folder):
    try:
        found = scan_folder(folder)
        check_pictures(found)
    except (ValueError, OSError) as e:
        yield Finding(BAD, str(e))
        return
    sides = [min(picture.size) for picture in found]
    yield Finding(OK, f"{len(found)} pictures in {folder} can be read; short sides {min(sides)} to {max(sides)} pixels")
    if not 3 <= len(found) <= 20:
        yield Finding(NOTE, f"3 to 20 pictures work best, here are {len(found)}")


def plan(argv, engine):
    """What a whole training command would do."""
    try:
        args = parse_train_args(argv)
        check_run(args, engine)
    except (ValueError, OSError) as e:
        yield Finding(BAD, str(e))
        return
    widths = [embedder.width for embedder in engine.conditioner.text_embedders]
    yield Finding(
        OK, f"'{args.placeholder_token}' gets {args.num_vectors} rows of {' and '.join(map(str, widths))} numbers; "
        f"{args.total_step} steps of {args.batch_size} pictures, {args.total_updates} updates",
    )  # fmt: skip
    height, width = args.data.size
    small = [p.path.name for p in scan_folder(args.data_path) if p.size[0] < height or p.size[1] < width]
    if small:
        yield Finding(NOTE, f"{len(small)} pictures are smaller than {height} x {width} and will be enlarged",
                      "larger originals, or data.target_size=...")  # fmt: skip
    place = next(p for p in (args.save_path.absolute(), *args.save_path.absolute().parents) if p.exists())
    yield Finding(OK, f"writes to {args.save_path}; {shutil.disk_usage(place).free / GIB:.1f} GiB are free there")


def main(argv=None):
    ms.set_device("CPU")
    findings = list(examine(sys.argv[1:] if argv is None else argv))
    for finding in findings:
        print(finding)
    return 1 if any(finding.level == BAD for finding in findings) else 0


if __name__ == "__main__":
    sys.exit(main())
