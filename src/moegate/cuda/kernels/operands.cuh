// Eight consecutive elements of a row, as operands of a bfloat16 (or float16) tensor-core multiplication.
//
// A float32 of normal size is the exact sum of three bfloat16 numbers, a float16 of two. The product of two such sums is
// taken over the pairs of terms that can reach float32's last bits: terms i and j with i + j <= 2.
#pragma once
#include "device.cuh"

template <class T>
struct Vec8;  // eight elements as they lie in memory
template <>
struct Vec8<bf16> {
  uint4 bits;
};
template <>
struct Vec8<fp16> {
  uint4 bits;
};
template <>
struct Vec8<float> {
  uint4 low, high;
};

// `volatile` keeps a load on its side of the wait, which is a question of correctness.
// kConstant: no kernel writes there while this kernel runs, not even the predecessor.
template <bool kConstant>
__forceinline__ uint4 load_16_bytes(const void* address) {
  uint4 v;
  if constexpr (kConstant) {
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(address));
  } else {
    asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(address)
                 : "memory");
  }
  return v;
}

template <bool kConstant, class T>
__forceinline__ Vec8<T> load_vec8(const T* address, bool in_range) {
  Vec8<T> vec = {};
  if (in_range) {
    if constexpr (sizeof(T) == 2) {
      vec.bits = load_16_bytes<kConstant>(address);
    } else {
      vec.low = load_16_bytes<kConstant>(address);
      vec.high = load_16_bytes<kConstant>(address + 4);
    }
  }
  return vec;
}

__forceinline__ void unpack(const Vec8<float>& vec, float (&values)[8]) {
  const uint32 words[8] = {vec.low.x,  vec.low.y,  vec.low.z,  vec.low.w,
                           vec.high.x, vec.high.y, vec.high.z, vec.high.w};
#pragma unroll
  for (int i = 0; i < 8; ++i) values[i] = __uint_as_float(words[i]);
}

template <class T>
__forceinline__ void unpack(const Vec8<T>& vec, float (&values)[8]) {
  const uint32 words[4] = {vec.bits.x, vec.bits.y, vec.bits.z, vec.bits.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    values[2 * i] = widen(T{uint16(words[i])});
    values[2 * i + 1] = widen(T{uint16(words[i] >> 16)});
  }
}

// The factor of an input norm for a token's logits, from the sum of squares of the token's elements: contract 1.2, less
// the scale of each element.
template <class Config>
__forceinline__ float norm_factor(float square) {
  return Config::kInputFactor / sqrtf(square / float(Config::kHidden) + Config::kNormEps);
}

// kNumTerms operands, each of four registers with two elements.
template <int kNumTerms>
struct Operand {
  uint32 pairs[kNumTerms][4];
};

template <int kNumTerms>
__forceinline__ Operand<kNumTerms> to_terms(const float (&values)[8]) {
  Operand<kNumTerms> operand;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float low = values[2 * i], high = values[2 * i + 1];
#pragma unroll
    for (int term = 0; term < kNumTerms; ++term) {
      uint32 pair;
      asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
      operand.pairs[term][i] = pair;
      low -= __uint_as_float(pair << 16);  // exact: the error of a rounding
      high -= __uint_as_float(pair & 0xffff0000u);
    }
  }
  return operand;
}

// kNumTerms is 1 only where the bits in memory are the operand.
template <int kNumTerms, class T>
__forceinline__ Operand<kNumTerms> as_operand(const Vec8<T>& vec) {
  if constexpr (kNumTerms == 1) {
    return {{{vec.bits.x, vec.bits.y, vec.bits.z, vec.bits.w}}};
  } else {
    float values[8];
    unpack(vec, values);
    return to_terms<kNumTerms>(values);
  }
}

// sum[16 x 8] += a[16 x 16] * b[16 x 8], accumulated in float32.
template <bool kIsFp16>
__forceinline__ void mma_16x8x16(float (&sum)[4], uint32 a0, uint32 a1, uint32 a2, uint32 a3, uint32 b0, uint32 b1) {
  if constexpr (kIsFp16) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  } else {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  }
}

// `low` holds rows 0..7 of the tile, `high` rows 8..15. Which of the lane's elements meet in one mma does not matter as
// long as both operands agree, so that no element has to move between lanes. Two accumulators, since an mma waits for
// the mma before it on the same accumulator.
template <bool kIsFp16, int kWeightTerms, int kHiddenTerms>
__forceinline__ void multiply(float (&sums)[2][4], const Operand<kWeightTerms>& low, const Operand<kWeightTerms>& high,
                              const Operand<kHiddenTerms>& hidden) {
#pragma unroll
  for (int i = 0; i < kWeightTerms; ++i) {
#pragma unroll
    for (int j = 0; j < kHiddenTerms; ++j) {
      if (i + j > 2) continue;
      const auto& w0 = low.pairs[i];
      const auto& w1 = high.pairs[i];
      const auto& x = hidden.pairs[j];
      mma_16x8x16<kIsFp16>(sums[0], w0[0], w1[0], w0[1], w1[1], x[0], x[1]);
      mma_16x8x16<kIsFp16>(sums[1], w0[2], w1[2], w0[3], w1[3], x[2], x[3]);
    }
  }
}
