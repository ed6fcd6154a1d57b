// Hidden states to logits for few tokens: logits[M, R] = hidden[M, K] * weight[R, K]^T + bias.
//
// At these sizes the GEMM takes as long as reading the weight once. So:
// - A block owns 16 rows of the weight, a 1/kNumSplits slice of K, and 8 * kTokenTiles tokens. The kNumSplits blocks
//   of a cluster own the same rows and tokens. A warp owns kSteps steps of 32 elements of that slice.
// - The weight's rows are the 16-row operand of the tensor cores and the tokens the 8-column one, so that up
//   to 8 tokens cost what one does.
// - Every lane loads its operands straight into registers, 16 bytes at a time: no lane needs what
//   another has loaded, so that shared memory would only add a stop. The weights of kAhead steps are in flight at
//   once, which are all of a warp's unless registers forbid it; tokens follow tile by tile.
// - A warp leaves its sums of each tile in shared memory. The block adds up its warps', and the first block of the
//   cluster, to which the others send theirs, adds up the blocks' and stores the logits.
// - Sums are added in a fixed order that kNumSplits, kWarps and kSteps decide, and these depend on K, R, the
//   dtypes and the chip alone: the same bits in every run, and for a token at every M that this kernel takes.
//
// A frozen weight is loaded before the wait for the predecessor, hidden after the wait. A weight that is not frozen may be
// the predecessor's output: the weight is prefetched to L2 before the wait and loaded after it.
//
// gemm/router_gemm.py writes `GemmArguments` and `Config`, which stand in front of this file.
#pragma once
#include "cluster.cuh"
#include "operands.cuh"

template <class Config>
struct RouterGemm {
  using Hidden = typename Config::Hidden;
  using Weight = typename Config::Weight;
  static constexpr int K = Config::kHidden, R = Config::kRows;
  static constexpr int kNumSplits = Config::kNumSplits, kWarps = Config::kWarps, kSteps = Config::kSteps;
  static constexpr int kTiles = Config::kTokenTiles, kTokens = 8 * kTiles;
  static constexpr bool kNorm = Config::kNorm;
  static constexpr bool kIsFp16 = Config::kIsFp16;
  static constexpr int kAhead = Config::kAhead;  // steps of a warp in flight at once
  // A token's sums in shared memory: 16 rows, and a vector of four with its sum of squares. The pitches keep lanes that
  // write or read at the same time on different banks. The host computes them, with the size of all that `run` lays out.
  static constexpr int kSums = kNorm ? 20 : 16;
  static constexpr int kPitch = Config::kTokenPitch, kWarpPitch = Config::kWarpPitch;
  static_assert(kSums <= kPitch && kTokens * kPitch <= kWarpPitch, "every sum has a place");
  static_assert(4 * (kWarps * kWarpPitch + kNumSplits * kTokens * kSums) + 8 <= Config::kSharedBytes,
                "the sums of a block's warps, of a cluster's blocks, and a barrier");

  static_assert(K % 8 == 0, "a lane loads 8 elements at a time");
  static_assert(kNumSplits * kWarps * kSteps * 32 >= K, "every step has an owner");
  static_assert(kNumSplits == 1 || MOEGATE_HAS_CLUSTERS, "the blocks that share a sum are a cluster");
  static_assert(!kNorm || Config::kHiddenTerms == 3, "the scaled input is a float32");

  const GemmArguments& arguments;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int rank = blockIdx.x % kNumSplits;
  const int first_row = blockIdx.x / kNumSplits * 16;
  const int first_token = blockIdx.y * kTokens;
  // The lane's part of a step of a tile: 8 of 32 elements, of two rows of the weight (row and row + 8) and of one token,
  // which has the number `row`, too: both operands of an mma have the same lanes.
  const int row = lane / 4, element = lane % 4 * 8;

  Vec8<Weight> low[kAhead], high[kAhead];
  float sums[kTiles][2][4] = {};
  float squares[kTiles] = {};

  __forceinline__ int column_of(int step) const { return ((rank * kWarps + warp) * kSteps + step) * 32 + element; }

  // False in the last round for the steps that kSteps does not fill.
  __forceinline__ bool is_own(int step) const { return kSteps % kAhead == 0 or step < kSteps; }

  __forceinline__ const Weight* weight_at(int row_in_tile, int column) const {
    return static_cast<const Weight*>(arguments.weight) + (first_row + row_in_tile) * arguments.weight_stride + column;
  }

  template <bool kConstant>
  __forceinline__ void load_weight(int step) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int column = column_of(step + i);
      const bool in_range = is_own(step + i) and column < K;
      low[i] = load_vec8<kConstant>(weight_at(row, column), in_range and first_row + row < R);
      high[i] = load_vec8<kConstant>(weight_at(row + 8, column), in_range and first_row + row + 8 < R);
    }
  }

  // From a step to the end of the warp's slice.
  __forceinline__ void prefetch_weight(int first) const {
#pragma unroll
    for (int step = first; step < kSteps; ++step) {
      const int column = column_of(step);
      if (column >= K) continue;
      if (first_row + row < R) prefetch_to_l2(weight_at(row, column));
      if (first_row + row + 8 < R) prefetch_to_l2(weight_at(row + 8, column));
    }
  }

  __forceinline__ Operand<Config::kHiddenTerms> normed_operand(const Vec8<Hidden>& vec, int column, float& square) const {
    float values[8];
    unpack(vec, values);
    const auto* scale = static_cast<const typename Config::InputScale*>(arguments.input_scale) + column;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      square += values[i] * values[i];
      values[i] *= column < K ? widen(scale[i]) : 0.0f;
    }
    return to_terms<Config::kHiddenTerms>(values);
  }

  __forceinline__ Vec8<Hidden> load_hidden(int step, int tile) const {
    const int column = column_of(step), token = first_token + tile * 8 + row;
    const auto* source = static_cast<const Hidden*>(arguments.hidden) + token * arguments.hidden_stride + column;
    return load_vec8<false>(source, is_own(step) and column < K and token < arguments.num_tokens);
  }

  // kAhead steps of all tokens, tile by tile. A tile's sums are stored when they include the warp's last step, so that a
  // warp with kSteps == kAhead keeps the sums of one tile only.
  __forceinline__ void multiply_steps(int step, float* partial) {
    // As many loads of hidden in flight as registers allow: 8 loads take 32 registers, and a thread of a block of 28 warps
    // has at most 72.
    constexpr int kMost = sizeof(Hidden) == 2 and kWarps <= 16 ? 8 : 4;
    constexpr int kAtOnce = kMost / kAhead < 1 ? 1 : kMost / kAhead < kTiles ? kMost / kAhead : kTiles;
#pragma unroll
    for (int first = 0; first < kTiles; first += kAtOnce) {
      Vec8<Hidden> hidden[kAtOnce][kAhead];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
#pragma unroll
        for (int j = 0; j < kAhead; ++j) {
          if (first + i < kTiles) hidden[i][j] = load_hidden(step + j, first + i);
        }
      }
      // Tile by tile. A weight of several terms goes step by step, so that it is split into terms once for all tiles.
#pragma unroll
      for (int i = 0; i < kAtOnce * kAhead; ++i) {
        const int j = Config::kWeightTerms > 1 ? i / kAtOnce : i % kAhead;
        const int tile = first + (Config::kWeightTerms > 1 ? i % kAtOnce : i / kAhead);
        if (tile >= kTiles) continue;
        multiply_vec8(step + j, tile, low[j], high[j], hidden[tile - first][j]);
        if (kSteps == kAhead and j == kAhead - 1) store_partial_sums(partial, tile);
      }
    }
  }

  __forceinline__ void multiply_vec8(int step, int tile, const Vec8<Weight>& weight_low, const Vec8<Weight>& weight_high,
                                      const Vec8<Hidden>& hidden) {
    const auto w0 = as_operand<Config::kWeightTerms>(weight_low);
    const auto w1 = as_operand<Config::kWeightTerms>(weight_high);
    if constexpr (kNorm) {
      multiply<kIsFp16>(sums[tile], w0, w1, normed_operand(hidden, column_of(step), squares[tile]));
    } else {
      multiply<kIsFp16>(sums[tile], w0, w1, as_operand<Config::kHiddenTerms>(hidden));
    }
  }

  __forceinline__ void multiply_slice(float* partial) {
    if constexpr (kSteps == kAhead) {
      multiply_steps(0, partial);
    } else {
#pragma unroll 1
      for (int step = 0; step < kSteps; step += kAhead) {
        if (step > 0) load_weight<Config::kFrozen>(step);
        multiply_steps(step, partial);
      }
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) store_partial_sums(partial, tile);
    }
  }

  // partial[kWarps][kTokens][kPitch], with the pitch of a warp
  __forceinline__ void store_partial_sums(float* partial, int tile) {
    float* mine = partial + warp * kWarpPitch;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int token = tile * 8 + lane % 4 * 2 + i % 2;
      mine[token * kPitch + lane / 4 + i / 2 * 8] = sums[tile][0][i] + sums[tile][1][i];
    }
    if constexpr (kNorm) {
      float square = squares[tile];
      square += __shfl_xor_sync(~0u, square, 1);
      square += __shfl_xor_sync(~0u, square, 2);
      if (lane % 4 == 0) mine[(tile * 8 + row) * kPitch + 16] = square;
    }
  }

  // Thread i gets the sum of element i: element i % 4 of vector i / 4, where a token's sums are 4 vectors of 4 elements
  // (and one with its sum of squares). The four threads of a vector first read all of it, each from every fourth warp,
  // then pass on to their neighbours what these are to have:
  //
  //            reads and adds up      after the first swap    after the second
  //   thread 0  x0 y0 z0 w0  (warps 0, 4, ..)  x01 z01             x0123
  //   thread 1  x1 y1 z1 w1  (warps 1, 5, ..)  y01 w01             y0123
  //   thread 2  x2 y2 z2 w2  (warps 2, 6, ..)  x23 z23             z0123
  //   thread 3  x3 y3 z3 w3  (warps 3, 7, ..)  y23 w23             w0123
  __forceinline__ float sum_over_warps(const float* partial, int index) const {
    const int chain = index % 4, vector = index / 4;
    const float* source = partial + chain * kWarpPitch + vector / (kSums / 4) * kPitch + vector % (kSums / 4) * 4;
    float4 sum = {};
#pragma unroll
    for (int w = 0; w < kWarps; w += 4) {
      if (kWarps % 4 != 0 and w + chain >= kWarps) continue;
      const float4 next = *reinterpret_cast<const float4*>(source + w * kWarpPitch);
      sum.x += next.x, sum.y += next.y, sum.z += next.z, sum.w += next.w;
    }
    const bool odd = chain % 2, high = chain / 2;
    const float first = (odd ? sum.y : sum.x) + __shfl_xor_sync(~0u, odd ? sum.x : sum.y, 1);
    const float second = (odd ? sum.w : sum.z) + __shfl_xor_sync(~0u, odd ? sum.z : sum.w, 1);
    return (high ? second : first) + __shfl_xor_sync(~0u, high ? first : second, 2);
  }

  // The sums of the tokens that exist.
  __forceinline__ int count_sums() const { return min(kTokens, arguments.num_tokens - first_token) * kSums; }

  // The first block's own sum, then those of the other blocks in the order of their ranks.
  __forceinline__ float sum_over_ranks(float own, const float* by_rank, int index) const {
#pragma unroll
    for (int r = 1; r < kNumSplits; ++r) own += by_rank[r * kTokens * kSums + index];
    return own;
  }

  __forceinline__ void store_logit(int index, float logit, const float* squares_of_tokens) const {
    using Logits = typename Config::Logits;
    const int token = index / kSums, r = index % kSums;
    if (r >= 16 or first_row + r >= R) return;
    if constexpr (kNorm) logit *= norm_factor<Config>(squares_of_tokens[token]);
    if constexpr (Config::kHasBias) {
      logit += widen(static_cast<const typename Config::Bias*>(arguments.bias)[first_row + r]);
    }
    static_cast<Logits*>(arguments.logits)[int64(first_token + token) * R + first_row + r] = narrow<Logits>(logit);
  }

  // by_rank[kNumSplits][kTokens * kSums] is in the shared memory of the cluster's first block, which adds up and stores.
  __forceinline__ void reduce_and_store(float* partial, float* by_rank, uint64* arrived) const {
    constexpr int kThreads = kWarps * 32, kRounds = ceil_div(kTokens * kSums, kThreads);
    const int count = count_sums();  // a multiple of 4, so that the four neighbours of a sum go together
    float own[kRounds];
#pragma unroll
    for (int i = 0; i < kRounds; ++i) {
      const int index = i * kThreads + threadIdx.x;
      if (i * kThreads + int(threadIdx.x) / 32 * 32 >= count) break;  // whole warps
      own[i] = sum_over_warps(partial, index);
      if (rank != 0 and index < count) send_to_first_block(by_rank + rank * kTokens * kSums + index, own[i], arrived);
    }
    if (rank != 0 or (not kNorm and int(threadIdx.x) >= count)) return;
    if (kNumSplits > 1) wait_for_bytes(arrived);
#pragma unroll
    for (int i = 0; i < kRounds; ++i) {
      const int index = i * kThreads + threadIdx.x;
      if (index < count) own[i] = sum_over_ranks(own[i], by_rank, index);
    }
    float* squares_of_tokens = by_rank;  // the first block's own place, which no block sends to
    if constexpr (kNorm) {
#pragma unroll
      for (int i = 0; i < kRounds; ++i) {
        const int index = i * kThreads + threadIdx.x;
        if (index < count and index % kSums == 16) squares_of_tokens[index / kSums] = own[i];
      }
      __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < kRounds; ++i) {
      const int index = i * kThreads + threadIdx.x;
      if (index < count) store_logit(index, own[i], squares_of_tokens);
    }
  }

  __forceinline__ void run(float* shared) {
    float* partial = shared;
    float* by_rank = shared + kWarps * kWarpPitch;
    uint64* arrived = reinterpret_cast<uint64*>(by_rank + kNumSplits * kTokens * kSums);
    trigger_dependents();
    if constexpr (Config::kFrozen) load_weight<true>(0);
    prefetch_weight(Config::kFrozen ? kAhead : 0);
    if constexpr (kNumSplits > 1) {
      if (threadIdx.x == 0 and rank == 0) expect_bytes(arrived, (kNumSplits - 1) * count_sums() * 4);
      arrive_at_cluster();
    }
    wait_for_predecessor();
    if constexpr (not Config::kFrozen) load_weight<false>(0);
    multiply_slice(partial);
    if constexpr (kNumSplits > 1) wait_for_cluster();  // the first block's mbarrier is initialised: others may send
    __syncthreads();
    reduce_and_store(partial, by_rank, arrived);
  }
};

template <class Config>
__forceinline__ void router_gemm(const GemmArguments& arguments) {
  extern __shared__ float shared[];
  RouterGemm<Config>{arguments}.run(shared);
}
