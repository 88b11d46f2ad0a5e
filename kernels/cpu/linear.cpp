// Products with frozen weights on a CPU with AVX-512: the LayerNorm in front and the elementwise work behind are done
// on panels of rows while they are in the cache, and results go straight to where they are kept.
//
//     norm_linear            out = act(norm(x) W + b), and act' of the same where it is wanted
//     linear_residual        out = residual + a W + b
//     linear_times           out = (dy W) slope, which is act'
//     linear_norm_backward   out = dy + the gradient of x, given d W as that of norm(x); dy may be absent
//
// The micro-kernel is oneDNN's batch-reduce GEMM, which PyTorch exports. Its factors come packed (engine/cpu/library.py):
// (N / NB, K, NB) in float32, (N / NB, K / 2, NB, 2) in bfloat16, N padded with zeros. On processors where PyTorch's own
// product is so much faster that the results' way through memory pays, it multiplies, and the rest is done in passes
// before and behind (choices.py finds out). Accumulation, LayerNorm and everything elementwise are in float32.
// Activations: 0 none, 1 silu, 2 gelu, 3 tanh gelu.

#include "common.h"

namespace {

using namespace upt_fast;
constexpr int64_t NB = 64;           // columns of a packed block
constexpr int64_t LONG_K = 1024;     // beyond it a panel is accumulated over parts of K
constexpr int64_t PART_K = 768;
constexpr int64_t LIBRARY_ROWS = 2048;  // of a product by PyTorch, at most, so that few results lie between
constexpr int64_t ROWS_A_TASK = 16;

// A frozen factor (K, N) and how rows are multiplied with it
struct Factor {
  const Tensor& values;  // packed; for PyTorch (K, N), of any strides
  int64_t panel;         // rows of a panel at most; 0: by PyTorch
};

template <typename T>
inline Vec sigmoid(const Vec& u) {
  return reciprocal<T>(Vec(1) + exponential<T>(u.neg()));
}

// act(u) and act'(u), which share their exponentials
template <typename T>
inline std::pair<Vec, Vec> activate(const Vec& u, int64_t kind) {
  if (kind == 1) {
    const Vec s = sigmoid<T>(u);
    return {u * s, s * (Vec(1) + u * (Vec(1) - s))};
  }
  if (kind == 2) {
    const Vec below = Vec(0.5f) * (Vec(1) + (u * Vec(static_cast<float>(M_SQRT1_2))).erf());
    return {u * below, below + u * exponential<T>(u * u * Vec(-0.5f)) * Vec(0.3989422804014327f)};
  }
  const Vec t = (Vec(0.7978845608028654f) * (u + Vec(0.044715f) * u * u * u)).tanh();
  const Vec slope = Vec(0.7978845608028654f) * (Vec(1) + Vec(0.134145f) * u * u);
  return {Vec(0.5f) * u * (Vec(1) + t), Vec(0.5f) * (Vec(1) + t) + Vec(0.5f) * u * (Vec(1) - t * t) * slope};
}

// Multiplies rows with a frozen factor of N columns. prepare(row, rows, into) returns the first of rows and their
// distance; it may write them into `into`. finish(row, rows, column, columns, c, distance) takes results, float32 from
// the micro-kernel and of the rows' dtype from PyTorch; with whole_rows all columns at once.
template <typename T, typename Prepare, typename Finish>
void in_panels(
    int64_t M, int64_t K, int64_t N, const T* packed, int64_t most, const Prepare& prepare, const Finish& finish,
    bool whole_rows) {
  constexpr bool vnni = !std::is_same_v<T, float>;
  const int64_t threads = at::get_num_threads();
  const int64_t panels = threads * ((M + threads * most - 1) / (threads * most));
  const int64_t height = (M + panels - 1) / panels, blocks = (N + NB - 1) / NB;
  const bool whole = whole_rows || K > LONG_K;  // all columns of a panel at once, K in parts
  const int64_t distance = whole ? blocks * NB : NB;
  at::parallel_for(0, panels, 1, [&](int64_t begin, int64_t end) {
    float* c = scratch<float>(0, height * distance);
    T* into = scratch<T>(1, Prepare::copies ? height * K : 0);
    for (int64_t p = begin; p < end; ++p) {
      const int64_t row = p * height, rows = std::min(height, M - row);
      if (rows <= 0) break;
      const auto [a, lda] = prepare(row, rows, into);
      for (int64_t k = 0; whole && k < K; k += PART_K) {
        const int64_t part = std::min(PART_K, K - k);
        for (int64_t j = 0; j < blocks; ++j) {
          at::native::cpublas::brgemm(
              rows, NB, part, lda, NB, distance, k > 0, a + k, packed + (j * K + k) * NB, c + j * NB, vnni);
        }
      }
      if (whole) {
        finish(row, rows, 0, N, c, distance);
        continue;
      }
      for (int64_t j = 0; j < blocks; ++j) {
        at::native::cpublas::brgemm(rows, NB, K, lda, NB, NB, false, a, packed + j * K * NB, c, vnni);
        finish(row, rows, j * NB, std::min(NB, N - j * NB), c, NB);
      }
    }
    at::native::cpublas::brgemm_release(vnni);
  });
}

template <typename T, typename Prepare, typename Finish>
void by_library(int64_t M, int64_t K, int64_t N, const Tensor& values, const Prepare& prepare, const Finish& finish) {
  const int64_t parts = (M + LIBRARY_ROWS - 1) / LIBRARY_ROWS, height = (M + parts - 1) / parts;
  T *c = scratch<T>(0, height * N), *into = scratch<T>(1, Prepare::copies ? height * K : 0);
  for (int64_t row = 0; row < M; row += height) {
    const int64_t rows = std::min(height, M - row);
    if (Prepare::copies)
      at::parallel_for(0, rows, ROWS_A_TASK, [&](int64_t b, int64_t e) { prepare(row + b, e - b, into + b * K); });
    T* a = Prepare::copies ? into : const_cast<T*>(prepare(row, rows, into).first);
    const Tensor left = at::from_blob(a, {rows, K}, values.options());
    Tensor product = at::from_blob(c, {rows, N}, values.options());
    at::mm_out(product, left, values);
    at::parallel_for(0, rows, ROWS_A_TASK, [&](int64_t b, int64_t e) { finish(row + b, e - b, 0, N, c + b * N, N); });
  }
}

// Rows as they lie.
template <typename T>
struct AsTheyLie {
  static constexpr bool copies = false;
  const T* rows;
  int64_t K;
  std::pair<const T*, int64_t> operator()(int64_t row, int64_t, T*) const {
    return {rows + row * K, K};
  }
};

template <typename T, typename Prepare, typename Finish>
void products(
    int64_t M, int64_t K, int64_t N, const Factor& factor, const Prepare& prepare, const Finish& finish,
    bool whole_rows = false) {
  if (M == 0) return;
  if (factor.panel == 0) {
    by_library<T>(M, K, N, factor.values, prepare, finish);
  } else {
    in_panels<T>(M, K, N, data<T>(factor.values), factor.panel, prepare, finish, whole_rows);
  }
}

// one row's mean and 1 / standard deviation
template <typename T>
inline std::pair<float, float> moments(const T* x, int64_t n, double eps) {
  Vec total(0);
  lanes(n, [&](int64_t i, int64_t m) { total = total + read(x + i, m); });  // short loads are filled with zeros
  const float mean = sum(total) / static_cast<float>(n);
  Vec squares(0);
  lanes(n, [&](int64_t i, int64_t m) {
    const Vec d = read(x + i, m) - Vec(mean);
    squares = squares + (m == Vec::size() ? d * d : Vec::set(Vec(0), d * d, m));
  });
  const float variance = sum(squares) / static_cast<float>(n);
  return {mean, static_cast<float>(1.0 / std::sqrt(static_cast<double>(variance) + eps))};
}

// Rows normalised, their moments kept.
template <typename T>
struct Normalize {
  static constexpr bool copies = true;
  const T* x;
  float *mean, *rstd;
  int64_t K;
  double eps;
  std::pair<const T*, int64_t> operator()(int64_t row, int64_t rows, T* into) const {
    for (int64_t r = 0; r < rows; ++r) {
      const T* from = x + (row + r) * K;
      const auto [m, s] = moments(from, K, eps);
      mean[row + r] = m;
      rstd[row + r] = s;
      lanes(K, [&, m = m, s = s](int64_t i, int64_t n) {
        write(into + r * K + i, (read(from + i, n) - Vec(m)) * Vec(s), n);
      });
    }
    return {into, K};
  }
};

template <typename T>
void norm_linear_of(
    const Tensor& x, double eps, const Factor& factor, int64_t N, const std::optional<Tensor>& bias, int64_t act,
    const std::optional<Tensor>& slope, at::TensorList outs, at::IntArrayRef length, at::IntArrayRef stride,
    at::IntArrayRef first, const Tensor& mean, const Tensor& rstd) {
  const int64_t M = x.size(0), K = x.size(1), width = N / static_cast<int64_t>(outs.size());
  const T* px = data<T>(x);
  float *pm = data<float>(mean), *pr = data<float>(rstd);
  const T* pb = bias ? data<T>(*bias) : nullptr;
  T* ps = slope ? data<T>(*slope) : nullptr;
  std::vector<T*> po;
  for (const auto& out : outs) po.push_back(data<T>(out));
  const Normalize<T> prepare{px, pm, pr, K, eps};
  auto finish = [&](int64_t row, int64_t rows, int64_t column, int64_t columns, const auto* c, int64_t distance) {
    for (int64_t done = 0; done < columns;) {  // a block of columns may reach into the next output
      const int64_t o = (column + done) / width, inside = (column + done) % width;
      const int64_t n = std::min(columns - done, width - inside);
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t source = row + r;
        const int64_t target = length[o] ? source / length[o] * stride[o] + first[o] + source % length[o] : source;
        T* to = po[o] + target * width + inside;
        lanes(n, [&](int64_t i, int64_t m) {
          Vec v = read(c + r * distance + done + i, m);
          if (pb) v = v + read(pb + column + done + i, m);
          if (act) {
            const auto [value, derivative] = activate<T>(v, act);
            if (ps) write(ps + source * width + inside + i, derivative, m);
            v = value;
          }
          write(to + i, v, m);
        });
      }
      done += n;
    }
  };
  products<T>(M, K, N, factor, prepare, finish);
}

template <typename T>
void linear_residual_of(
    const Tensor& a, const Factor& factor, int64_t N, const std::optional<Tensor>& bias,
    const std::optional<Tensor>& residual, const Tensor& out) {
  const int64_t M = a.size(0), K = a.size(1);
  const T *pa = data<T>(a), *pb = bias ? data<T>(*bias) : nullptr, *px = residual ? data<T>(*residual) : nullptr;
  T* po = data<T>(out);
  const AsTheyLie<T> prepare{pa, K};
  auto finish = [&](int64_t row, int64_t rows, int64_t column, int64_t columns, const auto* c, int64_t distance) {
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t at = (row + r) * N + column;
      lanes(columns, [&](int64_t i, int64_t n) {
        Vec v = read(c + r * distance + i, n);
        if (pb) v = v + read(pb + column + i, n);
        if (px) v = v + read(px + at + i, n);
        write(po + at + i, v, n);
      });
    }
  };
  products<T>(M, K, N, factor, prepare, finish);
}

template <typename T>
void linear_times_of(const Tensor& dy, const Factor& factor, int64_t N, const Tensor& slope, const Tensor& out) {
  const int64_t M = dy.size(0), K = dy.size(1);
  const T *pd = data<T>(dy), *ps = data<T>(slope);
  T* po = data<T>(out);
  const AsTheyLie<T> prepare{pd, K};
  auto finish = [&](int64_t row, int64_t rows, int64_t column, int64_t columns, const auto* c, int64_t distance) {
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t at = (row + r) * N + column;
      lanes(columns, [&](int64_t i, int64_t n) {
        write(po + at + i, read(c + r * distance + i, n) * read(ps + at + i, n), n);
      });
    }
  };
  products<T>(M, K, N, factor, prepare, finish);
}

template <typename T>
void linear_norm_backward_of(
    const Tensor& d, const Factor& factor, int64_t N, const Tensor& x, const Tensor& mean, const Tensor& rstd,
    const std::optional<Tensor>& dy, const Tensor& out) {
  const int64_t M = d.size(0), K = d.size(1);
  const T *pd = data<T>(d), *px = data<T>(x), *py = dy ? data<T>(*dy) : nullptr;
  const float *pm = data<float>(mean), *pr = data<float>(rstd);
  T* po = data<T>(out);
  const float scale = 1.0f / static_cast<float>(N);
  const AsTheyLie<T> prepare{pd, K};
  auto finish = [&](int64_t row, int64_t rows, int64_t, int64_t, const auto* c, int64_t distance) {
    for (int64_t r = 0; r < rows; ++r) {
      const auto* g = c + r * distance;
      const T *xr = px + (row + r) * N, *yr = py ? py + (row + r) * N : nullptr;
      T* to = po + (row + r) * N;
      const Vec m(pm[row + r]), s(pr[row + r]);
      Vec total(0), product(0);
      lanes(N, [&](int64_t i, int64_t n) {
        Vec gv = read(g + i, n), h = (read(xr + i, n) - m) * s;
        if (n != Vec::size()) gv = Vec::set(Vec(0), gv, n);
        total = total + gv;
        product = product + (n == Vec::size() ? gv * h : Vec::set(Vec(0), gv * h, n));
      });
      const Vec a(sum(total) * scale), b(sum(product) * scale);
      lanes(N, [&](int64_t i, int64_t n) {
        const Vec h = (read(xr + i, n) - m) * s;
        const Vec dx = s * (read(g + i, n) - a - h * b);
        write(to + i, yr ? read(yr + i, n) + dx : dx, n);
      });
    }
  };
  products<T>(M, K, N, factor, prepare, finish, /*whole_rows=*/true);
}

void check_factor(const Tensor& factor, int64_t panel, const Tensor& rows, int64_t n) {
  TORCH_CHECK(rows.scalar_type() == at::kFloat || rows.scalar_type() == at::kBFloat16, "wanted float32 or bfloat16");
  TORCH_CHECK(rows.dim() == 2 && rows.is_contiguous() && rows.device().is_cpu(), "wanted contiguous rows on the CPU");
  TORCH_CHECK(factor.scalar_type() == rows.scalar_type() && factor.device().is_cpu(), "wanted a factor like the rows");
  const int64_t blocks = (n + NB - 1) / NB;
  const bool fits = panel == 0 ? factor.dim() == 2 && factor.size(0) == rows.size(1) && factor.size(1) == n
                               : panel > 0 && factor.dim() > 2 && factor.size(0) == blocks &&
          factor.numel() == blocks * NB * rows.size(1) && factor.is_contiguous();
  TORCH_CHECK(
      fits, "a factor of ", factor.sizes(), " and panels of ", panel, " do not fit rows of ", rows.size(1), " and ", n,
      " columns");
}

void norm_linear(
    const Tensor& x, double eps, const Tensor& factor, int64_t panel, const std::optional<Tensor>& bias, int64_t act,
    const std::optional<Tensor>& slope, at::TensorList outs, at::IntArrayRef length, at::IntArrayRef stride,
    at::IntArrayRef first, const Tensor& mean, const Tensor& rstd) {
  const int64_t width = outs[0].size(-1), N = width * static_cast<int64_t>(outs.size());
  check_factor(factor, panel, x, N);
  for (const auto& out : outs) check(out, x, "out");
  if (bias) check(*bias, x, "bias");
  if (slope) check(*slope, x, "slope");
  TORCH_CHECK(
      mean.numel() == x.size(0) && rstd.numel() == x.size(0) && mean.scalar_type() == at::kFloat &&
          rstd.scalar_type() == at::kFloat,
      "mean and rstd must be float32 with one number a row");
  TORCH_CHECK(!bias || bias->numel() == N, "bias of ", bias->numel(), "; wanted ", N);
  TORCH_CHECK(!slope || slope->numel() == x.size(0) * N, "slope does not fit ", x.size(0), " rows of ", N);
  for (size_t o = 0; o < outs.size(); ++o) {
    TORCH_CHECK(outs[o].size(-1) == width, "outs differ in width");
    const int64_t rows = x.size(0);
    const int64_t last = length[o] ? (rows - 1) / length[o] * stride[o] + first[o] + (rows - 1) % length[o] : rows - 1;
    TORCH_CHECK(rows == 0 || last < outs[o].numel() / width, "out ", o, " is too small for ", rows, " rows");
  }
  by_dtype(x, [&](auto type) {
    norm_linear_of<decltype(type)>(x, eps, {factor, panel}, N, bias, act, slope, outs, length, stride, first, mean, rstd);
  });
}

void linear_residual(
    const Tensor& a, const Tensor& factor, int64_t panel, const std::optional<Tensor>& bias,
    const std::optional<Tensor>& residual, const Tensor& out) {
  check_factor(factor, panel, a, out.size(-1));
  check(out, a, "out");
  if (bias) check(*bias, a, "bias");
  if (residual) check(*residual, a, "residual");
  TORCH_CHECK(!bias || bias->numel() == out.size(-1), "bias of ", bias->numel(), "; wanted ", out.size(-1));
  TORCH_CHECK(out.numel() == a.size(0) * out.size(-1), "out does not fit ", a.size(0), " rows");
  TORCH_CHECK(!residual || residual->numel() == out.numel(), "residual does not fit out");
  by_dtype(a, [&](auto type) {
    linear_residual_of<decltype(type)>(a, {factor, panel}, out.size(-1), bias, residual, out);
  });
}

void linear_times(
    const Tensor& dy, const Tensor& factor, int64_t panel, const Tensor& slope, const Tensor& out) {
  check_factor(factor, panel, dy, out.size(-1));
  check(slope, dy, "slope");
  check(out, dy, "out");
  TORCH_CHECK(out.numel() == dy.size(0) * out.size(-1) && slope.numel() == out.numel(), "slope and out must fit dy's rows");
  by_dtype(dy, [&](auto type) {
    linear_times_of<decltype(type)>(dy, {factor, panel}, out.size(-1), slope, out);
  });
}

void linear_norm_backward(
    const Tensor& d, const Tensor& factor, int64_t panel, const Tensor& x, const Tensor& mean, const Tensor& rstd,
    const std::optional<Tensor>& dy, const Tensor& out) {
  check_factor(factor, panel, d, out.size(-1));
  check(x, d, "x");
  if (dy) check(*dy, d, "dy");
  check(out, d, "out");
  const int64_t numbers = d.size(0) * out.size(-1);
  TORCH_CHECK(
      out.numel() == numbers && x.numel() == numbers && (!dy || dy->numel() == numbers) && mean.numel() == d.size(0) &&
          rstd.numel() == d.size(0) && mean.scalar_type() == at::kFloat && rstd.scalar_type() == at::kFloat,
      "x, dy, out, mean and rstd must fit d's rows");
  by_dtype(d, [&](auto type) {
    linear_norm_backward_of<decltype(type)>(d, {factor, panel}, out.size(-1), x, mean, rstd, dy, out);
  });
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(upt_fast_cpu, m) {
  m.def(
      "norm_linear(Tensor x, float eps, Tensor factor, int panel, Tensor? bias, int act, Tensor(a!)? slope, "
      "Tensor[] outs, int[] length, int[] stride, int[] first, Tensor(b!) mean, Tensor(c!) rstd) -> ()",
      torch::dispatch(c10::kCPU, &norm_linear));
  m.def(
      "linear_residual(Tensor a, Tensor factor, int panel, Tensor? bias, Tensor? residual, Tensor(a!) out) -> ()",
      torch::dispatch(c10::kCPU, &linear_residual));
  m.def(
      "linear_times(Tensor dy, Tensor factor, int panel, Tensor slope, Tensor(a!) out) -> ()",
      torch::dispatch(c10::kCPU, &linear_times));
  m.def(
      "linear_norm_backward(Tensor d, Tensor factor, int panel, Tensor x, Tensor mean, Tensor rstd, Tensor? dy, "
      "Tensor(a!) out) -> ()",
      torch::dispatch(c10::kCPU, &linear_norm_backward));
}
