"""Processes that train together: how they join MindSpore's collectives under mpirun and msrun.

`mindspore.communication.init()` does the work. Under msrun, and under mpirun on Ascend, it needs nothing
else. On a CPU it forms a cluster of the ranks and one more process, the scheduler, of which mpirun knows
nothing: rank 0 starts it, and every rank works out where it is from what mpirun tells all of them.
"""

import atexit
import ctypes
import os
import re
import signal
import socket
import subprocess
import sys
import time
import zlib
from contextlib import suppress

PR_SET_PDEATHSIG = 1  # linux/prctl.h
NODE_TIMEOUT = 25  # seconds of silence after which the scheduler gives a rank up, and with it the job
SCHEDULER_TIMEOUT = 10  # seconds after which a rank gives the scheduler up
COLLECTIVE_TIMEOUT = 24 * 3600  # seconds that ranks wait for one that encodes, compiles or draws previews
START_LIMIT = 300  # seconds until the scheduler must answer
GRACE = 10  # seconds that the scheduler may outlive rank 0


def join(device):
    """Become one of several ranks; call before any tensor is made.

    Args:
        device: "CPU" or "Ascend".

    Returns:
        (rank, world_size).

    Raises:
        ValueError: the process was not started by mpirun or msrun, or the scheduler's place cannot be used.
    """
    mpirun, msrun = "OMPI_COMM_WORLD_RANK" in os.environ, "MS_ROLE" in os.environ
    if not mpirun and not msrun:
        raise ValueError(
            "--is_parallel True, but this process was started alone. Start N of them with "
            "'mpirun -n N python train_textual_inversion.py --is_parallel True ...' or 'msrun --worker_num N "
            "--local_worker_num N --join True train_textual_inversion.py --is_parallel True ...'."
        )
    if mpirun:
        _signal_when_parent_dies(signal.SIGTERM)
    if device == "CPU":
        # MindSpore's own limit, 30 s, is shorter than one preview. A dead rank is noticed by other means.
        os.environ.setdefault("MS_CPU_COMM_OP_TIMEOUT", str(COLLECTIVE_TIMEOUT))
    os.environ.setdefault("MS_HEARTBEAT_RETRY_TIMEOUT", str(SCHEDULER_TIMEOUT))
    if os.environ.get("MS_ROLE") == "MS_SCHED":
        os.environ.setdefault("MS_NODE_TIMEOUT", str(NODE_TIMEOUT))
    elif device == "CPU" and mpirun and not msrun:
        os.environ.update(cluster_variables(os.environ))
        if os.environ["MS_NODE_ID"] == "0":
            _start_scheduler()
        _wait_for_scheduler()

    from mindspore.communication import get_group_size, get_rank, init, release

    init()
    atexit.register(_leave, release)
    return get_rank(), get_group_size()


def cluster_variables(env):
    """What MindSpore's dynamic cluster asks of a worker, from what Open MPI tells its ranks.

    MS_SCHED_HOST and MS_SCHED_PORT are kept where given. Otherwise the scheduler is on the machine of mpirun,
    at a port that follows from the job's name.

    Args:
        env: environment variables, name -> value.

    Returns:
        dict of environment variables.

    Raises:
        ValueError: ranks are on several machines, and mpirun does not say on which it runs.
    """
    host = env.get("MS_SCHED_HOST")
    if not host and env["OMPI_COMM_WORLD_LOCAL_SIZE"] == env["OMPI_COMM_WORLD_SIZE"]:
        host = "127.0.0.1"
    elif not host:
        # "<job>.0;tcp://<address>[,<address>]:<port>;tcp6://..."
        found = re.search(r"tcp://([\d.]+)", env.get("OMPI_MCA_orte_hnp_uri", ""))
        if not found:
            raise ValueError(
                "the ranks are on several machines; say where the first rank is: "
                "mpirun -x MS_SCHED_HOST=<its address> -x MS_SCHED_PORT=<a free port> ..."
            )
        host = found[1]
    # Below the ports that Linux gives out by itself, above the well-known ones.
    port = 10000 + zlib.crc32(env.get("PMIX_NAMESPACE", "").encode()) % 22000
    return {
        "MS_ROLE": "MS_WORKER",
        "MS_WORKER_NUM": env["OMPI_COMM_WORLD_SIZE"],
        "MS_NODE_ID": env["OMPI_COMM_WORLD_RANK"],
        "MS_SCHED_HOST": host,
        "MS_SCHED_PORT": env.get("MS_SCHED_PORT", str(port)),
    }


def _start_scheduler():
    """Start the scheduler beside rank 0. It ends when all ranks have left, or soon after rank 0 has."""
    host, port = os.environ["MS_SCHED_HOST"], os.environ["MS_SCHED_PORT"]
    try:
        with socket.socket() as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            trial.bind((host, int(port)))
    except OSError as e:
        raise ValueError(
            f"the scheduler cannot listen at {host}:{port} ({e.strerror}). Give the address of the first "
            "rank's machine and a free port: mpirun -x MS_SCHED_HOST=<address> -x MS_SCHED_PORT=<port> ..."
        ) from e
    # Its input ends when rank 0 does, however that comes about. A session of its own keeps signals for the
    # ranks away from it: they need it until they have saved.
    timeout = os.environ.get("MS_NODE_TIMEOUT", str(NODE_TIMEOUT))
    subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True,
        env={**os.environ, "MS_ROLE": "MS_SCHED", "MS_NODE_TIMEOUT": timeout},
    )  # fmt: skip


def _wait_for_scheduler():
    """MindSpore would find it too, but lets up to a minute pass between two tries."""
    host, port = os.environ["MS_SCHED_HOST"], os.environ["MS_SCHED_PORT"]
    end = time.monotonic() + START_LIMIT
    while time.monotonic() < end:
        try:
            socket.create_connection((host, int(port)), timeout=1).close()
            return
        except OSError:
            time.sleep(0.1)
    raise ValueError(
        f"no scheduler answers at {host}:{port}; is that the address of the first rank's machine, and can "
        "this one reach the port? Set both with mpirun -x MS_SCHED_HOST=<address> -x MS_SCHED_PORT=<port> ..."
    )


def _signal_when_parent_dies(number):
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)


def _leave(release):
    """Release the ranks' connections, and see to it that what MindSpore does after that does not crash.

    It takes leave of the scheduler when Python ends. The thread that receives the answer hands it to the main thread
    and looks at the connection once more, while the main thread deletes it; on busy processors that was a crash more
    often than not. On one processor, and with the main thread a batch job, which does not interrupt others, the look
    comes first.
    """
    release()
    processors = sorted(os.sched_getaffinity(0))
    own = processors[os.getpid() % len(processors)]
    for thread in os.listdir("/proc/self/task"):
        with suppress(ProcessLookupError):  # it has ended
            os.sched_setaffinity(int(thread), [own])
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def _watch_scheduler():
    """Run MindSpore's scheduler, and end it where rank 0 cannot. (No thread of it would get to run.)"""
    code = "import mindspore; mindspore.set_device('CPU'); from mindspore.communication import init; init()"
    scheduler = subprocess.Popen(
        [sys.executable, "-c", code], preexec_fn=lambda: _signal_when_parent_dies(signal.SIGKILL)
    )
    sys.stdin.read()
    try:
        scheduler.wait(GRACE)
    except subprocess.TimeoutExpired:
        scheduler.kill()


if __name__ == "__main__":
    _watch_scheduler()
