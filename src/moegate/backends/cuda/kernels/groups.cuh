// Which groups of experts stay. Returns, for each of the lane's experts, whether its group does.
#pragma once
#include "top_k.cuh"

// The two largest keys of a group, in `first` and `second`.
__forceinline__ void take(uint32 key, uint32& first, uint32& second) {
  second = max(second, min(first, key));
  first = max(first, key);
}

template <class Config>
__forceinline__ uint32 group_score(uint32 first, uint32 second) {
  if constexpr (Config::kGroupsByTop2Sum) return ordered(from_ordered(first) + from_ordered(second));
  return first;
}

// Groups that are whole lanes: their keys never leave the registers.
template <class Config, int kPerLane>
__forceinline__ void exclude_groups_of_lanes(uint32 (&keys)[kPerLane]) {
  constexpr int kLanes = 32 / Config::kGroups;
  const int group = threadIdx.x % 32 / kLanes;
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
  const uint32 mine = group_score<Config>(first, second);
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

// Any groups: through the warp's share of shared memory, keys[kSelectable] and scores[kGroups].
template <class Config, int kPerLane>
__forceinline__ void exclude_groups(uint32 (&keys)[kPerLane], uint32* shared) {
  constexpr int kGroupSize = Config::kSelectable / Config::kGroups;
  const int lane = threadIdx.x % 32;
  uint32* scores = shared + Config::kSelectable;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    if (lane * kPerLane + i < Config::kSelectable) shared[lane * kPerLane + i] = keys[i];
  }
  __syncwarp();
  for (int group = lane; group < Config::kGroups; group += 32) {
    uint32 first = kExcludedKey, second = kExcludedKey;
    for (int i = 0; i < kGroupSize; ++i) take(shared[group * kGroupSize + i], first, second);
    scores[group] = group_score<Config>(first, second);
  }
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
