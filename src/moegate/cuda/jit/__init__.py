"""CUDA C++ text to kernels that can be launched, with nothing but NVRTC and the driver.

text -> compiler.py (NVRTC) -> cubin, kept by cache.py on disk -> module.py (driver) -> Kernel.launch
"""

from moegate.cuda.jit.compiler import (
    Binary,
    KernelUse,
    compile_binary,
    kernel_uses,
    known_archs,
    missing_compiler,
)
from moegate.cuda.jit.module import Kernel, Module, arch_of, has_clusters_and_pdl, load

__all__ = [
    "Binary",
    "Kernel",
    "KernelUse",
    "Module",
    "arch_of",
    "compile_binary",
    "has_clusters_and_pdl",
    "kernel_uses",
    "known_archs",
    "load",
    "missing_compiler",
]
