// Hidden states to logits for few tokens: logits[M, R] = hidden[M, K] * weight[R, K]^T + bias.
//
// At these sizes the product is the latency of reading the weight once. So:
// - A block owns 16 rows of the weight, a 1/kSplit share of K, and 8 * kTokenTiles tokens. The kSplit blocks
//   of a cluster own the same rows and tokens. A warp owns kSteps steps of 32 elements of that share.
// - The weight's rows are the 16-row operand of the tensor cores and the tokens the 8-column one, so that up
//   to 8 tokens cost what one does.
// - Every lane loads its operands straight into registers, 16 bytes at a time: no lane needs what
//   another has loaded, so that shared memory would only add a stop. All loads of a warp are in flight at once.
// - Sums are added in a fixed order that kSplit, kWarps and kSteps decide, and these depend on K, R, the
//   dtypes and the chip alone: the same bits in every run, and for a token at every M.
//
// A frozen weight is loaded before the wait for the predecessor, hidden after it. Another weight may just be
// being written by the predecessor: it is prefetched to L2 before the wait and loaded after it.
#pragma once
#include "pieces.cuh"

struct GemmArguments {
  const void* hidden;
  const void* weight;
  const void* bias;
  const void* input_scale;
  void* logits;        // [M, R], contiguous
  int64 hidden_stride;  // elements from row to row
  int64 weight_stride;
  int32 num_tokens;
};

template <class Config>
struct RouterGemm {
  using Hidden = typename Config::Hidden;
  using Weight = typename Config::Weight;
  static constexpr int K = Config::kHidden, R = Config::kRows;
  static constexpr int kSplit = Config::kSplit, kWarps = Config::kWarps, kSteps = Config::kSteps;
  static constexpr int kTokens = 8 * Config::kTokenTiles;
  static constexpr bool kNorm = Config::kNorm;
  static constexpr bool kIsFp16 = Config::kIsFp16;
  static constexpr int kAhead = Config::kAhead;  // steps of a warp in flight at once
  // What a token has of sums in shared memory: 16 rows, the sum of squares, and a pitch without conflicts.
  static constexpr int kPitch = 20;
  static constexpr int kSums = kNorm ? 17 : 16;

  static_assert(K % 8 == 0, "a lane loads 8 elements at a time");
  static_assert(kSplit * kWarps * kSteps * 32 >= K, "every step has an owner");
  static_assert(kSplit == 1 || MOEGATE_HAS_CLUSTERS, "the blocks that share a sum are a cluster");
  static_assert(!kNorm || Config::kHiddenParts == 3, "the scaled input is a float32");

  const GemmArguments& arguments;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int rank = blockIdx.x % kSplit;
  const int first_row = blockIdx.x / kSplit * 16;
  const int first_token = blockIdx.y * kTokens;
  // The lane's part in a tile: row (and row + 8) of the weight, the same number of token, 8 elements of 32.
  const int row = lane / 4, element = lane % 4 * 8;

  Raw<Weight> low[kAhead], high[kAhead];
  float sums[Config::kTokenTiles][2][4] = {};
  float squares[Config::kTokenTiles] = {};

  __forceinline__ int column_of(int step) const { return ((rank * kWarps + warp) * kSteps + step) * 32 + element; }

  // False for what an odd number of steps leaves of the last round.
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
      low[i] = load_piece<kConstant>(weight_at(row, column), in_range and first_row + row < R);
      high[i] = load_piece<kConstant>(weight_at(row + 8, column), in_range and first_row + row + 8 < R);
    }
  }

  __forceinline__ void prefetch_weight() const {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int column = column_of(step);
      if (column >= K) continue;
      if (first_row + row < R) prefetch_to_l2(weight_at(row, column));
      if (first_row + row + 8 < R) prefetch_to_l2(weight_at(row + 8, column));
    }
  }

  __forceinline__ Operand<Config::kHiddenParts> normed_operand(const Raw<Hidden>& raw, int column, float& square) const {
    float values[8];
    unpack(raw, values);
    const auto* scale = static_cast<const typename Config::InputScale*>(arguments.input_scale) + column;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      square += values[i] * values[i];
      values[i] *= column < K ? widen(scale[i]) : 0.0f;
    }
    return split<Config::kHiddenParts>(values);
  }

  __forceinline__ Raw<Hidden> load_hidden(int step, int tile) const {
    const int column = column_of(step), token = first_token + tile * 8 + row;
    const auto* source = static_cast<const Hidden*>(arguments.hidden) + token * arguments.hidden_stride + column;
    return load_piece<false>(source, is_own(step) and column < K and token < arguments.num_tokens);
  }

  // kAhead steps for all tokens, with as many loads of hidden in flight at once as registers are left for.
  __forceinline__ void multiply_steps(int step) {
    constexpr int kPieces = kAhead * Config::kTokenTiles;
    constexpr int kMost = sizeof(Hidden) == 2 and Config::kTokenTiles < 8 ? 8 : 4;
    constexpr int kBatch = kPieces <= kMost ? kPieces : kPieces % 3 == 0 ? kMost / 4 * 3 : kMost;
    static_assert(kPieces % kBatch == 0);
#pragma unroll
    for (int first = 0; first < kPieces; first += kBatch) {
      Raw<Hidden> hidden[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int piece = first + i;
        hidden[i] = load_hidden(step + piece / Config::kTokenTiles, piece % Config::kTokenTiles);
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int ahead = (first + i) / Config::kTokenTiles, tile = (first + i) % Config::kTokenTiles;
        multiply_piece(step + ahead, tile, low[ahead], high[ahead], hidden[i]);
      }
    }
  }

  __forceinline__ void multiply_piece(int step, int tile, const Raw<Weight>& weight_low, const Raw<Weight>& weight_high,
                                      const Raw<Hidden>& hidden) {
    const auto w0 = as_operand<Config::kWeightParts>(weight_low);
    const auto w1 = as_operand<Config::kWeightParts>(weight_high);
    if constexpr (kNorm) {
      multiply<kIsFp16>(sums[tile], w0, w1, normed_operand(hidden, column_of(step), squares[tile]));
    } else {
      multiply<kIsFp16>(sums[tile], w0, w1, as_operand<Config::kHiddenParts>(hidden));
    }
  }

  __forceinline__ void multiply_share() {
    if constexpr (kSteps == kAhead) {
      multiply_steps(0);
    } else {
#pragma unroll 1
      for (int step = 0; step < kSteps; step += kAhead) {
        if (step > 0) load_weight<Config::kFrozen>(step);
        multiply_steps(step);
      }
    }
  }

  // partial[kWarps][kTokens][kPitch]
  __forceinline__ void store_partial_sums(float* partial) {
    float* mine = partial + warp * kTokens * kPitch;
#pragma unroll
    for (int tile = 0; tile < Config::kTokenTiles; ++tile) {
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
  }

  // Four chains, so that additions need not wait for each other.
  __forceinline__ float sum_over_warps(const float* partial, int index) const {
    float chains[4] = {};
#pragma unroll
    for (int w = 0; w < kWarps; ++w) chains[w % 4] += partial[w * kTokens * kPitch + index];
    return (chains[0] + chains[1]) + (chains[2] + chains[3]);
  }

  // by_rank[kSplit][kTokens][kPitch], in the shared memory of the cluster's first block, whose barrier counts the
  // bytes that come: waiting for these is shorter than for the other blocks.
  __forceinline__ void send_to_first_block(float* by_rank, uint64* arrived, int index, float value) const {
#if MOEGATE_HAS_CLUSTERS
    float* target = by_rank + rank * kTokens * kPitch + index;
    uint32 remote, barrier;
    asm("mapa.shared::cluster.u32 %0, %1, 0;" : "=r"(remote) : "r"(uint32(__cvta_generic_to_shared(target))));
    asm("mapa.shared::cluster.u32 %0, %1, 0;" : "=r"(barrier) : "r"(uint32(__cvta_generic_to_shared(arrived))));
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(remote),
                 "r"(__float_as_uint(value)), "r"(barrier)
                 : "memory");
#endif
  }

  __forceinline__ void expect_other_blocks(uint64* arrived) const {
#if MOEGATE_HAS_CLUSTERS
    constexpr int kBytes = (kSplit - 1) * kTokens * kSums * 4;
    const uint32 barrier = uint32(__cvta_generic_to_shared(arrived));
    asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"(barrier));
    asm volatile("fence.mbarrier_init.release.cluster;");
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier), "r"(kBytes) : "memory");
#endif
  }

  __forceinline__ void wait_for_other_blocks(uint64* arrived) const {
#if MOEGATE_HAS_CLUSTERS
    const uint32 barrier = uint32(__cvta_generic_to_shared(arrived));
    uint32 done = 0;
    while (not done) {
      asm volatile(
          "{ .reg .pred p; mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], 0; selp.u32 %0, 1, 0, p; }"
          : "=r"(done)
          : "r"(barrier)
          : "memory");
    }
#endif
  }

  // The first block's own sum and, in the order of their ranks, those of the others.
  __forceinline__ float sum_over_ranks(const float* partial, const float* by_rank, int index) const {
    float sum = sum_over_warps(partial, index);
#pragma unroll
    for (int r = 1; r < kSplit; ++r) sum += by_rank[r * kTokens * kPitch + index];
    return sum;
  }

  __forceinline__ void store_logits(const float* partial, const float* by_rank) const {
    using Logits = typename Config::Logits;
    for (int i = threadIdx.x; i < kTokens * 16; i += kWarps * 32) {
      const int token = i / 16, r = i % 16;
      float logit = sum_over_ranks(partial, by_rank, token * kPitch + r);
      if (first_token + token >= arguments.num_tokens or first_row + r >= R) continue;
      if constexpr (kNorm) {
        const float mean_square = sum_over_ranks(partial, by_rank, token * kPitch + 16) / float(K);
        logit *= Config::kInputFactor / sqrtf(mean_square + Config::kNormEps);
      }
      if constexpr (Config::kHasBias) {
        logit += widen(static_cast<const typename Config::Bias*>(arguments.bias)[first_row + r]);
      }
      static_cast<Logits*>(arguments.logits)[int64(first_token + token) * R + first_row + r] = narrow<Logits>(logit);
    }
  }

  __forceinline__ void run(float* shared) {
    float* partial = shared;
    float* by_rank = shared + kWarps * kTokens * kPitch;
    uint64* arrived = reinterpret_cast<uint64*>(by_rank + kSplit * kTokens * kPitch);
    trigger_dependents();
    if constexpr (Config::kFrozen) {
      load_weight<true>(0);
    } else {
      prefetch_weight();
    }
    if (kSplit > 1 and threadIdx.x == 0 and rank == 0) expect_other_blocks(arrived);
    cluster_arrive();
    cluster_wait();  // the first block and its barrier must be there before anyone sends to it
    wait_for_predecessor();
    if constexpr (not Config::kFrozen) load_weight<false>(0);
    multiply_share();
    store_partial_sums(partial);
    __syncthreads();
    if (rank != 0) {
      for (int i = threadIdx.x; i < kTokens * kSums; i += kWarps * 32) {
        const int index = i / kSums * kPitch + i % kSums;
        send_to_first_block(by_rank, arrived, index, sum_over_warps(partial, index));
      }
      return;
    }
    if (kSplit > 1 and threadIdx.x < kTokens * 16) wait_for_other_blocks(arrived);
    store_logits(partial, by_rank);
  }

  static __forceinline__ void cluster_arrive() {
#if MOEGATE_HAS_CLUSTERS
    if constexpr (kSplit > 1) asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
  }

  static __forceinline__ void cluster_wait() {
#if MOEGATE_HAS_CLUSTERS
    if constexpr (kSplit > 1) asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
  }
};

template <class Config>
__forceinline__ void router_gemm(const GemmArguments& arguments) {
  extern __shared__ float shared[];
  RouterGemm<Config>{arguments}.run(shared);
}
