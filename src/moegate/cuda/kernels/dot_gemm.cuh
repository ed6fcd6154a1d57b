// Hidden states to logits for up to four tokens and a float32 weight, as dot products in float32:
// logits[M, R] = hidden[M, K] * weight[R, K]^T + bias. (router_gemm.cuh takes each weight apart into three operands.)
//
// The time is that of reading the weight once. So:
// - A block owns kRows rows of the weight, and all of K: no block waits for another. A thread has kVecs vectors of four
//   elements of each row, all of them in registers: a block's whole part of the weight is in flight at once.
// - The 32 lanes of a load read 512 consecutive bytes.
// - Every block reads all of hidden, after the wait. Hence several rows to a block where there are more rows than
//   multiprocessors. A vector of hidden is widened once for all of them.
// - Sums are added in a fixed order: a thread's, a warp's, a block's. kVecs and kWarps decide it, and these depend on K
//   alone: the same bits in every run, and for a token at every M that this kernel takes.
//
// A frozen weight is loaded before the wait for the predecessor, hidden after it. Another weight may just be
// being written by the predecessor: it is prefetched to L2 before the wait and loaded after it.
//
// gemm/dot_gemm.py writes the arguments' struct and `Config`, which stand in front of this file.
#pragma once
#include "operands.cuh"

// Four consecutive elements of a row, as they lie in memory.
template <class T>
struct Vec4 {
  uint2 bits;
};
template <>
struct Vec4<float> {
  uint4 bits;
};

template <class T>
__forceinline__ Vec4<T> load_vec4(const T* address, bool in_range) {
  Vec4<T> vec = {};
  if (not in_range) return vec;
  if constexpr (sizeof(T) == 4) {
    vec.bits = load_16_bytes<false>(address);
  } else {
    asm volatile("ld.global.v2.u32 {%0, %1}, [%2];" : "=r"(vec.bits.x), "=r"(vec.bits.y) : "l"(address) : "memory");
  }
  return vec;
}

__forceinline__ float4 widen(const Vec4<float>& vec) {
  return {__uint_as_float(vec.bits.x), __uint_as_float(vec.bits.y), __uint_as_float(vec.bits.z),
          __uint_as_float(vec.bits.w)};
}
template <class T>
__forceinline__ float4 widen(const Vec4<T>& vec) {
  return {widen(T{uint16(vec.bits.x)}), widen(T{uint16(vec.bits.x >> 16)}), widen(T{uint16(vec.bits.y)}),
          widen(T{uint16(vec.bits.y >> 16)})};
}

template <class Config>
struct DotGemm {
  using Hidden = typename Config::Hidden;
  using Logits = typename Config::Logits;
  static constexpr int K = Config::kHidden, R = Config::kRows, kRows = Config::kRowsOfBlock;
  static constexpr int kWarps = Config::kWarps, kVecs = Config::kVecs, kTokens = Config::kTokens;
  static constexpr int kSums = kRows * kTokens;               // the logits of a block
  static constexpr int kPitch = ceil_div(kWarps, 8) * 8 + 4;  // keeps threads that add up at once on different banks
  static_assert(K % 4 == 0, "a thread loads 4 elements at a time");
  static_assert(128 * kWarps * kVecs >= K, "every column has an owner");
  static_assert((kSums & (kSums - 1)) == 0 and kSums <= 32, "the lanes of a warp share its sums evenly");

  const DotArguments& arguments;
  const int first_row = blockIdx.x * kRows;

  Vec4<float> weight[kRows][kVecs];

  __forceinline__ int column_of(int vec) const { return (vec * 32 * kWarps + int(threadIdx.x)) * 4; }

  __forceinline__ bool in_row(int vec) const { return (vec + 1) * 128 * kWarps <= K or column_of(vec) < K; }

  __forceinline__ bool is_there(int row) const { return R % kRows == 0 or first_row + row < R; }

  __forceinline__ const float* weight_at(int row, int vec) const {
    return static_cast<const float*>(arguments.weight) + (first_row + row) * arguments.weight_stride + column_of(vec);
  }

  // By plain loads, frozen or not: those of the read-only path (load_16_bytes<true>) ptxas moves behind the wait, where
  // no branch and no barrier lies between.
  __forceinline__ void load_weight() {
#pragma unroll
    for (int vec = 0; vec < kVecs; ++vec) {
#pragma unroll
      for (int row = 0; row < kRows; ++row) {
        weight[row][vec] = {};
        if (is_there(row) and in_row(vec)) weight[row][vec].bits = load_16_bytes<false>(weight_at(row, vec));
      }
    }
  }

  __forceinline__ void prefetch_weight() const {
#pragma unroll
    for (int vec = 0; vec < kVecs; ++vec) {
#pragma unroll
      for (int row = 0; row < kRows; ++row) {
        if (is_there(row) and in_row(vec)) prefetch_to_l2(weight_at(row, vec));
      }
    }
  }

  // Of the logit that a thread stores: sum row * kTokens + token.
  __forceinline__ float load_bias() const {
    const int row = int(threadIdx.x) / kTokens;
    if (not Config::kHasBias or row >= kRows or not is_there(row)) return 0.0f;
    return widen(static_cast<const typename Config::Bias*>(arguments.bias)[first_row + row]);
  }

  __forceinline__ void load_hidden(Vec4<Hidden> (&hidden)[kTokens][kVecs]) const {
#pragma unroll
    for (int token = 0; token < kTokens; ++token) {
      const auto* source = static_cast<const Hidden*>(arguments.hidden) + token * arguments.hidden_stride;
#pragma unroll
      for (int vec = 0; vec < kVecs; ++vec) {
        const bool is_needed = kTokens == 1 or token < arguments.num_tokens;
        hidden[token][vec] = load_vec4(source + column_of(vec), is_needed and in_row(vec));
      }
    }
  }

  // Two chains of additions a sum, so that one needs not wait for the other.
  __forceinline__ void multiply(const Vec4<Hidden> (&hidden)[kTokens][kVecs], float (&sums)[kSums]) const {
    float even[kSums] = {}, odd[kSums] = {};
#pragma unroll
    for (int vec = 0; vec < kVecs; ++vec) {
#pragma unroll
      for (int token = 0; token < kTokens; ++token) {
        const float4 h = widen(hidden[token][vec]);
#pragma unroll
        for (int row = 0; row < kRows; ++row) {
          const float4 w = widen(weight[row][vec]);
          const int i = row * kTokens + token;
          even[i] = fmaf(w.z, h.z, fmaf(w.x, h.x, even[i]));
          odd[i] = fmaf(w.w, h.w, fmaf(w.y, h.y, odd[i]));
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kSums; ++i) sums[i] = even[i] + odd[i];
  }

  // Over the lanes of a warp: lane l gets sum l * kSums / 32. A lane that has several sums keeps half of them and gives
  // its partner the other half, which takes fewer shuffles than five for each. Each sum is added up as by warp_sum.
  __forceinline__ float sum_over_lanes(float (&sums)[kSums]) const {
#pragma unroll
    for (int offset = 16, half = kSums / 2; offset > 0; offset /= 2, half /= 2) {
      const bool upper = threadIdx.x & offset;
#pragma unroll
      for (int i = 0; i < kSums / 2; ++i) {
        if (i >= half) continue;
        const float given = upper ? sums[i] : sums[i + half], kept = upper ? sums[i + half] : sums[i];
        sums[i] = kept + __shfl_xor_sync(~0u, given, offset);
      }
      if (half == 0) sums[0] += __shfl_xor_sync(~0u, sums[0], offset);
    }
    return sums[0];
  }

  // Of one logit.
  static __forceinline__ float sum_over_warps(const float* partial) {
    float sums[4] = {};
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) sums[warp % 4] += partial[warp];
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
  }

  __forceinline__ void store_logit(float logit) const {
    const int row = int(threadIdx.x) / kTokens, token = int(threadIdx.x) % kTokens;
    if (not is_there(row) or (kTokens > 1 and token >= arguments.num_tokens)) return;
    static_cast<Logits*>(arguments.logits)[int64(token) * R + first_row + row] = narrow<Logits>(logit);
  }

  __forceinline__ void run(float (&partial)[kSums][kPitch]) {
    Vec4<Hidden> hidden[kTokens][kVecs];
    float sums[kSums], bias;
    trigger_dependents();
    if constexpr (Config::kFrozen) {
      load_weight();
      bias = load_bias();
    } else {
      prefetch_weight();
    }
    wait_for_predecessor();
    load_hidden(hidden);
    if constexpr (not Config::kFrozen) {
      load_weight();
      bias = load_bias();
    }
    multiply(hidden, sums);
    const float sum = sum_over_lanes(sums);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (lane % (32 / kSums) == 0) partial[lane * kSums / 32][warp] = sum;
    __syncthreads();
    if (threadIdx.x < kSums) store_logit(sum_over_warps(partial[threadIdx.x]) + bias);
  }
};

template <class Config>
__forceinline__ void dot_gemm(const DotArguments& arguments) {
  __shared__ __align__(16) float partial[DotGemm<Config>::kSums][DotGemm<Config>::kPitch];
  DotGemm<Config>{arguments}.run(partial);
}
