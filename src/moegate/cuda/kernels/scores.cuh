// Logits to scores, and float32 in the order of unsigned integers.
#pragma once
#include "device.cuh"

constexpr float kFloat32Max = 3.402823466e38f;

// A logit or key as docs/contract.md counts it: NaN as -MAX, the infinities as +-MAX.
__forceinline__ float finite(float value) { return fminf(fmaxf(value, -kFloat32Max), kFloat32Max); }

// Integers in the order of the floats, with -0.0 equal to 0.0; above 0 for every float.
__forceinline__ uint32 ordered(float value) {
  const uint32 bits = __float_as_uint(value + 0.0f);
  return bits ^ (uint32(int32(bits) >> 31) | 0x80000000u);
}

__forceinline__ float from_ordered(uint32 key) {
  return __uint_as_float(key ^ (uint32(int32(~key) >> 31) | 0x80000000u));
}

__forceinline__ float warp_max(float value) { return from_ordered(__reduce_max_sync(~0u, ordered(value))); }

enum class Score { kSoftmax, kSigmoid, kSqrtSoftplus, kIdentity };

template <class Config>
__forceinline__ float transformed(float logit) {
  if constexpr (Config::kLogitMultiplier != 1.0f) logit = finite(logit * Config::kLogitMultiplier);
  if constexpr (Config::kSoftcap > 0.0f) logit = Config::kSoftcap * tanhf(logit / Config::kSoftcap);
  return logit;
}

// A warp that selects one token is one dependent chain of instructions, most of them CUDA's exp, division and square
// root. The functions below are shorter, and keep the contract's bounds.

__forceinline__ float exp2_approx(float value) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(value));
  return power;
}

__forceinline__ float reciprocal(float value) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(value));
  return result;
}

// The quotient after one correction by its remainder; both arguments are normal numbers or 0.
__forceinline__ float divide(float a, float b) {
  const float inverse = reciprocal(b), quotient = a * inverse;
  return fmaf(inverse, fmaf(-quotient, b, a), quotient);
}

constexpr float kLog2E = 1.44269504f, kLog2ERest = 1.92596303e-8f, kLn2 = 0.69314718f;

// exp(value) to a few ulp and |value| * 2^-24, the error of rounding value * kLog2E.
__forceinline__ float exp_approx(float value) { return exp2_approx(value * kLog2E); }

// exp(value) to a few ulp, with the rounding of value * kLog2E corrected; value is at most 0.
__forceinline__ float exp_of_negative(float value) {
  value = fmaxf(value, -256.0f);  // 0 from there on, and no difference of infinities
  const float scaled = value * kLog2E;
  const float rest = fmaf(value, kLog2ERest, fmaf(value, kLog2E, -scaled));
  const float power = exp2_approx(scaled);
  return fmaf(power, rest * kLn2, power);
}

__forceinline__ float sigmoid(float value) { return reciprocal(1.0f + exp_approx(-value)); }

// The score of one transformed logit; a softmax needs the whole row.
template <Score kScore>
__forceinline__ float score_of(float value) {
  static_assert(kScore == Score::kSigmoid || kScore == Score::kSqrtSoftplus || kScore == Score::kIdentity);
  if constexpr (kScore == Score::kSigmoid) return sigmoid(value);
  if constexpr (kScore == Score::kSqrtSoftplus) return sqrtf(fmaxf(value, 0.0f) + log1pf(exp_of_negative(-fabsf(value))));
  return value;
}
