"""The machine a run finds itself on: device, dtype, threads, memory, and peak FLOP/s where they are known."""

import os
import platform
import resource
import time
from collections.abc import Sequence

import torch

# Dense bf16 FLOP/s from the vendors' data sheets. A device that is not listed has no MFU (n/a), never a guessed one.
PEAK_BF16 = {
    "NVIDIA A100": 312e12,
    "NVIDIA H100 80GB HBM3": 989.4e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989.4e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA GeForce RTX 4090": 165.2e12,
}


def pick_device(name: str = "auto") -> torch.device:
    """ "auto" is the first CUDA device if there is one, else the CPU. Raises ValueError for one that is not here."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"no device is called {name!r}; use auto, cpu or cuda") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda is asked for, but torch finds no CUDA device here; use --device cpu")
    return device


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_cpu_name()}, {torch.get_num_threads()} threads"


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def peak_flops(device: torch.device, dtype: str) -> float | None:
    """Published dense FLOP/s of `device` in `dtype`, or None where nobody published it (CPUs among them)."""
    if device.type != "cuda" or dtype != "bf16":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for known, peak in PEAK_BF16.items() if name.startswith(known)), None)


_measured: dict[tuple[str, torch.dtype, tuple[tuple[int, int, int], ...]], float] = {}


def measured_peak(
    device: torch.device, dtype: torch.dtype, sizes: Sequence[tuple[int, int, int]], *, again: bool = False
) -> float:
    """FLOP/s of the fastest of the matmuls [m, k] @ [k, n] of `sizes` (m, k, n), each tried for a part of a second.

    Kept for the life of the process; `again` measures anew and keeps the larger, for a machine has slow minutes.
    """
    key = (str(device), dtype, tuple(sizes))
    if again or key not in _measured:
        found = max(_matmul_speed(device, dtype, *size, seconds=1 / len(sizes)) for size in sizes)
        _measured[key] = max(found, _measured.get(key, 0.0))
    return _measured[key]


def _matmul_speed(device: torch.device, dtype: torch.dtype, m: int, k: int, n: int, seconds: float) -> float:
    """The best of as many goes as `seconds` hold, two at least; a go is of some calls, so that a GPU is kept busy."""
    calls = 20 if device.type == "cuda" else 1
    own = torch.Generator(device).manual_seed(0)  # a run's random numbers must not depend on when its speed is measured
    a_MK, b_KN = (torch.randn(size, device=device, dtype=dtype, generator=own) for size in ((m, k), (k, n)))
    best, begun, goes = float("inf"), time.perf_counter(), 0
    while goes < 3 or time.perf_counter() - begun < seconds:
        start = time.perf_counter()
        for _ in range(calls):
            a_MK @ b_KN
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        goes += 1
        if goes > 1:  # the first compiles and warms up
            best = min(best, (time.perf_counter() - start) / calls)
    return 2 * m * k * n / best


def peak_memory_gib(device: torch.device) -> float:
    """The most memory held so far: the device's own on CUDA, the process's resident set on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def keep_freed_memory() -> None:
    """Ask glibc to keep large freed blocks for the next step instead of giving them back page by page.

    A training step allocates the same tensors again and again; measured 5 to 10% more tokens per second on 2 cores.
    """
    import ctypes

    mmap_threshold, trim_threshold = -3, -1  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD of glibc's malloc.h
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:  # not glibc: its default allocator stays
        return
    libc.mallopt(mmap_threshold, 2**30)
    libc.mallopt(trim_threshold, 2**31 - 1)


def machine() -> dict[str, str]:
    """What a benchmark row or a report must say about where it ran."""
    return {
        "device": device_name(pick_device()),
        "cores": str(os.cpu_count()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": platform.platform(terse=True),
    }


def free_memory() -> int:
    """Bytes that a process may still take without swapping (Linux's MemAvailable; elsewhere the unused pages)."""
    try:
        with open("/proc/meminfo") as lines:
            return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
