// Copyright (C) 2026 The mergekit-nuslerp authors
// SPDX-License-Identifier: LGPL-3.0-only

// Gram matrices and combinations of vectors in contiguous memory. native.py calls the
// two functions at the end. C++17 for GCC or Clang, and nothing but its library.
//
// Weights are read in tiles that fit the first cache, in a working type. Sums of float
// over a tile are added up in double. A job is cut into the same blocks, whose sums are
// added in the same order, whatever the number of threads: so results are the same.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <new>
#include <system_error>
#include <thread>
#include <vector>
#ifdef __linux__
#include <sys/mman.h>
#endif

#define INLINE inline __attribute__((always_inline))
// The same code once more for each generation of processors.
#if defined(__x86_64__) && defined(__gnu_linux__)
#define CLONES \
  __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONES
#endif

namespace {

using Index = std::int64_t;
using Bits = std::uint32_t;

constexpr Index TILE_BYTES = 1 << 15;  // of all models, in the working type
constexpr Index RUN = 1024;            // most elements of a tile along memory
constexpr Index ROWS = 16;             // of a tile across memory
constexpr Index BLOCK = 1 << 16;       // elements of a block along memory
constexpr Index PARTS = 16;            // most blocks that share a vector across memory
constexpr Index REGISTER = 64;         // bytes, at most

struct BFloat16 { std::uint16_t bits; };
struct Float16 { std::uint16_t bits; };

template <class To, class From> INLINE To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

INLINE double widen(double x) { return x; }
INLINE float widen(float x) { return x; }
INLINE float widen(BFloat16 x) { return bits_as<float>(Bits(x.bits) << 16); }
INLINE float widen(Float16 x) {
  Bits sign = Bits(x.bits & 0x8000) << 16, size = x.bits & 0x7fff;
  // Exponents are 112 less than those of float, and that of infinity and NaN is 31.
  Bits normal = (size << 13) + (size < 0x7c00 ? 112u << 23 : 224u << 23);
  Bits subnormal = bits_as<Bits>(float(std::int32_t(size)) * 0x1p-24f);
  return bits_as<float>(sign | (size < 0x0400 ? subnormal : normal));
}

// To the nearest, ties to even.
INLINE void narrow(double x, double& to) { to = x; }
INLINE void narrow(double x, float& to) { to = float(x); }
INLINE void narrow(float x, BFloat16& to) {
  Bits bits = bits_as<Bits>(x), rounded = bits + 0x7fff + (bits >> 16 & 1);
  to.bits = std::uint16_t(x == x ? rounded >> 16 : 0x7fc0);
}
INLINE void narrow(float x, Float16& to) {
  Bits bits = bits_as<Bits>(x), size = bits & 0x7fffffff;
  Bits normal = (size + 0xfff + (size >> 13 & 1) - (112u << 23)) >> 13;
  // The last place of a float near one half is the smallest subnormal number.
  Bits subnormal = bits_as<Bits>(bits_as<float>(size) + 0.5f) - 0x3f000000;
  Bits large = size > 0x7f800000 ? 0x7e00 : 0x7c00;
  Bits half = size < 113u << 23 ? subnormal : size < 143u << 23 ? normal : large;
  to.bits = std::uint16_t((bits >> 16 & 0x8000) | half);
}
template <class To> INLINE void narrow(double x, To& to) { narrow(float(x), to); }

// A view is (outer, length, inner, width), its last two dimensions contiguous.
struct Job {
  const void* const* inputs;  // the models, then the base if there is one
  Index stored, in_double, models, has_base, measure_base;
  Index outer, length, inner, width, outer_stride, length_stride;
  double* sums;                // (parts, outer, inner, pairs)
  const double* coefficients;  // (outer, inner, models)
  void* result;
  std::atomic<bool> infinite{false};

  Job(const void* const* inputs, const Index* n)
      : inputs(inputs), stored(n[0]), in_double(n[1]), models(n[2]), has_base(n[3]),
        measure_base(n[4]), outer(n[5]), length(n[6]), inner(n[7]), width(n[8]),
        outer_stride(n[9]), length_stride(n[10]) {}
  Index vectors() const { return models + measure_base; }
  Index pairs() const { return vectors() * (vectors() + 1) / 2; }
  bool along() const { return inner == 1 && (length == 1 || length_stride == width); }
  // Elements of each model that fit a tile, and columns that do.
  Index tile() const { return TILE_BYTES / (in_double ? 8 : 4) / (models + 1); }
  Index run() const { return std::clamp<Index>(tile() / 64 * 64, 64, RUN); }
  Index columns() const { return std::max<Index>(tile() / ROWS / 64 * 64, 64); }
};

// What one thread does at a time: part of some vectors.
struct Block {
  Index outer, outer_stop;    // more than one only of whole vectors along memory
  Index start, stop;          // elements along memory, or rows across it
  Index inner, inner_stop;    // more than one only of whole widths
  Index column, column_stop;  // of the width
  Index part;                 // which of the vectors' blocks this is

  Index each() const { return column_stop - column; }
  Index count() const { return (inner_stop - inner) * each(); }
  Index offset(const Job& job, Index row) const {
    return outer * job.outer_stride + row * job.length_stride + inner * job.width +
           column;
  }
};

std::vector<Block> blocks(const Job& job, Index columns, Index& parts) {
  std::vector<Block> all;
  Index size = job.length * job.width, splits = (job.width + columns - 1) / columns;
  Index runs = std::clamp<Index>(job.length / (4 * ROWS), 1, PARTS);
  Index outer_step = job.along() ? std::max<Index>(1, BLOCK / size) : 1;
  Index inner_step = std::max<Index>(1, columns / job.width);
  parts = job.along() ? (size + BLOCK - 1) / BLOCK : runs * splits;
  for (Index o = 0; o < job.outer; o += outer_step)
    for (Index p = 0; p < parts; p++) {
      Index run = p / splits, split = p % splits;
      Block block{o, std::min(job.outer, o + outer_step), run * job.length / runs,
                  (run + 1) * job.length / runs, 0, 1, split * columns,
                  std::min(job.width, (split + 1) * columns), p};
      if (job.along()) {
        block.start = p * BLOCK, block.stop = std::min(size, (p + 1) * BLOCK);
        all.push_back(block);
        continue;
      }
      for (Index& i = block.inner; i < job.inner; i += inner_step) {
        block.inner_stop = std::min(job.inner, i + inner_step);
        all.push_back(block);
      }
    }
  return all;
}

// Elements of each model with the base taken off, and behind them the base's or zeros.
// Asks for what comes next, as processors do not foresee so many streams.
template <class S, class W>
INLINE void read(const Job& job, Index offset, Index count, Index ahead, W* tile,
                 Index stride) {
  W* __restrict origin = tile + job.models * stride;
  if (!job.has_base) std::fill(origin, origin + count, W(0));
  for (Index m = job.models - !job.has_base; m >= 0; m--) {
    const S* __restrict x = static_cast<const S*>(job.inputs[m]) + offset;
    W* __restrict to = tile + m * stride;
    for (Index k = 0; k < count; k += 64 / sizeof(S)) __builtin_prefetch(x + ahead + k);
    if (job.has_base && m < job.models)
      for (Index k = 0; k < count; k++) to[k] = W(widen(x[k])) - origin[k];
    else
      for (Index k = 0; k < count; k++) to[k] = W(widen(x[k]));
  }
}

template <class W> struct Register {
  typedef W type __attribute__((vector_size(REGISTER)));
  typedef double wide __attribute__((vector_size(REGISTER * 8 / sizeof(W))));
};

template <class S, class W> struct Gram {
  static constexpr Index LANES = REGISTER / sizeof(W);
  using Vector = typename Register<W>::type;
  using Wide = typename Register<W>::wide;

  static INLINE void run(Job& job, const Block& block, void* scratch) {
    Wide* sums = static_cast<Wide*>(scratch);
    if (!job.along()) return across(job, block, sums);
    for (Index o = block.outer; o < block.outer_stop; o++) along(job, block, o, sums);
  }

  static INLINE void along(Job& job, const Block& block, Index o, Wide* sums) {
    W* tile = reinterpret_cast<W*>(sums + job.pairs());
    Index size = job.run();
    std::fill(sums, sums + job.pairs(), Wide{});
    for (Index k = block.start; k < block.stop; k += size) {
      Index count = std::min(size, block.stop - k);
      Index padded = (count + 4 * LANES - 1) / (4 * LANES) * (4 * LANES);
      read<S>(job, o * job.outer_stride + k, count, size, tile, size);
      for (Index v = 0; v < job.vectors(); v++)
        std::fill(tile + v * size + count, tile + v * size + padded, W(0));
      Wide* sum = sums;
      for (Index i = 0; i < job.vectors(); i++)
        for (Index j = i; j < job.vectors(); j++, sum++) {
          const Vector* a = reinterpret_cast<const Vector*>(tile + i * size);
          const Vector* b = reinterpret_cast<const Vector*>(tile + j * size);
          Vector s0{}, s1{}, s2{}, s3{};
          for (Index n = 0; n < padded / LANES; n += 4) {
            s0 += a[n] * b[n], s1 += a[n + 1] * b[n + 1];
            s2 += a[n + 2] * b[n + 2], s3 += a[n + 3] * b[n + 3];
          }
          *sum += __builtin_convertvector((s0 + s1) + (s2 + s3), Wide);
        }
    }
    finish(job, block.part * job.outer + o, sums, 1, 0, LANES);
  }

  // A sum for each column first, and then of each vector's columns.
  static INLINE void across(Job& job, const Block& block, Wide* sums) {
    Index columns = job.columns(), strips = columns / LANES, size = ROWS * columns;
    W* tile = reinterpret_cast<W*>(sums + job.pairs() * strips);
    std::fill(sums, sums + job.pairs() * strips, Wide{});
    for (Index r = block.start; r < block.stop; r += ROWS) {
      Index rows = std::min(ROWS, block.stop - r);
      for (Index n = 0; n < rows; n++)
        read<S>(job, block.offset(job, r + n), block.count(), 4 * job.length_stride,
                tile + n * columns, size);
      Wide* sum = sums;
      for (Index i = 0; i < job.vectors(); i++)
        for (Index j = i; j < job.vectors(); j++, sum += strips)
          for (Index c = 0; c * LANES < block.count(); c++) {
            const Vector* a = reinterpret_cast<const Vector*>(tile + i * size) + c;
            const Vector* b = reinterpret_cast<const Vector*>(tile + j * size) + c;
            Vector s{};
            for (Index n = 0; n < rows; n++) s += a[n * strips] * b[n * strips];
            sum[c] += __builtin_convertvector(s, Wide);
          }
    }
    Index vector = (block.part * job.outer + block.outer) * job.inner;
    for (Index i = block.inner; i < block.inner_stop; i++)
      finish(job, vector + i, sums, strips, (i - block.inner) * block.each(),
             block.each());
  }

  // Add up some lanes of each pair's sums.
  static INLINE void finish(Job& job, Index vector, const Wide* sums, Index stride,
                            Index first, Index count) {
    for (Index p = 0; p < job.pairs(); p++) {
      const double* from = reinterpret_cast<const double*>(sums + p * stride) + first;
      double total = 0;
      for (Index n = 0; n < count; n++) total += from[n];
      job.sums[vector * job.pairs() + p] = total;
    }
  }
};

template <class S, class W> struct Combination {
  static INLINE void run(Job& job, const Block& block, void* scratch) {
    W* factors = static_cast<W*>(scratch);
    bool along = job.along();
    Index size = along ? std::min(RUN, block.stop - block.start) : block.count();
    for (Index o = block.outer; o < block.outer_stop; o++) {
      const double* c = job.coefficients + (o * job.inner + block.inner) * job.models;
      for (Index m = 0; m < job.models; m++)
        for (Index k = 0; k < size; k++)
          factors[m * RUN + k] = W(c[(along ? 0 : k / block.each()) * job.models + m]);
      for (Index k = block.start; k < block.stop; k += along ? RUN : 1)
        if (along)
          elements(job, o * job.outer_stride + k, std::min(RUN, block.stop - k), RUN,
                   factors);
        else
          elements(job, block.offset(job, k), size, 2 * job.length_stride, factors);
    }
  }

  static INLINE void elements(Job& job, Index offset, Index count, Index ahead,
                              W* factors) {
    W* tile = factors + job.models * RUN;
    W* __restrict total = tile + job.models * RUN;
    S* __restrict to = static_cast<S*>(job.result) + offset;
    read<S>(job, offset, count, ahead, tile, RUN);
    for (Index m = 0; m < job.models; m++) {
      const W* __restrict v = tile + m * RUN;
      const W* __restrict c = factors + m * RUN;
      for (Index k = 0; k < count; k++) total[k] += c[k] * v[k];
    }
    Bits infinite = 0;
    for (Index k = 0; k < count; k++) {
      narrow(total[k], to[k]);
      infinite |= !(widen(to[k]) - widen(to[k]) == 0);
    }
    if (infinite) job.infinite = true;
  }
};

template <template <class, class> class Step>
INLINE void with_types(Job& job, const Block& block, void* scratch) {
  switch (2 * job.stored + job.in_double) {
    case 0: return Step<BFloat16, float>::run(job, block, scratch);
    case 1: return Step<BFloat16, double>::run(job, block, scratch);
    case 2: return Step<Float16, float>::run(job, block, scratch);
    case 3: return Step<Float16, double>::run(job, block, scratch);
    case 5: return Step<float, double>::run(job, block, scratch);
    case 7: return Step<double, double>::run(job, block, scratch);
  }
}

using Step = void (*)(Job&, const Block&, void*);
CLONES void gram_block(Job& job, const Block& block, void* scratch) {
  with_types<Gram>(job, block, scratch);
}
CLONES void combine_block(Job& job, const Block& block, void* scratch) {
  with_types<Combination>(job, block, scratch);
}

// Ask for large pages where the result is new: the system provides them much faster.
void advise(char* start, Index bytes) {
#ifdef MADV_HUGEPAGE
  Index page = 1 << 21, skipped = (page - std::uintptr_t(start) % page) % page;
  Index whole = (bytes - skipped) / page * page;
  if (whole > 0) madvise(start + skipped, whole, MADV_HUGEPAGE);
#endif
}

// Take all blocks through a step, in threads that begin and end here.
void run(Step step, Job& job, const std::vector<Block>& all, Index threads,
         Index numbers) {
  threads = std::clamp<Index>(threads, 1, all.size());
  Index size = (numbers * sizeof(double) + 127) / 128 * 128;
  std::vector<char> scratch(threads * size + 128);
  char* start = scratch.data() + (128 - std::uintptr_t(scratch.data()) % 128);
  std::atomic<std::size_t> next{0};
  auto work = [&](Index thread) {
    for (std::size_t n; (n = next++) < all.size();)
      step(job, all[n], start + thread * size);
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

extern "C" {

// Writes (outer, inner, vectors, vectors). Returns 2 if there is no memory.
int nuslerp_gram(const void* const* inputs, const Index* sizes, double* gram,
                 Index threads) try {
  Job job(inputs, sizes);
  Index parts, count = job.outer * job.inner, pairs = job.pairs(), N = job.vectors();
  std::vector<Block> all = blocks(job, job.columns(), parts);
  std::vector<double> sums(parts * count * pairs);
  job.sums = sums.data();
  run(gram_block, job, all, threads,
      pairs * job.columns() + (job.models + 1) * std::max(RUN, ROWS * job.columns()));
  for (Index part = 1; part < parts; part++)  // add up all of them in the first
    for (Index n = 0; n < count * pairs; n++) sums[n] += sums[part * count * pairs + n];
  for (Index v = 0, n = 0; v < count; v++)
    for (Index i = 0; i < N; i++)
      for (Index j = i; j < N; j++, n++)
        gram[(v * N + i) * N + j] = gram[(v * N + j) * N + i] = sums[n];
  return 0;
} catch (const std::bad_alloc&) {
  return 2;
}

// Returns 1 if a result is infinite in the stored type, 2 if there is no memory.
int nuslerp_combine(const void* const* inputs, const Index* sizes,
                    const double* coefficients, char* result, Index threads) try {
  Job job(inputs, sizes);
  job.coefficients = coefficients;
  job.result = result;
  Index parts, bytes = job.stored < 2 ? 2 : 4 * (job.stored - 1);
  Index count = (job.outer - 1) * job.outer_stride +
                (job.length - 1) * job.length_stride + job.inner * job.width;
  advise(result, count * bytes);
  run(combine_block, job, blocks(job, RUN, parts), threads, (2 * job.models + 1) * RUN);
  return job.infinite;
} catch (const std::bad_alloc&) {
  return 2;
}
}
