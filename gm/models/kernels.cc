// The layers of SDXL for CPUs: value and gradient by the input, weights are constants.
//
// gm/models/fused.py compiles this file at first use and calls it through MindSpore's custom operators. Tensors are
// float32 rows of positions; matrices of weights are float32 or bfloat16, and set the precision of their products.
// Matrix products come from the oneDNN library inside MindSpore, everything around them is one pass over memory.

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

using bf16 = uint16_t;

// oneDNN's BLAS-like functions: row-major C = A B + beta C; without a thread pool they use the calling thread alone.
extern "C" {
int dnnl_threadpool_interop_sgemm(char ta, char tb, int64_t m, int64_t n, int64_t k, float alpha, const float* a,
                                  int64_t lda, const float* b, int64_t ldb, float beta, float* c, int64_t ldc,
                                  void* pool);
int dnnl_threadpool_interop_gemm_bf16bf16f32(char ta, char tb, int64_t m, int64_t n, int64_t k, float alpha,
                                             const bf16* a, int64_t lda, const bf16* b, int64_t ldb, float beta,
                                             float* c, int64_t ldc, void* pool);
int dnnl_threadpool_interop_set_max_concurrency(int threads);
}

namespace {

// ---------------------------------------------------------------- threads

int num_threads = 1;  // set once, by SetThreads

// Threads that share the tasks of one kernel at a time. They spin for a moment before they sleep: the next kernel
// usually follows at once.
class Pool {
 public:
  using Task = std::function<void(int64_t task, int worker)>;

  explicit Pool(int size) : size(size) {
    for (int i = 1; i < size; i++) std::thread([this, i] { work(i); }).detach();
  }

  void run(int64_t tasks, const Task& task) {
    if (tasks <= 1 || size == 1) {
      for (int64_t i = 0; i < tasks; i++) task(i, 0);
      return;
    }
    job_ = &task;
    tasks_ = tasks;
    next_ = 0;
    busy_ = size - 1;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      generation_++;
    }
    wake_.notify_all();
    take(0);
    for (int spin = 0; busy_.load() > 0; spin++) {
      if (spin < 20000)
        __builtin_ia32_pause();
      else
        std::this_thread::yield();
    }
  }

  const int size;

 private:
  void take(int worker) {
    for (int64_t i; (i = next_.fetch_add(1)) < tasks_;) (*job_)(i, worker);
  }

  void work(int worker) {
    for (int64_t seen = 0;;) {
      for (int spin = 0; spin < 20000 && generation_.load() == seen; spin++) __builtin_ia32_pause();
      if (generation_.load() == seen) {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return generation_.load() != seen; });
      }
      seen++;
      take(worker);
      busy_.fetch_sub(1);
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_;
  const Task* job_ = nullptr;
  int64_t tasks_ = 0;
  std::atomic<int64_t> next_{0}, generation_{0};
  std::atomic<int> busy_{0};
};

Pool& pool() {
  static Pool* const it = new Pool(num_threads);  // never deleted: its threads outlive main()
  return *it;
}

// Kernels take turns: each uses all threads, and they share the scratch memory.
std::unique_lock<std::mutex> turn() {
  static std::mutex mutex;
  return std::unique_lock<std::mutex>(mutex);
}

// Memory that is kept between calls, and never given back: threads may compute while the process ends.
template <class T>
struct Scratch {
  T* memory = nullptr;
  int64_t size = 0;
  T* get(int64_t n) {
    if (n > size) {
      delete[] memory;
      memory = new T[n];
      size = n;
    }
    return memory;
  }
};

// f(first, last) over 0..n in parts of at least `grain`.
template <class F>
void split(int64_t n, int64_t grain, F f) {
  const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(pool().size, n / std::max<int64_t>(grain, 1)));
  pool().run(parts, [&](int64_t i, int) { f(n * i / parts, n * (i + 1) / parts); });
}

constexpr int64_t GRAIN = 16384;  // elements that are worth another thread

int64_t rows_worth(int64_t width) { return GRAIN / width + 1; }

// ---------------------------------------------------------------- numbers

inline bf16 to_bf16(float x) {  // round to nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

inline float to_float(float x) { return x; }

inline float to_float(bf16 x) {
  const uint32_t bits = (uint32_t)x << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}

inline void store(float x, float& to) { to = x; }

inline void store(float x, bf16& to) { to = to_bf16(x); }

inline void convert(const float* from, bf16* to, int64_t n) {
  for (int64_t i = 0; i < n; i++) to[i] = to_bf16(from[i]);
}

inline void convert(const float* from, float* to, int64_t n) { std::memcpy(to, from, n * sizeof(float)); }

// exp within 1 unit in the last place or two; 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2]
inline float exp_(float x) {
  x = std::min(std::max(x, -87.0f), 88.0f);
  const float n = std::rint(x * 1.44269504f);
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.0f / 5040;
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const int32_t bits = ((int32_t)n + 127) << 23;
  float scale;
  std::memcpy(&scale, &bits, 4);
  return p * scale;
}

inline float sigmoid(float x) { return 1.0f / (1.0f + exp_(-x)); }

// The normal distribution function by Abramowitz and Stegun 7.1.26's form: erfc(z) = t P(t) exp(-z^2), with
// t = 1 / (1 + z / 2) and P a polynomial fitted by Chebyshev nodes, 3e-8 from it in exact arithmetic.
inline float normal_cdf(float x) {
  const float z = std::fabs(x) * 0.70710678f;
  const float t = 1.0f / (1.0f + 0.5f * z);
  float p = -0.0564758899f;
  p = p * t + 0.27208356f;
  p = p * t - 0.461669627f;
  p = p * t + 0.249234627f;
  p = p * t - 0.0070052195f;
  p = p * t + 0.194473376f;
  p = p * t + 0.245163488f;
  p = p * t + 0.282093091f;
  p = p * t + 0.282102566f;
  const float half_erfc = 0.5f * t * p * exp_(-z * z);
  return x < 0 ? half_erfc : 1.0f - half_erfc;
}

inline float normal_pdf(float x) { return 0.39894228f * exp_(-0.5f * x * x); }

// Activations: value and derivative.
struct SiLU {
  static float value(float x) { return x * sigmoid(x); }
  static float slope(float x) {
    const float s = sigmoid(x);
    return s * (1.0f + x * (1.0f - s));
  }
};

struct QuickGELU {
  static float value(float x) { return x * sigmoid(1.702f * x); }
  static float slope(float x) {
    const float s = sigmoid(1.702f * x);
    return s * (1.0f + 1.702f * x * (1.0f - s));
  }
};

struct GELU {
  static float value(float x) { return x * normal_cdf(x); }
  static float slope(float x) { return normal_cdf(x) + x * normal_pdf(x); }
};

struct Identity {
  static float value(float x) { return x; }
  static float slope(float) { return 1.0f; }
};

// ---------------------------------------------------------------- accounts

// What each kernel has cost so far: gm.models.fused.profile() reads it.
struct Account {
  int64_t calls = 0, operations = 0;  // of matrix products: a multiplication and an addition are two
  double seconds = 0;
};

auto& accounts = *new std::map<std::string, Account>;  // never deleted, as Scratch
std::atomic<int64_t> operations{0};
std::atomic<int> refused{0};  // oneDNN's status, where this processor cannot do a product

class Timer {
 public:
  explicit Timer(const char* name) : account_(accounts[name]), start_(Clock::now()), before_(operations) {}
  ~Timer() {
    account_.calls++;
    account_.operations += operations - before_;
    account_.seconds += std::chrono::duration<double>(Clock::now() - start_).count();
  }

 private:
  using Clock = std::chrono::steady_clock;
  Account& account_;
  const Clock::time_point start_;
  const int64_t before_;
};

// ---------------------------------------------------------------- matrix products

// C (m, n) = A B + beta C on this thread. A is (m, k), or (k, m) with ta 'T'; B likewise.
void gemm(char ta, char tb, int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb,
          float beta, float* c, int64_t ldc) {
  operations += 2 * m * n * k;
  dnnl_threadpool_interop_set_max_concurrency(1);
  refused |= dnnl_threadpool_interop_sgemm(ta, tb, m, n, k, 1.0f, a, lda, b, ldb, beta, c, ldc, nullptr);
}

void gemm(char ta, char tb, int64_t m, int64_t n, int64_t k, const bf16* a, int64_t lda, const bf16* b, int64_t ldb,
          float beta, float* c, int64_t ldc) {
  operations += 2 * m * n * k;
  dnnl_threadpool_interop_set_max_concurrency(1);
  refused |= dnnl_threadpool_interop_gemm_bf16bf16f32(ta, tb, m, n, k, 1.0f, a, lda, b, ldb, beta, c, ldc, nullptr);
}

// The same with a bias (n,) or null.
template <class T>
void multiply(char tb, int64_t m, int64_t n, int64_t k, const T* a, int64_t lda, const T* b, int64_t ldb, float beta,
              float* c, int64_t ldc, const float* bias) {
  gemm('N', tb, m, n, k, a, lda, b, ldb, beta, c, ldc);
  if (!bias) return;
  for (int64_t i = 0; i < m; i++)
    for (int64_t j = 0; j < n; j++) c[i * ldc + j] += bias[j];
}

// The same on all threads. Columns are shared out, so that weights are read once; rows where there are few columns.
template <class T>
void product(char tb, int64_t m, int64_t n, int64_t k, const T* a, int64_t lda, const T* b, int64_t ldb, float beta,
             float* c, int64_t ldc, const float* bias) {
  const int64_t grain = 1 + (1 << 20) / (m * k + 1);  // columns that are worth another thread
  if (n >= 64 * pool().size || m < 32) {
    split((n + 15) / 16, (std::max<int64_t>(grain, 32) + 15) / 16, [&](int64_t i, int64_t j) {
      const int64_t n0 = 16 * i, n1 = std::min(n, 16 * j);
      multiply(tb, m, n1 - n0, k, a, lda, b + (tb == 'T' ? n0 * ldb : n0), ldb, beta, c + n0, ldc,
               bias ? bias + n0 : nullptr);
    });
  } else {
    split(m, 1 + (1 << 20) / (n * k + 1), [&](int64_t i, int64_t j) {
      multiply(tb, j - i, n, k, a + i * lda, lda, b, ldb, beta, c + i * ldc, ldc, bias);
    });
  }
}

// The left side of a product in the weights' type.
const float* as_type_of(const float*, const float* x, int64_t) { return x; }

void convert_all(const float* x, bf16* y, int64_t n) {
  split(n, GRAIN, [&](int64_t i, int64_t j) { convert(x + i, y + i, j - i); });
}

const bf16* as_type_of(const bf16*, const float* x, int64_t n) {
  static Scratch<bf16> scratch;
  bf16* y = scratch.get(n);
  convert_all(x, y, n);
  return y;
}

// ---------------------------------------------------------------- convolution

struct Geometry {
  int64_t b, h, w, c, oh, ow, o, k, stride, top, left;
};

// The windows of x (b, h, w, c) at `count` positions of the output, counted in reading order, one a row of `to`.
template <class T>
void gather_windows(const Geometry& g, const T* x, int64_t first, int64_t count, T* to) {
  for (int64_t row = first; row < first + count; row++) {
    const int64_t n = row / (g.oh * g.ow), oy = row / g.ow % g.oh, ox = row % g.ow;
    for (int64_t ky = 0; ky < g.k; ky++)
      for (int64_t kx = 0; kx < g.k; kx++, to += g.c) {
        const int64_t iy = oy * g.stride + ky - g.top, ix = ox * g.stride + kx - g.left;
        if (iy < 0 || iy >= g.h || ix < 0 || ix >= g.w)
          std::memset(to, 0, g.c * sizeof(T));
        else
          std::memcpy(to, x + ((n * g.h + iy) * g.w + ix) * g.c, g.c * sizeof(T));
      }
  }
}

constexpr int64_t MANY_WINDOWS = 4 << 20, WINDOWS_OF_A_THREAD = 1 << 20;  // numbers

// y (b, oh, ow, o) = windows of x (b, h, w, c) times weight (o, k k c). Large maps are shared out by position, and each
// thread gathers windows that stay in its cache; for small ones the weights are more, and shared out by `product`.
template <class T>
void convolve(const Geometry& g, const float* x, const T* weight, const float* bias, float* y) {
  const int64_t width = g.k * g.k * g.c, rows = g.b * g.oh * g.ow, threads = pool().size;
  const T* source = as_type_of(weight, x, g.b * g.h * g.w * g.c);
  if (rows >= 2 * threads * g.o) {
    const int64_t block = std::min(std::max<int64_t>(64, WINDOWS_OF_A_THREAD / width), (rows + threads - 1) / threads);
    static auto& scratch = *new std::vector<Scratch<T>>(threads);
    pool().run((rows + block - 1) / block, [&](int64_t task, int worker) {
      const int64_t first = task * block, count = std::min(block, rows - first);
      T* windows = scratch[worker].get(block * width);
      gather_windows(g, source, first, count, windows);
      multiply('T', count, g.o, width, windows, width, weight, width, 0.0f, y + first * g.o, g.o, bias);
    });
    return;
  }
  const int64_t block = std::min(rows, std::max<int64_t>(256, MANY_WINDOWS / width));
  static Scratch<T> scratch;
  T* windows = scratch.get(block * width);
  for (int64_t first = 0; first < rows; first += block) {
    const int64_t count = std::min(block, rows - first);
    split(count, rows_worth(width),
          [&](int64_t i, int64_t j) { gather_windows(g, source, first + i, j - i, windows + i * width); });
    product('T', count, g.o, width, windows, width, weight, width, 0.0f, y + first * g.o, g.o, bias);
  }
}

// dx (b, h, w, c) = sum over the window's places of (dy, shifted) times that place's (o, c) part of the weight.
template <class T>
void convolve_gradient(const Geometry& g, const float* dy, const T* weight, float* dx) {
  const int64_t width = g.k * g.k * g.c, rows = g.b * g.h * g.w;
  const T* source = as_type_of(weight, dy, g.b * g.oh * g.ow * g.o);
  const int64_t block = std::min(rows, std::max<int64_t>(256, (1 << 20) / std::max(g.c, g.o)));
  static Scratch<T> scratch;
  T* shifted = scratch.get(block * g.o);
  for (int64_t first = 0; first < rows; first += block) {
    const int64_t count = std::min(block, rows - first);
    for (int64_t place = 0; place < g.k * g.k; place++) {
      const int64_t ky = place / g.k, kx = place % g.k;
      split(count, rows_worth(g.o), [&](int64_t i0, int64_t i1) {
        for (int64_t i = i0; i < i1; i++) {
          const int64_t row = first + i, n = row / (g.h * g.w);
          const int64_t sy = row / g.w % g.h + g.top - ky, sx = row % g.w + g.left - kx;
          const int64_t oy = sy / g.stride, ox = sx / g.stride;
          T* to = shifted + i * g.o;
          if (sy < 0 || sx < 0 || sy % g.stride || sx % g.stride || oy >= g.oh || ox >= g.ow)
            std::memset(to, 0, g.o * sizeof(T));
          else
            std::memcpy(to, source + ((n * g.oh + oy) * g.ow + ox) * g.o, g.o * sizeof(T));
        }
      });
      product('N', count, g.c, g.o, shifted, g.o, weight + place * g.c, width, place ? 1.0f : 0.0f, dx + first * g.c,
              g.c, nullptr);
    }
  }
}

// ---------------------------------------------------------------- normalisation

struct Moments {
  float mean, rstd;
};

Moments moments(const float* x, int64_t n, float eps) {
  float sum = 0, square = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; i++) sum += x[i];
  const float mean = sum / n;
#pragma omp simd reduction(+ : square)
  for (int64_t i = 0; i < n; i++) square += (x[i] - mean) * (x[i] - mean);
  return {mean, 1.0f / std::sqrt(square / n + eps)};
}

void layer_norm(const float* x, const float* gamma, const float* beta, float eps, int64_t rows, int64_t c, float* y) {
  split(rows, rows_worth(c), [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; r++) {
      const float* in = x + r * c;
      const auto [mean, rstd] = moments(in, c, eps);
      for (int64_t i = 0; i < c; i++) y[r * c + i] = (in[i] - mean) * rstd * gamma[i] + beta[i];
    }
  });
}

// dx = (g - mean(g) - x_hat mean(g x_hat)) / std, where g = dy gamma
void layer_norm_gradient(const float* dy, const float* x, const float* gamma, float eps, int64_t rows, int64_t c,
                         float* dx) {
  split(rows, rows_worth(c), [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; r++) {
      const float *in = x + r * c, *up = dy + r * c;
      const auto [mean, rstd] = moments(in, c, eps);
      float sum = 0, along = 0;
#pragma omp simd reduction(+ : sum, along)
      for (int64_t i = 0; i < c; i++) {
        const float g = up[i] * gamma[i];
        sum += g;
        along += g * (in[i] - mean);
      }
      const float shift = sum / c, slope = along * rstd * rstd / c;
      for (int64_t i = 0; i < c; i++) dx[r * c + i] = (up[i] * gamma[i] - shift - (in[i] - mean) * slope) * rstd;
    }
  });
}

// Sums over positions of f(row) for each sample and channel: f adds a row of (c,) numbers to `sums` arrays. In double
// beyond 64 rows, and in the same order whatever thread does what.
class ChannelSums {
 public:
  ChannelSums(int64_t b, int64_t length, int64_t c, int sums) : b(b), length(length), c(c), sums(sums) {
    parts = std::max<int64_t>(1, std::min<int64_t>(pool().size, length * c / GRAIN));
    partial.resize(b * parts * sums * c);
  }

  template <class F>
  void add(F f) {
    std::fill(partial.begin(), partial.end(), 0.0);
    pool().run(b * parts, [&](int64_t task, int) {
      const int64_t n = task / parts, p = task % parts, first = length * p / parts, last = length * (p + 1) / parts;
      std::vector<float> block(sums * c);
      double* total = partial.data() + task * sums * c;
      for (int64_t r = first; r < last; r++) {
        f(n, r, block.data());
        if ((r - first) % 64 == 63 || r == last - 1)
          for (int64_t i = 0; i < sums * c; i++) {
            total[i] += block[i];
            block[i] = 0;
          }
      }
    });
  }

  // Mean over the positions and channels of a group.
  double group_mean(int64_t n, int64_t group, int64_t channels, int which, const float* weight = nullptr) const {
    double sum = 0;
    for (int64_t p = 0; p < parts; p++)
      for (int64_t i = group * channels; i < (group + 1) * channels; i++)
        sum += partial[((n * parts + p) * sums + which) * c + i] * (weight ? weight[i] : 1.0f);
    return sum / (length * channels);
  }

 private:
  const int64_t b, length, c;
  const int sums;
  int64_t parts;
  std::vector<double> partial;
};

std::vector<Moments> group_moments(const float* x, int64_t b, int64_t length, int64_t c, int64_t groups, float eps) {
  std::vector<Moments> of(b * groups);
  std::vector<float> mean(b * c);
  const int64_t channels = c / groups;
  ChannelSums sums(b, length, c, 1);
  sums.add([&](int64_t n, int64_t r, float* sum) {
    const float* in = x + (n * length + r) * c;
    for (int64_t i = 0; i < c; i++) sum[i] += in[i];
  });
  for (int64_t n = 0; n < b; n++)
    for (int64_t i = 0; i < c; i++)
      mean[n * c + i] = i % channels ? mean[n * c + i - 1] : sums.group_mean(n, i / channels, channels, 0);
  sums.add([&](int64_t n, int64_t r, float* sum) {
    const float *in = x + (n * length + r) * c, *m = mean.data() + n * c;
    for (int64_t i = 0; i < c; i++) sum[i] += (in[i] - m[i]) * (in[i] - m[i]);
  });
  for (int64_t n = 0; n < b; n++)
    for (int64_t g = 0; g < groups; g++)
      of[n * groups + g] = {mean[n * c + g * channels],
                            (float)(1.0 / std::sqrt(sums.group_mean(n, g, channels, 0) + eps))};
  return of;
}

// y = act(x_hat gamma + beta), written as act(a x + d) with a and d a channel and sample.
struct Affine {
  std::vector<float> a, d;
  Affine(const std::vector<Moments>& of, const float* gamma, const float* beta, int64_t b, int64_t c, int64_t groups)
      : a(b * c), d(b * c) {
    for (int64_t n = 0; n < b; n++)
      for (int64_t i = 0; i < c; i++) {
        const Moments m = of[n * groups + i / (c / groups)];
        a[n * c + i] = m.rstd * gamma[i];
        d[n * c + i] = beta[i] - m.mean * a[n * c + i];
      }
  }
};

template <class Act>
void group_norm(const float* x, const float* gamma, const float* beta, int64_t b, int64_t length, int64_t c,
                int64_t groups, float eps, float* y) {
  const Affine f(group_moments(x, b, length, c, groups, eps), gamma, beta, b, c, groups);
  split(b * length, rows_worth(c), [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; r++) {
      const float *in = x + r * c, *a = f.a.data() + r / length * c, *d = f.d.data() + r / length * c;
      float* out = y + r * c;
      for (int64_t i = 0; i < c; i++) out[i] = Act::value(a[i] * in[i] + d[i]);
    }
  });
}

template <class Act>
void group_norm_gradient(const float* dy, const float* x, const float* gamma, const float* beta, int64_t b,
                         int64_t length, int64_t c, int64_t groups, float eps, float* dx) {
  const auto of = group_moments(x, b, length, c, groups, eps);
  const Affine f(of, gamma, beta, b, c, groups);
  const int64_t channels = c / groups;
  ChannelSums sums(b, length, c, 2);
  sums.add([&](int64_t n, int64_t r, float* sum) {  // of dz and dz x, where z = a x + d; dz is kept in dx
    const float *in = x + (n * length + r) * c, *up = dy + (n * length + r) * c;
    const float *a = f.a.data() + n * c, *d = f.d.data() + n * c;
    float* dz = dx + (n * length + r) * c;
    for (int64_t i = 0; i < c; i++) dz[i] = up[i] * Act::slope(a[i] * in[i] + d[i]);
    for (int64_t i = 0; i < c; i++) sum[i] += dz[i];
    for (int64_t i = 0; i < c; i++) sum[c + i] += dz[i] * in[i];
  });
  // As in layer_norm_gradient, with means over a group: dx = a dz - slope x + shift
  std::vector<float> slope(b * c), shift(b * c);
  for (int64_t n = 0; n < b; n++)
    for (int64_t i = 0; i < c; i++) {
      if (i % channels) {
        slope[n * c + i] = slope[n * c + i - 1];
        shift[n * c + i] = shift[n * c + i - 1];
        continue;
      }
      const int64_t g = i / channels;
      const double mean = of[n * groups + g].mean, rstd = of[n * groups + g].rstd;
      const double sum = sums.group_mean(n, g, channels, 0, gamma);
      const double along = sums.group_mean(n, g, channels, 1, gamma) - mean * sum;
      slope[n * c + i] = along * rstd * rstd * rstd;
      shift[n * c + i] = mean * along * rstd * rstd * rstd - sum * rstd;
    }
  split(b * length, rows_worth(c), [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; r++) {
      const int64_t n = r / length * c;
      const float* in = x + r * c;
      float* out = dx + r * c;
      for (int64_t i = 0; i < c; i++) out[i] = f.a[n + i] * out[i] - slope[n + i] * in[i] + shift[n + i];
    }
  });
}

// ---------------------------------------------------------------- attention

// Softmax of scale * s over the first `seen` of `n` numbers, zeros after them.
void softmax(float* s, float scale, int64_t seen, int64_t n) {
  float top = s[0], sum = 0;
#pragma omp simd reduction(max : top)
  for (int64_t i = 0; i < seen; i++) top = std::max(top, s[i]);
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < seen; i++) {
    s[i] = exp_((s[i] - top) * scale);
    sum += s[i];
  }
  const float share = 1.0f / sum;
  for (int64_t i = 0; i < seen; i++) s[i] *= share;
  std::fill(s + seen, s + n, 0.0f);
}

struct Heads {
  int64_t b, lq, lk, c, heads, d;
  bool causal;
  float scale() const { return 1.0f / std::sqrt((float)d); }
  int64_t rows() const { return std::min(lq, std::max<int64_t>(16, (1 << 18) / lk)); }  // of queries at a time
};

template <class T>
struct AttentionScratch {
  Scratch<float> p, dp;
  Scratch<T> p_t, ds_t;
};

// Probabilities of `count` queries from `first` on.
template <class T>
void probabilities(const Heads& g, const T* q, const T* k, int64_t first, int64_t count, float* p) {
  gemm('N', 'T', count, g.lk, g.d, q, g.c, k, g.c, 0.0f, p, g.lk);
  for (int64_t i = 0; i < count; i++) softmax(p + i * g.lk, g.scale(), g.causal ? first + i + 1 : g.lk, g.lk);
}

inline const float* typed(const float* x, float*, int64_t) { return x; }
inline const bf16* typed(const float* x, bf16* to, int64_t n) {
  convert(x, to, n);
  return to;
}

template <class T>
std::vector<AttentionScratch<T>>& attention_scratch() {
  static auto& of = *new std::vector<AttentionScratch<T>>(pool().size);
  return of;
}

template <class T>
void attention(const Heads& g, const T* q, const T* k, const T* v, float* out) {
  const int64_t rows = g.rows(), chunks = (g.lq + rows - 1) / rows;
  pool().run(g.b * g.heads * chunks, [&](int64_t task, int worker) {
    auto& scratch = attention_scratch<T>()[worker];
    const int64_t first = task % chunks * rows, count = std::min(rows, g.lq - first);
    const int64_t h = task / chunks % g.heads, n = task / chunks / g.heads;
    const int64_t at_q = (n * g.lq + first) * g.c + h * g.d, at_k = n * g.lk * g.c + h * g.d;
    float* p = scratch.p.get(rows * g.lk);
    probabilities(g, q + at_q, k + at_k, first, count, p);
    const T* pt = typed(p, scratch.p_t.get(rows * g.lk), count * g.lk);
    gemm('N', 'N', count, g.d, g.lk, pt, g.lk, v + at_k, g.c, 0.0f, out + at_q, g.c);
  });
}

// With p = softmax(s): dv = p^T do, ds = p (do v^T - rowsum(p do v^T)) (Dao et al. 2022, appendix B).
template <class T>
void attention_gradient(const Heads& g, const float* dout, const T* q, const T* k, const T* v, float* dq, float* dk,
                        float* dv) {
  const T* up = as_type_of(q, dout, g.b * g.lq * g.c);
  const int64_t rows = g.rows();
  pool().run(g.b * g.heads, [&](int64_t task, int worker) {
    auto& scratch = attention_scratch<T>()[worker];
    const int64_t h = task % g.heads, n = task / g.heads, at_k = n * g.lk * g.c + h * g.d;
    float *p = scratch.p.get(rows * g.lk), *dp = scratch.dp.get(rows * g.lk);
    T *p_t = scratch.p_t.get(rows * g.lk), *ds_t = scratch.ds_t.get(rows * g.lk);
    for (int64_t first = 0; first < g.lq; first += rows) {
      const int64_t count = std::min(rows, g.lq - first), at_q = (n * g.lq + first) * g.c + h * g.d;
      const float beta = first ? 1.0f : 0.0f;
      probabilities(g, q + at_q, k + at_k, first, count, p);
      gemm('N', 'T', count, g.lk, g.d, up + at_q, g.c, v + at_k, g.c, 0.0f, dp, g.lk);
      gemm('T', 'N', g.lk, g.d, count, typed(p, p_t, count * g.lk), g.lk, up + at_q, g.c, beta, dv + at_k, g.c);
      for (int64_t i = 0; i < count; i++) {
        float *pi = p + i * g.lk, *di = dp + i * g.lk, mean = 0;
#pragma omp simd reduction(+ : mean)
        for (int64_t j = 0; j < g.lk; j++) mean += pi[j] * di[j];
        for (int64_t j = 0; j < g.lk; j++) di[j] = pi[j] * (di[j] - mean) * g.scale();
      }
      const T* ds = typed(dp, ds_t, count * g.lk);
      gemm('N', 'N', count, g.d, g.lk, ds, g.lk, k + at_k, g.c, 0.0f, dq + at_q, g.c);
      gemm('T', 'N', g.lk, g.d, count, ds, g.lk, q + at_q, g.c, beta, dk + at_k, g.c);
    }
  });
}

// ---------------------------------------------------------------- elementwise

template <class Act>
void activate(const float* x, int64_t n, float* y) {
  split(n, GRAIN, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; i++) y[i] = Act::value(x[i]);
  });
}

template <class Act>
void activate_gradient(const float* dy, const float* x, int64_t n, float* dx) {
  split(n, GRAIN, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; i++) dx[i] = dy[i] * Act::slope(x[i]);
  });
}

// ---------------------------------------------------------------- GEGLU

constexpr int64_t GEGLU_BLOCK = 4 << 20;  // numbers of the product at a time

// y = value GELU(gate), where (value, gate) = x W^T + b, which is kept for the gradient.
template <class T>
void geglu(int64_t m, int64_t k, int64_t c, const float* x, const T* weight, const float* bias, float* y, T* kept) {
  const T* source = as_type_of(weight, x, m * k);
  const int64_t block = std::min(m, std::max<int64_t>(64, GEGLU_BLOCK / (2 * c)));
  static Scratch<float> scratch;
  float* both = scratch.get(block * 2 * c);
  for (int64_t first = 0; first < m; first += block) {
    const int64_t count = std::min(block, m - first);
    product('T', count, 2 * c, k, source + first * k, k, weight, k, 0.0f, both, 2 * c, bias);
    split(count, rows_worth(2 * c), [&](int64_t i0, int64_t i1) {
      for (int64_t i = i0; i < i1; i++) {
        const float *value = both + i * 2 * c, *gate = value + c;
        float* out = y + (first + i) * c;
        for (int64_t j = 0; j < c; j++) out[j] = value[j] * GELU::value(gate[j]);
        convert(value, kept + (first + i) * 2 * c, 2 * c);
      }
    });
  }
}

template <class T>
void geglu_gradient(int64_t m, int64_t k, int64_t c, const float* dy, const T* kept, const T* weight, float* dx) {
  const int64_t block = std::min(m, std::max<int64_t>(64, GEGLU_BLOCK / (2 * c)));
  static Scratch<T> scratch;
  T* slopes = scratch.get(block * 2 * c);
  for (int64_t first = 0; first < m; first += block) {
    const int64_t count = std::min(block, m - first);
    split(count, rows_worth(2 * c), [&](int64_t i0, int64_t i1) {
      for (int64_t i = i0; i < i1; i++) {
        const T *value = kept + (first + i) * 2 * c, *gate = value + c;
        const float* up = dy + (first + i) * c;
        T *dvalue = slopes + i * 2 * c, *dgate = dvalue + c;
        for (int64_t j = 0; j < c; j++) {
          const float g = to_float(gate[j]), p = normal_cdf(g);
          store(up[j] * g * p, dvalue[j]);
          store(up[j] * to_float(value[j]) * (p + g * normal_pdf(g)), dgate[j]);
        }
      }
    });
    product('N', count, k, 2 * c, slopes, 2 * c, weight, k, 0.0f, dx + first * k, k, nullptr);
  }
}

// ---------------------------------------------------------------- MindSpore's calls

// What a custom operator is called with: inputs, then outputs.
struct Call {
  void** data;
  int64_t** shape;
  const int* rank;
  const char** dtype;

  float* f(int i) const { return static_cast<float*>(data[i]); }
  int32_t setting(int i, int j) const { return static_cast<const int32_t*>(data[i])[j]; }
  int64_t dim(int i, int axis) const { return shape[i][axis < 0 ? rank[i] + axis : axis]; }
  int64_t size(int i) const {
    int64_t n = 1;
    for (int a = 0; a < rank[i]; a++) n *= shape[i][a];
    return n;
  }
  int64_t rows(int i) const { return size(i) / dim(i, -1); }
  bool is_bf16(int i) const { return std::strcmp(dtype[i], "int16") == 0; }
  const bf16* h(int i) const { return static_cast<const bf16*>(data[i]); }
};

float as_float(int32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

template <class F>
void with_activation(int32_t kind, F f) {
  switch (kind) {
    case 0:
      return f(Identity());
    case 1:
      return f(SiLU());
    case 2:
      return f(QuickGELU());
    default:
      return f(GELU());
  }
}

}  // namespace

bool known_dtypes(int count, const char** dtype) {
  return std::all_of(dtype, dtype + count, [](const char* d) {
    return !std::strcmp(d, "float32") || !std::strcmp(d, "int16") || !std::strcmp(d, "int32");
  });
}

// Writes a line "name calls seconds operations" a kernel, and starts all accounts anew.
extern "C" void TakeAccounts(char* text, int64_t size) {
  auto lock = turn();
  std::string lines;
  for (const auto& [name, a] : accounts)
    lines += name + " " + std::to_string(a.calls) + " " + std::to_string(a.seconds) + " " +
             std::to_string(a.operations) + "\n";
  std::strncpy(text, lines.c_str(), size - 1);
  accounts.clear();
}

// To be called once, before any other function.
extern "C" void SetThreads(int threads) { num_threads = threads; }

// On the calling thread alone.
extern "C" void ToBfloat16(const float* from, bf16* to, int64_t n) { convert(from, to, n); }

// Functions that MindSpore calls. Inputs and outputs are listed at each; the last input holds int32 settings.
#define KERNEL(name, ...)                                                                                     \
  extern "C" int name(int count, void** data, int* rank, int64_t** shape, const char** dtype, void*, void*) { \
    if (!known_dtypes(count, dtype)) return 1;                                                                \
    auto lock = turn();                                                                                   \
    const Timer timer(#name);                                                                                       \
    const Call call{data, shape, rank, dtype};                                                                \
    __VA_ARGS__                                                                                               \
    return refused.exchange(0);                                                                                \
  }

// x (..., k), weight (n, k), and maybe bias (n,) -> (..., n)
KERNEL(Linear, {
  const int64_t m = call.rows(0), k = call.dim(1, 1), n = call.dim(1, 0);
  const float* bias = count == 4 ? call.f(2) : nullptr;
  float* y = call.f(count - 1);
  if (call.is_bf16(1))
    product('T', m, n, k, as_type_of(call.h(1), call.f(0), m * k), k, call.h(1), k, 0.0f, y, n, bias);
  else
    product('T', m, n, k, call.f(0), k, call.f(1), k, 0.0f, y, n, bias);
})

// dy (..., n), weight (n, k) -> dx (..., k)
KERNEL(LinearGradient, {
  const int64_t m = call.rows(0), n = call.dim(1, 0), k = call.dim(1, 1);
  if (call.is_bf16(1))
    product('N', m, k, n, as_type_of(call.h(1), call.f(0), m * n), n, call.h(1), k, 0.0f, call.f(2), k, nullptr);
  else
    product('N', m, k, n, call.f(0), n, call.f(1), k, 0.0f, call.f(2), k, nullptr);
})

// x (b, h, w, c), weight (o, k k c), bias (o,), (k, stride, top, left) -> (b, h', w', o)
KERNEL(Conv, {
  const Geometry g{call.dim(0, 0),     call.dim(0, 1),     call.dim(0, 2),    call.dim(0, 3),
                   call.dim(4, 1),     call.dim(4, 2),     call.dim(1, 0),    call.setting(3, 0),
                   call.setting(3, 1), call.setting(3, 2), call.setting(3, 3)};
  if (call.is_bf16(1))
    convolve(g, call.f(0), call.h(1), call.f(2), call.f(4));
  else
    convolve(g, call.f(0), call.f(1), call.f(2), call.f(4));
})

// dy (b, h', w', o), weight, settings as above -> dx (b, h, w, c)
KERNEL(ConvGradient, {
  const Geometry g{call.dim(3, 0),     call.dim(3, 1),     call.dim(3, 2),    call.dim(3, 3),
                   call.dim(0, 1),     call.dim(0, 2),     call.dim(1, 0),    call.setting(2, 0),
                   call.setting(2, 1), call.setting(2, 2), call.setting(2, 3)};
  if (call.is_bf16(1))
    convolve_gradient(g, call.f(0), call.h(1), call.f(3));
  else
    convolve_gradient(g, call.f(0), call.f(1), call.f(3));
})

// x (..., c), gamma (c,), beta (c,), (bits of eps,) -> (..., c)
KERNEL(LayerNorm, {
  layer_norm(call.f(0), call.f(1), call.f(2), as_float(call.setting(3, 0)), call.rows(0), call.dim(0, -1), call.f(4));
})

// dy, x (..., c), gamma (c,), settings as above -> dx (..., c)
KERNEL(LayerNormGradient, {
  layer_norm_gradient(call.f(0), call.f(1), call.f(2), as_float(call.setting(3, 0)), call.rows(0), call.dim(0, -1),
                      call.f(4));
})

// x (b, ..., c), gamma (c,), beta (c,), (bits of eps, groups, activation) -> (b, ..., c)
KERNEL(GroupNorm, {
  with_activation(call.setting(3, 2), [&](auto act) {
    group_norm<decltype(act)>(call.f(0), call.f(1), call.f(2), call.dim(0, 0), call.rows(0) / call.dim(0, 0),
                              call.dim(0, -1), call.setting(3, 1), as_float(call.setting(3, 0)), call.f(4));
  });
})

// dy, x (b, ..., c), gamma, beta (c,), settings as above -> dx (b, ..., c)
KERNEL(GroupNormGradient, {
  with_activation(call.setting(4, 2), [&](auto act) {
    group_norm_gradient<decltype(act)>(call.f(0), call.f(1), call.f(2), call.f(3), call.dim(0, 0),
                                       call.rows(0) / call.dim(0, 0), call.dim(0, -1), call.setting(4, 1),
                                       as_float(call.setting(4, 0)), call.f(5));
  });
})

// q (b, lq, c), k, v (b, lk, c), (heads, causal) -> (b, lq, c); to compute in bf16, with q, k and v in it as well
KERNEL(Attention, {
  const Heads g{call.dim(0, 0),         call.dim(0, 1),     call.dim(1, 1),
                call.dim(0, 2),         call.setting(3, 0), call.dim(0, 2) / call.setting(3, 0),
                call.setting(3, 1) != 0};
  if (count == 5) {
    attention<float>(g, call.f(0), call.f(1), call.f(2), call.f(4));
  } else {
    bf16* kept[3];
    for (int i = 0; i < 3; i++) {
      kept[i] = static_cast<bf16*>(data[5 + i]);
      convert_all(call.f(i), kept[i], call.size(i));
    }
    attention<bf16>(g, kept[0], kept[1], kept[2], call.f(4));
  }
})

// dout, q (b, lq, c), k, v (b, lk, c), float32 or bf16, settings as above -> dq, dk, dv
KERNEL(AttentionGradient, {
  const Heads g{call.dim(1, 0),         call.dim(1, 1),     call.dim(2, 1),
                call.dim(1, 2),         call.setting(4, 0), call.dim(1, 2) / call.setting(4, 0),
                call.setting(4, 1) != 0};
  if (call.is_bf16(1))
    attention_gradient<bf16>(g, call.f(0), call.h(1), call.h(2), call.h(3), call.f(5), call.f(6), call.f(7));
  else
    attention_gradient<float>(g, call.f(0), call.f(1), call.f(2), call.f(3), call.f(5), call.f(6), call.f(7));
})

// x, (activation,) -> act(x)
KERNEL(Activation, {
  with_activation(call.setting(1, 0), [&](auto act) { activate<decltype(act)>(call.f(0), call.size(0), call.f(2)); });
})

// dy, x, settings as above -> dx
KERNEL(ActivationGradient, {
  with_activation(call.setting(2, 0),
                  [&](auto act) { activate_gradient<decltype(act)>(call.f(0), call.f(1), call.size(0), call.f(3)); });
})

// x (..., k), weight (2c, k), bias (2c,) -> (..., c), and the product x W^T + b (..., 2c) in the weight's type
KERNEL(GEGLU, {
  const int64_t m = call.rows(0), k = call.dim(1, 1), c = call.dim(1, 0) / 2;
  if (call.is_bf16(1))
    geglu(m, k, c, call.f(0), call.h(1), call.f(2), call.f(3), static_cast<bf16*>(data[4]));
  else
    geglu(m, k, c, call.f(0), call.f(1), call.f(2), call.f(3), call.f(4));
})

// dy (..., c), the product (..., 2c), weight (2c, k) -> dx (..., k)
KERNEL(GEGLUGradient, {
  const int64_t m = call.rows(0), k = call.dim(2, 1), c = call.dim(0, -1);
  if (call.is_bf16(2))
    geglu_gradient(m, k, c, call.f(0), call.h(1), call.h(2), call.f(3));
  else
    geglu_gradient(m, k, c, call.f(0), call.f(1), call.f(2), call.f(3));
})

// x (b, h, w, c) -> (b, 2h, 2w, c): each position four times
KERNEL(Enlarge, {
  const int64_t w = call.dim(1, 2), c = call.dim(1, 3), h = call.dim(1, 1);
  split(call.rows(1), rows_worth(c), [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; r++) {
      const int64_t x = r % w, y = r / w % h, n = r / w / h;
      std::memcpy(call.f(1) + r * c, call.f(0) + ((n * (h / 2) + y / 2) * (w / 2) + x / 2) * c, c * sizeof(float));
    }
  });
})

// dy (b, 2h, 2w, c) -> dx (b, h, w, c)
KERNEL(EnlargeGradient, {
  const int64_t w = call.dim(1, 2), c = call.dim(1, 3), h = call.dim(1, 1);
  split(call.rows(1), rows_worth(c), [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; r++) {
      const int64_t x = r % w, y = r / w % h, n = r / w / h;
      const float *upper = call.f(0) + ((n * 2 * h + 2 * y) * 2 * w + 2 * x) * c, *lower = upper + 2 * w * c;
      for (int64_t i = 0; i < c; i++) call.f(1)[r * c + i] = upper[i] + upper[c + i] + lower[i] + lower[c + i];
    }
  });
})

// x (b, ..., c), e (b, c) -> x + e at every position
KERNEL(AddPerSample, {
  const int64_t length = call.rows(0) / call.dim(0, 0), c = call.dim(0, -1);
  split(call.rows(0), rows_worth(c), [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; r++) {
      const float *x = call.f(0) + r * c, *e = call.f(1) + r / length * c;
      for (int64_t i = 0; i < c; i++) call.f(2)[r * c + i] = x[i] + e[i];
    }
  });
})
