// Rows of any supported dtype, read and written as float32.
//
// Every CPU kernel works on float32 rows that sit in L1: a row is widened on the way in (nothing to
// do for float32) and rounded once on the way out. One pass more over L1 buys a kernel that serves
// every mix of dtypes without a template for each, and costs a few per cent of the memory time.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <type_traits>

#ifdef __SSE2__
#include <emmintrin.h>
#endif

// Compiled once per instruction set; the loader picks the best that the machine has. A build for
// one machine (FLOWKERNELS_CPU=host) has one set, named to the compiler, and takes a third of the
// time.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(FK_ONE_CPU)
#define FK_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FK_CLONES
#endif
// Helpers must be inlined into a cloned function, or they would run with the default instructions.
#define FK_INLINE static inline __attribute__((always_inline))
#define FK_INLINE_LAMBDA __attribute__((always_inline))

namespace flowkernels {

enum class DType : int32_t { float32, bfloat16, float16 };

FK_INLINE int64_t element_size(DType dtype) { return dtype == DType::float32 ? 4 : 2; }

// A [batch, rows, columns] operand with a unit last stride; a broadcast dimension has stride 0.
struct View {
  char* data = nullptr;
  DType dtype = DType::float32;
  int64_t batch_stride = 0;
  int64_t row_stride = 0;

  explicit operator bool() const { return data != nullptr; }
  char* row(int64_t batch, int64_t row_index) const {
    return data + (batch * batch_stride + row_index * row_stride) * element_size(dtype);
  }
};

FK_INLINE float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

FK_INLINE uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

FK_INLINE float bfloat16_to_float(uint16_t half) { return bits_to_float(uint32_t{half} << 16); }

// Round to nearest, ties to even; NaN stays a (quiet) NaN.
FK_INLINE uint16_t float_to_bfloat16(float value) {
  const uint32_t bits = float_to_bits(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

// The half conversions are integer arithmetic, so that the vectoriser takes them on any machine.
FK_INLINE float float16_to_float(uint16_t half) {
  const uint32_t sign = uint32_t{half & 0x8000u} << 16;
  const uint32_t magnitude = uint32_t{half & 0x7fffu};
  const float normal = bits_to_float((magnitude << 13) + (112u << 23));
  const float subnormal = static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f;
  const float special = bits_to_float((magnitude << 13) | 0x7f800000u);
  const float value = magnitude >= 0x7c00u ? special : (magnitude < 0x0400u ? subnormal : normal);
  return bits_to_float(float_to_bits(value) | sign);
}

FK_INLINE uint16_t float_to_float16(float value) {
  const uint32_t bits = float_to_bits(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  // Adding 0.5 aligns the mantissa of a subnormal result at the bottom of the word.
  const uint32_t subnormal = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t normal = (magnitude - (112u << 23) + 0x0fffu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t half =
      magnitude >= 0x47800000u ? special : (magnitude < 0x38800000u ? subnormal : normal);
  return static_cast<uint16_t>(half | sign);
}

// 16-bit elements as types of their own, for loops that widen and round in registers.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};
FK_INLINE float widen(float value) { return value; }
FK_INLINE float widen(BFloat16 value) { return bfloat16_to_float(value.bits); }
FK_INLINE float widen(Float16 value) { return float16_to_float(value.bits); }
FK_INLINE void narrow(float value, float& out) { out = value; }
FK_INLINE void narrow(float value, BFloat16& out) { out.bits = float_to_bfloat16(value); }
FK_INLINE void narrow(float value, Float16& out) { out.bits = float_to_float16(value); }

// The row as float32: the row itself where it is float32 already, else `scratch`.
FK_INLINE const float* load_row(const char* source, DType dtype, float* scratch, int64_t n) {
  if (dtype == DType::float32) return reinterpret_cast<const float*>(source);
  const uint16_t* half = reinterpret_cast<const uint16_t*>(source);
  if (dtype == DType::bfloat16) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) scratch[i] = bfloat16_to_float(half[i]);
  } else {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) scratch[i] = float16_to_float(half[i]);
  }
  return scratch;
}

// Where to build a result: in place for float32, else in `scratch`, for store_row to round.
FK_INLINE float* target_row(char* target, DType dtype, float* scratch) {
  return dtype == DType::float32 ? reinterpret_cast<float*>(target) : scratch;
}

FK_INLINE void store_row(const float* source, char* target, DType dtype, int64_t n) {
  if (dtype == DType::float32) {
    if (reinterpret_cast<const char*>(source) != target) std::memcpy(target, source, n * 4);
    return;
  }
  uint16_t* half = reinterpret_cast<uint16_t*>(target);
  if (dtype == DType::bfloat16) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) half[i] = float_to_bfloat16(source[i]);
  } else {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) half[i] = float_to_float16(source[i]);
  }
}

// target[i] = value(i) for every i, rounded to `dtype`: no scratch row in between.
template <class F>
FK_INLINE void write_row(char* target, DType dtype, int64_t n, const F& value) {
  if (dtype == DType::float32) {
    float* out = reinterpret_cast<float*>(target);
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) out[i] = value(i);
  } else if (dtype == DType::bfloat16) {
    uint16_t* out = reinterpret_cast<uint16_t*>(target);
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) out[i] = float_to_bfloat16(value(i));
  } else {
    uint16_t* out = reinterpret_cast<uint16_t*>(target);
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) out[i] = float_to_float16(value(i));
  }
}

// A kernel written for rows of one type T: with T = BFloat16 every operand has that dtype and is
// read and written where it lies; with T = float other dtypes pass through `scratch`.
template <class T>
FK_INLINE const T* typed_row(const char* source, DType dtype, float* scratch, int64_t n) {
  if constexpr (std::is_same_v<T, float>) return load_row(source, dtype, scratch, n);
  return reinterpret_cast<const T*>(source);
}

// Where `stream` says so, rows that need no rounding pass through `scratch` too.
template <class T>
FK_INLINE T* typed_target(char* target, DType dtype, float* scratch, bool stream = false) {
  if (stream) return reinterpret_cast<T*>(scratch);
  if constexpr (std::is_same_v<T, float>) return target_row(target, dtype, scratch);
  return reinterpret_cast<T*>(target);
}

// From here on a result goes to memory past the caches, which would not hold it until it is read:
// a store that goes through them reads what it is about to overwrite. Measured with a last level of
// 32 MiB: a norm and the product that reads its result gain together at 12 MiB, lose at 8.
constexpr int64_t kStreamedBytes = int64_t{12} << 20;

// Whether a whole line can be stored here at once.
FK_INLINE bool starts_line(const void* address) {
  return reinterpret_cast<uintptr_t>(address) % 64 == 0;
}

FK_INLINE void stream_row(const void* source, char* target, int64_t bytes) {
  int64_t i = 0;
#ifdef __SSE2__
  if (reinterpret_cast<uintptr_t>(target) % 16 == 0)
    for (; i + 16 <= bytes; i += 16)
      _mm_stream_si128(
          reinterpret_cast<__m128i*>(target + i),
          _mm_loadu_si128(reinterpret_cast<const __m128i*>(static_cast<const char*>(source) + i)));
#endif
  std::memcpy(target + i, static_cast<const char*>(source) + i, bytes - i);
}

// After rows that were streamed, before another thread reads them.
FK_INLINE void finish_streams() {
#ifdef __SSE2__
  _mm_sfence();
#endif
}

template <class T>
FK_INLINE void store_typed(const T* row, char* target, DType dtype, int64_t n,
                           bool stream = false) {
  if (stream && (!std::is_same_v<T, float> || dtype == DType::float32)) {
    stream_row(row, target, n * static_cast<int64_t>(sizeof(T)));
    return;
  }
  if constexpr (std::is_same_v<T, float>) store_row(row, target, dtype, n);
}

// Whether every operand that is there is of this type.
template <class T, class... Views>
FK_INLINE bool all_of(const Views&... views) {
  constexpr DType kType = std::is_same_v<T, float>      ? DType::float32
                          : std::is_same_v<T, BFloat16> ? DType::bfloat16
                                                        : DType::float16;
  return ((!views || views.dtype == kType) && ...);
}

// A value after rounding to `dtype`, as the next reader of the stored tensor will see it.
FK_INLINE void round_row(float* row, DType dtype, int64_t n) {
  if (dtype == DType::bfloat16) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) row[i] = bfloat16_to_float(float_to_bfloat16(row[i]));
  } else if (dtype == DType::float16) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) row[i] = float16_to_float(float_to_float16(row[i]));
  }
}

// `count` float32 rows of `n`, 64-byte aligned, on the heap: a worker asks once per range.
class Scratch {
 public:
  Scratch(int64_t count, int64_t n)
      : stride_((n + 15) / 16 * 16), memory_(new float[count * stride_ + 16]) {
    const auto address = reinterpret_cast<uintptr_t>(memory_.get());
    base_ = reinterpret_cast<float*>((address + 63) / 64 * 64);
  }
  float* operator[](int64_t index) const { return base_ + index * stride_; }

 private:
  int64_t stride_;
  std::unique_ptr<float[]> memory_;
  float* base_;
};

}  // namespace flowkernels
