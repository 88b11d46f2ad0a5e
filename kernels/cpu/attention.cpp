// Attention of each image's rows over [prompts ; own rows], without mask; attention's scale is in the queries.
//
//     attention            out = softmax(q k^T) v, and the log-sum-exp of each row's scores
//     attention_backward   dq, dk, dv of the rows, in one (B, L, 3, H, K) buffer; dk, dv of the prompts, by image
//
// A task is one head of one image. Its 200 keys of 64 numbers lie in the cache whole: scores are formed at once, and
// backward works on their transpose, so that three of its five products take their factors as they are. All of it is in
// float32, whatever the dtype of the rows.

#include "common.h"

namespace {

using namespace upt_fast;
constexpr int64_t QUERIES = 256;  // rows of scores at a time

void multiply(
    int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc,
    bool add = false) {
  at::native::cpublas::brgemm(m, n, k, lda, ldb, ldc, add, a, b, c, false);
}

// rows (n, K) with a distance, as contiguous float32; float rows that are not copied are returned as they are
template <typename T>
void gather(const T* from, int64_t distance, int64_t n, int64_t K, float* into) {
  for (int64_t r = 0; r < n; ++r)
    lanes(K, [&](int64_t i, int64_t m) { write(into + r * K + i, read(from + r * distance + i, m), m); });
}

template <typename T>
void scatter(const float* from, int64_t n, int64_t K, T* into, int64_t distance) {
  for (int64_t r = 0; r < n; ++r)
    lanes(K, [&](int64_t i, int64_t m) { write(into + r * distance + i, read(from + r * K + i, m), m); });
}

void transpose(const float* from, int64_t rows, int64_t columns, float* into) {
  at::vec::transpose_mxn<float>(from, columns, into, rows, static_cast<int>(rows), static_cast<int>(columns));
}

// scores -> probabilities in place; returns the log-sum-exp
template <typename T>
float softmax(float* s, int64_t n) {
  Vec highest(-std::numeric_limits<float>::infinity());
  float top = -std::numeric_limits<float>::infinity();
  int64_t i = 0;
  for (; i + Vec::size() <= n; i += Vec::size()) highest = at::vec::maximum(highest, Vec::loadu(s + i));
  if (i > 0) top = at::vec::vec_reduce_all<float>([](Vec& a, Vec& b) { return at::vec::maximum(a, b); }, highest);
  for (; i < n; ++i) top = s[i] > top || std::isnan(s[i]) ? s[i] : top;
  Vec total(0);
  lanes(n, [&](int64_t j, int64_t m) {
    const Vec e = exponential<T>(read(s + j, m) - Vec(top));
    write(s + j, e, m);
    total = total + (m == Vec::size() ? e : Vec::set(Vec(0), e, m));
  });
  const float all = sum(total), inverse = 1.0f / all;
  lanes(n, [&](int64_t j, int64_t m) { write(s + j, read(s + j, m) * Vec(inverse), m); });
  return top + std::log(all);
}

template <typename T>
void attention_of(const Tensor& q, const Tensor& k, const Tensor& v, int64_t H, const Tensor& out, const Tensor& lse) {
  const int64_t B = k.size(0), total = k.size(1), D = k.size(2), K = D / H, L = q.numel() / (B * D);
  const T *pq = data<T>(q), *pk = data<T>(k), *pv = data<T>(v);
  T* po = data<T>(out);
  float* pl = data<float>(lse);
  const int64_t block = std::min(L, QUERIES);
  at::parallel_for(0, B * H, 1, [&](int64_t begin, int64_t end) {
    float* memory = scratch<float>(0, 3 * total * K + block * total + 2 * block * K).data();
    float *kh = memory, *kt = kh + total * K, *vh = kt + total * K, *s = vh + total * K, *qh = s + block * total;
    float* oh = qh + block * K;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / H, h = task % H;
      gather(pk + b * total * D + h * K, D, total, K, kh);
      gather(pv + b * total * D + h * K, D, total, K, vh);
      transpose(kh, total, K, kt);
      for (int64_t first = 0; first < L; first += block) {
        const int64_t rows = std::min(block, L - first), at = (b * L + first) * D + h * K;
        gather(pq + at, D, rows, K, qh);
        multiply(rows, total, K, qh, K, kt, total, s, total);
        for (int64_t r = 0; r < rows; ++r) pl[task * L + first + r] = softmax<T>(s + r * total, total);
        multiply(rows, K, total, s, total, vh, K, oh, K);
        scatter(oh, rows, K, po + at, D);
      }
    }
    at::native::cpublas::brgemm_release(false);
  });
}

template <typename T>
void attention_backward_of(
    const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v, int64_t H, const Tensor& out,
    const Tensor& lse, const Tensor& dqkv, const Tensor& dk_prefix, const Tensor& dv_prefix) {
  const int64_t B = k.size(0), total = k.size(1), D = k.size(2), K = D / H, L = q.numel() / (B * D), P = total - L;
  const T *pq = data<T>(q), *pk = data<T>(k), *pv = data<T>(v), *po = data<T>(out), *pd = data<T>(dout);
  const float* pl = data<float>(lse);
  T *rows_grad = data<T>(dqkv), *dkp = data<T>(dk_prefix), *dvp = data<T>(dv_prefix);
  const int64_t block = std::min(L, QUERIES);
  at::parallel_for(0, B * H, 1, [&](int64_t begin, int64_t end) {
    float* memory = scratch<float>(0, 4 * total * K + 6 * block * K + 3 * block * total + block).data();
    float *kh = memory, *vh = kh + total * K, *dk = vh + total * K, *dv = dk + total * K;
    float *qh = dv + total * K, *qt = qh + block * K, *dh = qt + block * K, *dt = dh + block * K;
    float *oh = dt + block * K, *dq = oh + block * K;
    float *p = dq + block * K, *ds = p + block * total, *turned = ds + block * total, *delta = turned + block * total;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / H, h = task % H;
      gather(pk + b * total * D + h * K, D, total, K, kh);
      gather(pv + b * total * D + h * K, D, total, K, vh);
      for (int64_t first = 0; first < L; first += block) {
        const int64_t rows = std::min(block, L - first), at = (b * L + first) * D + h * K;
        const float* logs = pl + task * L + first;
        gather(pq + at, D, rows, K, qh);
        gather(pd + at, D, rows, K, dh);
        gather(po + at, D, rows, K, oh);
        for (int64_t r = 0; r < rows; ++r) {
          Vec all(0);
          lanes(K, [&](int64_t i, int64_t m) { all = all + read(dh + r * K + i, m) * read(oh + r * K + i, m); });
          delta[r] = sum(all);
        }
        transpose(qh, rows, K, qt);
        transpose(dh, rows, K, dt);
        multiply(total, rows, K, kh, K, qt, rows, p, rows);  // scores, (keys, queries)
        multiply(total, rows, K, vh, K, dt, rows, ds, rows);
        for (int64_t t = 0; t < total; ++t)
          lanes(rows, [&](int64_t i, int64_t m) {
            float *pt = p + t * rows + i, *dst = ds + t * rows + i;
            const Vec probability = exponential<T>(read(pt, m) - read(logs + i, m));
            write(pt, probability, m);
            write(dst, probability * (read(dst, m) - read(delta + i, m)), m);
          });
        multiply(total, K, rows, p, rows, dh, K, dv, K, first > 0);
        multiply(total, K, rows, ds, rows, qh, K, dk, K, first > 0);
        transpose(ds, total, rows, turned);
        multiply(rows, K, total, turned, total, kh, K, dq, K);
        scatter(dq, rows, K, rows_grad + (b * L + first) * 3 * D + h * K, 3 * D);
      }
      scatter(dk + P * K, L, K, rows_grad + b * L * 3 * D + D + h * K, 3 * D);
      scatter(dv + P * K, L, K, rows_grad + b * L * 3 * D + 2 * D + h * K, 3 * D);
      scatter(dk, P, K, dkp + b * P * D + h * K, D);
      scatter(dv, P, K, dvp + b * P * D + h * K, D);
    }
    at::native::cpublas::brgemm_release(false);
  });
}

void check_heads(const Tensor& q, const Tensor& k, const Tensor& v, int64_t H, const Tensor& lse) {
  TORCH_CHECK(q.scalar_type() == at::kFloat || q.scalar_type() == at::kBFloat16, "wanted float32 or bfloat16");
  check(q, q, "q");
  check(k, q, "k");
  check(v, q, "v");
  TORCH_CHECK(k.dim() == 3 && v.sizes() == k.sizes() && H > 0 && k.size(2) % H == 0, "k and v must be (B, P + L, D)");
  TORCH_CHECK(k.numel() > 0 && q.numel() % (k.size(0) * k.size(2)) == 0, "q does not fit k");
  TORCH_CHECK(q.numel() / k.size(2) <= k.size(0) * k.size(1), "more queries than keys");
  TORCH_CHECK(lse.is_contiguous() && lse.scalar_type() == at::kFloat, "lse must be contiguous float32");
  TORCH_CHECK(lse.numel() == q.numel() / k.size(2) * H, "lse does not fit q");
}

void attention(const Tensor& q, const Tensor& k, const Tensor& v, int64_t H, const Tensor& out, const Tensor& lse) {
  check_heads(q, k, v, H, lse);
  check(out, q, "out");
  TORCH_CHECK(out.numel() == q.numel(), "out does not fit q");
  BY_DTYPE(attention_of, q, q, k, v, H, out, lse);
}

void attention_backward(
    const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v, int64_t H, const Tensor& out,
    const Tensor& lse, const Tensor& dqkv, const Tensor& dk_prefix, const Tensor& dv_prefix) {
  check_heads(q, k, v, H, lse);
  for (const auto& t : {dout, out}) {
    check(t, q, "dout, out");
    TORCH_CHECK(t.numel() == q.numel(), "dout and out must fit q");
  }
  for (const auto& t : {dk_prefix, dv_prefix}) {
    check(t, q, "dk_prefix, dv_prefix");
    TORCH_CHECK(t.numel() == k.numel() - q.numel(), "dk_prefix and dv_prefix must fit k's rows before the own ones");
  }
  check(dqkv, q, "dqkv");
  TORCH_CHECK(dqkv.numel() == 3 * q.numel(), "dqkv must be three times q");
  BY_DTYPE(attention_backward_of, q, dout, q, k, v, H, out, lse, dqkv, dk_prefix, dv_prefix);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(upt_fast_cpu, m) {
  m.def(
      "attention(Tensor q, Tensor k, Tensor v, int num_heads, Tensor(a!) out, Tensor(b!) lse) -> ()", &attention);
  m.def(
      "attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, int num_heads, Tensor out, Tensor lse, "
      "Tensor(a!) dqkv, Tensor(b!) dk_prefix, Tensor(c!) dv_prefix) -> ()",
      &attention_backward);
}
