// Attention of each image's rows over [prompts ; own rows], without mask; attention's scale is in the queries.
//
//     attention            out = softmax(q k^T) v, and the log-sum-exp of each row's scores
//     attention_backward   dq, dk, dv of the rows, in one (B, L, 3, H, K) buffer; dk, dv of the prompts, by image
//
// A task is one head of one image. Its 200 keys of 64 numbers lie in the cache whole: scores are formed at once, and
// backward works on their transpose, so that three of its five products take their factors as they are. In bfloat16 the
// products take bfloat16 and accumulate in float32; their second factors come in pairs of rows. Scores, softmax and sums
// are in float32 in both. Rows begin at cache lines; `fill` makes the bfloat16 products' sizes multiples of 32 as well.

#include "common.h"

namespace {

using namespace upt_fast;
constexpr int64_t QUERIES = 256;  // rows of scores at a time

void multiply(
    int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc,
    bool add = false) {
  at::native::cpublas::brgemm(m, n, k, lda, ldb, ldc, add, a, b, c, false);
}

// b in pairs of rows, (k / 2, ldb, 2)
void multiply(
    int64_t m, int64_t n, int64_t k, const BFloat16* a, int64_t lda, const BFloat16* b, int64_t ldb, float* c,
    int64_t ldc, bool add = false) {
  at::native::cpublas::brgemm(m, n, k, lda, ldb, ldc, add, a, b, c, true);
}

// How far the second of two factors' sizes goes in bfloat16: tiles of matrices want their rows and sums full, for
// which zeros are added; vectors do not
int64_t filled(int64_t n, bool fill) {
  return fill ? lines<BFloat16>(n) : n + n % 2;
}

// rows (n, K) with a distance, made contiguous
void gather(const float* from, int64_t distance, int64_t n, int64_t K, float* into) {
  for (int64_t r = 0; r < n; ++r)
    lanes(K, [&](int64_t i, int64_t m) { write(into + r * K + i, read(from + r * distance + i, m), m); });
}

// factor[r] times row r of (n, K)
template <typename T>
void scatter(const float* from, int64_t n, int64_t K, T* into, int64_t distance, const float* factor = nullptr) {
  for (int64_t r = 0; r < n; ++r) {
    const Vec f(factor ? factor[r] : 1.0f);
    lanes(K, [&](int64_t i, int64_t m) { write(into + r * distance + i, read(from + r * K + i, m) * f, m); });
  }
}

void transpose(const float* from, int64_t distance, int64_t rows, int64_t columns, float* into, int64_t step) {
  at::vec::transpose_mxn<float>(from, distance, into, step, static_cast<int>(rows), static_cast<int>(columns));
}

void transpose(const BFloat16* from, int64_t distance, int64_t rows, int64_t columns, BFloat16* into, int64_t step) {
  constexpr int64_t TILE = 32;
  for (int64_t r = 0; r < rows; r += TILE)
    for (int64_t c = 0; c < columns; c += TILE)
      at::vec::transpose_mxn<BFloat16>(
          from + r * distance + c, distance, into + c * step + r, step, static_cast<int>(std::min(TILE, rows - r)),
          static_cast<int>(std::min(TILE, columns - c)));
}

// rows (n, K) -> (K / 2, step, 2): their transpose, in pairs of rows
void transposed_pairs(const BFloat16* from, int64_t distance, int64_t n, int64_t K, BFloat16* into, int64_t step) {
  at::vec::transpose_mxn<float>(
      reinterpret_cast<const float*>(from), distance / 2, reinterpret_cast<float*>(into), step, static_cast<int>(n),
      static_cast<int>(K / 2));
}

// 16 numbers of a row and of the next one, interleaved
inline void write_pairs(BFloat16* into, __m256i row, __m256i next, int64_t n = Vec::size()) {
  const __m512i high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(next), 16);
  _mm512_mask_storeu_epi32(into, first_lanes(n), _mm512_or_si512(_mm512_cvtepu16_epi32(row), high));
}

// rows (n, K) in pairs, (even(n) / 2, K, 2), an odd last one beside zeros
void pairs(const BFloat16* from, int64_t distance, int64_t n, int64_t K, BFloat16* into) {
  for (int64_t r = 0; r < n; r += 2)
    lanes(K, [&](int64_t i, int64_t m) {
      const BFloat16* row = from + r * distance + i;
      const __m256i next =
          r + 1 < n ? _mm256_maskz_loadu_epi16(first_lanes(m), row + distance) : _mm256_setzero_si256();
      write_pairs(into + r * K + 2 * i, _mm256_maskz_loadu_epi16(first_lanes(m), row), next, m);
    });
}

// columns from..to of each of n rows
void zero_columns(BFloat16* x, int64_t distance, int64_t n, int64_t from, int64_t to) {
  for (int64_t r = 0; r < n; ++r) std::fill(x + r * distance + from, x + r * distance + to, BFloat16(0.0f));
}

// exp(s - max) of one row of scores; the row's log-sum-exp and 1 / sum
template <typename T>
std::pair<float, float> exponentials(const float* s, int64_t n, T* e) {
  Vec highest(-std::numeric_limits<float>::infinity());
  float top = -std::numeric_limits<float>::infinity();
  int64_t i = 0;
  for (; i + Vec::size() <= n; i += Vec::size()) highest = at::vec::maximum(highest, Vec::loadu(s + i));
  if (i > 0) top = at::vec::vec_reduce_all<float>([](Vec& a, Vec& b) { return at::vec::maximum(a, b); }, highest);
  for (; i < n; ++i) top = s[i] > top || std::isnan(s[i]) ? s[i] : top;
  Vec total(0);
  lanes(n, [&](int64_t j, int64_t m) {
    const Vec value = exponential<T>(read(s + j, m) - Vec(top));
    write(e + j, value, m);
    total = total + (m == Vec::size() ? value : Vec::set(Vec(0), value, m));
  });
  const float all = sum(total);
  return {top + std::log(all), 1.0f / all};
}

// sums of a_r b_r over each of n rows
template <typename T>
void row_products(const T* a, const T* b, int64_t distance, int64_t n, int64_t K, float* out) {
  for (int64_t r = 0; r < n; ++r) {
    Vec all(0);
    lanes(K, [&](int64_t i, int64_t m) {
      all = all + read(a + r * distance + i, m) * read(b + r * distance + i, m);  // short reads are filled with zeros
    });
    out[r] = sum(all);
  }
}

void attention_of(
    const float* q, const float* k, const float* v, int64_t B, int64_t H, int64_t L, int64_t total, int64_t K,
    bool /*fill*/, float* out, float* lse) {
  const int64_t D = H * K, block = std::min(L, QUERIES), keys = lines<float>(total);
  at::parallel_for(0, B * H, 1, [&](int64_t begin, int64_t end) {
    Parts<float> parts(0, {total * K, K * keys, total * K, block * keys, block * K, block * K, block});
    float *kh = parts.take(total * K), *kt = parts.take(K * keys), *vh = parts.take(total * K);
    float *s = parts.take(block * keys), *qh = parts.take(block * K), *oh = parts.take(block * K);
    float* factor = parts.take(block);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / H, h = task % H;
      gather(k + b * total * D + h * K, D, total, K, kh);
      gather(v + b * total * D + h * K, D, total, K, vh);
      transpose(kh, K, total, K, kt, keys);
      for (int64_t first = 0; first < L; first += block) {
        const int64_t rows = std::min(block, L - first), at = (b * L + first) * D + h * K;
        gather(q + at, D, rows, K, qh);
        multiply(rows, total, K, qh, K, kt, keys, s, keys);
        for (int64_t r = 0; r < rows; ++r) {
          float* row = s + r * keys;
          std::tie(lse[task * L + first + r], factor[r]) = exponentials(row, total, row);
        }
        multiply(rows, K, total, s, keys, vh, K, oh, K);
        scatter(oh, rows, K, out + at, D, factor);
      }
    }
    at::native::cpublas::brgemm_release(false);
  });
}

void attention_of(
    const BFloat16* q, const BFloat16* k, const BFloat16* v, int64_t B, int64_t H, int64_t L, int64_t total, int64_t K,
    bool fill, BFloat16* out, float* lse) {
  const int64_t D = H * K, block = std::min(L, QUERIES), keys = lines<BFloat16>(total), sum = filled(total, fill);
  at::parallel_for(0, B * H, 1, [&](int64_t begin, int64_t end) {
    Parts<float> floats(0, {block * keys, block * K, block});
    float *s = floats.take(block * keys), *oh = floats.take(block * K), *factor = floats.take(block);
    Parts<BFloat16> parts(1, {K * keys, keys * K, block * keys});
    BFloat16 *kt = parts.take(K * keys), *vp = parts.take(keys * K), *p = parts.take(block * keys);
    std::fill(kt, kt + K * keys, BFloat16(0.0f));  // columns and rows that fill a line up: they add zeros
    std::fill(vp, vp + keys * K, BFloat16(0.0f));
    zero_columns(p, keys, block, total, keys);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / H, h = task % H;
      transposed_pairs(k + b * total * D + h * K, D, total, K, kt, keys);
      pairs(v + b * total * D + h * K, D, total, K, vp);
      for (int64_t first = 0; first < L; first += block) {
        const int64_t rows = std::min(block, L - first), at = (b * L + first) * D + h * K;
        multiply(rows, fill ? keys : total, K, q + at, D, kt, keys, s, keys);
        for (int64_t r = 0; r < rows; ++r)
          std::tie(lse[task * L + first + r], factor[r]) = exponentials(s + r * keys, total, p + r * keys);
        multiply(rows, K, sum, p, keys, vp, K, oh, K);
        scatter(oh, rows, K, out + at, D, factor);
      }
    }
    at::native::cpublas::brgemm_release(true);
  });
}

void attention_backward_of(
    const float* dout, const float* q, const float* k, const float* v, int64_t B, int64_t H, int64_t L, int64_t total,
    int64_t K, bool /*fill*/, const float* out, const float* lse, float* dqkv, float* dk_prefix, float* dv_prefix) {
  const int64_t D = H * K, P = total - L, block = std::min(L, QUERIES), keys = lines<float>(total);
  const int64_t across = lines<float>(block);
  at::parallel_for(0, B * H, 1, [&](int64_t begin, int64_t end) {
    const int64_t of_keys = total * K, of_rows = block * K, turned_rows = K * across, scores = total * across;
    Parts<float> parts(
        0, {of_keys, of_keys, of_keys, of_keys, of_rows, of_rows, of_rows, turned_rows, turned_rows, scores, scores,
            block * keys, block});
    float *kh = parts.take(of_keys), *vh = parts.take(of_keys), *dk = parts.take(of_keys), *dv = parts.take(of_keys);
    float *qh = parts.take(of_rows), *dh = parts.take(of_rows), *dq = parts.take(of_rows);
    float *qt = parts.take(turned_rows), *dt = parts.take(turned_rows);
    float *p = parts.take(scores), *ds = parts.take(scores), *turned = parts.take(block * keys);
    float* delta = parts.take(block);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / H, h = task % H;
      gather(k + b * total * D + h * K, D, total, K, kh);
      gather(v + b * total * D + h * K, D, total, K, vh);
      for (int64_t first = 0; first < L; first += block) {
        const int64_t rows = std::min(block, L - first), at = (b * L + first) * D + h * K;
        const float* logs = lse + task * L + first;
        gather(q + at, D, rows, K, qh);
        gather(dout + at, D, rows, K, dh);
        row_products(dout + at, out + at, D, rows, K, delta);
        transpose(qh, K, rows, K, qt, across);
        transpose(dh, K, rows, K, dt, across);
        multiply(total, rows, K, kh, K, qt, across, p, across);  // scores, (keys, queries)
        multiply(total, rows, K, vh, K, dt, across, ds, across);
        for (int64_t t = 0; t < total; ++t)
          lanes(rows, [&](int64_t i, int64_t m) {
            float *pt = p + t * across + i, *dst = ds + t * across + i;
            const Vec probability = exponential<float>(read(pt, m) - read(logs + i, m));
            write(pt, probability, m);
            write(dst, probability * (read(dst, m) - read(delta + i, m)), m);
          });
        multiply(total, K, rows, p, across, dh, K, dv, K, first > 0);
        multiply(total, K, rows, ds, across, qh, K, dk, K, first > 0);
        transpose(ds, across, total, rows, turned, keys);
        multiply(rows, K, total, turned, keys, kh, K, dq, K);
        scatter(dq, rows, K, dqkv + (b * L + first) * 3 * D + h * K, 3 * D);
      }
      scatter(dk + P * K, L, K, dqkv + b * L * 3 * D + D + h * K, 3 * D);
      scatter(dv + P * K, L, K, dqkv + b * L * 3 * D + 2 * D + h * K, 3 * D);
      scatter(dk, P, K, dk_prefix + b * P * D + h * K, D);
      scatter(dv, P, K, dv_prefix + b * P * D + h * K, D);
    }
    at::native::cpublas::brgemm_release(false);
  });
}

void attention_backward_of(
    const BFloat16* dout, const BFloat16* q, const BFloat16* k, const BFloat16* v, int64_t B, int64_t H, int64_t L,
    int64_t total, int64_t K, bool fill, const BFloat16* out, const float* lse, BFloat16* dqkv, BFloat16* dk_prefix,
    BFloat16* dv_prefix) {
  const int64_t D = H * K, P = total - L, block = std::min(L, QUERIES), keys = lines<BFloat16>(total);
  const int64_t across = lines<BFloat16>(block);
  at::parallel_for(0, B * H, 1, [&](int64_t begin, int64_t end) {
    const int64_t scores = total * across;
    Parts<float> floats(0, {scores, scores, total * K, total * K, K * across, block * K, block});
    float *s = floats.take(scores), *ds = floats.take(scores), *dk = floats.take(total * K);
    float *dv = floats.take(total * K), *dqt = floats.take(K * across), *dq = floats.take(block * K);
    float* delta = floats.take(block);
    const int64_t turned = K * across, paired = across * K, of_pairs = keys * across;
    Parts<BFloat16> parts(1, {K * keys, turned, turned, paired, paired, scores, scores, of_pairs});
    BFloat16 *kt = parts.take(K * keys), *qt = parts.take(turned), *dt = parts.take(turned), *qp = parts.take(paired);
    BFloat16 *dp = parts.take(paired), *p16 = parts.take(scores), *ds16 = parts.take(scores);
    BFloat16* ds_pairs = parts.take(of_pairs);
    // what fills a line up adds zeros
    for (auto [x, n] : {std::pair(kt, K * keys), {qt, turned}, {dt, turned}, {qp, paired}, {dp, paired},
                        {p16, scores}, {ds16, scores}, {ds_pairs, of_pairs}})
      std::fill(x, x + n, BFloat16(0.0f));
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / H, h = task % H;
      const BFloat16 *kh = k + b * total * D + h * K, *vh = v + b * total * D + h * K;
      transpose(kh, D, total, K, kt, keys);
      for (int64_t first = 0; first < L; first += block) {
        const int64_t rows = std::min(block, L - first), at = (b * L + first) * D + h * K;
        const float* logs = lse + task * L + first;
        if (rows < block) {  // the last rows leave those of the block before behind
          for (auto [x, n] : {std::pair(qp, paired), {dp, paired}}) std::fill(x, x + n, BFloat16(0.0f));
          for (auto x : {p16, ds16}) zero_columns(x, across, total, rows, across);
        }
        transposed_pairs(q + at, D, rows, K, qt, across);
        transposed_pairs(dout + at, D, rows, K, dt, across);
        pairs(q + at, D, rows, K, qp);
        pairs(dout + at, D, rows, K, dp);
        row_products(dout + at, out + at, D, rows, K, delta);
        const int64_t columns = fill ? across : rows, sum = filled(rows, fill);
        multiply(total, columns, K, kh, D, qt, across, s, across);  // scores, (keys, queries)
        multiply(total, columns, K, vh, D, dt, across, ds, across);
        for (int64_t t = 0; t < total; t += 2) {
          lanes(rows, [&](int64_t i, int64_t m) {
            const Vec log = read(logs + i, m), mean = read(delta + i, m);
            const auto row = [&](int64_t t) {
              const Vec probability = exponential<BFloat16>(read(s + t * across + i, m) - log);
              _mm256_mask_storeu_epi16(p16 + t * across + i, first_lanes(m), rounded(probability));
              const __m256i d = rounded(probability * (read(ds + t * across + i, m) - mean));
              _mm256_mask_storeu_epi16(ds16 + t * across + i, first_lanes(m), d);
              return d;
            };
            const __m256i d = row(t);
            write_pairs(ds_pairs + t * across + 2 * i, d, t + 1 < total ? row(t + 1) : _mm256_setzero_si256(), m);
          });
        }
        multiply(total, K, sum, p16, across, dp, K, dv, K, first > 0);
        multiply(total, K, sum, ds16, across, qp, K, dk, K, first > 0);
        multiply(K, columns, filled(total, fill), kt, keys, ds_pairs, across, dqt, across);
        transpose(dqt, across, K, rows, dq, K);
        scatter(dq, rows, K, dqkv + (b * L + first) * 3 * D + h * K, 3 * D);
      }
      scatter(dk + P * K, L, K, dqkv + b * L * 3 * D + D + h * K, 3 * D);
      scatter(dv + P * K, L, K, dqkv + b * L * 3 * D + 2 * D + h * K, 3 * D);
      scatter(dk, P, K, dk_prefix + b * P * D + h * K, D);
      scatter(dv, P, K, dv_prefix + b * P * D + h * K, D);
    }
    at::native::cpublas::brgemm_release(true);
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
  TORCH_CHECK(q.scalar_type() == at::kFloat || k.size(2) / H % 2 == 0, "heads of odd width in bfloat16");
}

void attention(
    const Tensor& q, const Tensor& k, const Tensor& v, int64_t H, bool fill, const Tensor& out, const Tensor& lse) {
  check_heads(q, k, v, H, lse);
  check(out, q, "out");
  TORCH_CHECK(out.numel() == q.numel(), "out does not fit q");
  const int64_t B = k.size(0), total = k.size(1), K = k.size(2) / H, L = q.numel() / (B * k.size(2));
  by_dtype(q, [&](auto type) {
    using T = decltype(type);
    attention_of(data<T>(q), data<T>(k), data<T>(v), B, H, L, total, K, fill, data<T>(out), data<float>(lse));
  });
}

void attention_backward(
    const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v, int64_t H, bool fill,
    const Tensor& out, const Tensor& lse, const Tensor& dqkv, const Tensor& dk_prefix, const Tensor& dv_prefix) {
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
  const int64_t B = k.size(0), total = k.size(1), K = k.size(2) / H, L = q.numel() / (B * k.size(2));
  by_dtype(q, [&](auto type) {
    using T = decltype(type);
    attention_backward_of(
        data<T>(dout), data<T>(q), data<T>(k), data<T>(v), B, H, L, total, K, fill, data<T>(out),
        data<float>(lse), data<T>(dqkv), data<T>(dk_prefix), data<T>(dv_prefix));
  });
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(upt_fast_cpu, m) {
  m.def(
      "attention(Tensor q, Tensor k, Tensor v, int num_heads, bool fill, Tensor(a!) out, Tensor(b!) lse) -> ()",
      torch::dispatch(c10::kCPU, &attention));
  m.def(
      "attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, int num_heads, bool fill, Tensor out, "
      "Tensor lse, Tensor(a!) dqkv, Tensor(b!) dk_prefix, Tensor(c!) dv_prefix) -> ()",
      torch::dispatch(c10::kCPU, &attention_backward));
}
