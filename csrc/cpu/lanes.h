// Rows of float32 or bfloat16 in AVX-512 registers: what loops in the CPU's own instructions share.
// What g++ 12 makes of portable loops takes some ten instructions to widen and to round sixteen
// bfloat16 elements.
#pragma once

#include <cstdlib>

#include "rows.h"

#if defined(__x86_64__) && (defined(__clang__) || __GNUC__ >= 10)
#define FK_HAS_LANES 1

// g++ 12 takes the undefined lanes in its own header for a mistake of ours.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

#define FK_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma")))

namespace flowkernels {

// Whether this CPU has them, and PyTorch has not been told to do without.
inline bool lanes_supported() {
  const char* capability = std::getenv("ATEN_CPU_CAPABILITY");
  for (const char* lesser : {"avx2", "default"})
    if (capability && std::strcmp(capability, lesser) == 0) return false;
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("fma");
}

// Elements are taken 32 at a time, as two registers: halves in order of float32; of bfloat16 those
// at even and those at odd places, which are the low and the high halves of 32-bit words.
constexpr int64_t kLanes = 16, kPair = 2 * kLanes;

struct Pair {
  __m512 low, high;
};

FK_AVX512 static inline Pair load(const float* source) {
  return {_mm512_loadu_ps(source), _mm512_loadu_ps(source + kLanes)};
}

FK_AVX512 static inline Pair load(const BFloat16* source) {
  const __m512i words = _mm512_loadu_si512(source);
  return {_mm512_castsi512_ps(_mm512_slli_epi32(words, 16)),
          _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(0xffff0000u)))};
}

FK_AVX512 static inline Pair difference(const Pair& a, const Pair& b) {
  return {_mm512_sub_ps(a.low, b.low), _mm512_sub_ps(a.high, b.high)};
}

// a + b * c
FK_AVX512 static inline Pair sum(const Pair& a, const Pair& b, __m512 c) {
  return {_mm512_fmadd_ps(b.low, c, a.low), _mm512_fmadd_ps(b.high, c, a.high)};
}

FK_AVX512 static inline Pair scaled(const Pair& a, __m512 c) {
  return {_mm512_mul_ps(a.low, c), _mm512_mul_ps(a.high, c)};
}

// Asks the memory for the lines of the pair that many bytes ahead.
template <class T>
FK_AVX512 static inline void prefetch(const T* source, int64_t ahead = 0) {
  const char* address = reinterpret_cast<const char*>(source) + ahead;
  for (int64_t i = 0; i < kPair * int64_t{sizeof(T)}; i += 64)
    _mm_prefetch(address + i, _MM_HINT_T0);
}

// What the second-level cache should have by the time it is read: the memory's own prefetching
// starts anew with every page. Where results are streamed it takes bandwidth from them.
template <class T>
FK_AVX512 static inline void prefetch_ahead(const T* operand) {
  constexpr int64_t kAhead = 1024, kLine = 64;
  const char* address = reinterpret_cast<const char*>(operand) + kAhead;
  for (int64_t i = 0; i < kPair * int64_t{sizeof(T)}; i += kLine)
    _mm_prefetch(address + i, _MM_HINT_T1);
}

template <bool stream>
FK_AVX512 static inline void put(__m512i values, void* target) {
  if constexpr (stream)
    _mm512_stream_si512(static_cast<__m512i*>(target), values);
  else
    _mm512_storeu_si512(target, values);
}

template <bool stream>
FK_AVX512 static inline void store(const Pair& x, float* target) {
  put<stream>(_mm512_castps_si512(x.low), target);
  put<stream>(_mm512_castps_si512(x.high), target + kLanes);
}

// A pair of float32 that goes with rows of T: from the order of memory to that of T's registers.
template <class T>
FK_AVX512 static inline Pair arranged(const Pair& x) {
  if constexpr (std::is_same_v<T, float>) return x;
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
  return {_mm512_permutex2var_ps(x.low, even, x.high), _mm512_permutex2var_ps(x.low, odd, x.high)};
}

// Undoes `arranged`.
template <class T>
FK_AVX512 static inline Pair restored(const Pair& x) {
  if constexpr (std::is_same_v<T, float>) return x;
  const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
  return {_mm512_permutex2var_ps(x.low, first, x.high),
          _mm512_permutex2var_ps(x.low, second, x.high)};
}

template <class T>
FK_AVX512 static inline void arrange(float* row, int64_t n) {
  if constexpr (std::is_same_v<T, float>) return;
  for (int64_t i = 0; i + kPair <= n; i += kPair) store<false>(arranged<T>(load(row + i)), row + i);
}

template <class T>
FK_AVX512 static inline void restore(float* row, int64_t n) {
  if constexpr (std::is_same_v<T, float>) return;
  for (int64_t i = 0; i + kPair <= n; i += kPair) store<false>(restored<T>(load(row + i)), row + i);
}

// The instruction that rounds takes subnormal numbers for zeros and keeps the payload of a NaN;
// rows.h does neither.
FK_AVX512 static inline bool differs(const Pair& x) {
  constexpr int kSubnormal = 0x20, kQuietNan = 0x01, kSignalingNan = 0x80;
  constexpr int kAny = kSubnormal | kQuietNan | kSignalingNan;
  return __builtin_expect(
      _mm512_fpclass_ps_mask(x.low, kAny) | _mm512_fpclass_ps_mask(x.high, kAny), 0);
}

template <bool stream>
FK_AVX512 static inline void store(const Pair& x, BFloat16* target) {
  alignas(64) static constexpr uint16_t kInTurn[kPair] = {
      0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  if (differs(x)) {
    alignas(64) float values[kPair];
    _mm512_store_ps(values, x.low);
    _mm512_store_ps(values + kLanes, x.high);
    for (int64_t i = 0; i < kPair; ++i) narrow(values[kInTurn[i]], target[i]);
    return;
  }
  const __m512bh halves = _mm512_cvtne2ps_pbh(x.high, x.low);
  __m512i bits;
  std::memcpy(&bits, &halves, sizeof(bits));
  put<stream>(_mm512_permutexvar_epi16(_mm512_load_si512(kInTurn), bits), target);
}

}  // namespace flowkernels

#endif
