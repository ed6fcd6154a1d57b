// The blocks of a cluster send numbers to the first block, where an mbarrier counts the bytes that arrive. Waiting for
// the bytes takes less time than a barrier of the whole cluster.
#pragma once
#include "device.cuh"

#if MOEGATE_HAS_CLUSTERS

__forceinline__ uint32 shared_address(const void* address) { return uint32(__cvta_generic_to_shared(address)); }

// By one thread of the first block, before any other block sends.
__forceinline__ void expect_bytes(uint64* barrier, int bytes) {
  const uint32 address = shared_address(barrier);
  asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"(address));
  asm volatile("fence.mbarrier_init.release.cluster;");
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(address), "r"(bytes) : "memory");
}

// `target` and `barrier` as the calling block would address its own.
__forceinline__ void send_to_first_block(float* target, float value, uint64* barrier) {
  uint32 remote_target, remote_barrier;
  asm("mapa.shared::cluster.u32 %0, %1, 0;" : "=r"(remote_target) : "r"(shared_address(target)));
  asm("mapa.shared::cluster.u32 %0, %1, 0;" : "=r"(remote_barrier) : "r"(shared_address(barrier)));
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(remote_target),
               "r"(__float_as_uint(value)), "r"(remote_barrier)
               : "memory");
}

__forceinline__ void wait_for_bytes(uint64* barrier) {
  uint32 done = 0;
  while (not done) {
    asm volatile(
        "{ .reg .pred p; mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], 0; selp.u32 %0, 1, 0, p; }"
        : "=r"(done)
        : "r"(shared_address(barrier))
        : "memory");
  }
}

// The cluster's barrier, by all threads, after `expect_bytes` and before any block sends: all blocks have started, and the
// mbarrier is initialised. In two steps, so that a block loads between them. Relaxed, since `expect_bytes` has a fence of
// its own: a release would wait for every load in flight.
__forceinline__ void arrive_at_cluster() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }
__forceinline__ void wait_for_cluster() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

#else  // never called: on a chip without clusters the tiling has num_splits = 1

__forceinline__ void expect_bytes(uint64*, int) {}
__forceinline__ void send_to_first_block(float*, float, uint64*) {}
__forceinline__ void wait_for_bytes(uint64*) {}
__forceinline__ void arrive_at_cluster() {}
__forceinline__ void wait_for_cluster() {}

#endif
