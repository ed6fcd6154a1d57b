// A token's logits, as a warp of the selection has them: lane l those of the experts l * kPerLane and on.
//
// They are read; or, behind a library's product (kProducts > 0), made here, so that this takes no kernel of its own. Then
// the token's row holds float32 products, R of them or 3 R of a weight that was taken apart (split.cuh). What they add
// up to gets the linear bias, is rounded, and stored.
#pragma once
#include "device.cuh"

template <class Config>
struct TokenLogits {
  static constexpr int E = Config::kSelectable, R = Config::kRows, kPerLane = ceil_div(E, 32);
  static constexpr int kProducts = Config::kProducts;
  static constexpr bool kByFours = Config::kAligned and kPerLane % 4 == 0 and R % 4 == 0 and E % 4 == 0;
  static_assert(kProducts == 0 or kProducts == 1 or kProducts == 3, "none, of a plain weight, of one in three parts");
  using Logits = typename Config::Logits;
  using Bias = typename Config::Bias;

  const void* row;  // kProducts == 0: the logits
  const Bias* bias;
  Logits* made;
  const int lane = threadIdx.x % 32;

  static __forceinline__ TokenLogits of(const void* source, int64 stride, const void* bias, void* made, int token) {
    const int64 first = token * stride;
    const void* row = kProducts == 0 ? static_cast<const void*>(static_cast<const Logits*>(source) + first)
                                     : static_cast<const float*>(source) + first;
    return {row, static_cast<const Bias*>(bias), static_cast<Logits*>(made) + int64(token) * R};
  }

  // The lane's, 0 beyond the experts; and whether any of the row's is NaN.
  __forceinline__ bool load(float (&values)[kPerLane]) const {
    bool is_nan = false;
    if constexpr (kProducts == 0) {
      load_part(static_cast<const Logits*>(row), values);
    } else {
      make(values);
      store_part(values);
    }
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) is_nan |= isnan(values[i]);
    for (int id = E + lane; id < R; id += 32) {
      const float logit = at(id);
      is_nan |= isnan(logit);
      if constexpr (kProducts > 0) made[id] = narrow<Logits>(logit);
    }
    return __any_sync(~0u, is_nan);
  }

  // Any of the row, fetched anew.
  __forceinline__ float at(int id) const {
    if constexpr (kProducts == 0) {
      return widen(static_cast<const Logits*>(row)[id]);
    } else {
      const float* products = static_cast<const float*>(row) + id;
      return made_of(products[0], kProducts == 3 ? products[R] + products[2 * R] : 0.0f, id);
    }
  }

  template <class T>
  __forceinline__ void load_part(const T* source, float (&values)[kPerLane]) const {
#pragma unroll
    for (int i = 0; i < kPerLane; i += kByFours ? 4 : 1) {
      const int id = lane * kPerLane + i;
      if constexpr (not kByFours) {
        values[i] = id < E ? widen(source[id]) : 0.0f;
      } else if (id >= E) {
        values[i] = values[i + 1] = values[i + 2] = values[i + 3] = 0.0f;
      } else if constexpr (sizeof(T) == 4) {
        const float4 four = *reinterpret_cast<const float4*>(source + id);
        values[i] = four.x, values[i + 1] = four.y, values[i + 2] = four.z, values[i + 3] = four.w;
      } else {
        const uint2 four = *reinterpret_cast<const uint2*>(source + id);
        values[i] = widen(bf16{uint16(four.x)}), values[i + 1] = widen(bf16{uint16(four.x >> 16)});
        values[i + 2] = widen(bf16{uint16(four.y)}), values[i + 3] = widen(bf16{uint16(four.y >> 16)});
      }
    }
  }

  // In the order of sum_products (split.cuh), so that a logit has the same bits from either.
  __forceinline__ float made_of(float first, float others, int id) const {
    float logit = kProducts == 3 ? first + others : first;
    if constexpr (Config::kHasBias) logit += widen(bias[id]);
    return widen(narrow<Logits>(logit));
  }

  __forceinline__ void make(float (&values)[kPerLane]) const {
    const float* products = static_cast<const float*>(row);
    float others[kPerLane] = {};
    if constexpr (kProducts == 3) {
      float third[kPerLane];
      load_part(products + R, others);
      load_part(products + 2 * R, third);
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) others[i] += third[i];
    }
    load_part(products, values);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const int id = lane * kPerLane + i;
      if (id < E) values[i] = made_of(values[i], others[i], id);
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
