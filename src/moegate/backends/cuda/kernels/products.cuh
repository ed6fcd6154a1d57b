// Around a library's product for many tokens: products[S, M, C], of which the logits [M, R] are the sums.
//
// - S shares of K, each a product of its own, so that few tokens are enough for all multiprocessors.
// - P = 3 parts of a float32 weight, which is taken apart here: a library multiplies bfloat16 numbers on tensor cores,
//   and a float32 is the sum of three. P = 1 of any other weight.
// - With an input norm, a weight that is multiplied by the norm's scale here, and then is a float32, too (P = 2 is all
//   of it, if both are bfloat16); and a factor for each token, by which its logits are multiplied in the end.
// - C = P * R columns, or the next multiple of 8, of a copy with rows of zeros: cuBLAS takes two to four times as long
//   for any other number.
//
// Both kernels are bound by memory, and neighbours take neighbours: eight elements of the weight a thread, one logit.
// A token's norm is a warp's.
#pragma once
#include "pieces.cuh"

struct PrepareArguments {
  const void* weight;
  void* parts;              // [C, K]: the first parts of all rows, then the second, then the third
  const void* input_scale;  // [K]; this and what follows with an input norm
  const void* hidden;       // [M, K]
  float* factors;           // [M]
  int64 weight_stride;      // elements from row to row
  int64 hidden_stride;
  int32 num_tokens;
};

struct SumArguments {
  const float* products;
  const void* bias;
  void* logits;
  int64 count;   // M * R
  int64 stride;  // C
  int32 shares;
};

template <class Config>
__forceinline__ Operand<Config::kParts> scaled_operand(const Raw<typename Config::Weight>& piece, const void* input_scale,
                                                       int column) {
  float values[8];
  unpack(piece, values);
  if constexpr (Config::kNorm) {
    const auto* scale = static_cast<const typename Config::InputScale*>(input_scale) + column;
#pragma unroll
    for (int i = 0; i < 8; ++i) values[i] *= widen(scale[i]);
  }
  return split<Config::kParts>(values);
}

template <class Config>
__forceinline__ void split_weight(const PrepareArguments& arguments) {
  constexpr int kPieces = Config::kHidden / 8, kCount = Config::kRows * kPieces, kParts = Config::kParts;
  constexpr int kZeros = Config::kColumns * kPieces - kParts * kCount;
  static_assert(Config::kHidden % 8 == 0, "a thread takes 8 elements");
  static_assert(kZeros >= 0, "every part has a place");
  auto* parts = static_cast<uint4*>(arguments.parts);
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < kCount + kZeros; i += gridDim.x * blockDim.x) {
    if (i >= kCount) {
      parts[(kParts - 1) * kCount + i] = uint4{};
      continue;
    }
    const int column = i % kPieces * 8;
    const auto* row = static_cast<const typename Config::Weight*>(arguments.weight) + i / kPieces * arguments.weight_stride;
    const auto piece = load_piece<false>(row + column, true);
    if constexpr (kParts == 1) {
      parts[i] = piece.bits;
    } else {
      const Operand<kParts> operand = scaled_operand<Config>(piece, arguments.input_scale, column);
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        const auto& pairs = operand.pairs[part];
        parts[part * kCount + i] = uint4{pairs[0], pairs[1], pairs[2], pairs[3]};
      }
    }
  }
}

// From the last warp on, since the first ones have the weight to do.
template <class Config>
__forceinline__ void norm_tokens(const PrepareArguments& arguments) {
  constexpr int K = Config::kHidden, kAtOnce = 4;
  const int lane = threadIdx.x % 32, warps = gridDim.x * blockDim.x / 32;
  for (int token = warps - 1 - (blockIdx.x * blockDim.x + threadIdx.x) / 32; token < arguments.num_tokens; token += warps) {
    const auto* row = static_cast<const typename Config::Hidden*>(arguments.hidden) + token * arguments.hidden_stride;
    float square = 0.0f;
    for (int first = lane * 8; first < K; first += kAtOnce * 256) {
      Raw<typename Config::Hidden> pieces[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) pieces[i] = load_piece<false>(row + first + i * 256, first + i * 256 < K);
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        float values[8];
        unpack(pieces[i], values);
#pragma unroll
        for (int j = 0; j < 8; ++j) square += values[j] * values[j];
      }
    }
    square = warp_sum(square);
    if (lane == 0) arguments.factors[token] = norm_factor<Config>(square);
  }
}

template <class Config>
__forceinline__ void prepare_product(const PrepareArguments& arguments) {
  trigger_dependents();
  wait_for_predecessor();  // which may be writing what is read here, or reading what was where the parts are to be
  split_weight<Config>(arguments);
  if constexpr (Config::kNorm) norm_tokens<Config>(arguments);
}

// The order in which all kernels add, so that a logit has the same bits from any of them: the parts of a share, smaller
// ones first; then share after share.
template <int kParts>
__forceinline__ float sum_of_parts(float first, float second, float third) {
  return kParts == 3 ? first + (second + third) : kParts == 2 ? first + second : first;
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
    const float* first = arguments.products + token * arguments.stride + row;
    float logit = sum_of_products<kParts>(first, R, arguments.count / R * arguments.stride, arguments.shares);
    if constexpr (Config::kHasBias) logit += widen(static_cast<const typename Config::Bias*>(arguments.bias)[row]);
    static_cast<typename Config::Logits*>(arguments.logits)[i] = narrow<typename Config::Logits>(logit);
  }
}
