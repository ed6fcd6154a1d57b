// Around a library's product for many tokens: products[S, M, P * R], of which the logits [M, R] are the sums.
//
// - S shares of K, each a product of its own, so that few tokens are enough for all multiprocessors.
// - P = 3 parts of a float32 weight, which is taken apart here: a library multiplies bfloat16 numbers on tensor cores,
//   and a float32 is the sum of three. P = 1 of any other weight.
//
// Both kernels are bound by memory, and neighbours take neighbours: eight elements of the weight a thread, one logit.
#pragma once
#include "pieces.cuh"

struct SplitArguments {
  const float* weight;
  void* parts;          // [3 R, K] bfloat16: the first parts of all rows, then the second, then the third
  int64 weight_stride;  // elements from row to row
};

struct SumArguments {
  const float* products;
  const void* bias;
  void* logits;
  int64 count;  // M * R
  int32 shares;
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

// The order in which all kernels add, so that a logit has the same bits from any of them: the parts of a share, smaller
// ones first; then share after share.
template <int kParts>
__forceinline__ float sum_of_parts(float first, float second, float third) {
  return kParts == 3 ? first + (second + third) : first;
}

template <int kParts>
__forceinline__ float sum_of_products(const float* first, int rows, int64 share_stride, int shares) {
  float sum = 0.0f;
#pragma unroll 4
  for (int share = 0; share < shares; ++share, first += share_stride) {
    sum += sum_of_parts<kParts>(first[0], first[kParts / 2 * rows], first[(kParts - 1) * rows]);
  }
  return sum;
}

template <class Config>
__forceinline__ void sum_products(const SumArguments& arguments) {
  constexpr int R = Config::kRows, kParts = Config::kParts;
  trigger_dependents();
  wait_for_predecessor();
  const int64 step = int64(gridDim.x) * blockDim.x;
  for (int64 i = int64(blockIdx.x) * blockDim.x + threadIdx.x; i < arguments.count; i += step) {
    const int64 token = i / R;
    const int row = i % R;
    const float* first = arguments.products + token * kParts * R + row;
    float logit = sum_of_products<kParts>(first, R, arguments.count * kParts, arguments.shares);
    if constexpr (Config::kHasBias) logit += widen(static_cast<const typename Config::Bias*>(arguments.bias)[row]);
    static_cast<typename Config::Logits*>(arguments.logits)[i] = narrow<typename Config::Logits>(logit);
  }
}
