// Products that read live rows of the weight only, for up to four rows of x.
#ifndef PALLAS_KERNELS_NATIVE_SPARSE_KERNELS_H_
#define PALLAS_KERNELS_NATIVE_SPARSE_KERNELS_H_

#include "decoder.h"

namespace {

using lut::DenseProblem;
using lut::Live;

// Sums of a chunk of columns stay in L1 while rows, several at a time, stream by: long runs of every
// row, so that pages and prefetchers are used well.
constexpr int kChunk = 2048;    // columns times rows of x
constexpr int kTogether = 8;    // live rows times rows of x that are added at a time

// A lookup-table weight: adds kRows live rows, from the i-th on, to sums[tile][m][4], vectors in the
// order of words, for `count` columns: whole tiles, or less than one.
template <int kM, int kRows, bool kCrosses, class Decoder>
void AddPackedRows(const Problem& p, const Live& live, int64_t i, int64_t m0, const Decoder& decoder,
                   int64_t column, int64_t count, float* sums) {
  const uint8_t *rows[kRows], *next[kRows];
  uint8_t padded[2 * kTile] = {0};
  int shifts[kRows];
  float x[kRows][kM];
  for (int r = 0; r < kRows; ++r) {
    rows[r] = p.words + live.rows[i + r].start + column;
    shifts[r] = live.rows[i + r].shift;
    next[r] = p.words + live.rows[Min(i + kRows + r, live.count - 1)].start + column;
    for (int m = 0; m < kM; ++m) x[r][m] = live.x[(i + r) * p.m + m0 + m];
  }
  int64_t stride = p.n;
  if (kRows == 1 && count < kTile) {
    std::memcpy(padded, rows[0], count);
    if (kCrosses) std::memcpy(padded + kTile, rows[0] + stride, count);
    rows[0] = padded;
    stride = kTile;
  }
  for (int64_t at = 0; at < count; at += kTile, sums += kM * kTile) {
    Float sum[kM][4];
    LUT_UNROLL
    for (int m = 0; m < kM; ++m)
      LUT_UNROLL
      for (int j = 0; j < 4; ++j) sum[m][j] = Simd::Load(sums + m * kTile + j * kLanes);
    LUT_UNROLL
    for (int r = 0; r < kRows; ++r) {
      __builtin_prefetch(next[r] + at);
      decoder.template Row<kCrosses>(
          rows[r] + at, stride, shifts[r], [&](int j, Float value) __attribute__((always_inline)) {
            LUT_UNROLL
            for (int m = 0; m < kM; ++m)
              sum[m][j] = Simd::MulAdd(Simd::Set(x[r][m]), value, sum[m][j]);
          });
    }
    LUT_UNROLL
    for (int m = 0; m < kM; ++m)
      LUT_UNROLL
      for (int j = 0; j < 4; ++j) Simd::Store(sums + m * kTile + j * kLanes, sum[m][j]);
  }
}

// Live rows [i, end) of a group.
template <int kBits, Tables kTables, int kM, bool kCrosses>
void AddPackedGroup(const Problem& p, const Live& live, int64_t i, int64_t end, int64_t m0,
                    int64_t column, int64_t count, float* sums) {
  const int64_t whole = count / kTile * kTile, rest = count - whole;
  const Decoder<kBits, kTables> decoder(p, {column, kTile});
  if (rest)
    for (int64_t at = i; at < end; ++at)
      AddPackedRows<kM, 1, kCrosses>(p, live, at, m0, decoder, column + whole, rest,
                                     sums + kM * whole);
  if (!whole) return;
  constexpr int kRows = kTogether / kM;
  for (; i + kRows <= end; i += kRows)
    AddPackedRows<kM, kRows, kCrosses>(p, live, i, m0, decoder, column, whole, sums);
  for (; i < end; ++i)
    AddPackedRows<kM, 1, kCrosses>(p, live, i, m0, decoder, column, whole, sums);
}

template <int kBits, Tables kTables, int kM>
void SparsePacked(const Problem& p, const Live& live, int64_t m0, int64_t first, int64_t last) {
  constexpr int64_t kColumns = kChunk / kM;
  const int64_t groups = (p.k + p.group - 1) / p.group, end = Min(last * kTile, p.n);
  const Decoder<kBits, kTables> decoder(p, {0, kTile});
  alignas(64) float sums[kChunk], totals[kChunk];
  for (int64_t column = first * kTile; column < end; column += kColumns) {
    const int64_t count = Min(kColumns, end - column), tiles = (count + kTile - 1) / kTile;
    const int64_t bytes = tiles * kTile * kM * sizeof(float);
    std::memset(totals, 0, bytes);
    for (int64_t g = 0, i = 0; g < groups; ++g) {
      const int64_t middle = live.ends[2 * g], stop = live.ends[2 * g + 1];
      if (stop == i) continue;
      std::memset(sums, 0, bytes);
      AddPackedGroup<kBits, kTables, kM, false>(p, live, i, middle, m0, column, count, sums);
      if (8 % kBits)
        AddPackedGroup<kBits, kTables, kM, true>(p, live, middle, stop, m0, column, count, sums);
      i = stop;
      for (int64_t t = 0; t < tiles; ++t) {
        const Columns columns = {column + t * kTile, Min(kTile, p.n - column - t * kTile)};
        Float scale[4], offset[4];
        LoadScales(p, p.scales, g, columns, scale);
        if (p.offsets.values) LoadScales(p, p.offsets, g, columns, offset);
        for (int m = 0; m < kM; ++m)
          for (int j = 0; j < 4; ++j) {
            const int64_t place = (t * kM + m) * kTile + j * kLanes;
            const Float sum = decoder.EntryOfSum(Simd::Load(sums + place));
            Float a = Simd::MulAdd(sum, scale[j], Simd::Load(totals + place));
            if (p.offsets.values)
              a = Simd::MulAdd(Simd::Set(p.sums[(m0 + m) * groups + g]), offset[j], a);
            Simd::Store(totals + place, a);
          }
      }
    }
    for (int64_t t = 0; t < tiles; ++t)
      for (int m = 0; m < kM; ++m) {
        const Columns columns = {column + t * kTile, Min(kTile, p.n - column - t * kTile)};
        Float values[4];
        for (int j = 0; j < 4; ++j)
          values[j] = Simd::Load(totals + (t * kM + m) * kTile + j * kLanes);
        StoreColumns(p.y + (m0 + m) * p.n + columns.first, columns, values);
      }
  }
}

// The lookup-table product for Dispatch.
struct RunSparse {
  template <int kBits, Tables kTables>
  static void Run(const Problem& p, const Live& live, int64_t first, int64_t last) {
    if constexpr (kTables != kPerColumn) {  // the handler refuses a table a column
      if (p.m == 4) return SparsePacked<kBits, kTables, 4>(p, live, 0, first, last);
      if (p.m >= 2) SparsePacked<kBits, kTables, 2>(p, live, 0, first, last);
      if (p.m % 2) SparsePacked<kBits, kTables, 1>(p, live, p.m - 1, first, last);
    }
  }
};

Float LoadElements(const float* p) { return Simd::Load(p); }
Float LoadElements(const uint16_t* p) { return Simd::LoadBfloat16(p); }

// A dense weight: adds kRows live rows, from the i-th on, to the sums [kM][stride] of `count` columns.
template <class Element, int kM, int kRows>
void AddRows(const DenseProblem& p, const Live& live, int64_t i, int64_t column, int64_t count,
             int64_t stride, float* sums) {
  const Element* weight = static_cast<const Element*>(p.weight) + column;
  const Element *rows[kRows], *next[kRows];
  for (int r = 0; r < kRows; ++r) {
    rows[r] = weight + live.rows[i + r].start;
    next[r] = weight + live.rows[Min(i + kRows + r, live.count - 1)].start;
  }
  const float* x = live.x + i * kM;
  const auto add = [&](int64_t at, int64_t size) __attribute__((always_inline)) {
    Float sum[kM];
    LUT_UNROLL
    for (int m = 0; m < kM; ++m) sum[m] = Simd::Load(sums + m * stride + at);
    LUT_UNROLL
    for (int r = 0; r < kRows; ++r) {
      Float value;
      if (size < kLanes) {
        Element padded[kLanes] = {0};
        std::memcpy(padded, rows[r] + at, size * sizeof(Element));
        value = LoadElements(padded);
      } else {
        value = LoadElements(rows[r] + at);
      }
      LUT_UNROLL
      for (int m = 0; m < kM; ++m) sum[m] = Simd::MulAdd(Simd::Set(x[r * kM + m]), value, sum[m]);
    }
    LUT_UNROLL
    for (int m = 0; m < kM; ++m) Simd::Store(sums + m * stride + at, sum[m]);
  };
  constexpr int64_t kLine = 64 / sizeof(Element);
  int64_t at = 0;
  for (; at + kLine <= count; at += kLine) {
    LUT_UNROLL
    for (int r = 0; r < kRows; ++r) __builtin_prefetch(next[r] + at);
    LUT_UNROLL
    for (int v = 0; v < kLine; v += kLanes) add(at + v, kLanes);
  }
  for (; at < count; at += kLanes) add(at, Min(kLanes, count - at));
}

template <class Element, int kM>
void DenseRows(const DenseProblem& p, const Live& live, int64_t first, int64_t last) {
  constexpr int64_t kColumns = kChunk / kM / kTile * kTile;  // whole vectors a row, also for kM = 3
  constexpr int kRows = kTogether / kM;
  alignas(64) float sums[kM * kColumns];
  const int64_t end = Min(last * kTile, p.n);
  for (int64_t column = first * kTile; column < end; column += kColumns) {
    const int64_t count = Min(kColumns, end - column);
    std::memset(sums, 0, sizeof(sums));
    int64_t i = 0;
    for (; i + kRows <= live.count; i += kRows)
      AddRows<Element, kM, kRows>(p, live, i, column, count, kColumns, sums);
    for (; i < live.count; ++i)
      AddRows<Element, kM, 1>(p, live, i, column, count, kColumns, sums);
    for (int m = 0; m < kM; ++m)
      std::memcpy(p.y + m * p.n + column, sums + m * kColumns, count * sizeof(float));
  }
}

template <class Element>
void DenseElements(const DenseProblem& p, const Live& live, int64_t first, int64_t last) {
  switch (p.m) {
    case 1: return DenseRows<Element, 1>(p, live, first, last);
    case 2: return DenseRows<Element, 2>(p, live, first, last);
    case 3: return DenseRows<Element, 3>(p, live, first, last);
    case 4: return DenseRows<Element, 4>(p, live, first, last);
  }
}

void SparseDense(const DenseProblem& p, const Live& live, int64_t first, int64_t last) {
  (p.bfloat16 ? DenseElements<uint16_t> : DenseElements<float>)(p, live, first, last);
}

}  // namespace

#endif  // PALLAS_KERNELS_NATIVE_SPARSE_KERNELS_H_
