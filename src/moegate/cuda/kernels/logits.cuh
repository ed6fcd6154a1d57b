// A token's logits in a warp of the selection: lane l has those of kPerLane experts, from l * kPerLane on.
//
// The logits are read; or, behind cuBLAS's split-K GEMM (kNumTerms > 0), they are made here, which saves a kernel: the sum
// of the partial sums (split_k.cuh) is multiplied by the norm factor, gets the linear bias, is rounded, and stored.
#pragma once
#include "operands.cuh"
#include "partial_sums.cuh"

// The element type of a row: logits, or partial sums.
template <int kNumTerms, class Logits>
struct SourceOf {
  using Type = float;
};
template <class Logits>
struct SourceOf<0, Logits> {
  using Type = Logits;
};

template <class Config>
struct TokenLogits {
  static constexpr int E = Config::kSelectable, R = Config::kRows, kPerLane = ceil_div(E, 32);
  static constexpr int kNumTerms = Config::kNumTerms;  // 0: the logits are given
  static constexpr bool kByFours = Config::kAligned and kPerLane % 4 == 0 and R % 4 == 0 and E % 4 == 0;
  using Logits = typename Config::Logits;
  using Bias = typename Config::Bias;
  using Source = typename SourceOf<kNumTerms, Logits>::Type;

  const Source* row;  // of the logits, or of the first split's partial sums
  int64 split_stride;
  int num_splits;
  const float* norm_factor;  // the token's
  const Bias* bias;
  Logits* made;
  const int lane = threadIdx.x % 32;

  // Loads the lane's logits, 0 beyond the experts; returns whether any logit of the row is NaN.
  __forceinline__ bool load(float (&values)[kPerLane]) const {
    bool is_nan = false;
    const float factor = Config::kNorm ? *norm_factor : 1.0f;
    if constexpr (kNumTerms == 0) {
      load_lane(row, values);
    } else {
      make(values, factor);
      store_lane(values);
    }
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) is_nan |= isnan(values[i]);
    for (int id = E + lane; id < R; id += 32) {
      if constexpr (kNumTerms > 0) made[id] = made_of(sum_of_splits<kNumTerms>(row + id, R, split_stride, num_splits), id, factor);
      is_nan |= isnan(at(id));
    }
    if constexpr (kNumTerms > 0) __syncwarp();  // any lane may load what another has stored
    return __any_sync(~0u, is_nan);
  }

  // Any logit of the row, loaded again; only after `load`.
  __forceinline__ float at(int id) const {
    if constexpr (kNumTerms == 0) {
      return widen(row[id]);
    } else {
      return widen(made[id]);
    }
  }

  __forceinline__ void load_lane(const Source* source, float (&values)[kPerLane]) const {
#pragma unroll
    for (int i = 0; i < kPerLane; i += kByFours ? 4 : 1) {
      const int id = lane * kPerLane + i;
      if constexpr (not kByFours) {
        values[i] = id < E ? widen(source[id]) : 0.0f;
      } else if (id >= E) {
        values[i] = values[i + 1] = values[i + 2] = values[i + 3] = 0.0f;
      } else if constexpr (sizeof(Source) == 4) {
        const float4 four = *reinterpret_cast<const float4*>(source + id);
        values[i] = four.x, values[i + 1] = four.y, values[i + 2] = four.z, values[i + 3] = four.w;
      } else {
        const uint2 four = *reinterpret_cast<const uint2*>(source + id);
        values[i] = widen(bf16{uint16(four.x)}), values[i + 1] = widen(bf16{uint16(four.x >> 16)});
        values[i + 2] = widen(bf16{uint16(four.y)}), values[i + 3] = widen(bf16{uint16(four.y >> 16)});
      }
    }
  }

  __forceinline__ Logits made_of(float sum, int id, float factor) const {
    if constexpr (Config::kNorm) sum *= factor;
    if constexpr (Config::kHasBias) sum += widen(bias[id]);
    return narrow<Logits>(sum);
  }

  // Each iteration loads kAtOnce splits, as many as the register budget kInFlight allows. With kNumTerms == 1 the three
  // arguments of sum_of_terms name one element, of which sum_of_terms takes the first.
  __forceinline__ void make(float (&values)[kPerLane], float factor) const {
    constexpr int kMost = Config::kInFlight / (kPerLane * kNumTerms), kAtOnce = kMost > 8 ? 8 : kMost < 1 ? 1 : kMost;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) values[i] = 0.0f;
#pragma unroll 1
    for (int first = 0; first < num_splits; first += kAtOnce) {
      float terms[kAtOnce][kNumTerms][kPerLane];
#pragma unroll
      for (int i = 0; i < kAtOnce * kNumTerms; ++i) {
        const Source* split = row + (first + i / kNumTerms) * split_stride;
        if (first + i / kNumTerms < num_splits) load_lane(split + i % kNumTerms * R, terms[i / kNumTerms][i % kNumTerms]);
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (first + i >= num_splits) break;
#pragma unroll
        for (int j = 0; j < kPerLane; ++j) {
          values[j] += sum_of_terms<kNumTerms>(terms[i][0][j], terms[i][kNumTerms / 2][j], terms[i][kNumTerms - 1][j]);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const int id = lane * kPerLane + i;
      if (id < E) values[i] = widen(made_of(values[i], id, factor));
    }
  }

  __forceinline__ void store_lane(const float (&values)[kPerLane]) const {
#pragma unroll
    for (int i = 0; i < kPerLane; i += kByFours ? 4 : 1) {
      const int id = lane * kPerLane + i;
      if (id >= E) continue;
      if constexpr (not kByFours) {
        made[id] = narrow<Logits>(values[i]);
      } else if constexpr (sizeof(Logits) == 4) {
        *reinterpret_cast<float4*>(made + id) = {values[i], values[i + 1], values[i + 2], values[i + 3]};
      } else {
        const uint2 four = {bits_of_two(values[i], values[i + 1]), bits_of_two(values[i + 2], values[i + 3])};
        *reinterpret_cast<uint2*>(made + id) = four;
      }
    }
  }

  static __forceinline__ uint32 bits_of_two(float low, float high) {
    return uint32(narrow<Logits>(high).bits) << 16 | narrow<Logits>(low).bits;
  }
};
