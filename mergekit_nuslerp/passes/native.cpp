// Copyright (C) 2026 The mergekit-nuslerp authors
// SPDX-License-Identifier: LGPL-3.0-only

// Gram matrices and combinations of contiguous vectors, for native.py. C++17 for GCC or
// Clang. Weights are read in tiles that fit the first cache, in a working type; sums over
// a tile are added up in double, in an order that no number of threads changes.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <new>
#include <numeric>
#include <system_error>
#include <thread>
#include <vector>
#ifdef __x86_64__
#include <immintrin.h>
#endif

#define INLINE inline __attribute__((always_inline))

namespace {
using Index = std::int64_t;
using Bits = std::uint32_t;

constexpr Index TILE_BYTES = 1 << 15;  // of all models, in the working type
constexpr Index ALONG_BYTES = 1 << 11; // of a tile's row along memory, at most
constexpr Index WIDTH = 1024;          // elements of a tile's row across it, at most
constexpr Index ROWS = 16;             // of a tile across memory
constexpr Index BLOCK = 1 << 16;       // elements of a block along memory
constexpr Index PARTS = 64;            // blocks of a job across memory, at least

INLINE Index ceil(Index a, Index b) { return (a + b - 1) / b; }
template <Bits EXPONENT> struct Half { std::uint16_t bits; };  // infinity's
using BFloat16 = Half<0x7f80>; using Float16 = Half<0x7c00>;
template <class To, class From>
INLINE To bits_as(From from) { To to; return __builtin_memcpy(&to, &from, 4), to; }

template <class W> INLINE W widen(W x) { return x; }
INLINE float widen(BFloat16 x) { return bits_as<float>(Bits(x.bits) << 16); }
INLINE float widen(Float16 x) {
  // Exponents are 112 less than those of float, and that of infinity and NaN is 31.
  Bits size = x.bits & 0x7fff, more = size < 0x7c00 ? 112u << 23 : 224u << 23;
  float normal = bits_as<float>((size << 13) + more), sign = x.bits >> 15 ? -1 : 1;
  return sign * (normal + std::min(normal - 0x1p-14f, 0.0f));  // or subnormal
}

// To the nearest, ties to even.
template <class S> INLINE void narrow(double x, S& to) { to = S(x); }
INLINE void narrow(float x, BFloat16& to) {
  Bits bits = bits_as<Bits>(x), rounded = bits + 0x7fff + (bits >> 16 & 1);
  to.bits = std::uint16_t(x == x ? rounded >> 16 : 0x7fc0);
}
INLINE void narrow(float x, Float16& to) {
  Bits bits = bits_as<Bits>(x), size = bits & 0x7fffffff;
  Bits normal = (size + 0xfff + (size >> 13 & 1) - (112u << 23)) >> 13;
  // The last place of a float near one half is the smallest subnormal number.
  Bits subnormal = bits_as<Bits>(bits_as<float>(size) + 0.5f) - 0x3f000000;
  Bits half = size < 113u << 23 ? subnormal : size < 143u << 23 ? normal : 0x7c00;
  to.bits = std::uint16_t((bits >> 16 & 0x8000) | half | (x == x ? 0 : 0x200));
}
template <Bits E> INLINE void narrow(double x, Half<E>& to) { narrow(float(x), to); }

template <Bits E> INLINE bool finite(Half<E> x) { return (x.bits & E) != E; }
template <class S> INLINE bool finite(S x) { return x - x == 0; }

// Returns how many elements of a row it converted, by instructions that come with AVX2.
template <bool AVX2, class From, class To>
Index convert(const From*, To*, Index) { return 0; }

// As native.py passes them. A view is (outer, length, inner, width), and its last two
// dimensions are contiguous.
struct Sizes {
  Index stored, in_double, models, has_base, has_rows;
  Index outer, length, inner, width, outer_stride, length_stride;
};

// What one thread does at a time: some rows of some vectors.
struct Block {
  Index outer, outer_stop;  // more than one only of whole vectors along memory
  Index start, stop;        // rows
  Index inner, inners;      // more than one only of whole widths
  Index column, width, part;  // the last: which of the vectors' blocks this is
};

// Vectors that lie in one piece are seen as rows of a tile's width, the last shorter.
struct Job : Sizes {
  const void* const* inputs;   // the models, then the base if there is one
  bool along;                  // memory: a vector lies in one piece
  Index rows, tile, last;      // rows of a tile, their width, and the last row's along
  Index splits, runs, parts;   // of the width, of the rows, and of both
  Index outer_step, inner_step, inner_steps, blocks;
  std::vector<double> grams;   // (part, outer, inner, models, models)
  const double* coefficients;  // (outer, inner, models), rows' (outer, length, models)
  void* result;
  std::atomic<bool> infinite{false};

  Job(const void* const* inputs, const Sizes& sizes, const double* c, void* result)
      : Sizes(sizes), inputs(inputs), coefficients(c), result(result) {
    along = inner == 1 && !has_rows && (length == 1 || length_stride == width);
    rows = along || coefficients ? 1 : ROWS;
    Index size = in_double ? 8 : 4, each = along || !coefficients ? 1 : 2;  // with factors
    Index room = TILE_BYTES / size / (each * models + 1) / rows;
    tile = std::clamp<Index>(room / 64 * 64, 64, along ? ALONG_BYTES / size : WIDTH);
    if (along) {
      last = length * width, length = ceil(last, tile), width = length_stride = tile;
      last -= (length - 1) * tile;
    }
    outer_step = along ? std::max<Index>(1, BLOCK / (length * tile)) : 1;
    inner_step = std::max<Index>(1, tile / width);
    inner_steps = ceil(inner, inner_step), splits = ceil(width, tile);
    Index most = along ? length : std::max<Index>(1, length / (4 * ROWS));
    runs = along ? ceil(length * tile, BLOCK) : PARTS / (outer * inner_steps * splits);
    runs = std::clamp<Index>(runs, 1, most), parts = runs * splits;
    blocks = ceil(outer, outer_step) * parts * inner_steps;
    if (!c) grams.resize(parts * outer * inner * models * models);
  }
  Block block(Index n) const {
    Index i = n % inner_steps * inner_step, part = n / inner_steps % parts;
    Index o = n / inner_steps / parts * outer_step;
    Index run = part / splits, column = part % splits * tile;
    return {o, std::min(outer, o + outer_step), run * length / runs,
            (run + 1) * length / runs, i, std::min(inner - i, inner_step), column,
            std::min(width - column, tile), part};
  }
  Index count(const Block& block, Index row) const {
    return along && row == length - 1 ? last : block.inners * block.width;
  }
  Index offset(const Block& block, Index o, Index row) const {
    return o * outer_stride + row * length_stride + block.inner * width + block.column;
  }
};

// One row of each model with the base taken off, then the base's or zeros; zeros fill
// the last registers. Asks ahead, as processors do not foresee so many streams.
template <bool AVX2, class S, class W>
INLINE Index read(const Job& job, const Block& block, Index o, Index row, W* to) {
  Index offset = job.offset(block, o, row), count = job.count(block, row);
  Index next = offset + 2 * job.length_stride, stride = job.rows * job.tile;
  W* __restrict origin = to + job.models * stride;
  if (!job.has_base) std::fill(origin, origin + count, W(0));
  for (Index m = job.models - !job.has_base; m >= 0; m--) {
    const S* __restrict x = static_cast<const S*>(job.inputs[m]);
    W* __restrict wide = to + m * stride;
    for (Index k = 0; k < count; k += 64 / sizeof(S)) __builtin_prefetch(x + next + k);
    Index k = convert<AVX2>(x + offset, wide, count);
    if (m < job.models && job.has_base) {
      for (Index n = 0; n < k; n++) wide[n] -= origin[n];
      for (; k < count; k++) wide[k] = W(widen(x[offset + k])) - origin[k];
    } else
      for (; k < count; k++) wide[k] = W(widen(x[offset + k]));
    for (Index k = count; k % 64; k++) wide[k] = 0;
  }
  return count;
}

// Products of a tile's rows for each pair of models, added up by columns: one register,
// of LANES numbers, along memory, and all of the tile's width across it.
template <class S, class W, Index BYTES, Index LANES = BYTES / sizeof(W)>
INLINE void gram(Job& job, const Block& block, double* sums) {
  typedef W Vector __attribute__((vector_size(LANES * sizeof(W))));
  Index N = job.models, columns = job.along ? LANES : job.tile;
  Index each = job.along ? columns : block.width, size = job.rows * job.tile;
  Index pairs = N * (N + 1) / 2, strips = job.along ? 4 : columns / LANES;
  W* tile = reinterpret_cast<W*>(sums + pairs * columns), *totals = tile + (N + 1) * size;
  for (Index o = block.outer; o < block.outer_stop; o++) {
    std::fill_n(sums, pairs * columns, 0.0);
    for (Index r = block.start; r < block.stop; r += job.rows) {
      Index rows = std::min(job.rows, block.stop - r), count = 0;
      for (Index n = 0; n < rows; n++)
        count = read<(BYTES > 16), S>(job, block, o, r + n, tile + n * job.tile);
      if (job.along) rows = ceil(count, 4 * LANES), count = LANES;
      for (Index i = 0, pair = 0; i < N; i++)
        for (Index j = i; j < N; j++, pair += columns)
          for (Index c = 0; c * LANES < count; c += 4) {
            const Vector* a = reinterpret_cast<const Vector*>(tile + i * size) + c;
            const Vector* b = reinterpret_cast<const Vector*>(tile + j * size) + c;
            Vector s[4] = {};
            for (Index n = 0; n < rows * strips; n += strips)
              for (Index l = 0; l < 4; l++) s[l] += a[n + l] * b[n + l];
            if (job.along) s[0] = (s[0] + s[1]) + (s[2] + s[3]);
            for (Index l = 0; l < 4; l++) reinterpret_cast<Vector*>(totals)[l] = s[l];
            double* to = sums + pair + c * LANES;
            for (Index k = 0; k < (job.along ? 1 : 4) * LANES; k++) to[k] += totals[k];
          }
    }
    for (Index v = 0; v < block.inners; v++) {
      Index vector = (block.part * job.outer + o) * job.inner + block.inner + v;
      double *to = &job.grams[vector * N * N], *from = sums + v * each;
      for (Index i = 0; i < N; i++)
        for (Index j = i; j < N; j++, from += columns)
          to[i * N + j] = to[j * N + i] = std::accumulate(from, from + each, 0.0);
    }
  }
}

template <class S, class W, Index BYTES>
INLINE void combine(Job& job, const Block& block, double* scratch) {
  W *factors = reinterpret_cast<W*>(scratch), *tile = factors + job.models * job.tile;
  const double* rows = job.coefficients + job.outer * job.inner * job.models;
  Index along = job.along, width = along ? 1 : block.width;
  for (Index o = block.outer; o < block.outer_stop; o++) {
    const double* c = job.coefficients + (o * job.inner + block.inner) * job.models;
    for (Index v = 0; v < block.inners; v++)
      for (Index m = 0; m < job.models; m++)
        std::fill_n(factors + m * job.tile + v * width, width, W(*c++));
    for (Index r = block.start; r < block.stop; r++) {
      Index count = read<(BYTES > 16), S>(job, block, o, r, tile);
      W* __restrict total = tile + job.models * job.tile;
      const double* row = job.has_rows ? rows + (o * job.length + r) * job.models : 0;
      for (Index m = 0; m < job.models; m++) {
        const W *__restrict x = tile + m * job.tile, *f = factors + m * job.tile;
        W each = along ? *f : W(row ? row[m] : 1);
        if (along) for (Index k = 0; k < count; k++) total[k] += each * x[k];
        else for (Index k = 0; k < count; k++) total[k] += each * f[k] * x[k];
      }
      S* __restrict to = static_cast<S*>(job.result) + job.offset(block, o, r);
      Bits infinite = 0;
      Index k = convert<(BYTES > 16)>(total, to, count);
      for (; k < count; k++) narrow(total[k], to[k]);
      for (Index k = 0; k < count; k++) infinite |= !finite(to[k]);
      if (infinite) job.infinite = true;
    }
  }
}

// With registers of so many bytes. Wider ones than a processor has are slow.
template <Index BYTES> INLINE void step(Job& job, const Block& block, double* to) {
#define CASE(N, S, W) case N: return job.coefficients ? \
    combine<S, W, BYTES>(job, block, to) : gram<S, W, BYTES>(job, block, to);
  switch (2 * job.stored + job.in_double) {
    CASE(0, BFloat16, float) CASE(1, BFloat16, double) CASE(2, Float16, float)
    CASE(3, Float16, double) CASE(5, float, double) CASE(7, double, double)
  }
}
using Step = void(Job&, const Block&, double*);
void step_16(Job& job, const Block& block, double* to) { step<16>(job, block, to); }
#ifdef __x86_64__
#define F16C template <> __attribute__((target("avx,f16c"))) Index convert<true>
F16C(const Float16* from, float* to, Index count) {
  Index k = 0;
  for (; k + 8 <= count; k += 8) {
    auto eight = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + k));
    _mm256_storeu_ps(to + k, _mm256_cvtph_ps(eight));
  }
  return k;
}
F16C(const float* from, Float16* to, Index count) {
  Index k = 0;
  for (; k + 8 <= count; k += 8) {
    auto eight = _mm256_cvtps_ph(_mm256_loadu_ps(from + k), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + k), eight);
  }
  return k;
}
#define HAS(feature) __builtin_cpu_supports(feature)
__attribute__((target("avx2,fma,bmi2")))
void step_32(Job& job, const Block& block, double* to) { step<32>(job, block, to); }
__attribute__((target("avx2,fma,bmi2,avx512f,avx512bw,avx512dq,avx512vl")))
void step_64(Job& job, const Block& block, double* to) { step<64>(job, block, to); }
Step* best_step() {
  if (!HAS("avx2") || !HAS("fma") || !HAS("bmi2")) return step_16;
  return HAS("avx512bw") && HAS("avx512dq") && HAS("avx512vl") ? step_64 : step_32;
}
#else
Step* best_step() { return step_16; }
#endif

struct alignas(64) Line { double numbers[8]; };
// Take all blocks through their step, in threads that begin and end here.
void run(Job& job, Index threads) {
  threads = std::clamp<Index>(threads, 1, job.blocks);
  Index pairs = job.models * (job.models + 1) / 2, vectors = 2 * job.models + 1;
  Index lines = (pairs + vectors * job.rows) * job.tile / 8;
  std::vector<Line> scratch(threads * lines);
  std::atomic<Index> next{0};
  auto work = [&, step = best_step()](Index thread) {
    for (Index n; (n = next++) < job.blocks;)
      step(job, job.block(n), scratch[thread * lines].numbers);
  };
  std::vector<std::thread> others;
  others.reserve(threads);
  try {
    for (Index t = 1; t < threads; t++) others.emplace_back(work, t);
  } catch (const std::system_error&) {}  // the system has no more: do with fewer
  work(0);
  for (std::thread& other : others) other.join();
}
}  // namespace

// Without coefficients adds to zeros (outer, inner, models, models), or else writes the
// result. Returns 1 if that is not finite, and 2 if there is no memory.
extern "C" int nuslerp(const void* const* inputs, const Sizes* sizes,
                       const double* coefficients, void* result, Index threads) try {
  Job job(inputs, *sizes, coefficients, result);
  run(job, threads);
  for (Index n = 0, size = job.grams.size(), part = size / job.parts; n < size; n++)
    static_cast<double*>(result)[n % part] += job.grams[n];
  return job.infinite;
} catch (const std::bad_alloc&) { return 2; }
