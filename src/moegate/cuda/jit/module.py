"""Compiled kernels in the driver, and their launch."""

from __future__ import annotations

import ctypes
import struct
import threading
from functools import cache
from importlib import import_module
from typing import Any

import torch

from moegate.cuda.jit.compiler import compile_binary, known_archs
from moegate.cuda.jit.errors import checked

# What NVRTC calls the chips that have instructions of their own, which need the suffix.
_SUFFIXED = {90, 100, 103, 110, 120, 121}
_NEWEST = 121
_MAX_PLAIN_SHARED_BYTES = 48 * 1024


class Kernel:
    """One kernel of a module, with the part of its launch that never changes.

    Args:
        function: The driver's handle.
        fields: The kernel's one by-value struct parameter, in the codes of Python's `struct`.
        threads: Threads of a block.
        cluster: Blocks of a cluster, along x.
        pdl: Start before the predecessor ends; the kernel waits for it by `griddepcontrol.wait`.
    """

    def __init__(self, function: Any, fields: str, threads: int, cluster: int, shared_bytes: int, pdl: bool) -> None:
        self._function = function
        self._launch = _driver().cuLaunchKernelEx
        self._pack = struct.Struct(fields)
        self._threads = threads
        self._cluster = cluster
        self._shared_bytes = shared_bytes
        self._pdl = pdl
        # The driver reads the arguments and the configuration with the GIL released: each thread has its own.
        self._of_thread = threading.local()

    def launch(self, grid: tuple[int, int], stream: int, *arguments: float) -> None:
        """Enqueues the kernel on a stream of the current device.

        Raises:
            RuntimeError: The driver refused; nothing was enqueued.
        """
        here = self._of_thread
        try:
            config = here.config
        except AttributeError:
            config = self._set_up(here)
        self._pack.pack_into(here.buffer, 0, *arguments)
        if here.place != (grid, stream):  # setting a field of the driver's takes time
            here.place = None  # whatever stops this halfway, the next launch sets them again
            config.gridDimX, config.gridDimY = grid
            config.hStream = stream
            here.place = grid, stream
        (error,) = self._launch(config, self._function, here.parameters, 0)
        if error == 201:  # CUDA_ERROR_INVALID_CONTEXT: a thread in which nothing has used the GPU yet
            _make_context_current()
            (error,) = self._launch(config, self._function, here.parameters, 0)
        if error != 0:
            raise RuntimeError(f"cuLaunchKernelEx: {error.name}")

    def _set_up(self, here: threading.local) -> Any:
        driver = _driver()
        config = driver.CUlaunchConfig()
        config.gridDimZ = 1
        config.blockDimX, config.blockDimY, config.blockDimZ = self._threads, 1, 1
        config.sharedMemBytes = self._shared_bytes
        attributes = []
        if self._cluster > 1:
            attribute = driver.CUlaunchAttribute()
            attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
            attribute.value.clusterDim.x = self._cluster
            attribute.value.clusterDim.y = attribute.value.clusterDim.z = 1
            attributes.append(attribute)
        if self._pdl:
            attribute = driver.CUlaunchAttribute()
            attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            attribute.value.programmaticStreamSerializationAllowed = 1
            attributes.append(attribute)
        config.attrs, config.numAttrs = attributes, len(attributes)
        here.buffer = ctypes.create_string_buffer(self._pack.size)
        here.pointers = (ctypes.c_void_p * 1)(ctypes.addressof(here.buffer))
        here.parameters = ctypes.addressof(here.pointers)
        here.config, here.place = config, None
        return config


class Module:
    """The kernels of one text, on one GPU."""

    def __init__(self, code: bytes, arch: str, index: int) -> None:
        self._code = code  # the driver may read it later than it says
        self._device = index
        self._waits_for_predecessor = has_clusters_and_pdl(arch)
        self._library = checked(_driver().cuLibraryLoadData, code, [], [], 0, [], [], 0)
        self._most_shared: dict[str, int] = {}

    def kernel(
        self,
        name: str,
        fields: str,
        threads: int,
        *,
        cluster: int = 1,
        shared_bytes: int = 0,
        least_shared: bool = False,
        pdl: bool = True,
    ) -> Kernel:
        """A kernel by name; see `Kernel`. Code for chips without `pdl` does not wait, and so never starts early.

        `least_shared`: a multiprocessor is to set no more of its cache apart as shared memory than a block needs.
        """
        driver = _driver()
        handle = checked(driver.cuLibraryGetKernel, self._library, name.encode())
        attributes = driver.CUfunction_attribute
        with _lock:  # one function may be launched in several ways, and the most that any of them asks for counts
            if shared_bytes > self._most_shared.get(name, _MAX_PLAIN_SHARED_BYTES):
                most = attributes.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
                checked(driver.cuKernelSetAttribute, most, shared_bytes, handle, self._device)
                self._most_shared[name] = shared_bytes
        if least_shared:
            percent = attributes.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT
            checked(driver.cuKernelSetAttribute, percent, 0, handle, self._device)
        pdl = pdl and self._waits_for_predecessor
        function = driver.CUfunction(int(handle))  # the launch takes either kind of handle
        return Kernel(function, fields, threads, cluster, shared_bytes, pdl)


def load(source: str, device: torch.device, arch: str | None = None) -> Module:
    """Compiles CUDA C++ for the device (or for `arch`) and loads it: once a process for each text.

    Raises:
        RuntimeError: It does not compile; the driver refuses it; or it would have to be compiled
            while the current stream is captured into a graph.
    """
    return _load(source, arch or arch_of(torch.cuda.get_device_capability(device)), device.index or 0)


def arch_of(capability: tuple[int, int]) -> str:
    """What to compile for on a chip: its own code, or PTX for one newer than this package or than the NVRTC here."""
    number = 10 * capability[0] + capability[1]
    if number > _NEWEST or (number > 90 and number not in known_archs()):
        return "compute_90"
    return f"sm_{number}{'a' if number in _SUFFIXED else ''}"


def has_clusters_and_pdl(arch: str) -> bool:
    """True if code for `arch`, such as `sm_90a` or `compute_80`, has thread block clusters and dependent launch."""
    return int("".join(filter(str.isdigit, arch))) >= 90


_lock = threading.Lock()


def _load(source: str, arch: str, index: int) -> Module:
    with _lock:  # not twice at once; `cache` alone would let two threads compile the same text
        return _load_once(source, arch, index)


@cache
def _load_once(source: str, arch: str, index: int) -> Module:
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "a kernel would have to be compiled while the current stream is captured into a CUDA graph; "
            "allowed: the same call, or Gate.warmup(), once before the capture"
        )
    with torch.cuda.device(index):
        torch.cuda.current_stream().synchronize()  # makes sure of a context
        return Module(compile_binary(source, arch).code, arch, index)


def _make_context_current() -> None:
    """Binds the thread to PyTorch's context, which set_device leaves alone if the device stays the same."""
    driver = _driver()
    context = checked(driver.cuDevicePrimaryCtxRetain, torch.cuda.current_device())
    checked(driver.cuCtxSetCurrent, context)


@cache
def _driver() -> Any:
    return import_module("cuda.bindings.driver")
