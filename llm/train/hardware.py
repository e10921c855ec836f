"""What a device is called and what it can do at most: the denominators of MFU."""

from __future__ import annotations

import math
import os
import platform
import re
import sys

import torch

PEAK_BF16: tuple[tuple[str, float], ...] = (
    ("gb300", 2500e12),
    ("gb200", 2500e12),
    ("b300", 2250e12),
    ("b200", 2250e12),
    ("b100", 1750e12),
    ("gh200", 989.4e12),
    ("h200 nvl", 835e12),
    ("h200", 989.4e12),
    ("h100 nvl", 835e12),
    ("h100 pcie", 756e12),
    ("h100", 989.4e12),
    ("h800 pcie", 756e12),
    ("h800", 989.4e12),
    ("h20", 148e12),
    ("a100", 312e12),
    ("a800", 312e12),
    ("a40", 149.7e12),
    ("a30", 165e12),
    ("l40s", 362e12),
    ("l40", 181e12),
    ("l4", 121e12),
    ("rtx 5090", 209.5e12),
    ("rtx 4090", 165.2e12),
    ("rtx 3090", 71e12),
    ("mi355x", 2500e12),
    ("mi350x", 2300e12),
    ("mi325x", 1307.4e12),
    ("mi300x", 1307.4e12),
    ("mi250x", 191.5e12),
)
"""Words of the lower-case device name -> dense bf16 FLOP/s of one device (one die of an MI250X), specific names
first. Dense figures of the makers' data sheets, never the 2:4 sparse ones; consumer cards with fp32 accumulation."""


def peak_flops(name: str) -> float:
    """Dense bf16 peak of the device called `name`, FLOP/s; infinity when unknown, so that MFU reads 0 and not a guess.

    Whole words are compared: an "A4000" is no A40.
    """
    words = re.split(r"[\s\-_/()]+", name.lower())
    for key, peak in PEAK_BF16:
        parts = key.split()
        if any(words[i : i + len(parts)] == parts for i in range(len(words))):
            return peak
    return math.inf


def device_name(device: torch.device | str) -> str:
    """The device's name as its maker gives it: the GPU, or the CPU's model."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return cpu_name()


def cpu_name() -> str:
    """The CPU's model where the system tells it, else the architecture."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine() or "CPU"


def device_memory(device: torch.device | str) -> int:
    """Bytes of memory on the device (for a CPU: of the machine, or of its container's limit)."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    import psutil

    total = psutil.virtual_memory().total
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            with open(path, encoding="utf-8") as file:
                limit = file.read().strip()
        except OSError:
            continue
        if limit.isdigit():
            return min(total, int(limit))
    return total


def peak_memory(device: torch.device | str) -> int:
    """The most memory held so far, bytes: allocated tensors on CUDA, resident set of the process on a CPU."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    try:
        # A process inherits getrusage's figure from the one that started it, so the kernel's own is better.
        with open("/proc/self/status", encoding="ascii") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def num_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
