// Partial sums to sums: partial_sums[S, M, C], of num_splits slices of K and num_terms terms of a weight (split_k.cuh).
#pragma once
#include "device.cuh"

// The order in which all kernels add partial sums, so that a logit has the same bits from any of them: the terms of one
// split, smaller terms first; then split after split.
template <int kNumTerms>
__forceinline__ float sum_of_terms(float first, float second, float third) {
  return kNumTerms == 3 ? first + (second + third) : kNumTerms == 2 ? first + second : first;
}

template <int kNumTerms>
__forceinline__ float sum_of_splits(const float* first, int rows, int64 split_stride, int num_splits) {
  float sum = 0.0f;
#pragma unroll 4
  for (int split = 0; split < num_splits; ++split, first += split_stride) {
    sum += sum_of_terms<kNumTerms>(first[0], first[kNumTerms / 2 * rows], first[(kNumTerms - 1) * rows]);
  }
  return sum;
}
