// Causal attention of packed class names over [the set's shared prompts ; the class's own rows so far]; attention's
// scale is in the queries.
//
//     packed_attention            out = softmax(q k^T) v
//     packed_attention_backward   dq, dk, dv of the rows, dk, dv of the prompts
//
// A class has three or four rows, so everything is a dot product or a sum of a few rows of a head, in registers and the
// nearest cache, and backward computes the scores again. A task is one head of a group of classes; the prompts'
// gradients are summed over groups in order, so that any number of threads gives the same bits. All of it is in float32,
// whatever the dtype of the rows.

#include "common.h"

namespace {

using namespace upt_fast;
constexpr int64_t GROUPS = 8;       // of a set's classes, at most
constexpr int64_t GROUP_ROWS = 64;  // at least

template <typename T>
float dot(const float* a, const T* b, int64_t n) {
  Vec all(0);
  lanes(n, [&](int64_t i, int64_t m) {
    const Vec product = read(a + i, m) * read(b + i, m);
    all = all + (m == Vec::size() ? product : Vec::set(Vec(0), product, m));
  });
  return sum(all);
}

// to += factor from
template <typename T>
void add(float* to, float factor, const T* from, int64_t n) {
  const Vec f(factor);
  lanes(n, [&](int64_t i, int64_t m) { write(to + i, at::vec::fmadd(f, read(from + i, m), read(to + i, m)), m); });
}

template <typename T, typename S>
void copy(T* to, const S* from, int64_t n) {
  lanes(n, [&](int64_t i, int64_t m) { write(to + i, read(from + i, m), m); });
}

// scores -> probabilities
void softmax(float* s, int64_t n) {
  float top = s[0], total = 0;
  for (int64_t j = 1; j < n; ++j) top = s[j] > top || std::isnan(s[j]) ? s[j] : top;
  lanes(n, [&](int64_t j, int64_t m) { write(s + j, (read(s + j, m) - Vec(top)).exp(), m); });
  for (int64_t j = 0; j < n; ++j) total += s[j];
  for (int64_t j = 0; j < n; ++j) s[j] /= total;
}

// One head's rows, a distance D = H K apart, and its set's prompts
template <typename T>
struct Head {
  const T *k, *v, *prefix_k, *prefix_v;
  int64_t P, D, K;

  // probabilities of a query over the prompts and n own rows that begin at row
  void probabilities(const float* q, int64_t row, int64_t n, float* p) const {
    for (int64_t j = 0; j < P; ++j) p[j] = dot(q, prefix_k + j * D, K);
    for (int64_t j = 0; j < n; ++j) p[P + j] = dot(q, k + (row + j) * D, K);
    softmax(p, P + n);
  }
};

// f(task, set, head, first class, end) over all groups of all sets and heads
template <typename F>
void by_group(const int64_t* sets, int64_t S, const int64_t* first, int64_t H, const F& f) {
  at::parallel_for(0, S * H * GROUPS, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t s = task / (H * GROUPS), h = task / GROUPS % H, g = task % GROUPS;
      const int64_t classes = sets[s + 1] - sets[s], rows = first[sets[s + 1]] - first[sets[s]];
      const int64_t groups = std::clamp<int64_t>(rows / GROUP_ROWS, 1, GROUPS), size = (classes + groups - 1) / groups;
      const int64_t from = std::min(g * size, classes), to = std::min(from + size, classes);
      f(task, s, h, sets[s] + from, sets[s] + to);
    }
  });
}

int64_t longest(const int64_t* first, int64_t classes) {
  int64_t n = 0;
  for (int64_t c = 0; c < classes; ++c) n = std::max(n, first[c + 1] - first[c]);
  return n;
}

template <typename T>
void forward_of(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& prefix_k, const Tensor& prefix_v,
    const int64_t* first, const int64_t* sets, bool last_only, const Tensor& out) {
  const int64_t H = k.size(1), K = k.size(2), D = H * K, S = prefix_k.size(0), P = prefix_k.size(1);
  const int64_t most = P + longest(first, sets[S]);
  by_group(sets, S, first, H, [&](int64_t, int64_t s, int64_t h, int64_t from, int64_t to) {
    float *p = scratch<float>(0, most + 2 * K), *query = p + most, *o = query + K;
    const int64_t shared = s * P * D + h * K;
    const Head<T> head{
        data<T>(k) + h * K, data<T>(v) + h * K, data<T>(prefix_k) + shared, data<T>(prefix_v) + shared, P, D, K};
    for (int64_t c = from; c < to; ++c) {
      const int64_t row = first[c], length = first[c + 1] - row;
      for (int64_t r = last_only ? length - 1 : 0; r < length; ++r) {
        const int64_t at = (last_only ? c : row + r) * D + h * K;
        copy(query, data<T>(q) + at, K);
        head.probabilities(query, row, r + 1, p);
        std::fill(o, o + K, 0.0f);
        for (int64_t j = 0; j < P; ++j) add(o, p[j], head.prefix_v + j * D, K);
        for (int64_t j = 0; j <= r; ++j) add(o, p[P + j], head.v + (row + j) * D, K);
        copy(data<T>(out) + at, o, K);
      }
    }
  });
}

template <typename T>
void backward_of(
    const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& prefix_k,
    const Tensor& prefix_v, const int64_t* first, const int64_t* sets, bool last_only, const std::optional<Tensor>& dq,
    const std::optional<Tensor>& dk, const std::optional<Tensor>& dv, const Tensor& dprefix_k,
    const Tensor& dprefix_v) {
  const int64_t H = k.size(1), K = k.size(2), D = H * K, S = prefix_k.size(0), P = prefix_k.size(1);
  const int64_t most = longest(first, sets[S]), part = 2 * P * K;
  const Tensor parts = at::zeros({S * H * GROUPS * part}, q.options().dtype(at::kFloat));
  by_group(sets, S, first, H, [&](int64_t task, int64_t s, int64_t h, int64_t from, int64_t to) {
    float* p = scratch<float>(0, 2 * (P + most) + 3 * K + 2 * most * K);
    float *dp = p + P + most, *query = dp + P + most, *grad = query + K, *dquery = grad + K, *own_k = dquery + K;
    float *own_v = own_k + most * K, *shared_k = parts.data_ptr<float>() + task * part, *shared_v = shared_k + P * K;
    const int64_t shared = s * P * D + h * K;
    const Head<T> head{
        data<T>(k) + h * K, data<T>(v) + h * K, data<T>(prefix_k) + shared, data<T>(prefix_v) + shared, P, D, K};
    for (int64_t c = from; c < to; ++c) {
      const int64_t row = first[c], length = first[c + 1] - row;
      std::fill(own_k, own_k + length * K, 0.0f);
      std::fill(own_v, own_v + length * K, 0.0f);
      for (int64_t r = last_only ? length - 1 : 0; r < length; ++r) {
        const int64_t at = (last_only ? c : row + r) * D + h * K, n = P + r + 1;
        copy(query, data<T>(q) + at, K);
        copy(grad, data<T>(dout) + at, K);
        head.probabilities(query, row, r + 1, p);
        for (int64_t j = 0; j < P; ++j) dp[j] = dot(grad, head.prefix_v + j * D, K);
        for (int64_t j = 0; j <= r; ++j) dp[P + j] = dot(grad, head.v + (row + j) * D, K);
        float mean = 0;
        for (int64_t j = 0; j < n; ++j) mean += p[j] * dp[j];
        for (int64_t j = 0; j < n; ++j) dp[j] = p[j] * (dp[j] - mean);
        std::fill(dquery, dquery + K, 0.0f);
        for (int64_t j = 0; j < P; ++j) {
          add(dquery, dp[j], head.prefix_k + j * D, K);
          add(shared_k + j * K, dp[j], query, K);
          add(shared_v + j * K, p[j], grad, K);
        }
        for (int64_t j = 0; j <= r; ++j) {
          add(dquery, dp[P + j], head.k + (row + j) * D, K);
          add(own_k + j * K, dp[P + j], query, K);
          add(own_v + j * K, p[P + j], grad, K);
        }
        if (dq) copy(data<T>(*dq) + at, dquery, K);
      }
      for (int64_t r = 0; r < length; ++r) {
        const int64_t at = (row + r) * D + h * K;
        if (dk) copy(data<T>(*dk) + at, own_k + r * K, K);
        if (dv) copy(data<T>(*dv) + at, own_v + r * K, K);
      }
    }
  });
  at::parallel_for(0, S * H, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      float* total = parts.data_ptr<float>() + i * GROUPS * part;
      for (int64_t g = 1; g < GROUPS; ++g) add(total, 1.0f, total + g * part, part);
      for (int64_t j = 0; j < P; ++j) {
        const int64_t at = ((i / H) * P + j) * D + i % H * K;
        copy(data<T>(dprefix_k) + at, total + j * K, K);
        copy(data<T>(dprefix_v) + at, total + (P + j) * K, K);
      }
    }
  });
}

void check_rows(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& prefix_k, const Tensor& prefix_v,
    const Tensor& first, const Tensor& sets, bool last_only) {
  TORCH_CHECK(q.scalar_type() == at::kFloat || q.scalar_type() == at::kBFloat16, "wanted float32 or bfloat16");
  for (const auto& t : {q, k, v, prefix_k, prefix_v}) check(t, q, "q, k, v and the prompts'");
  TORCH_CHECK(k.dim() == 3 && v.sizes() == k.sizes(), "k and v must be (N, H, K)");
  TORCH_CHECK(
      prefix_k.dim() == 4 && prefix_v.sizes() == prefix_k.sizes() && prefix_k.size(2) == k.size(1) &&
          prefix_k.size(3) == k.size(2),
      "prefix_k and prefix_v must be (S, P, H, K)");
  for (const auto& t : {first, sets})
    TORCH_CHECK(t.scalar_type() == at::kLong && t.dim() == 1 && t.is_contiguous() && t.numel() > 0, "wanted int64 bounds");
  const int64_t classes = first.numel() - 1;
  const int64_t *pf = first.data_ptr<int64_t>(), *ps = sets.data_ptr<int64_t>();
  TORCH_CHECK(sets.numel() == prefix_k.size(0) + 1 && ps[0] == 0 && ps[sets.numel() - 1] == classes, "sets do not fit");
  TORCH_CHECK(std::is_sorted(ps, ps + sets.numel()), "sets must ascend");
  TORCH_CHECK(pf[0] == 0 && pf[classes] == k.size(0), "first does not fit ", k.size(0), " rows");
  for (int64_t c = 0; c < classes; ++c) TORCH_CHECK(pf[c] < pf[c + 1], "class ", c, " has no rows");
  TORCH_CHECK(
      q.dim() == 3 && q.size(0) == (last_only ? classes : k.size(0)) && q.size(1) == k.size(1) && q.size(2) == k.size(2),
      "q does not fit k");
}

void packed_attention(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& prefix_k, const Tensor& prefix_v,
    const Tensor& first, const Tensor& sets, bool last_only, const Tensor& out) {
  check_rows(q, k, v, prefix_k, prefix_v, first, sets, last_only);
  check(out, q, "out");
  TORCH_CHECK(out.sizes() == q.sizes(), "out does not fit q");
  by_dtype(q, [&](auto type) {
    forward_of<decltype(type)>(
        q, k, v, prefix_k, prefix_v, first.data_ptr<int64_t>(), sets.data_ptr<int64_t>(), last_only, out);
  });
}

void packed_attention_backward(
    const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& prefix_k,
    const Tensor& prefix_v, const Tensor& first, const Tensor& sets, bool last_only, const std::optional<Tensor>& dq,
    const std::optional<Tensor>& dk, const std::optional<Tensor>& dv, const Tensor& dprefix_k,
    const Tensor& dprefix_v) {
  check_rows(q, k, v, prefix_k, prefix_v, first, sets, last_only);
  check(dout, q, "dout");
  TORCH_CHECK(dout.sizes() == q.sizes() && (!dq || dq->sizes() == q.sizes()), "dout and dq must fit q");
  for (const auto& t : {dk, dv}) TORCH_CHECK(!t || t->sizes() == k.sizes(), "dk and dv must fit k");
  for (const auto& t : {dq, dk, dv})
    if (t) check(*t, q, "dq, dk, dv");
  for (const auto& t : {dprefix_k, dprefix_v}) {
    check(t, q, "the prompts' gradients");
    TORCH_CHECK(t.sizes() == prefix_k.sizes(), "the prompts' gradients must fit them");
  }
  by_dtype(q, [&](auto type) {
    backward_of<decltype(type)>(
        dout, q, k, v, prefix_k, prefix_v, first.data_ptr<int64_t>(), sets.data_ptr<int64_t>(), last_only, dq, dk, dv,
        dprefix_k, dprefix_v);
  });
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(upt_fast_cpu, m) {
  m.def(
      "packed_attention(Tensor q, Tensor k, Tensor v, Tensor prefix_k, Tensor prefix_v, Tensor first, Tensor sets, "
      "bool last_only, Tensor(a!) out) -> ()",
      torch::dispatch(c10::kCPU, &packed_attention));
  m.def(
      "packed_attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor prefix_k, Tensor prefix_v, "
      "Tensor first, Tensor sets, bool last_only, Tensor(a!)? dq, Tensor(b!)? dk, Tensor(c!)? dv, "
      "Tensor(d!) dprefix_k, Tensor(e!) dprefix_v) -> ()",
      torch::dispatch(c10::kCPU, &packed_attention_backward));
}
