// The kernels, compiled once an instruction set (LUT_AVX512, LUT_AVX2, LUT_NEON, none) into an
// object of its own. No standard library templates: an inline function of theirs, compiled for
// AVX-512 here, could be the copy that the linker keeps for everybody.

#include "kernels.h"

#include "simd.h"

#if defined(LUT_AVX512)
#define LUT_ENTRY Avx512Kernels
#elif defined(LUT_AVX2)
#define LUT_ENTRY Avx2Kernels
#elif defined(LUT_NEON)
#define LUT_ENTRY NeonKernels
#else
#define LUT_ENTRY PortableKernels
#endif

namespace {

using lut::Problem;
using Float = Simd::Float;
using Word = Simd::Word;

constexpr int kLanes = Simd::kLanes;
constexpr int kTile = 4 * kLanes;  // columns: four a word
constexpr int kBlock = 8;          // rows
constexpr int kFewRows = 4;        // rows of x that look codes up themselves
constexpr int kPanelRows = 128;    // of the dequantised panel; 32 KB with AVX-512
constexpr int kRowsOfX = 512;      // that share a panel
constexpr int kPanelTiles = 64;    // of the transposed panel
constexpr int kAhead = 12;         // blocks between a prefetch and its use

int64_t Min(int64_t a, int64_t b) { return a < b ? a : b; }

// Where a tile of columns lies; the last tile may stick out of the matrix.
struct Columns {
  int64_t first, count;
  bool whole() const { return count == kTile; }
};

Columns TileColumns(const Problem& p, int64_t tile) {
  return {tile * kTile, Min(kTile, p.n - tile * kTile)};
}

// Natural order to the order of words: element i of out[j] is column 4 i + j.
void LoadColumns(const float* p, const Columns& columns, Float out[4]) {
  if (columns.whole()) return Simd::Deinterleave(p, out);
  float values[kTile] = {0};
  std::memcpy(values, p, columns.count * sizeof(float));
  Simd::Deinterleave(values, out);
}

// Scales or offsets of one group and tile.
void LoadScales(const void* scales, bool bfloat16, int64_t at, const Columns& columns,
                Float out[4]) {
  if (!bfloat16) return LoadColumns(static_cast<const float*>(scales) + at, columns, out);
  const uint16_t* p = static_cast<const uint16_t*>(scales) + at;
  uint32_t bits[kTile] = {0};
  float values[kTile];
  for (int i = 0; i < columns.count; ++i) bits[i] = uint32_t{p[i]} << 16;
  std::memcpy(values, bits, sizeof(values));
  Simd::Deinterleave(values, out);
}

float Sum(Float a) {
  float values[kLanes];
  Simd::Store(values, a);
  for (int step = kLanes / 2; step > 0; step /= 2)
    for (int i = 0; i < step; ++i) values[i] += values[i + step];
  return values[0];
}

// One table, one a column, or one whose entries are equally spaced and so need no looking up.
enum Tables { kShared, kPerColumn, kLinear };

float Spacing(const float* lut) { return lut[1] - lut[0]; }

// Whether start + code * spacing, rounded once, is every entry.
bool IsLinear(const float* lut, int entries) {
  for (int i = 0; i < entries; ++i)
    if (__builtin_fmaf(static_cast<float>(i), Spacing(lut), lut[0]) != lut[i]) return false;
  return true;
}

// Looks up the codes of kBits bits.
template <int kBits, Tables kTables>
class Decoder {
 public:
  Decoder(const Problem& p, const Columns& columns) : p_(p), columns_(columns) {
    // Repeated to 16 entries, so that the bits above a code do not matter.
    float entries[16] = {0};
    if (kInRegisters)
      for (int i = 0; i < 16; ++i) entries[i] = p.lut[i & ((1 << kBits) - 1)];
    table_ = Simd::LoadTable(entries);
    if (kBytes) byte_table_ = Simd::LoadByteTable(p.lut);
    lut_ = p.lut + (kTables == kPerColumn ? columns.first << kBits : 0);
    if (kTables != kPerColumn) return;
    for (int j = 0; j < 4; ++j) {
      uint32_t starts[kLanes];
      for (int i = 0; i < kLanes; ++i)
        starts[i] = 4 * i + j < columns.count ? static_cast<uint32_t>(4 * i + j) << kBits : 0;
      tables_[j] = Simd::LoadBytes(reinterpret_cast<const uint8_t*>(starts));
    }
  }

  // Calls use(row, j, value) for the 8 rows of a block and j < 4: element i of value is the table
  // entry of column 4 i + j of the tile, counted from the first one.
  template <class Use>
  inline __attribute__((always_inline)) void Block(int64_t block, int tile, Use use) const {
    const uint8_t* words = p_.words + block * kBits * p_.n + columns_.first + tile * kTile;
    int64_t stride = p_.n;
    uint8_t padded[kBits * kTile];
    if (!columns_.whole()) {
      for (int i = 0; i < kBits; ++i) {
        std::memset(padded + i * kTile, 0, kTile);
        std::memcpy(padded + i * kTile, words + i * stride, columns_.count);
      }
      words = padded;
      stride = kTile;
    }
    Word bytes[kBits];
    LUT_UNROLL
    for (int i = 0; i < kBits; ++i) bytes[i] = Simd::LoadBytes(words + i * stride);
    LUT_UNROLL
    for (int row = 0; row < kBlock; ++row) {
      const int byte = row * kBits / 8, shift = row * kBits % 8;
      const bool crosses = shift + kBits > 8;
      Word word = bytes[byte];
      if (crosses) {
        const uint32_t low = 0x01010101u * ((1u << (8 - shift)) - 1);
        word = Simd::Select(low, Simd::Right(word, shift),
                            Simd::Left(bytes[byte + 1 < kBits ? byte + 1 : byte], 8 - shift));
      }
      LUT_UNROLL
      for (int j = 0; j < 4; ++j) {
        const int right = 8 * j + (crosses ? 0 : shift);
        use(row, j, Lookup(right ? Simd::Right(word, right) : word, j));
      }
    }
  }

 private:
  static constexpr bool kInRegisters = kTables == kShared && kBits <= 4;
  static constexpr bool kBytes = kTables == kShared && kBits == 8;

  inline __attribute__((always_inline)) Float Lookup(Word index, int j) const {
    if (kInRegisters) return Simd::template Lookup<(kBits <= 3 ? 8 : 16)>(table_, index);
    if (kBytes) return Simd::LookupByte(byte_table_, index);
    index = Simd::And(index, (1u << kBits) - 1);
    if (kTables == kLinear)
      return Simd::MulAdd(Simd::Convert(index), Simd::Set(Spacing(lut_)), Simd::Set(lut_[0]));
    return Simd::Gather(lut_, Simd::Add(index, tables_[j]));
  }

  const Problem& p_;
  const Columns columns_;
  const float* lut_;
  Simd::Table table_;
  Simd::ByteTable byte_table_;
  Word tables_[4];
};

void StoreColumns(float* y, const Columns& columns, const Float values[4]) {
  float natural[4][kLanes];
  for (int j = 0; j < 4; ++j) Simd::Store(natural[j], values[j]);
  for (int i = 0; i < columns.count; ++i) y[i] = natural[i % 4][i / 4];
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
  for (int64_t g = 0; g < groups; ++g) {
    Float sum[kM][kTiles][4];
    LUT_UNROLL
    for (int m = 0; m < kM; ++m)
      LUT_UNROLL
      for (int t = 0; t < kTiles; ++t)
        LUT_UNROLL
        for (int j = 0; j < 4; ++j) sum[m][t][j] = Simd::Zero();
    for (int64_t b = g * group_blocks; b < Min(blocks, (g + 1) * group_blocks); ++b) {
      if (b + kAhead < blocks)
        for (int i = 0; i < kBits; ++i)
          for (int byte = 0; byte < kTiles * kTile; byte += 64)
            __builtin_prefetch(p.words + ((b + kAhead) * kBits + i) * p.n + columns.first + byte);
      LUT_UNROLL
      for (int t = 0; t < kTiles; ++t)
        decoder.Block(b, t, [&](int row, int j, Float value) __attribute__((always_inline)) {
          LUT_UNROLL
          for (int m = 0; m < kM; ++m)
            sum[m][t][j] =
                Simd::MulAdd(Simd::Set(x[m * p.k + b * kBlock + row]), value, sum[m][t][j]);
        });
    }
    for (int t = 0; t < kTiles; ++t) {
      const int64_t at = g * p.n + columns.first + t * kTile;
      Float scale[4], offset[4];
      LoadScales(p.scales, p.bfloat16_scales, at, columns, scale);
      if (p.offsets) LoadScales(p.offsets, p.bfloat16_scales, at, columns, offset);
      for (int m = 0; m < kM; ++m)
        for (int j = 0; j < 4; ++j) {
          Float& a = total[m][t][j];
          a = Simd::MulAdd(sum[m][t][j], scale[j], a);
          if (p.offsets)
            a = Simd::MulAdd(Simd::Set(p.sums[(m0 + m) * groups + g]), offset[j], a);
        }
    }
  }
  for (int m = 0; m < kM; ++m)
    for (int t = 0; t < kTiles; ++t)
      StoreColumns(p.y + (m0 + m) * p.n + columns.first + t * kTile, columns, total[m][t]);
}

// One block of 8 rows of the weight, scaled: [8][4][kLanes], rows `stride` floats apart.
template <int kBits, Tables kTables>
void Dequantize(const Problem& p, const Decoder<kBits, kTables>& decoder, int64_t block,
                const Columns& columns, int64_t stride, float* out) {
  const int64_t at = block * kBlock / p.group * p.n + columns.first;
  Float scale[4], offset[4];
  for (int j = 0; j < 4; ++j) offset[j] = Simd::Zero();
  LoadScales(p.scales, p.bfloat16_scales, at, columns, scale);
  if (p.offsets) LoadScales(p.offsets, p.bfloat16_scales, at, columns, offset);
  decoder.Block(block, 0, [&](int row, int j, Float value) __attribute__((always_inline)) {
    Simd::Store(out + row * stride + j * kLanes, Simd::MulAdd(value, scale[j], offset[j]));
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
      const float* x = packed;
      std::memset(c, 0, count * kTile * sizeof(float));
      for (int64_t k0 = 0; k0 < p.k; k0 += kPanelRows) {
        const int64_t rows = Min(kPanelRows, p.k - k0);
        for (int64_t b = 0; b < rows / kBlock; ++b)
          Dequantize(p, decoder, k0 / kBlock + b, columns, kTile, panel + b * kBlock * kTile);
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
  constexpr bool kCheap = kTables == kLinear || (kTables == kShared && kBits <= 4);
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
        Dequantize(p, Decoder<kBits, kTables>(p, columns), block, columns, kStride,
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

template <int kBits, Tables kTables>
void RunTables(const Problem& p, int64_t first, int64_t last, float* scratch, bool transpose) {
  (transpose ? Transposed<kBits, kTables> : Product<kBits, kTables>)(p, first, last, scratch);
}

template <int kBits>
void RunBits(const Problem& p, int64_t first, int64_t last, float* scratch, bool transpose) {
  if (p.tables > 1) return RunTables<kBits, kPerColumn>(p, first, last, scratch, transpose);
  // Where the table fits a register or two, looking up is as fast as computing.
  if (kBits == 8 && IsLinear(p.lut, 1 << kBits))
    return RunTables<8, kLinear>(p, first, last, scratch, transpose);
  RunTables<kBits, kShared>(p, first, last, scratch, transpose);
}

void Run(const Problem& p, int64_t first, int64_t last, float* scratch, bool transpose) {
  switch (p.bits) {
    case 2: return RunBits<2>(p, first, last, scratch, transpose);
    case 3: return RunBits<3>(p, first, last, scratch, transpose);
    case 4: return RunBits<4>(p, first, last, scratch, transpose);
    case 8: return RunBits<8>(p, first, last, scratch, transpose);
  }
}

void RunProduct(const Problem& p, int64_t first, int64_t last, float* scratch) {
  Run(p, first, last, scratch, false);
}

void RunTransposed(const Problem& p, int64_t first, int64_t last, float* scratch) {
  Run(p, first, last, scratch, true);
}

}  // namespace

namespace lut {

const Kernels* LUT_ENTRY() {
  static const Kernels kernels = {Simd::kName, kTile, Scratch, RunProduct, RunTransposed};
  return &kernels;
}

}  // namespace lut
