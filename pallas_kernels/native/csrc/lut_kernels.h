// Products with a lookup-table weight: a few rows of x, many rows of x, and the transposed product.
#ifndef PALLAS_KERNELS_NATIVE_LUT_KERNELS_H_
#define PALLAS_KERNELS_NATIVE_LUT_KERNELS_H_

#include "decoder.h"

namespace {

constexpr int kPanelRows = 128;    // of the dequantised panel; 32 KB with AVX-512
constexpr int kRowsOfX = 512;      // that share a panel
constexpr int kPanelTiles = 64;    // of the transposed panel
constexpr int kAhead = 24;         // rows of words between a prefetch and its use

float Sum(Float a) {
  float values[kLanes];
  Simd::Store(values, a);
  for (int step = kLanes / 2; step > 0; step /= 2)
    for (int i = 0; i < step; ++i) values[i] += values[i + step];
  return values[0];
}

// y for kM rows of x and kTiles tiles; every code is looked up once and multiplied with all rows.
// Only a single tile may stick out of the matrix.
template <int kBits, Tables kTables, int kM, int kTiles>
void FewRows(const Problem& p, int64_t m0, int64_t tile) {
  const Columns columns = kTiles == 1 ? TileColumns(p, tile) : Columns{tile * kTile, kTile};
  const Decoder<kBits, kTables> decoder(p, columns);
  const int64_t blocks = p.k / kBlock, group_blocks = p.group / kBlock;
  const int64_t groups = (blocks + group_blocks - 1) / group_blocks;
  const float* x = p.x + m0 * p.k;
  Float total[kM][kTiles][4];
  for (int i = 0; i < kM * kTiles * 4; ++i) (&total[0][0][0])[i] = Simd::Zero();
  alignas(64) float scale_steps[kTiles][kTile], offset_steps[kTiles][kTile];
  const auto load_steps = [&](const Scales& s, int64_t g, float (*steps)[kTile]) {
    if (__builtin_expect(s.words && g % s.rows == 0, false))
      for (int t = 0; t < kTiles; ++t)
        LoadSteps(p, s, g, {columns.first + t * kTile, columns.count}, steps[t]);
  };
  const int64_t ahead = Min(kAhead / kBits, blocks), ahead_groups = ahead / group_blocks + 1;
  for (int64_t g = 0; g < groups; ++g) {
    if (g + ahead_groups < groups) {
      PrefetchScales(p, p.scales, g + ahead_groups, columns.first, kTiles * kTile);
      if (p.offsets.values)
        PrefetchScales(p, p.offsets, g + ahead_groups, columns.first, kTiles * kTile);
    }
    Float sum[kM][kTiles][4];
    LUT_UNROLL
    for (int m = 0; m < kM; ++m)
      LUT_UNROLL
      for (int t = 0; t < kTiles; ++t)
        LUT_UNROLL
        for (int j = 0; j < 4; ++j) sum[m][t][j] = Simd::Zero();
    for (int64_t b = g * group_blocks; b < Min(blocks, (g + 1) * group_blocks); ++b) {
      // Behind the last rows come the first ones of the next columns.
      const bool here = b + ahead < blocks;
      const uint8_t* words = p.words + (here ? b + ahead : b + ahead - blocks) * kBits * p.n +
                             columns.first + (here ? 0 : kTiles * kTile);
      if (here || columns.first + 2 * kTiles * kTile <= p.n)
        for (int i = 0; i < kBits; ++i)
          for (int byte = 0; byte < kTiles * kTile; byte += 64)
            __builtin_prefetch(words + i * p.n + byte);
      LUT_UNROLL
      for (int t = 0; t < kTiles; ++t)
        decoder.Block(b, t, [&](int row, int j, Float value) __attribute__((always_inline)) {
          LUT_UNROLL
          for (int m = 0; m < kM; ++m)
            sum[m][t][j] =
                Simd::MulAdd(Simd::Set(x[m * p.k + b * kBlock + row]), value, sum[m][t][j]);
        });
    }
    load_steps(p.scales, g, scale_steps);
    load_steps(p.offsets, g, offset_steps);
    LUT_UNROLL  // with a variable t, the sums would lie in memory
    for (int t = 0; t < kTiles; ++t) {
      const Columns own = {columns.first + t * kTile, columns.count};
      Float scale[4], offset[4];
      LoadScales(p, p.scales, g, own, scale_steps[t], scale);
      if (p.offsets.values) LoadScales(p, p.offsets, g, own, offset_steps[t], offset);
      LUT_UNROLL
      for (int m = 0; m < kM; ++m)
        LUT_UNROLL
        for (int j = 0; j < 4; ++j) {
          Float& a = total[m][t][j];
          a = Simd::MulAdd(decoder.EntryOfSum(sum[m][t][j]), scale[j], a);
          if (p.offsets.values)
            a = Simd::MulAdd(Simd::Set(p.sums[(m0 + m) * groups + g]), offset[j], a);
        }
    }
  }
  for (int m = 0; m < kM; ++m)
    for (int t = 0; t < kTiles; ++t)
      StoreColumns(p.y + (m0 + m) * p.n + columns.first + t * kTile, columns, total[m][t]);
}

// Scales and offsets of a tile, which the blocks of a group share.
struct TileScales {
  int64_t group = -1;
  Float scale[4], offset[4];

  void Load(const Problem& p, int64_t block, const Columns& columns) {
    const int64_t wanted = block * kBlock / p.group;
    if (wanted == group) return;
    group = wanted;
    LoadScales(p, p.scales, group, columns, scale);
    for (int j = 0; j < 4; ++j) offset[j] = Simd::Zero();
    if (p.offsets.values) LoadScales(p, p.offsets, group, columns, offset);
  }
};

// One block of 8 rows of the weight, scaled: [8][4][kLanes], rows `stride` floats apart.
template <int kBits, Tables kTables>
void Dequantize(const Problem& p, const Decoder<kBits, kTables>& decoder, int64_t block,
                const Columns& columns, int64_t stride, TileScales* scales, float* out) {
  scales->Load(p, block, columns);
  Float scale[4], offset[4];
  for (int j = 0; j < 4; ++j) scale[j] = scales->scale[j], offset[j] = scales->offset[j];
  decoder.Block(block, 0, [&](int row, int j, Float value) __attribute__((always_inline)) {
    Simd::Store(out + row * stride + j * kLanes,
                Simd::MulAdd(decoder.Entry(value), scale[j], offset[j]));
  });
}

// x[m0 + i][k0 + r] goes to [panel][block of kM rows i][r][kM], so that the dense kernel reads on
// and on. The last blocks of rows hold one row each.
void PackRows(const Problem& p, int64_t m0, int64_t count, float* out) {
  for (int64_t k0 = 0; k0 < p.k; k0 += kPanelRows) {
    const int64_t rows = Min(kPanelRows, p.k - k0);
    for (int64_t m = 0; m < count;) {
      const int64_t block = m + Simd::kRows <= count ? Simd::kRows : 1;
      for (int64_t i = 0; i < block; ++i) {
        const float* x = p.x + (m0 + m + i) * p.k + k0;
        for (int64_t r = 0; r < rows; ++r) out[r * block + i] = x[r];
      }
      out += rows * block;
      m += block;
    }
  }
}

// c[kM][kTile] += x[rows][kM].T @ panel[rows][kTile].
template <int kM>
void MultiplyPanel(const float* x, const float* panel, int64_t rows, float* c) {
  Float sum[kM][4];
  LUT_UNROLL
  for (int m = 0; m < kM; ++m)
    LUT_UNROLL
    for (int j = 0; j < 4; ++j) sum[m][j] = Simd::Load(c + m * kTile + j * kLanes);
  for (int64_t r = 0; r < rows; ++r) {
    Float value[4];
    LUT_UNROLL
    for (int j = 0; j < 4; ++j) value[j] = Simd::Load(panel + r * kTile + j * kLanes);
    LUT_UNROLL
    for (int m = 0; m < kM; ++m) {
      const Float xr = Simd::Set(x[r * kM + m]);
      LUT_UNROLL
      for (int j = 0; j < 4; ++j) sum[m][j] = Simd::MulAdd(xr, value[j], sum[m][j]);
    }
  }
  LUT_UNROLL
  for (int m = 0; m < kM; ++m)
    LUT_UNROLL
    for (int j = 0; j < 4; ++j) Simd::Store(c + m * kTile + j * kLanes, sum[m][j]);
}

// Many rows of x: a panel of one tile is dequantised at a time and multiplied with all of them.
template <int kBits, Tables kTables>
void ManyRows(const Problem& p, int64_t first, int64_t last, float* scratch) {
  float* panel = scratch;
  float* c = panel + kPanelRows * kTile;
  float* packed = c + Min(p.m, kRowsOfX) * kTile;
  for (int64_t m0 = 0; m0 < p.m; m0 += kRowsOfX) {
    const int64_t count = Min(kRowsOfX, p.m - m0);
    PackRows(p, m0, count, packed);
    for (int64_t tile = first; tile < last; ++tile) {
      const Columns columns = TileColumns(p, tile);
      const Decoder<kBits, kTables> decoder(p, columns);
      TileScales scales;
      const float* x = packed;
      std::memset(c, 0, count * kTile * sizeof(float));
      for (int64_t k0 = 0; k0 < p.k; k0 += kPanelRows) {
        const int64_t rows = Min(kPanelRows, p.k - k0);
        for (int64_t b = 0; b < rows / kBlock; ++b)
          Dequantize(p, decoder, k0 / kBlock + b, columns, kTile, &scales,
                     panel + b * kBlock * kTile);
        int64_t m = 0;
        for (; m + Simd::kRows <= count; m += Simd::kRows, x += rows * Simd::kRows)
          MultiplyPanel<Simd::kRows>(x, panel, rows, c + m * kTile);
        for (; m < count; ++m, x += rows) MultiplyPanel<1>(x, panel, rows, c + m * kTile);
      }
      for (int64_t m = 0; m < count; ++m) {
        Float values[4];
        for (int j = 0; j < 4; ++j) values[j] = Simd::Load(c + m * kTile + j * kLanes);
        StoreColumns(p.y + (m0 + m) * p.n + columns.first, columns, values);
      }
    }
  }
}

template <int kBits, Tables kTables, int kM, int kTiles>
void FewRowsOfTiles(const Problem& p, int64_t m0, int64_t first, int64_t last) {
  int64_t tile = first;
  for (; tile + kTiles <= last && (tile + kTiles) * kTile <= p.n; tile += kTiles)
    FewRows<kBits, kTables, kM, kTiles>(p, m0, tile);
  for (; tile < last; ++tile) FewRows<kBits, kTables, kM, 1>(p, m0, tile);
}

template <int kBits, Tables kTables>
void Product(const Problem& p, int64_t first, int64_t last, float* scratch) {
  constexpr bool kCheap = AreComputed(kTables) || (kTables == kShared && kBits <= 4);
  constexpr int kWide = kCheap ? Simd::kWide : 1, kPair = kWide > 1 ? kWide / 2 : 1;
  if (p.m > kFewRows) return ManyRows<kBits, kTables>(p, first, last, scratch);
  if (p.m == 4) return FewRowsOfTiles<kBits, kTables, 4, 1>(p, 0, first, last);
  if (p.m >= 2) FewRowsOfTiles<kBits, kTables, 2, kPair>(p, 0, first, last);
  if (p.m % 2) FewRowsOfTiles<kBits, kTables, 1, kWide>(p, p.m - 1, first, last);
}

// y[m][8] of one dequantised block [8][columns] and kM rows of x, both in the order of words.
template <int kM>
void MultiplyBlock(const float* x, int64_t x_stride, const float* panel, int64_t stride,
                   int64_t columns, float* y) {
  Float sum[kM][kBlock];
  LUT_UNROLL
  for (int m = 0; m < kM; ++m)
    LUT_UNROLL
    for (int r = 0; r < kBlock; ++r) sum[m][r] = Simd::Zero();
  for (int64_t i = 0; i < columns; i += kLanes) {
    Float xs[kM];
    LUT_UNROLL
    for (int m = 0; m < kM; ++m) xs[m] = Simd::Load(x + m * x_stride + i);
    LUT_UNROLL
    for (int r = 0; r < kBlock; ++r) {
      const Float value = Simd::Load(panel + r * stride + i);
      LUT_UNROLL
      for (int m = 0; m < kM; ++m) sum[m][r] = Simd::MulAdd(xs[m], value, sum[m][r]);
    }
  }
  for (int m = 0; m < kM; ++m)
    for (int r = 0; r < kBlock; ++r) y[m * kBlock + r] += Sum(sum[m][r]);
}

// x @ W.T: a block of 8 rows of the weight is dequantised, kPanelTiles tiles at a time.
template <int kBits, Tables kTables>
void Transposed(const Problem& p, int64_t first, int64_t last, float* scratch) {
  const int64_t tiles = (p.n + kTile - 1) / kTile, width = tiles * kTile;
  constexpr int64_t kStride = kPanelTiles * kTile;
  float* panel = scratch;
  float* y = panel + kBlock * kStride;
  float* x = y + p.m * kBlock;
  for (int64_t m = 0; m < p.m; ++m)
    for (int64_t t = 0; t < tiles; ++t) {
      Float values[4];
      LoadColumns(p.x + m * p.n + t * kTile, TileColumns(p, t), values);
      for (int j = 0; j < 4; ++j) Simd::Store(x + m * width + t * kTile + j * kLanes, values[j]);
    }
  for (int64_t block = first; block < last; ++block) {
    std::memset(y, 0, p.m * kBlock * sizeof(float));
    for (int64_t t0 = 0; t0 < tiles; t0 += kPanelTiles) {
      const int64_t count = Min(kPanelTiles, tiles - t0);
      for (int64_t t = 0; t < count; ++t) {
        const Columns columns = TileColumns(p, t0 + t);
        TileScales scales;
        Dequantize(p, Decoder<kBits, kTables>(p, columns), block, columns, kStride, &scales,
                   panel + t * kTile);
      }
      const float* xs = x + t0 * kTile;
      int64_t m = 0;
      for (; m + 2 <= p.m; m += 2)
        MultiplyBlock<2>(xs + m * width, width, panel, kStride, count * kTile, y + m * kBlock);
      if (m < p.m)
        MultiplyBlock<1>(xs + m * width, width, panel, kStride, count * kTile, y + m * kBlock);
    }
    const int64_t rows = Min(kBlock, p.rows - block * kBlock);
    for (int64_t m = 0; m < p.m; ++m)
      std::memcpy(p.y + m * p.rows + block * kBlock, y + m * kBlock, rows * sizeof(float));
  }
}

int64_t Scratch(const Problem& p, bool transpose) {
  const int64_t width = (p.n + kTile - 1) / kTile * kTile;
  if (transpose) return kBlock * kPanelTiles * kTile + p.m * kBlock + p.m * width;
  if (p.m <= kFewRows) return 0;
  return kPanelRows * kTile + Min(p.m, kRowsOfX) * (kTile + p.k);
}

// The two products for DispatchTables.
struct RunProduct {
  template <int kBits, Tables kTables>
  static void Run(const Problem& p, int64_t first, int64_t last, float* scratch) {
    Product<kBits, kTables>(p, first, last, scratch);
  }
};

struct RunTransposed {
  template <int kBits, Tables kTables>
  static void Run(const Problem& p, int64_t first, int64_t last, float* scratch) {
    Transposed<kBits, kTables>(p, first, last, scratch);
  }
};

}  // namespace

#endif  // PALLAS_KERNELS_NATIVE_LUT_KERNELS_H_
