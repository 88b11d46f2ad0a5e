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
#include <cstdlib>
#include <initializer_list>
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

// 2^(u log2(e)) as 2^floor times a polynomial of what is above it, to 17 bits; infinities and NaN as they should be
inline Vec short_exponential(const Vec& u) {
  const __m512 t = _mm512_mul_ps(u, _mm512_set1_ps(1.44269504088896341f));
  const __m512 f = _mm512_reduce_ps(t, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);  // t - floor(t)
  __m512 p = _mm512_set1_ps(1.353416792833e-2f);
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.201146058412e-2f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.414427569091e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.930038344665e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0000025934f));
  return _mm512_scalef_ps(p, t);
}

// bfloat16 keeps 8 bits of a number: 17 bits of an exponential and 13 of a reciprocal are as good there
template <typename T>
inline Vec exponential(const Vec& u) {
  return std::is_same_v<T, float> ? u.exp() : short_exponential(u);
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

constexpr int64_t LINE = 64;  // bytes that a cache line and the widest register hold

// n numbers, filled up to whole cache lines: rows at such a distance are read without crossing a line
template <typename T>
constexpr int64_t lines(int64_t n) {
  constexpr int64_t numbers = LINE / static_cast<int64_t>(sizeof(T));
  return (n + numbers - 1) / numbers * numbers;
}

// Memory that a thread keeps for its next call, at the start of a cache line
template <typename T>
T* scratch(int which, int64_t size) {
  struct Buffer {
    T* memory = nullptr;
    int64_t size = 0;
    ~Buffer() {
      std::free(memory);
    }
  };
  static thread_local Buffer buffers[2];
  Buffer& buffer = buffers[which];
  if (buffer.size < size) {
    std::free(buffer.memory);
    buffer.size = 0;
    buffer.memory = static_cast<T*>(std::aligned_alloc(LINE, lines<T>(size) * sizeof(T)));
    TORCH_CHECK(buffer.memory, "no memory for ", size, " numbers");
    buffer.size = size;
  }
  return buffer.memory;
}

// Hands out parts of a thread's memory, each at the start of a cache line
template <typename T>
class Parts {
 public:
  // sizes: of all parts that will be taken
  Parts(int which, std::initializer_list<int64_t> sizes) {
    int64_t size = 0;
    for (const int64_t n : sizes) size += lines<T>(n);
    next_ = scratch<T>(which, size);
  }

  T* take(int64_t n) {
    T* part = next_;
    next_ += lines<T>(n);
    return part;
  }

 private:
  T* next_;
};

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
