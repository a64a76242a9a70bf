"""Which processor this machine has, as far as kernels are picked by it."""

from __future__ import annotations

import functools
import platform
from pathlib import Path

ARCHITECTURES = ("x86-avx2", "x86-vnni", "x86-amx", "arm64")


@functools.cache
def host_architecture() -> str:
    """One of `ARCHITECTURES`, or "" where the machine is none of them or does not tell."""
    cpuinfo = Path("/proc/cpuinfo")
    try:
        text = cpuinfo.read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    return architecture_of(platform.machine(), text)


def architecture_of(machine: str, cpuinfo: str) -> str:
    """The architecture that `platform.machine()` and the text of /proc/cpuinfo stand for.

    The strongest of what the kernels of ONNX Runtime's MLAS distinguish for integers: AMX tiles, dot products of
    bytes (AVX512-VNNI or AVX-VNNI), or AVX2, where pairs of products are added in 16 bits and may saturate.
    """
    if machine.lower() in ("aarch64", "arm64"):
        return "arm64"
    flags = {
        word
        for line in cpuinfo.splitlines()
        if line.startswith("flags")
        for word in line.partition(":")[2].split()
    }
    if "amx_int8" in flags:
        return "x86-amx"
    if {"avx512_vnni", "avx_vnni"} & flags:
        return "x86-vnni"
    return "x86-avx2" if "avx2" in flags else ""
