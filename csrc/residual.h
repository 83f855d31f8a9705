// Sums onto a residual: of a convolution, its bias and the block's input; and of Infusion's rows that follow another's
// attention map (arXiv:2404.14007, eq. 6): x_C += out_F + P_obj R.
#pragma once

#include "simd.h"

namespace twinstream {

// out = x + residual + bias over (rows, C).
template <typename T>
void residual_add(const T* x, const T* residual, const T* bias, T* out, int64_t rows, int64_t C) {
#pragma omp parallel for schedule(static)
  for (int64_t row = 0; row < rows; row++) {
    each(C, [&](int64_t c, int lanes) {
      const int64_t at = row * C + c;
      put(out + at, take(x + at, lanes) + take(residual + at, lanes) + take(bias + c, lanes), lanes);
    });
  }
}

// x, out (F, N, C); attended (B, N, C) and columns (B, N, K) of the rows followed; residuals (F, K, C).
template <typename T>
void residual_apply(const T* x, const T* attended, const T* columns, const int64_t* leaders, const T* residuals, T* out,
                    int64_t F, int64_t N, int64_t K, int64_t C) {
#pragma omp parallel for schedule(static)
  for (int64_t row = 0; row < F * N; row++) {
    const int64_t f = row / N, leader = leaders[f] * N + row % N;
    const T* share = columns + leader * K;
    each(C, [&](int64_t c, int lanes) {
      Floats y = take(x + row * C + c, lanes) + take(attended + leader * C + c, lanes);
      for (int64_t k = 0; k < K; k++) y += as_float(share[k]) * take(residuals + (f * K + k) * C + c, lanes);
      put(out + row * C + c, y, lanes);
    });
  }
}

}  // namespace twinstream
