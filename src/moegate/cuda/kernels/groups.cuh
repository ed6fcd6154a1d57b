// The choice in groups: only experts of the best groups, or the best experts of each group.
//
// Where a group is a number of whole lanes, its keys stay in registers. Any other group's keys go through the warp's part
// of shared memory, where one lane reads all keys of a group.
#pragma once
#include "top_k.cuh"

// The two largest keys of a group, in `first` and `second`.
__forceinline__ void take(uint32 key, uint32& first, uint32& second) {
  second = max(second, min(first, key));
  first = max(first, key);
}

template <class Config>
__forceinline__ uint32 group_score(uint32 first, uint32 second) {
  if constexpr (Config::kGroupScoreKeys == 2) return ordered(from_ordered(first) + from_ordered(second));
  return first;
}

// Removes the kBest best values of each group of lanes from the lanes' lists, one a round, of equal values the lowest id.
// `found(round, key, is_mine)` tells each lane the key, and whether the value is its own, values[0].
template <int kLanes, int kBest, class Value, int kPerLane, class Found>
__forceinline__ void best_of_lanes(Value (&values)[kPerLane], Found found) {
  const int lane = threadIdx.x % 32;
  const uint32 below = ((1u << lane) - 1) & ~0u << lane / kLanes * kLanes;  // of the same group
  if constexpr (kBest == 1) {
    best_to_front(values);
  } else {
    sort_descending(values);
  }
#pragma unroll(kBest <= 4 ? kBest : 1)
  for (int round = 0; round < kBest; ++round) {
    const uint32 key = key_of(values[0]);
    uint32 best = key;
#pragma unroll
    for (int offset = 1; offset < kLanes; offset *= 2) best = max(best, __shfl_xor_sync(~0u, best, offset));
    const uint32 best_lanes = __ballot_sync(~0u, key == best);
    const bool is_mine = key == best and (best_lanes & below) == 0;
    found(round, best, is_mine);
    if (not is_mine) continue;
#pragma unroll
    for (int i = 0; i + 1 < kPerLane; ++i) values[i] = values[i + 1];
    values[kPerLane - 1] = kExcludedKey;
  }
}

// The score of the lane's group.
template <class Config, int kPerLane>
__forceinline__ uint32 score_of_lanes(const uint32 (&keys)[kPerLane]) {
  constexpr int kLanes = 32 / Config::kGroups;
  if constexpr (Config::kGroupScoreKeys > 2) {
    uint32 sorted[kPerLane];
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) sorted[i] = keys[i];
    float sum = 0.0f;
    best_of_lanes<kLanes, Config::kGroupScoreKeys>(sorted, [&](int, uint32 key, bool) { sum += from_ordered(key); });
    return ordered(sum);
  }
  uint32 first = kExcludedKey, second = kExcludedKey;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) take(keys[i], first, second);
#pragma unroll
  for (int offset = 1; offset < kLanes; offset *= 2) {
    const uint32 other_first = __shfl_xor_sync(~0u, first, offset);
    const uint32 other_second = __shfl_xor_sync(~0u, second, offset);
    take(other_first, first, second);
    second = max(second, other_second);
  }
  return group_score<Config>(first, second);
}

// Groups that are whole lanes: their keys never leave the registers.
template <class Config, int kPerLane>
__forceinline__ void exclude_groups_of_lanes(uint32 (&keys)[kPerLane]) {
  constexpr int kLanes = 32 / Config::kGroups;
  const int group = threadIdx.x % 32 / kLanes;
  const uint32 mine = score_of_lanes<Config>(keys);
  int rank = 0;
#pragma unroll
  for (int other = 0; other < Config::kGroups; ++other) {
    const uint32 score = __shfl_sync(~0u, mine, other * kLanes);
    rank += score > mine or (score == mine and other < group);
  }
  if (rank >= Config::kTopkGroup) {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) keys[i] = kExcludedKey;
  }
}

// The best entry below `limit` of a group, whose first expert is `first`.
template <int kGroupSize>
__forceinline__ Entry best_below(Entry limit, const uint32* keys, int first) {
  Entry best = 0;
  for (int id = first; id < first + kGroupSize; ++id) {
    const Entry entry = entry_of(keys[id], id);
    if (entry < limit and entry > best) best = entry;
  }
  return best;
}

// The score of a group, from the keys of all experts.
template <class Config>
__forceinline__ uint32 score_of_group(const uint32* keys, int group) {
  constexpr int kGroupSize = Config::kSelectable / Config::kGroups;
  if constexpr (Config::kGroupScoreKeys > 2) {
    Entry last = ~Entry(0);
    float sum = 0.0f;
    for (int i = 0; i < Config::kGroupScoreKeys; ++i) {
      last = best_below<kGroupSize>(last, keys, group * kGroupSize);
      sum += from_ordered(key_of(last));
    }
    return ordered(sum);
  }
  uint32 first = kExcludedKey, second = kExcludedKey;
  for (int i = 0; i < kGroupSize; ++i) take(keys[group * kGroupSize + i], first, second);
  return group_score<Config>(first, second);
}

// The lane's keys, to shared memory.
template <class Config, int kPerLane>
__forceinline__ void share_keys(const uint32 (&keys)[kPerLane], uint32* shared) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    if (lane * kPerLane + i < Config::kSelectable) shared[lane * kPerLane + i] = keys[i];
  }
  __syncwarp();
}

// Any groups: through the warp's part of shared memory, keys[kSelectable] and scores[kGroups].
template <class Config, int kPerLane>
__forceinline__ void exclude_groups(uint32 (&keys)[kPerLane], uint32* shared) {
  constexpr int kGroupSize = Config::kSelectable / Config::kGroups;
  const int lane = threadIdx.x % 32;
  uint32* scores = shared + Config::kSelectable;
  share_keys<Config>(keys, shared);
  for (int group = lane; group < Config::kGroups; group += 32) scores[group] = score_of_group<Config>(shared, group);
  __syncwarp();
#pragma unroll 1
  for (int i = 0; i < kPerLane; ++i) {
    const int id = lane * kPerLane + i;
    if (id >= Config::kSelectable) continue;
    const int group = id / kGroupSize;
    int rank = 0;
    for (int other = 0; other < Config::kGroups; ++other) {
      rank += scores[other] > scores[group] or (scores[other] == scores[group] and other < group);
    }
    if (rank >= Config::kTopkGroup) shared[id] = kExcludedKey;
  }
  __syncwarp();
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    if (lane * kPerLane + i < Config::kSelectable) keys[i] = shared[lane * kPerLane + i];
  }
}

// The kPerGroup best of each group that is whole lanes, group by group, to `places`.
template <class Config, int kPerLane>
__forceinline__ void place_best_of_lanes(const uint32 (&keys)[kPerLane], Entry* places) {
  constexpr int kLanes = 32 / Config::kGroups;
  const int lane = threadIdx.x % 32;
  Entry* const of_group = places + lane / kLanes * Config::kPerGroup;
  Entry entries[kPerLane];
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) entries[i] = entry_of(keys[i], lane * kPerLane + i);
  best_of_lanes<kLanes, Config::kPerGroup>(entries, [&](int round, uint32, bool is_mine) {
    if (is_mine) of_group[round] = entries[0];
  });
}

// The same for any groups, with keys[kSelectable] in shared memory. There are no more groups than chosen experts.
template <class Config, int kPerLane>
__forceinline__ void place_best(const uint32 (&keys)[kPerLane], Entry* places, uint32* shared) {
  constexpr int kGroupSize = Config::kSelectable / Config::kGroups;
  const int lane = threadIdx.x % 32;
  share_keys<Config>(keys, shared);
  if (lane >= Config::kGroups) return;
  Entry last = ~Entry(0);
  for (int i = 0; i < Config::kPerGroup; ++i) {
    last = best_below<kGroupSize>(last, shared, lane * kGroupSize);
    places[lane * Config::kPerGroup + i] = last;
  }
}

// Lane r < kTopK gets the id of the r-th best of kTopK entries, through `chosen`, kTopK words of shared memory.
template <int kTopK>
__forceinline__ uint32 in_order(const Entry* places, uint32* chosen) {
  const int lane = threadIdx.x % 32;
  __syncwarp();
  const Entry mine = places[lane < kTopK ? lane : 0];
  int rank = 0;
#pragma unroll
  for (int other = 0; other < kTopK; ++other) rank += places[other] > mine;
  if (lane < kTopK) chosen[rank] = id_of(mine);
  __syncwarp();
  return chosen[lane < kTopK ? lane : 0];
}
