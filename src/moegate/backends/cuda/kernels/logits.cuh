// A token's logits, as a warp of the selection has them: lane l those of kPerLane experts, from l * kPerLane on.
//
// They are read; or, behind a library's product (kParts > 0), made here, so that this takes no kernel of its own: what the
// products (products.cuh) add up to gets the factor of the input norm and the linear bias, is rounded, and stored.
#pragma once
#include "products.cuh"

// What a row consists of: logits, or products.
template <int kParts, class Logits>
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
  static constexpr int kParts = Config::kParts;  // 0: the logits are given
  static constexpr bool kByFours = Config::kAligned and kPerLane % 4 == 0 and R % 4 == 0 and E % 4 == 0;
  using Logits = typename Config::Logits;
  using Bias = typename Config::Bias;
  using Source = typename SourceOf<kParts, Logits>::Type;

  const Source* row;  // of the logits, or of the first share's products
  int64 share_stride;
  int shares;
  const float* norm_factor;  // the token's
  const Bias* bias;
  Logits* made;
  const int lane = threadIdx.x % 32;

  // The lane's, 0 beyond the experts; and whether any of the row's is NaN.
  __forceinline__ bool load(float (&values)[kPerLane]) const {
    bool is_nan = false;
    const float factor = Config::kNorm ? *norm_factor : 1.0f;
    if constexpr (kParts == 0) {
      load_part(row, values);
    } else {
      make(values, factor);
      store_part(values);
    }
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) is_nan |= isnan(values[i]);
    for (int id = E + lane; id < R; id += 32) {
      if constexpr (kParts > 0) made[id] = made_of(sum_of_products<kParts>(row + id, R, share_stride, shares), id, factor);
      is_nan |= isnan(at(id));
    }
    if constexpr (kParts > 0) __syncwarp();  // any lane may fetch what another has stored
    return __any_sync(~0u, is_nan);
  }

  // Any of the row, fetched anew, after `load`.
  __forceinline__ float at(int id) const {
    if constexpr (kParts == 0) {
      return widen(row[id]);
    } else {
      return widen(made[id]);
    }
  }

  __forceinline__ void load_part(const Source* source, float (&values)[kPerLane]) const {
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

  // As many shares in flight at once as registers are given. Of one part, the three that are added are the same.
  __forceinline__ void make(float (&values)[kPerLane], float factor) const {
    constexpr int kMost = Config::kInFlight / (kPerLane * kParts), kAtOnce = kMost > 8 ? 8 : kMost < 1 ? 1 : kMost;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) values[i] = 0.0f;
#pragma unroll 1
    for (int first = 0; first < shares; first += kAtOnce) {
      float parts[kAtOnce][kParts][kPerLane];
#pragma unroll
      for (int i = 0; i < kAtOnce * kParts; ++i) {
        const Source* share = row + (first + i / kParts) * share_stride;
        if (first + i / kParts < shares) load_part(share + i % kParts * R, parts[i / kParts][i % kParts]);
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (first + i >= shares) break;
#pragma unroll
        for (int j = 0; j < kPerLane; ++j) {
          values[j] += sum_of_parts<kParts>(parts[i][0][j], parts[i][kParts / 2][j], parts[i][kParts - 1][j]);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const int id = lane * kPerLane + i;
      if (id < E) values[i] = widen(made_of(values[i], id, factor));
    }
  }

  __forceinline__ void store_part(const float (&values)[kPerLane]) const {
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
