// Before and after cuBLAS's split-K GEMM: partial_sums[S, M, C], of which the logits [M, R] are the sums.
//
// - S = num_splits slices of K, multiplied as a batch. S times as many output tiles give every multiprocessor one.
// - T = num_terms bfloat16 terms of a weight. Tensor cores multiply bfloat16 numbers; a float32 is the exact sum of
//   three of them (T = 3). A weight in half precision stays as it is (T = 1).
// - With an input norm, the norm's scale is multiplied into the weight. The scaled weight is a float32, too (T = 2 holds
//   all of its bits, if weight and scale are bfloat16). Each token's logits are multiplied by norm_factors[token] last.
// - C = T * R columns, or the next multiple of 8, of a copy with rows of zeros: cuBLAS takes two to four times as long
//   for any other number.
//
// Both kernels are bound by memory. Adjacent threads handle adjacent data: eight elements of the weight, or one logit. A
// warp computes a token's norm.
//
// gemm/cublas.py writes the arguments' structs and `Config`, which stand in front of this file.
#pragma once
#include "operands.cuh"
#include "partial_sums.cuh"

template <class Config>
__forceinline__ Operand<Config::kNumTerms> scaled_operand(const Vec8<typename Config::Weight>& vec, const void* input_scale,
                                                       int column) {
  float values[8];
  unpack(vec, values);
  if constexpr (Config::kNorm) {
    const auto* scale = static_cast<const typename Config::InputScale*>(input_scale) + column;
#pragma unroll
    for (int i = 0; i < 8; ++i) values[i] *= widen(scale[i]);
  }
  return to_terms<Config::kNumTerms>(values);
}

template <class Config>
__forceinline__ void split_weight(const PrepareArguments& arguments) {
  constexpr int kVecs = Config::kHidden / 8, kCount = Config::kRows * kVecs, kNumTerms = Config::kNumTerms;
  constexpr int kZeros = Config::kColumns * kVecs - kNumTerms * kCount;
  static_assert(Config::kHidden % 8 == 0, "a thread takes 8 elements");
  static_assert(kZeros >= 0, "every term has a place");
  auto* terms = static_cast<uint4*>(arguments.terms);
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < kCount + kZeros; i += gridDim.x * blockDim.x) {
    if (i >= kCount) {
      terms[(kNumTerms - 1) * kCount + i] = uint4{};
      continue;
    }
    const int column = i % kVecs * 8;
    const auto* row = static_cast<const typename Config::Weight*>(arguments.weight) + i / kVecs * arguments.weight_stride;
    const auto vec = load_vec8<false>(row + column, true);
    if constexpr (kNumTerms == 1) {
      terms[i] = vec.bits;
    } else {
      const Operand<kNumTerms> operand = scaled_operand<Config>(vec, arguments.input_scale, column);
#pragma unroll
      for (int term = 0; term < kNumTerms; ++term) {
        const auto& pairs = operand.pairs[term];
        terms[term * kCount + i] = uint4{pairs[0], pairs[1], pairs[2], pairs[3]};
      }
    }
  }
}

// From the last warp down, since the first warps have the weight to prepare.
template <class Config>
__forceinline__ void norm_tokens(const PrepareArguments& arguments) {
  constexpr int K = Config::kHidden, kAtOnce = 4;
  const int lane = threadIdx.x % 32, warps = gridDim.x * blockDim.x / 32;
  for (int token = warps - 1 - (blockIdx.x * blockDim.x + threadIdx.x) / 32; token < arguments.num_tokens; token += warps) {
    const auto* row = static_cast<const typename Config::Hidden*>(arguments.hidden) + token * arguments.hidden_stride;
    float square = 0.0f;
    for (int first = lane * 8; first < K; first += kAtOnce * 256) {
      Vec8<typename Config::Hidden> vecs[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) vecs[i] = load_vec8<false>(row + first + i * 256, first + i * 256 < K);
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        float values[8];
        unpack(vecs[i], values);
#pragma unroll
        for (int j = 0; j < 8; ++j) square += values[j] * values[j];
      }
    }
    square = warp_sum(square);
    if (lane == 0) arguments.factors[token] = norm_factor<Config>(square);
  }
}

template <class Config>
__forceinline__ void prepare_operands(const PrepareArguments& arguments) {
  trigger_dependents();
  wait_for_predecessor();  // it may be writing the weight, or reading the memory where the terms are to be
  split_weight<Config>(arguments);
  if constexpr (Config::kNorm) norm_tokens<Config>(arguments);
}

template <class Config>
__forceinline__ void reduce_splits(const ReduceArguments& arguments) {
  constexpr int R = Config::kRows, kNumTerms = Config::kNumTerms;
  trigger_dependents();
  wait_for_predecessor();
  const int64 step = int64(gridDim.x) * blockDim.x;
  for (int64 i = int64(blockIdx.x) * blockDim.x + threadIdx.x; i < arguments.count; i += step) {
    const int64 token = i / R;
    const int row = i % R;
    const float* first = arguments.partial_sums + token * arguments.stride + row;
    float logit = sum_of_splits<kNumTerms>(first, R, arguments.count / R * arguments.stride, arguments.num_splits);
    if constexpr (Config::kHasBias) logit += widen(static_cast<const typename Config::Bias*>(arguments.bias)[row]);
    static_cast<typename Config::Logits*>(arguments.logits)[i] = narrow<typename Config::Logits>(logit);
  }
}
