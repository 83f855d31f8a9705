// Vectors of floats, as wide as the file that includes this is compiled for. GCC's and Clang's vector types spell
// arithmetic once for every instruction set; only loads and stores of bfloat16 and dot products need more.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <cstdint>
#include <cstring>

namespace twinstream {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));

struct bfloat16 {
  uint16_t bits;
};

inline float as_float(float x) { return x; }

inline float as_float(bfloat16 x) {
  const uint32_t bits = (uint32_t)x.bits << 16;
  float y;
  std::memcpy(&y, &bits, sizeof y);
  return y;
}

inline Floats all(float x) { return x - Floats{}; }

inline Floats load(const float* p) {
  Floats x;
  std::memcpy(&x, p, sizeof x);
  return x;
}

inline Floats load(const bfloat16* p) {
  Halves bits;
  std::memcpy(&bits, p, sizeof bits);
  return (Floats)(__builtin_convertvector(bits, Words) << 16);
}

inline void store(float* p, Floats x) { std::memcpy(p, &x, sizeof x); }

// Rounds to the nearest, ties to even; NaN stays NaN.
inline void store(bfloat16* p, Floats x) {
#if defined(__AVX512BF16__)
  const __m256bh out = _mm512_cvtneps_pbh((__m512)x);
#else
  const Words bits = (Words)x;
  const Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Words is_nan = (Words)(x != x);
  const Halves out = __builtin_convertvector((rounded & ~is_nan) | (((bits >> 16) | 0x40) & is_nan), Halves);
#endif
  std::memcpy(p, &out, sizeof out);
}

// The first n lanes; the others are zero.
template <typename T>
inline Floats load_some(const T* p, int n) {
  T lanes[kLanes] = {};
  std::memcpy(lanes, p, n * sizeof(T));
  return load(lanes);
}

template <typename T>
inline void store_some(T* p, Floats x, int n) {
  T lanes[kLanes];
  store(lanes, x);
  std::memcpy(p, lanes, n * sizeof(T));
}

// Visits a row of n numbers a vector at a time; the last visit may be of fewer lanes.
template <typename Visit>
inline void each(int64_t n, Visit visit) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) visit(i, kLanes);
  if (i < n) visit(i, (int)(n - i));
}

template <typename T>
inline Floats take(const T* p, int lanes) {
  return lanes == kLanes ? load(p) : load_some(p, lanes);
}

template <typename T>
inline void put(T* p, Floats x, int lanes) {
  lanes == kLanes ? store(p, x) : store_some(p, x, lanes);
}

inline Floats max(Floats a, Floats b) {
#if defined(__AVX512F__)
  return (Floats)_mm512_max_ps((__m512)a, (__m512)b);  // which GCC makes two of for its own vectors
#else
  return a > b ? a : b;
#endif
}

inline Floats min(Floats a, Floats b) { return a < b ? a : b; }

// Lanes of a and b, which are counted on from a to b; ``which`` must be constants for the compiler.
inline Floats shuffle(Floats a, Floats b, Ints which) {
#if defined(__clang__)
  Floats x;
#pragma unroll
  for (int i = 0; i < kLanes; i++) x[i] = which[i] < kLanes ? a[which[i]] : b[which[i] - kLanes];
  return x;
#else
  return __builtin_shuffle(a, b, which);
#endif
}

inline float sum(Floats x) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)x);
#else
  float total = 0;
  for (int i = 0; i < kLanes; i++) total += x[i];
  return total;
#endif
}

inline float largest(Floats x) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)x);
#else
  float top = x[0];
  for (int i = 1; i < kLanes; i++) top = x[i] > top ? x[i] : top;
  return top;
#endif
}

inline bool any(Ints x) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)x, (__m512i)x);
#else
  int32_t some = 0;
  for (int i = 0; i < kLanes; i++) some |= x[i];
  return some;
#endif
}

// The first n lanes, the others zero.
inline Floats only(Floats x, int n) { return load_some((const float*)&x, n); }

// The degree of exp2's polynomial that does for results of type T.
template <typename T>
constexpr int kExpDegree = sizeof(T) == 4 ? 6 : 3;

// 2^x for x <= 127. What remains of x beside the nearest integer, in [-1/2, 1/2], goes through a minimax polynomial:
// relative error 7e-5 of degree 3, 1e-7 of degree 6 (float's rounding). AVX-512 has instructions for both parts; else
// a magic number's addition leaves the integer in the low bits.
template <int kDegree>
inline Floats exp2(Floats x) {
#if defined(__AVX512F__)
  const Floats f = (Floats)_mm512_reduce_ps((__m512)x, 0);
#else
  const Floats magic = all(12582912.0f);
  x = max(x, all(-126.0f));
  const Floats shifted = x + magic;
  const Floats f = x - (shifted - magic);
#endif
  Floats p;
  if constexpr (kDegree == 3) {
    p = all(5.5826318e-2f);
    p = p * f + 2.4015361e-1f;
    p = p * f + 6.9315307e-1f;
    p = p * f + 9.9999320e-1f;
  } else {
    p = all(1.53533605e-4f);
    p = p * f + 1.33988750e-3f;
    p = p * f + 9.61843692e-3f;
    p = p * f + 5.55033237e-2f;
    p = p * f + 2.40226477e-1f;
    p = p * f + 6.93147182e-1f;
    p = p * f + 1.0f;
  }
#if defined(__AVX512F__)
  return (Floats)_mm512_scalef_ps((__m512)p, (__m512)(x - f));
#else
  return (Floats)((Ints)p + ((Ints)shifted << 23));
#endif
}

}  // namespace twinstream
