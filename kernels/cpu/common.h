// What the CPU operations share: vectors that are read and written in the dtype of the rows and computed in float32,
// memory of a thread, checks.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/native/CPUBlas.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

namespace upt_fast {

using at::BFloat16;
using at::Tensor;
using Vec = at::vec::Vectorized<float>;

inline __mmask16 first_lanes(int64_t n) {
  return static_cast<__mmask16>((1u << n) - 1);
}

// 16 numbers as bfloat16
inline __m256i rounded(const Vec& v) {
#ifdef __AVX512BF16__
  return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v));
#else
  return at::vec::cvtfp32_bf16(static_cast<__m512>(v));
#endif
}

template <typename T>
inline Vec read(const T* p, int64_t n = Vec::size()) {
  if constexpr (std::is_same_v<T, float>) {
    return n == Vec::size() ? Vec::loadu(p) : Vec::loadu(p, n);
  } else {
    const __m512i bits = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first_lanes(n), p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
  }
}

template <typename T>
inline void write(T* p, const Vec& v, int64_t n = Vec::size()) {
  if constexpr (std::is_same_v<T, float>) {
    n == Vec::size() ? v.store(p) : v.store(p, n);
  } else {
    _mm256_mask_storeu_epi16(p, first_lanes(n), rounded(v));
  }
}

// f(offset, lanes) over n numbers
template <typename F>
inline void lanes(int64_t n, const F& f) {
  int64_t i = 0;
  for (; i + Vec::size() <= n; i += Vec::size()) f(i, Vec::size());
  if (i < n) f(i, n - i);
}

// bfloat16 keeps 8 bits of a number: 13 bits of an exponential or of a reciprocal are as good there
template <typename T>
inline Vec exponential(const Vec& u) {
  return std::is_same_v<T, float> ? u.exp() : u.fexp_u20();
}

template <typename T>
inline Vec reciprocal(const Vec& u) {
  return std::is_same_v<T, float> ? Vec(1) / u : Vec(_mm512_rcp14_ps(u));
}

inline float sum(const Vec& v) {
  return _mm512_reduce_add_ps(v);
}

template <typename T>
T* data(const Tensor& t) {
  return reinterpret_cast<T*>(t.data_ptr());
}

template <typename T>
std::vector<T>& scratch(int which, int64_t size) {
  static thread_local std::vector<T> buffers[2];
  if (static_cast<int64_t>(buffers[which].size()) < size) buffers[which].resize(size);
  return buffers[which];
}

// f(a number of t's dtype)
template <typename F>
void by_dtype(const Tensor& t, const F& f) {
  if (t.scalar_type() == at::kFloat) {
    f(float());
  } else {
    f(BFloat16());
  }
}

inline void check(const Tensor& t, const Tensor& like, const char* name) {
  TORCH_CHECK(t.is_contiguous() && t.device().is_cpu(), name, " must be contiguous on the CPU");
  TORCH_CHECK(t.scalar_type() == like.scalar_type(), name, " is ", t.scalar_type(), "; wanted ", like.scalar_type());
}

}  // namespace upt_fast
