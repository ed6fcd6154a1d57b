"""CUDA kernels for measurements only: the two predecessors of a chain, and the floor that no router can beat."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import Tensor

SOURCE = r"""
struct CopyArguments { const uint4* source; uint4* target; int count; int cycles; };
// Counts are in vectors of 16 bytes.
struct NormArguments { const uint4* source; uint4* target; int row_vectors; };
struct ReadArguments { const uint4* weight; const uint4* hidden; unsigned int* out; int weight_vectors;
                       int hidden_vectors; };

__device__ __forceinline__ uint4 load(const uint4* address) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(address));
  return v;
}

// Stands for the layer before the router: triggers its dependents at once, then spins for a given time.
extern "C" __global__ void trigger_predecessor(const __grid_constant__ CopyArguments a) {
  asm volatile("griddepcontrol.launch_dependents;");
  asm volatile("griddepcontrol.wait;" ::: "memory");
  const long long start = clock64();
  while (clock64() - start < a.cycles) {}
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < a.count; i += gridDim.x * blockDim.x)
    a.target[i] = a.source[i];
}

__device__ __forceinline__ float squares(unsigned int pair) {
  const float low = __uint_as_float(pair << 16), high = __uint_as_float(pair & 0xffff0000u);
  return low * low + high * high;
}

// Does the work of an RMS norm, one block a token, and never triggers. It writes finite input unchanged, so that
// both predecessors give the router the same bits.
extern "C" __global__ void norm_predecessor(const __grid_constant__ NormArguments a) {
  __shared__ float partial[32];
  const uint4* row = a.source + (long long)blockIdx.x * a.row_vectors;
  uint4* out = a.target + (long long)blockIdx.x * a.row_vectors;
  float sum = 0.0f;
  for (int i = threadIdx.x; i < a.row_vectors; i += blockDim.x) {
    const uint4 v = row[i];
    sum += squares(v.x) + squares(v.y) + squares(v.z) + squares(v.w);
  }
  for (int offset = 16; offset; offset >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = sum;
  __syncthreads();
  float total = 0.0f;
  for (int w = 0; w < blockDim.x / 32; ++w) total += partial[w];
  const unsigned int keep = rsqrtf(total / (8.0f * a.row_vectors) + 1e-6f) >= 0.0f ? 0xffffffffu : 0u;
  for (int i = threadIdx.x; i < a.row_vectors; i += blockDim.x) {
    const uint4 v = row[i];
    out[i] = make_uint4(v.x & keep, v.y & keep, v.z & keep, v.w & keep);
  }
}

// Reads what a router must read, with the widest loads and as early as allowed: the weight before the wait, since it
// does not depend on the predecessor, `hidden` after the wait. The exclusive or keeps the compiler from dropping loads.
extern "C" __global__ void __launch_bounds__(1024, 1) read_floor(const __grid_constant__ ReadArguments a) {
  asm volatile("griddepcontrol.launch_dependents;");
  const int first = blockIdx.x * blockDim.x + threadIdx.x, step = gridDim.x * blockDim.x;
  unsigned int mix = 0;
  int i = first;
  for (; i + 3 * step < a.weight_vectors; i += 4 * step) {
    const uint4 v = load(a.weight + i), w = load(a.weight + i + step);
    const uint4 x = load(a.weight + i + 2 * step), y = load(a.weight + i + 3 * step);
    mix ^= v.x ^ v.y ^ v.z ^ v.w ^ w.x ^ w.y ^ w.z ^ w.w ^ x.x ^ x.y ^ x.z ^ x.w ^ y.x ^ y.y ^ y.z ^ y.w;
  }
  for (; i < a.weight_vectors; i += step) {
    const uint4 v = load(a.weight + i);
    mix ^= v.x ^ v.y ^ v.z ^ v.w;
  }
  asm volatile("griddepcontrol.wait;" ::: "memory");
  for (i = first; i < a.hidden_vectors; i += step) {
    uint4 v;
    // No ld.global.nc: the predecessor wrote `hidden` while this kernel was already running.
    asm volatile("ld.global.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(a.hidden + i) : "memory");
    mix ^= v.x ^ v.y ^ v.z ^ v.w;
  }
  const bool odd = __syncthreads_or(mix == 0x9e3779b9u);
  if (threadIdx.x == 0) a.out[blockIdx.x] = mix ^ odd;
}
"""

PREDECESSOR_BLOCKS, PREDECESSOR_THREADS = 132, 256
_CLOCK_CYCLES_PER_US = 1900.0  # a first guess, before the calibration
PREDECESSOR_US = 2.2


@functools.cache
def _module() -> Any:
    jit = importlib.import_module("moegate.cuda.jit")
    return jit.load(SOURCE, torch.device("cuda", torch.cuda.current_device()))


@functools.cache
def _kernel(name: str, fields: str, threads: int, pdl: bool) -> Any:
    return _module().kernel(name, fields=fields, threads=threads, pdl=pdl)


def _stream() -> int:
    return int(torch.cuda.current_stream().cuda_stream)


def _vectors(tensor: Tensor) -> int:
    """The tensor's size in vectors of 16 bytes; every hidden size of the catalog is a multiple of 8."""
    size = tensor.numel() * tensor.element_size()
    assert size % 16 == 0
    assert tensor.is_contiguous()
    return size // 16


class Predecessors:
    """The kernels that write `hidden` before a call; `timing.calibrate` makes `trigger` last `PREDECESSOR_US`."""

    def __init__(self) -> None:
        self.cycles = int(PREDECESSOR_US * _CLOCK_CYCLES_PER_US)

    def launch(self, name: str, source: Tensor, target: Tensor) -> None:
        """`trigger` or `norm`: copies source [M, K] to target."""
        count = _vectors(source)
        if name == "trigger":
            kernel = _kernel("trigger_predecessor", "QQii", PREDECESSOR_THREADS, True)
            kernel.launch((PREDECESSOR_BLOCKS, 1), _stream(), source.data_ptr(), target.data_ptr(), count, self.cycles)
        else:
            kernel = _kernel("norm_predecessor", "QQi", PREDECESSOR_THREADS, False)
            rows = source.shape[0]
            kernel.launch((rows, 1), _stream(), source.data_ptr(), target.data_ptr(), count // rows)


def read_floor(weight: Tensor, hidden: Tensor, blocks: int) -> Tensor:
    """Reads both tensors and computes nothing; returns one word a block."""
    out = torch.empty(blocks, dtype=torch.int32, device=weight.device)
    kernel = _kernel("read_floor", "QQQii", 1024, True)
    pointers = weight.data_ptr(), hidden.data_ptr(), out.data_ptr()
    kernel.launch((blocks, 1), _stream(), *pointers, _vectors(weight), _vectors(hidden))
    return out
