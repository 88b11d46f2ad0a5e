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
#include <vector>

namespace upt_fast {

using at::BFloat16;
using at::Tensor;
using Vec = at::vec::Vectorized<float>;

template <typename T>
inline Vec read(const T* p, int64_t n = Vec::size()) {
  if constexpr (std::is_same_v<T, float>) {
    return n == Vec::size() ? Vec::loadu(p) : Vec::loadu(p, n);
  } else {
    auto v = at::vec::Vectorized<BFloat16>::loadu(p, n);
    return std::get<0>(at::vec::convert_bfloat16_float(v));
  }
}

template <typename T>
inline void write(T* p, const Vec& v, int64_t n = Vec::size()) {
  if constexpr (std::is_same_v<T, float>) {
    n == Vec::size() ? v.store(p) : v.store(p, n);
  } else {
    at::vec::convert_float_bfloat16(v, Vec(0)).store(p, n);
  }
}

// f(offset, lanes) over n numbers
template <typename F>
inline void lanes(int64_t n, const F& f) {
  int64_t i = 0;
  for (; i + Vec::size() <= n; i += Vec::size()) f(i, Vec::size());
  if (i < n) f(i, n - i);
}

// bfloat16 keeps 8 bits of a number: an exponential of 20 units in the last place of float32 is as good there
template <typename T>
inline Vec exponential(const Vec& u) {
  return std::is_same_v<T, float> ? u.exp() : u.exp_u20();
}

inline float sum(const Vec& v) {
  return at::vec::vec_reduce_all<float>([](Vec& a, Vec& b) { return a + b; }, v);
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

#define BY_DTYPE(name, of, ...)                                                                     \
  do {                                                                                              \
    if (of.scalar_type() == at::kFloat)                                                             \
      name<float>(__VA_ARGS__);                                                                     \
    else                                                                                            \
      name<at::BFloat16>(__VA_ARGS__);                                                              \
  } while (false)

inline void check(const Tensor& t, const Tensor& like, const char* name) {
  TORCH_CHECK(t.is_contiguous() && t.device().is_cpu(), name, " must be contiguous on the CPU");
  TORCH_CHECK(t.scalar_type() == like.scalar_type(), name, " is ", t.scalar_type(), "; wanted ", like.scalar_type());
}

}  // namespace upt_fast
