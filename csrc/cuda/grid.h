// Kernels, their launch, and their position in the grid. nvcc compiles it for a device. Any C++ compiler can compile it
// for an emulation on the host, whose <cuda_runtime.h> then stands in the include path: it supplies fi_host::launch,
// fi_host::here and fi_host::sync_threads. There are no warps: what needs one is not written.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
// In blocks of this many threads, and with registers few enough for as many blocks at a time in a multiprocessor.
#define FI_KERNEL(threads, resident) __global__ void __launch_bounds__((threads), (resident))
#define FI_ARGUMENT const __grid_constant__  // of a struct: read where it lies, not copied by every thread
#define FI_SHARED __shared__
#define FI_DEVICE __device__ static __forceinline__
#define FI_RARE __device__ static __noinline__  // what hardly ever happens: not inlined
// kernel in parentheses if it has template arguments; the caller checks cudaGetLastError() afterwards.
#define FI_LAUNCH(kernel, blocks, threads, stream, ...) kernel<<<(blocks), (threads), 0, (stream)>>>(__VA_ARGS__)
#else
#define FI_KERNEL(threads, resident) static inline void
#define FI_ARGUMENT const
#define FI_SHARED static thread_local
#define FI_DEVICE static inline __attribute__((unused))
#define FI_RARE static inline __attribute__((unused))
// Arguments are copied at the launch, as on a device: they must be variables or expressions of them, not `this`.
#define FI_LAUNCH(kernel, blocks, threads, stream, ...) \
  fi_host::launch((blocks), (threads), (stream), [=] { kernel(__VA_ARGS__); })
#endif

namespace fi {

constexpr int kArgumentBytes = 30 << 10;  // of a table that is a kernel argument: CUDA allows 32764 in all

#ifdef __CUDACC__
FI_DEVICE uint32_t thread_index() { return threadIdx.x; }
FI_DEVICE uint32_t block_index() { return blockIdx.x; }
FI_DEVICE uint32_t block_threads() { return blockDim.x; }
FI_DEVICE uint32_t block_count() { return gridDim.x; }
FI_DEVICE void sync_threads() { __syncthreads(); }
#else
FI_DEVICE uint32_t thread_index() { return fi_host::here().thread; }
FI_DEVICE uint32_t block_index() { return fi_host::here().block; }
FI_DEVICE uint32_t block_threads() { return fi_host::here().threads; }
FI_DEVICE uint32_t block_count() { return fi_host::here().blocks; }
FI_DEVICE void sync_threads() { fi_host::sync_threads(); }
#endif

// ---- memory --------------------------------------------------------------------------------------------------------

struct alignas(16) Vector16 {
  uint32_t w[4];
};

// 16 bytes that nobody writes while the kernel runs, and that it reads once. `at` is a multiple of 16.
FI_DEVICE Vector16 load_once(const void* at) {
  Vector16 v;
#ifdef __CUDA_ARCH__
  asm volatile("ld.global.nc.L1::no_allocate.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.w[0]), "=r"(v.w[1]), "=r"(v.w[2]), "=r"(v.w[3])
               : "l"(__cvta_generic_to_global(at)));
#else
  memcpy(&v, at, sizeof v);
#endif
  return v;
}

// 16 bytes that are not read again soon. `at` is a multiple of 16.
FI_DEVICE void store_once(void* at, const Vector16& v) {
#ifdef __CUDA_ARCH__
  asm volatile("st.global.cs.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(at)), "r"(v.w[0]),
               "r"(v.w[1]), "r"(v.w[2]), "r"(v.w[3])
               : "memory");
#else
  memcpy(at, &v, sizeof v);
#endif
}

// 16 bytes that other threads read, too. `at` is a multiple of 16.
FI_DEVICE Vector16 load_often(const void* at) {
  Vector16 v;
#ifdef __CUDA_ARCH__
  asm volatile("ld.global.nc.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.w[0]), "=r"(v.w[1]), "=r"(v.w[2]), "=r"(v.w[3])
               : "l"(__cvta_generic_to_global(at)));
#else
  memcpy(&v, at, sizeof v);
#endif
  return v;
}

// The same into words that are 0 where nothing is `wanted`; the second form of 8 bytes, at a multiple of 8. A
// predicate, not a branch.
FI_DEVICE void load_once_if(bool wanted, const void* at, uint32_t* w) {
#ifdef __CUDA_ARCH__
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %5, 0;\n"
      "@p ld.global.nc.L1::no_allocate.v4.b32 {%0, %1, %2, %3}, [%4];\n}"
      : "+r"(w[0]), "+r"(w[1]), "+r"(w[2]), "+r"(w[3])
      : "l"(__cvta_generic_to_global(at)), "r"(int(wanted)));
#else
  if (wanted) memcpy(w, at, 16);
#endif
}
FI_DEVICE void load_once_if(bool wanted, const void* at, uint32_t* low, uint32_t* high) {
#ifdef __CUDA_ARCH__
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %3, 0;\n@p ld.global.nc.L1::no_allocate.v2.b32 {%0, %1}, [%2];\n}"
               : "+r"(*low), "+r"(*high)
               : "l"(__cvta_generic_to_global(at)), "r"(int(wanted)));
#else
  if (wanted) memcpy(low, at, 4), memcpy(high, static_cast<const char*>(at) + 4, 4);
#endif
}

FI_DEVICE void store_once(void* at, uint32_t low, uint32_t high) {
#ifdef __CUDA_ARCH__
  asm volatile("st.global.cs.v2.b32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(at)), "r"(low), "r"(high)
               : "memory");
#else
  memcpy(at, &low, 4), memcpy(static_cast<char*>(at) + 4, &high, 4);
#endif
}

// What is computed from `v` after this is computed again each time: in a loop, that takes fewer registers than holding
// it.
FI_DEVICE void compute_again(Vector16* v) {
#ifdef __CUDA_ARCH__
  asm volatile("" : "+r"(v->w[0]), "+r"(v->w[1]), "+r"(v->w[2]), "+r"(v->w[3]));
#else
  (void)v;
#endif
}

#ifdef __CUDA_ARCH__
// Elements at odd addresses, byte by byte. Calls, so that the compiler does not make one of this and of what is whole.
FI_RARE uint64_t load_bytes(const unsigned char* at, int n) {
  uint64_t bits = 0;
#pragma unroll 1
  for (int i = 0; i < n; ++i) bits |= uint64_t(at[i]) << (8 * i);
  return bits;
}
FI_RARE void store_bytes(unsigned char* at, uint64_t bits, int n) {
#pragma unroll 1
  for (int i = 0; i < n; ++i) at[i] = static_cast<unsigned char>(bits >> (8 * i));
}
#endif

// One element at any address: a device can read it as a whole only where it is aligned.
template <class Bits>
FI_DEVICE Bits load_bits(const void* at) {
#ifdef __CUDA_ARCH__
  if (uintptr_t(at) % sizeof(Bits) != 0) return Bits(load_bytes(static_cast<const unsigned char*>(at), sizeof(Bits)));
  return *static_cast<const Bits*>(at);
#else
  Bits bits;
  memcpy(&bits, at, sizeof bits);
  return bits;
#endif
}

template <class Bits>
FI_DEVICE void store_bits(void* at, Bits bits) {
#ifdef __CUDA_ARCH__
  if (uintptr_t(at) % sizeof(Bits) != 0)
    store_bytes(static_cast<unsigned char*>(at), uint64_t(bits), sizeof(Bits));
  else
    *static_cast<Bits*>(at) = bits;
#else
  memcpy(at, &bits, sizeof bits);
#endif
}

// a / b, both from 0 on, by the short division of 32 bits where that does.
FI_DEVICE int64_t quotient(int64_t a, int64_t b) {
  if (((a | b) >> 32) == 0) return uint32_t(a) / uint32_t(b);
  return a / b;
}

#ifdef __CUDACC__
FI_DEVICE void atomic_add(uint32_t* at, uint32_t n) { atomicAdd(at, n); }
FI_DEVICE void atomic_add(int64_t* at, int64_t n) {
  atomicAdd(reinterpret_cast<unsigned long long*>(at), static_cast<unsigned long long>(n));
}
FI_DEVICE void atomic_or(uint32_t* at, uint32_t bits) { atomicOr(at, bits); }
#else
FI_DEVICE void atomic_add(uint32_t* at, uint32_t n) { __atomic_fetch_add(at, n, __ATOMIC_RELAXED); }
FI_DEVICE void atomic_add(int64_t* at, int64_t n) { __atomic_fetch_add(at, n, __ATOMIC_RELAXED); }
FI_DEVICE void atomic_or(uint32_t* at, uint32_t bits) { __atomic_fetch_or(at, bits, __ATOMIC_RELAXED); }
#endif

}  // namespace fi
