// Logits to scores, and float32 in the order of unsigned integers.
#pragma once
#include "device.cuh"

constexpr float kFloat32Max = 3.402823466e38f;

// What docs/contract.md makes of a number before anything else: -MAX of NaN, +-MAX of the infinities.
__forceinline__ float finite(float value) { return fminf(fmaxf(value, -kFloat32Max), kFloat32Max); }

// Integers in the order of the floats, with -0.0 equal to 0.0; above 0 for every float.
__forceinline__ uint32 ordered(float value) {
  const uint32 bits = __float_as_uint(value + 0.0f);
  return bits ^ (uint32(int32(bits) >> 31) | 0x80000000u);
}

__forceinline__ float from_ordered(uint32 key) {
  return __uint_as_float(key ^ (uint32(int32(~key) >> 31) | 0x80000000u));
}

__forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(~0u, value, offset);
  return value;
}

__forceinline__ float warp_max(float value) { return from_ordered(__reduce_max_sync(~0u, ordered(value))); }

enum class Score { kSoftmax, kSigmoid, kSqrtSoftplus, kIdentity };

template <class Config>
__forceinline__ float transformed(float logit) {
  if constexpr (Config::kLogitMultiplier != 1.0f) logit = finite(logit * Config::kLogitMultiplier);
  if constexpr (Config::kSoftcap > 0.0f) logit = Config::kSoftcap * tanhf(logit / Config::kSoftcap);
  return logit;
}

__forceinline__ float sigmoid(float value) { return __fdividef(1.0f, 1.0f + expf(-value)); }

// The score of one transformed logit; a softmax is a matter of the whole row.
template <Score kScore>
__forceinline__ float score_of(float value) {
  static_assert(kScore != Score::kSoftmax);
  if constexpr (kScore == Score::kSigmoid) return sigmoid(value);
  if constexpr (kScore == Score::kSqrtSoftplus) return sqrtf(fmaxf(value, 0.0f) + log1pf(expf(-fabsf(value))));
  return value;
}
