// GEGLU (Shazeer 2020, arXiv:2002.05202): x * gelu(gate), with the exact gelu.
#pragma once

#include "simd.h"

namespace twinstream {

// The normal distribution's tail beyond x >= 0: exp(-x^2 / 2) times a minimax polynomial in 1 / (1 + 0.3 x), relative
// error 4e-7. The two halves of gelu then lose nothing to 1 + erf, which cancels for negative x.
template <int kDegree>
inline Floats tail(Floats x) {
  const Floats t = 1.0f / (1.0f + 0.3f * x);
  Floats p = all(0.0367427692f);
  p = p * t - 0.161684394f;
  p = p * t + 0.214141876f;
  p = p * t - 0.0609283969f;
  p = p * t + 0.132444754f;
  p = p * t + 0.0987178087f;
  p = p * t + 0.120949306f;
  p = p * t + 0.119616255f;
  return p * t * exp2<kDegree>(x * x * -0.721347520f);
}

template <int kDegree>
inline Floats gelu(Floats x) {
  const Floats beyond = x * tail<kDegree>(x < 0.0f ? -x : x);
  return x < 0.0f ? beyond : x - beyond;
}

// out (rows, C) from x (rows, 2C): values first, then gates.
template <typename T>
void geglu(const T* x, T* out, int64_t rows, int64_t C) {
#pragma omp parallel for schedule(static)
  for (int64_t row = 0; row < rows; row++) {
    each(C, [&](int64_t c, int lanes) {
      const Floats value = take(x + row * 2 * C + c, lanes), gate = take(x + row * 2 * C + C + c, lanes);
      put(out + row * C + c, value * gelu<kExpDegree<T>>(gate), lanes);
    });
  }
}

}  // namespace twinstream
