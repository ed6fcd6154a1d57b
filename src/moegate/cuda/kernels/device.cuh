// What the kernels share: types without headers, dependent launch, and exact conversions.
//
// NVRTC compiles all of this with --device-as-default-execution-space: functions need no __device__.
#pragma once

using int32 = int;
using int64 = long long;
using uint16 = unsigned short;
using uint32 = unsigned int;
using uint64 = unsigned long long;

#if __CUDA_ARCH__ >= 900
#define MOEGATE_HAS_CLUSTERS 1
#else
#define MOEGATE_HAS_CLUSTERS 0
#endif

// Programmatic dependent launch (PDL). Every block of every kernel waits, also a block without work: a kernel is complete
// when its blocks have ended, and a dependent kernel relies on the kernel having waited for all kernels before it. The
// trigger only lets the blocks of the dependent kernel start; that kernel waits in its turn.
__forceinline__ void trigger_dependents() {
#if MOEGATE_HAS_CLUSTERS
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

__forceinline__ void wait_for_predecessor() {
#if MOEGATE_HAS_CLUSTERS
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Into L2, which is coherent: allowed before the wait, even while the predecessor writes there.
__forceinline__ void prefetch_to_l2(const void* address) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
}

struct bf16 {
  uint16 bits;
};
struct fp16 {
  uint16 bits;
};

__forceinline__ float widen(float value) { return value; }
__forceinline__ float widen(bf16 value) { return __uint_as_float(uint32(value.bits) << 16); }
__forceinline__ float widen(fp16 value) {
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value.bits));
  return wide;
}

// Rounded to nearest, ties to even.
template <class T>
__forceinline__ T narrow(float value);
template <>
__forceinline__ float narrow<float>(float value) {
  return value;
}
template <>
__forceinline__ bf16 narrow<bf16>(float value) {
  bf16 result;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
  return result;
}
template <>
__forceinline__ fp16 narrow<fp16>(float value) {
  fp16 result;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
  return result;
}

// The sum over the first kLanes lanes (a power of two), in each of these lanes.
template <int kLanes = 32>
__forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(~0u, value, offset);
  return value;
}

__host__ __device__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }
