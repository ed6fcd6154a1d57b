// Logits to experts and weights: docs/contract.md, parts 2 to 4, one warp a token.
//
// Lane l owns the experts from l * kPerLane on (see top_k.cuh). After the choice, lane r < kTopK has the r-th chosen
// expert. The warp's part of shared memory hands that lane the expert's id and its score or logit, so that neither is
// loaded or computed again.
// Everything that the spec decides is a compile-time constant; the number of tokens is not. selection/select_text.py
// writes `SelectArguments` and `Config`, which stand in front of this file.
#pragma once
#include "groups.cuh"
#include "logits.cuh"

template <class Config>
struct Select {
  static constexpr int E = Config::kSelectable, R = Config::kRows, k = Config::kTopK;
  static constexpr int kPerLane = ceil_div(E, 32);
  static constexpr int kChosenLanes = k <= 1 ? 1 : k <= 2 ? 2 : k <= 4 ? 4 : k <= 8 ? 8 : k <= 16 ? 16 : 32;
  static constexpr bool kIsSoftmax = Config::kScore == Score::kSoftmax;
  static constexpr bool kWeightsAreScores = Config::kWeights == Config::kFromScore;
  static constexpr bool kKeysAreScores = Config::kKeys == Config::kScoreKeys;
  static constexpr bool kBasesAreScores = kWeightsAreScores and kKeysAreScores;
  static constexpr bool kNeedsSoftmaxSum = kIsSoftmax and (kWeightsAreScores or kKeysAreScores);
  static constexpr bool kGroupsAreLanes = Config::kGroups <= 32 and 32 % Config::kGroups == 0 and E % 32 == 0;

  // A warp's shared memory, in words: the basis of a weight by expert, the chosen ids, what groups.cuh needs.
  static constexpr int kChosen = ceil_div(E, 4) * 4, kForGroups = kChosen + k;
  static constexpr int kPlaces = ceil_div(kForGroups, 2) * 2, kForKeys = kPlaces + 2 * k;  // entries are two words
  static constexpr int kEnd = Config::kPerGroup > 0 ? (kGroupsAreLanes ? kForKeys : kForKeys + E)
                              : Config::kGroups > 1 and not kGroupsAreLanes ? kForGroups + E + Config::kGroups
                                                                            : kForGroups;
  static constexpr int kWords = Config::kSharedWords;  // a multiple of 4, by the host
  static_assert(kEnd <= kWords, "a warp has all the shared memory that it uses");

  const SelectArguments& arguments;
  const int token;
  uint32* const shared;
  const TokenLogits<Config> logits;
  const int lane = threadIdx.x % 32;

  // A softmax's largest logit and sum, over the selectable experts.
  float largest = 0.0f, inverse_sum = 0.0f;

  __forceinline__ float score(float value) const {
    if constexpr (kIsSoftmax) {
      return exp_of_negative(value - largest) * inverse_sum;
    } else {
      return score_of<Config::kScore>(value);
    }
  }

  __forceinline__ void sum_softmax(const float (&values)[kPerLane]) {
    float most = -kFloat32Max;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      if (lane * kPerLane + i < E) most = fmaxf(most, transformed<Config>(finite(values[i])));
    }
    largest = warp_max(most);
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      if (lane * kPerLane + i < E) sum += exp_of_negative(transformed<Config>(finite(values[i])) - largest);
    }
    inverse_sum = 1.0f / warp_sum(sum);
  }

  __forceinline__ void load_bias(float (&bias)[kPerLane]) const {
    if constexpr (Config::kHasCorrectionBias) {
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        const int id = lane * kPerLane + i;
        if constexpr (Config::kAligned and kPerLane % 4 == 0 and E % 4 == 0) {
          if (i % 4 != 0) continue;
          float4 four = {};
          if (id < E) four = *reinterpret_cast<const float4*>(arguments.correction_bias + id);
          bias[i] = four.x, bias[i + 1] = four.y, bias[i + 2] = four.z, bias[i + 3] = four.w;
        } else {
          bias[i] = id < E ? arguments.correction_bias[id] : 0.0f;
        }
      }
    }
  }

  // The choice key, and in `basis` what the weight is computed from: a score that the key needs too, or a logit.
  __forceinline__ uint32 choice_key(float logit, float bias, float& basis) const {
    float key = finite(logit);
    basis = transformed<Config>(key);
    if constexpr (Config::kKeys != Config::kLogitKeys) {
      key = basis;
      if constexpr (kKeysAreScores) key = score(key);
      if constexpr (kBasesAreScores) basis = key;
      if constexpr (Config::kHasCorrectionBias) key += bias;
      key = finite(key);
    }
    return ordered(key);
  }

  // Lane r gets the id of the r-th expert.
  __forceinline__ int choose(const float (&values)[kPerLane], const float (&bias)[kPerLane]) const {
    uint32 keys[kPerLane];
    float bases[kPerLane];
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      keys[i] = lane * kPerLane + i < E ? choice_key(values[i], bias[i], bases[i]) : kExcludedKey;
    }
    store_bases(bases);
    if constexpr (Config::kPerGroup > 0) return choose_per_group(keys);
    if constexpr (Config::kGroups > 1 and kGroupsAreLanes) exclude_groups_of_lanes<Config>(keys);
    if constexpr (Config::kGroups > 1 and not kGroupsAreLanes) exclude_groups<Config>(keys, shared + kForGroups);
    Entry entries[kPerLane];
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) entries[i] = entry_of(keys[i], lane * kPerLane + i);
    return warp_top_k<k>(entries, shared + kChosen);
  }

  __forceinline__ int choose_per_group(const uint32 (&keys)[kPerLane]) const {
    auto* const places = reinterpret_cast<Entry*>(shared + kPlaces);
    if constexpr (kGroupsAreLanes) {
      place_best_of_lanes<Config>(keys, places);
    } else {
      place_best<Config>(keys, places, shared + kForKeys);
    }
    return in_order<k>(places, shared + kChosen);
  }

  __forceinline__ void store_bases(const float (&bases)[kPerLane]) const {
    auto* mine = reinterpret_cast<float*>(shared) + lane * kPerLane;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      if (lane * kPerLane + i >= E) continue;
      if constexpr (kPerLane % 4 == 0 and E % 4 == 0) {
        if (i % 4 == 0) *reinterpret_cast<float4*>(mine + i) = {bases[i], bases[i + 1], bases[i + 2], bases[i + 3]};
      } else {
        mine[i] = bases[i];
      }
    }
  }

  __forceinline__ int look_up(bool& is_outside) const {
    const int64 wanted = static_cast<const typename Config::InputIds*>(arguments.input_ids)[token];
    const int64 row = min(max(wanted, int64(0)), arguments.table_rows - 1);
    is_outside = row != wanted;
    const auto* table = static_cast<const typename Config::Table*>(arguments.tid2eid);
    return lane < k ? int(table[row * arguments.table_stride + lane]) : 0;
  }

  __forceinline__ bool is_padding() const {
    if constexpr (Config::kPadding == Config::kMask) return static_cast<const unsigned char*>(arguments.padding)[token] != 0;
    if constexpr (Config::kPadding == Config::kCount) return token >= *static_cast<const int*>(arguments.padding);
    return false;
  }

  __forceinline__ float basis_of(int id) const {
    if constexpr (Config::kIsHash) return transformed<Config>(finite(logits.at(id)));
    return reinterpret_cast<const float*>(shared)[id];
  }

  // The weight before the factors and before it is renormalised; 0 in lanes without an expert.
  __forceinline__ float plain_weight(int id) const {
    const bool has_expert = lane < k;
    const float basis = basis_of(has_expert ? id : 0);
    if constexpr (Config::kWeights == Config::kSoftmaxOfSelected) {
      const float most = warp_max(has_expert ? basis : -kFloat32Max);
      const float power = has_expert ? exp_of_negative(basis - most) : 0.0f;
      return divide(power, warp_sum<kChosenLanes>(power));
    }
    if constexpr (kBasesAreScores and not Config::kIsHash) return has_expert ? basis : 0.0f;
    const float weight = Config::kWeights == Config::kSigmoidOfSelected ? sigmoid(basis) : score(basis);
    return has_expert ? weight : 0.0f;
  }

  __forceinline__ float shared_score(int gate) const { return score(transformed<Config>(finite(logits.at(E + gate)))); }

  // `is_padding`: the row has no expert and no weight, whatever its logits are.
  __forceinline__ void store_weights(int id, bool is_nan, bool is_padding) const {
    using Ids = typename Config::Ids;
    using Weights = typename Config::Weights;
    float weight = plain_weight(id);
    float factor = Config::kFactor;
    if constexpr (Config::kHasGlobalScale) {
      factor *= widen(*static_cast<const typename Config::GlobalScale*>(arguments.global_scale));
    }
    float total = 1.0f;
    if constexpr (Config::kRenormalize) {
      float sum = weight;
      if constexpr (R > E) {
        for (int gate = lane; gate < R - E; gate += 32) sum += shared_score(gate);
      }
      total = fmaxf(warp_sum<R == E ? kChosenLanes : 32>(sum) + Config::kEps, Config::kLeastSum);
      weight = divide(weight, total);
    }
    weight *= factor;
    if constexpr (Config::kHasExpertScale) {
      weight *= widen(static_cast<const typename Config::ExpertScale*>(arguments.per_expert_scale)[lane < k ? id : 0]);
    }
    const auto stored = [=](float value) {
      return narrow<Weights>(is_padding ? 0.0f : is_nan ? __uint_as_float(0x7fffffffu) : value);
    };
    if (lane < k) {
      static_cast<Ids*>(arguments.topk_ids)[int64(token) * k + lane] = is_padding ? -1 : id;
      static_cast<Weights*>(arguments.topk_weights)[int64(token) * k + lane] = stored(weight);
    }
    if constexpr (E > Config::kExperts) {
      const float identity = warp_sum<kChosenLanes>(lane < k and id >= Config::kExperts ? weight : 0.0f);
      if (lane == 0) static_cast<Weights*>(arguments.identity_weight)[token] = stored(identity);
    }
    if constexpr (R > E) {
      for (int gate = lane; gate < R - E; gate += 32) {
        const float of_gate = divide(shared_score(gate), total) * factor;
        static_cast<Weights*>(arguments.shared_weights)[int64(token) * (R - E) + gate] = stored(of_gate);
      }
    }
  }

  __forceinline__ void run() {
    float values[kPerLane], bias[kPerLane];
    if (not arguments.holds_dependents) trigger_dependents();
    // A frozen bias is loaded before the wait. Any other bias may be the predecessor's output.
    if constexpr (Config::kFrozen) load_bias(bias);
    wait_for_predecessor();
    trigger_dependents();
    if (token >= arguments.num_tokens) return;
    if constexpr (not Config::kFrozen) load_bias(bias);
    const bool has_no_token = is_padding();  // loaded beside the logits
    bool is_nan = logits.load(values);
    if constexpr (kNeedsSoftmaxSum) sum_softmax(values);
    int id;
    if constexpr (Config::kIsHash) {
      bool is_outside;
      id = look_up(is_outside);
      is_nan |= is_outside;
    } else {
      id = choose(values, bias);
    }
    store_weights(id, is_nan, has_no_token);
  }
};

template <class Config>
__forceinline__ TokenLogits<Config> logits_of(const SelectArguments& arguments, int token) {
  using Source = typename TokenLogits<Config>::Source;
  return {static_cast<const Source*>(arguments.logits) + token * arguments.logits_stride,
          arguments.num_tokens * arguments.logits_stride,
          arguments.num_splits,
          arguments.norm_factors + token,
          static_cast<const typename Config::Bias*>(arguments.bias),
          static_cast<typename Config::Logits*>(arguments.made_logits) + int64(token) * Config::kRows};
}

template <class Config>
__forceinline__ void select(const SelectArguments& arguments) {
  extern __shared__ uint32 shared[];
  const int warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int token = int(blockIdx.x) * warps + warp;
  const auto logits = logits_of<Config>(arguments, token);
  Select<Config>{arguments, token, shared + warp * Select<Config>::kWords, logits}.run();
}
