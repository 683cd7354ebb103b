"""What only some operating systems have, each with what is done where it is missing."""

from __future__ import annotations

import errno
import math
import mmap
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Ctrl-C, what a scheduler sends before it kills, and a terminal that closes (which Windows does not tell).
END_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
# What a container is limited to.
CGROUPS = Path("/sys/fs/cgroup")
CPU_INFO = Path("/proc/cpuinfo")
# Positions in files are the process's: threads that read take turns.
_file_lock = threading.Lock()


def start_method() -> str:
    """Return how worker processes are started: copied where that is safe, else anew."""
    return "fork" if sys.platform == "linux" and hasattr(os, "fork") else "spawn"


def usable_cores() -> int:
    """Return how many cores this process may use, which a container can limit below what the machine has."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota()
    return cores if quota is None else max(1, min(cores, math.ceil(quota)))


def total_memory() -> int | None:
    """Return the memory that this process may use, in bytes; None where the system does not say."""
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
    limit = memory_limit()
    return memory if limit is None else min(memory, limit)


def cpu_quota(root: Path = CGROUPS) -> float | None:
    """Return to how many cores' time a container is limited; None is no limit.

    Args:
        root: where Linux tells of control groups, of either version.
    """
    quota, period = _words(root / "cpu.max", 2)
    if quota is None:
        (quota,), (period,) = (_words(root / "cpu" / f"cpu.cfs_{name}_us", 1) for name in ("quota", "period"))
    return quota / period if quota is not None and quota > 0 and period else None


def memory_limit(root: Path = CGROUPS) -> int | None:
    """Return to how many bytes of memory a container is limited; None is no limit."""
    (limit,) = _words(root / "memory.max", 1)
    if limit is None:
        (limit,) = _words(root / "memory" / "memory.limit_in_bytes", 1)
    return limit


def _words(path: Path, count: int) -> list[int | None]:
    """Return the numbers in a file of the system; None for each that is not there, or is "max"."""
    try:
        words = path.read_text("ascii").split()
    except (OSError, ValueError):
        words = []
    numbers = [int(word) if word.lstrip("-").isdigit() else None for word in words[:count]]
    return [*numbers, *[None] * (count - len(numbers))]


def has_amx(cpu_info: Path = CPU_INFO) -> bool:
    """Say whether the processor multiplies matrices of bfloat16 by itself; no where the system does not say.

    Args:
        cpu_info: where Linux tells of processors.
    """
    try:
        lines = cpu_info.read_text("ascii", errors="replace").splitlines()
    except OSError:
        return False
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), [])
    return "amx_bf16" in flags


def wait_without_spinning() -> None:
    """Let threads of OpenMP sleep while they wait for each other; of use before torch is loaded only.

    Threads that spin take the time of those that they wait for, as soon as another process runs beside them.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def peak_memory() -> int | None:
    """Return the most memory that this process has taken, in bytes; None where the system does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def resident_memory() -> int | None:
    """Return the memory that this process takes now, in bytes; None where the system does not say."""
    try:
        pages = Path("/proc/self/statm").read_text("ascii").split()[1]
    except (OSError, IndexError):  # not Linux
        return None
    return int(pages) * mmap.PAGESIZE


@contextmanager
def blocked_signals() -> Iterator[None]:
    """Let no signal reach this thread, nor a process that is started in the block."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, END_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


@contextmanager
def kept_child_handler() -> Iterator[None]:
    """Put back what is done when a child process ends, which torch replaces when it starts workers."""
    if not hasattr(signal, "SIGCHLD"):
        yield
        return
    handled = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, handled)


def send_again(signum: int) -> None:
    """Send a signal to the main thread of this process."""
    ident = threading.main_thread().ident
    if hasattr(signal, "pthread_kill") and ident is not None:
        signal.pthread_kill(ident, signum)
    else:
        signal.raise_signal(signum)


def write_at(descriptor: int, data: memoryview, position: int) -> None:
    """Write bytes at a position of a file.

    Raises:
        OSError: it cannot be written, or there is no room for all of it.
    """
    if hasattr(os, "pwrite"):
        written = os.pwrite(descriptor, data, position)
    else:
        with _file_lock:
            os.lseek(descriptor, position, os.SEEK_SET)
            written = os.write(descriptor, data)
    if written != data.nbytes:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def read_at(descriptor: int, buffer: memoryview, position: int) -> None:
    """Fill a buffer with the bytes at a position of a file.

    Raises:
        OSError: it cannot be read, or ends before.
    """
    if hasattr(os, "preadv"):
        read = os.preadv(descriptor, [buffer], position)
    else:
        with _file_lock:
            os.lseek(descriptor, position, os.SEEK_SET)
            data = os.read(descriptor, buffer.nbytes)
        read = len(data)
        buffer.cast("B")[:read] = data
    if read != buffer.nbytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))


def ignore_warnings() -> None:
    """Ignore what other libraries warn of and chgval tells itself, for the whole process.

    For processes that are chgval's own: the command line, and the workers that decode images.
    """
    # What is odd about an image, such as its EXIF data, does not matter as long as it can be decoded; by its
    # number of pixels it is refused by --max-pixels.
    warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
    warnings.filterwarnings("ignore", message=r"Image size \(\d+ pixels\) exceeds limit")
    # How many workers there are is the user's choice.
    warnings.filterwarnings("ignore", message="This DataLoader will create", category=UserWarning)
