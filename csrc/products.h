// Small products in registers: what matrices are made of, and the tile of sums that attention and convolutions share.
#pragma once

#include "simd.h"

namespace twinstream {

constexpr int kRows = kLanes == 16 ? 8 : 4;  // rows of a tile; kRows * kColumns sums fill the registers
constexpr int kColumns = 3;                  // vectors of a tile, side by side

// What products are made of: floats, or pairs of bfloat16 where one instruction multiplies and adds both.
template <typename T>
struct Product {
  using Element = float;
  using Weight = float;
  static constexpr int kPair = 1;
};

inline Floats multiply_add(Floats sum, float a, const float* b) { return sum + a * load(b); }

inline void pair(float& packed, float x, float) { packed = x; }
inline void pair(float& packed, bfloat16 x, bfloat16) { packed = as_float(x); }

#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)  // processors with AMX multiply pairs more slowly than floats
template <>
struct Product<bfloat16> {
  using Element = uint32_t;
  using Weight = bfloat16;
  static constexpr int kPair = 2;
};

inline Floats multiply_add(Floats sum, uint32_t a, const uint32_t* b) {
  return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32((int)a), (__m512bh)_mm512_loadu_si512(b));
}

inline void pair(uint32_t& packed, bfloat16 x, bfloat16 y) { packed = x.bits | (uint32_t)y.bits << 16; }
#endif

// sums[r][c] += sum_k a[r * a_row + k] * b[k * b_step + c * b_column]
template <int R, int C, typename E>
inline void accumulate(Floats (&sums)[R][C], const E* a, int64_t a_row, const E* b, int64_t b_step, int64_t b_column,
                       int64_t n) {
  for (int64_t k = 0; k < n; k++) {
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
#pragma GCC unroll 3
      for (int c = 0; c < C; c++)
        sums[r][c] = multiply_add(sums[r][c], a[r * a_row + k], b + k * b_step + c * b_column);
    }
  }
}

}  // namespace twinstream
