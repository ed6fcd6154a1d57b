// A float32 weight on tensor cores, by a library that multiplies bfloat16: the weight as the sum of three bfloat16
// numbers, before, and the sum of the three products, after.
//
// Both are bound by memory, and neighbours take neighbours: eight elements of the weight a thread, one logit.
#pragma once
#include "pieces.cuh"

struct SplitArguments {
  const float* weight;
  void* parts;          // [3 R, K] bfloat16: the first parts of all rows, then the second, then the third
  int64 weight_stride;  // elements from row to row
};

struct SumArguments {
  const float* products;  // [M, 3 R]
  const void* bias;
  void* logits;  // [M, R]
  int64 count;   // M * R
};

template <class Config>
__forceinline__ void split_weight(const SplitArguments& arguments) {
  constexpr int kPieces = Config::kHidden / 8, kCount = Config::kRows * kPieces;
  static_assert(Config::kHidden % 8 == 0, "a thread takes 8 elements");
  trigger_dependents();
  wait_for_predecessor();  // which may be writing the weight, or reading what was where the parts are to be
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < kCount; i += gridDim.x * blockDim.x) {
    const float* source = arguments.weight + i / kPieces * arguments.weight_stride + i % kPieces * 8;
    const Operand<3> parts = as_operand<3>(load_piece<false>(source, true));
#pragma unroll
    for (int part = 0; part < 3; ++part) {
      const auto& pairs = parts.pairs[part];
      static_cast<uint4*>(arguments.parts)[part * kCount + i] = uint4{pairs[0], pairs[1], pairs[2], pairs[3]};
    }
  }
}

template <class Config>
__forceinline__ void sum_products(const SumArguments& arguments) {
  constexpr int R = Config::kRows;
  trigger_dependents();
  wait_for_predecessor();
  const int64 step = int64(gridDim.x) * blockDim.x;
  for (int64 i = int64(blockIdx.x) * blockDim.x + threadIdx.x; i < arguments.count; i += step) {
    const int64 token = i / R;
    const int row = i % R;
    const float* of_token = arguments.products + token * 3 * R + row;
    float logit = of_token[0] + (of_token[R] + of_token[2 * R]);
    if constexpr (Config::kHasBias) logit += widen(static_cast<const typename Config::Bias*>(arguments.bias)[row]);
    static_cast<typename Config::Logits*>(arguments.logits)[i] = narrow<typename Config::Logits>(logit);
  }
}
