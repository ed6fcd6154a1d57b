// The k largest entries of the lanes of a warp.
//
// An entry is a key and an id in one integer, so that its order is the contract's: the larger key first, of
// equal keys the lower id. Lane l owns the consecutive ids l * kPerLane and on, so that among lanes with
// equal keys the lowest lane has the lowest id.
#pragma once
#include "scores.cuh"

using Entry = uint64;

constexpr uint32 kExcludedKey = 0;  // below the key of every float

__forceinline__ Entry entry_of(uint32 key, uint32 id) { return Entry(key) << 32 | ~id; }
__forceinline__ uint32 key_of(Entry entry) { return uint32(entry >> 32); }
__forceinline__ uint32 key_of(uint32 key) { return key; }  // where no id is wanted
__forceinline__ uint32 id_of(Entry entry) { return ~uint32(entry); }

// Batcher's merge exchange (Knuth, The Art of Computer Programming 3, 5.2.2, algorithm M). By recursion, since
// an index that the compiler does not know would move the entries from registers to memory.
template <int kDistance, int kPass, class Value, int kCount>
__forceinline__ void sort_from(Value (&entries)[kCount]) {
  constexpr int kHighest = kCount > 16 ? 16 : kCount > 8 ? 8 : kCount > 4 ? 4 : kCount > 2 ? 2 : 1;
  constexpr int kBit = kPass == kHighest ? 0 : kDistance;
  constexpr int kOffset = kPass == kHighest ? kDistance : 2 * kPass - kDistance;
#pragma unroll
  for (int i = 0; i + kOffset < kCount; ++i) {
    if ((i & kDistance) != kBit) continue;
    const Value a = entries[i], b = entries[i + kOffset];
    entries[i] = a > b ? a : b;
    entries[i + kOffset] = a > b ? b : a;
  }
  if constexpr (kPass > kDistance) {
    sort_from<kDistance, kPass / 2>(entries);
  } else if constexpr (kDistance > 1) {
    sort_from<kDistance / 2, kHighest>(entries);
  }
}

template <class Value, int kCount>
__forceinline__ void sort_descending(Value (&entries)[kCount]) {
  constexpr int kHighest = kCount > 16 ? 16 : kCount > 8 ? 8 : kCount > 4 ? 4 : kCount > 2 ? 2 : 1;
  sort_from<kHighest, kHighest>(entries);
}

// The best first, if that is all that is wanted of a list.
template <class Value, int kCount>
__forceinline__ void best_to_front(Value (&entries)[kCount]) {
#pragma unroll
  for (int i = kCount - 1; i > 0; --i) {
    const Value a = entries[i - 1], b = entries[i];
    entries[i - 1] = a > b ? a : b;
    entries[i] = a > b ? b : a;
  }
}

// Lane r < kTopK gets the id of the r-th best entry of the warp. Each lane sorts its own entries. Then the best of the
// lanes' first entries is removed, kTopK times. The latency of a round is short: a ballot of equal keys shows each lane
// whether the entry is its own, and the id goes to `chosen`, kTopK words of shared memory that no round reads.
template <int kTopK, int kPerLane>
__forceinline__ uint32 warp_top_k(Entry (&entries)[kPerLane], uint32* chosen) {
  const int lane = threadIdx.x % 32;
  const uint32 lanes_below = (1u << lane) - 1;
  sort_descending(entries);
#pragma unroll(kTopK <= 16 ? kTopK : 1)
  for (int round = 0; round < kTopK; ++round) {
    const uint32 key = key_of(entries[0]);
    const bool is_best = key == __reduce_max_sync(~0u, key);
    const uint32 best_lanes = __ballot_sync(~0u, is_best);
    if (is_best and (best_lanes & lanes_below) == 0) {
      chosen[round] = id_of(entries[0]);
#pragma unroll
      for (int i = 0; i + 1 < kPerLane; ++i) entries[i] = entries[i + 1];
      entries[kPerLane - 1] = entry_of(kExcludedKey, 0);
    }
  }
  __syncwarp();
  return chosen[lane < kTopK ? lane : 0];
}
