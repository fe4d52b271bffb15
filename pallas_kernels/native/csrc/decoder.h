// Looking codes up, and moving columns between memory and the order of words; for the kernels of one
// instruction set. No standard library templates: an inline function of theirs, compiled for AVX-512
// here, could be the copy that the linker keeps for everybody.
#ifndef PALLAS_KERNELS_NATIVE_DECODER_H_
#define PALLAS_KERNELS_NATIVE_DECODER_H_

#include <cmath>

#include "kernels.h"
#include "simd.h"

namespace {

using lut::kFewRows;
using lut::LiveRow;
using lut::Problem;
using lut::Scales;
using lut::ScaleType;
using Float = Simd::Float;
using Word = Simd::Word;

constexpr int kLanes = Simd::kLanes;
constexpr int kTile = 4 * kLanes;  // columns: four a word
constexpr int kBlock = 8;          // rows

template <bool kValue>
struct Bool {
  static constexpr bool value = kValue;
};

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

// A tile of numbers of any type. Inline, as a call would spill the sums of the caller.
inline __attribute__((always_inline)) void LoadValues(const void* numbers, ScaleType type,
                                                      int64_t at, const Columns& columns,
                                                      Float out[4]) {
  if (type == ScaleType::kFloat32)
    return LoadColumns(static_cast<const float*>(numbers) + at, columns, out);
  const uint16_t* p = static_cast<const uint16_t*>(numbers) + at;
  uint16_t padded[kTile] = {0};
  if (!columns.whole()) p = static_cast<uint16_t*>(std::memcpy(padded, p, 2 * columns.count));
  float values[kTile];
  for (int i = 0; i < kTile; i += kLanes)
    Simd::Store(values + i, type == ScaleType::kBfloat16 ? Simd::LoadBfloat16(p + i)
                                                         : Simd::LoadFloat16(p + i));
  Simd::Deinterleave(values, out);
}

// One number of any type.
float LoadValue(const void* numbers, ScaleType type, int64_t at) {
  float value[kLanes];
  if (type == ScaleType::kFloat32) return static_cast<const float*>(numbers)[at];
  const uint16_t padded[kLanes] = {static_cast<const uint16_t*>(numbers)[at]};
  Simd::Store(value, type == ScaleType::kBfloat16 ? Simd::LoadBfloat16(padded)
                                                  : Simd::LoadFloat16(padded));
  return value[0];
}

// The steps of one group and tile of quantised scales, in the order of words.
__attribute__((noinline)) void LoadSteps(const Problem& p, const Scales& s, int64_t group,
                                         const Columns& columns, float steps[kTile]) {
  const int64_t row = group / s.rows;
  Float out[4];
  if (s.columns == 1) {
    LoadValues(s.values, s.type, row * p.n + columns.first, columns, out);
  } else {
    const int64_t start = row * ((p.n + s.columns - 1) / s.columns);
    int64_t block = columns.first / s.columns, end = (block + 1) * s.columns - columns.first;
    if (end >= columns.count) {
      const Float value = Simd::Set(LoadValue(s.values, s.type, start + block));
      for (int j = 0; j < 4; ++j) out[j] = value;
    } else {
      float values[kTile + kLanes] = {0};  // a run may be written beyond its end
      for (int64_t at = 0; at < columns.count; ++block, end += s.columns) {
        const Float value = Simd::Set(LoadValue(s.values, s.type, start + block));
        const int64_t stop = Min(end, kTile);
        for (int64_t i = at; i < stop; i += kLanes) Simd::Store(values + i, value);
        at = stop;
      }
      Simd::Deinterleave(values, out);
    }
  }
  for (int j = 0; j < 4; ++j) Simd::Store(steps + j * kLanes, out[j]);
}

// Where the codes of a group lie that are quantised scales.
struct ScaleCodes {
  const uint8_t* bytes;
  int shift;
  bool crosses;

  ScaleCodes(const Problem& p, const Scales& s, int64_t group, int64_t column) {
    const int64_t bit = group % kBlock * s.bits;
    bytes = s.words + (group / kBlock * s.bits + bit / 8) * p.n + column;
    shift = static_cast<int>(bit % 8);
    crosses = shift + s.bits > 8;
  }
};

// Scales or offsets of one group and tile; `steps` are those of quantised ones.
inline __attribute__((always_inline)) void LoadScales(const Problem& p, const Scales& s,
                                                      int64_t group, const Columns& columns,
                                                      const float steps[kTile], Float out[4]) {
  if (!s.words) return LoadValues(s.values, s.type, group * p.n + columns.first, columns, out);
  const ScaleCodes codes(p, s, group, columns.first);
  const uint8_t* bytes = codes.bytes;
  int64_t stride = p.n;
  uint8_t padded[2 * kTile] = {0};
  if (!columns.whole()) {
    std::memcpy(padded, bytes, columns.count);
    if (codes.crosses) std::memcpy(padded + kTile, bytes + stride, columns.count);
    bytes = padded;
    stride = kTile;
  }
  Word word = Simd::RightBy(Simd::LoadBytes(bytes), codes.shift);
  if (codes.crosses) {
    const Word next = Simd::LeftBy(Simd::LoadBytes(bytes + stride), 8 - codes.shift);
    word = Simd::Select(0x01010101u * ((1u << (8 - codes.shift)) - 1), word, next);
  }
  word = Simd::And(word, 0x01010101u * ((1u << s.bits) - 1));
  const Float zero = Simd::Set(-256 * Simd::template LowBitsOf0<8>() - s.zero);
  LUT_UNROLL
  for (int j = 0; j < 4; ++j) {
    const Float code = Simd::template LowBits<8>(j ? Simd::Right(word, 8 * j) : word);
    out[j] = Simd::MulAdd(Simd::MulAdd(code, Simd::Set(256), zero), Simd::Load(steps + j * kLanes),
                          Simd::Set(s.floor));
  }
}

// The same for a single group.
inline __attribute__((always_inline)) void LoadScales(const Problem& p, const Scales& s,
                                                      int64_t group, const Columns& columns,
                                                      Float out[4]) {
  alignas(64) float steps[kTile];
  if (s.words) LoadSteps(p, s, group, columns, steps);
  LoadScales(p, s, group, columns, steps, out);
}

// Brings scales near that are needed soon.
void PrefetchScales(const Problem& p, const Scales& s, int64_t group, int64_t column,
                    int64_t count) {
  const int64_t bytes = s.words ? 1 : s.type == ScaleType::kFloat32 ? 4 : 2;
  const char* start = s.words
                          ? reinterpret_cast<const char*>(ScaleCodes(p, s, group, column).bytes)
                          : static_cast<const char*>(s.values) + (group * p.n + column) * bytes;
  for (int64_t i = 0; i < count * bytes; i += 64) __builtin_prefetch(start + i);
}

// One table, one a column, or one that needs no looking up: its entries are equally spaced, or codes
// of 8 bits are floats.
enum Tables { kShared, kPerColumn, kLinear, kFloat8 };

constexpr bool AreComputed(Tables tables) { return tables == kLinear || tables == kFloat8; }

// Whether every entry of a table is the one that is computed of its code.
template <int kBits, class Entry>
bool IsComputed(const float* lut, Entry entry) {
  for (int i = 0; i < 1 << kBits; i += kLanes) {
    uint32_t codes[kLanes];
    float entries[kLanes];
    for (int j = 0; j < kLanes; ++j) codes[j] = static_cast<uint32_t>(i + j);
    Simd::Store(entries, entry(Simd::LoadBytes(reinterpret_cast<const uint8_t*>(codes))));
    for (int j = 0; j < kLanes; ++j)
      if (entries[j] != lut[i + j]) return false;
  }
  return true;
}

// What computes equally spaced entries, rounded once as they are: (code - zero) * step, the step in
// two parts, because that of 127 entries a unit, say, is none of float32.
struct Line {
  float zero, step, rest;  // in 2**kBits codes: with sums of codes large x would overflow

  // code - zero of the lowest bits of a word.
  template <int kBits>
  inline __attribute__((always_inline)) Float Distance(Word word) const {
    constexpr float kOf0 = Simd::template LowBitsOf0<kBits>();
    return Simd::Sub(Simd::template LowBits<kBits>(word), Simd::Set(kOf0 + zero));
  }

  // The entry at a distance.
  inline __attribute__((always_inline)) Float Entry(Float distance) const {
    return Simd::MulAdd(distance, Simd::Set(step),
                        Simd::MulAdd(distance, Simd::Set(rest), Simd::Zero()));
  }

  // The sum of entries for one of distances, which is infinite if a factor of theirs was.
  inline __attribute__((always_inline)) Float EntryOfSum(Float distance) const {
    return Simd::MulAdd(distance, Simd::Set(step),
                        Simd::MulAdd(Simd::Finite(distance), Simd::Set(rest), Simd::Zero()));
  }

};

// Finds the line of a table of equally spaced entries, zero among them, if it is one.
template <int kBits>
bool FindLine(const float* lut, Line* line) {
  constexpr int kLast = (1 << kBits) - 1;
  int zero = 0;
  while (zero < kLast && lut[zero] != 0.0f) ++zero;
  if (zero == kLast) return false;
  const double step = static_cast<double>(lut[kLast]) / (kLast - zero) * (1 << kBits);
  const float rounded = static_cast<float>(step);
  const float rest = static_cast<float>(step - rounded);
  *line = {zero / static_cast<float>(1 << kBits), rounded, rest};
  // A larger rest would overflow where the product of the step is infinite, or of the other sign.
  return std::fabs(rest) < 1.0f && IsComputed<kBits>(lut, [line](Word word) {
           return line->Entry(line->Distance<kBits>(word));
         });
}

// What computes the entries of codes that are 8-bit floats (E4M3), times a factor. The codes that
// stand for NaN have the value that their bits would have.
struct Float8 {
  float factor;  // times 256, as values are in units of 256

  // The value of the lowest 8 bits of a word.
  static inline __attribute__((always_inline)) Float Value(Word word) {
    const Word of_0 = Simd::SetWord(0x38000000);  // 2**-15
    const Float a = Simd::OfBits(Simd::Select(0x07F00000, Simd::Left(word, 20), of_0));
    // Below 2**-14 are subnormal numbers: 2**-15 (1 + m) stands for 2**-14 m.
    const Float less = Simd::Max(Simd::Sub(Simd::Set(0x1p-14f), a), Simd::Zero());
    const Word magnitude = Simd::Bits(Simd::Sub(a, less));
    return Simd::OfBits(Simd::Select(0x80000000, Simd::Left(word, 24), magnitude));
  }

  inline __attribute__((always_inline)) Float Entry(Float value) const {
    return Simd::MulAdd(value, Simd::Set(factor), Simd::Zero());
  }
};

// Finds the factor of a table whose entries are 8-bit floats times a factor, if it is one.
bool FindFloat8(const float* lut, Float8* float8) {
  *float8 = {256 * lut[0x38]};  // the code of 1
  return IsComputed<8>(lut, [float8](Word word) { return float8->Entry(Float8::Value(word)); });
}

// Looks up the codes of kBits bits; if kLinear or kFloat8, `lut` of the problem is the numbers of a
// Line or Float8.
template <int kBits, Tables kTables>
class Decoder {
 public:
  Decoder(const Problem& p, const Columns& columns) : p_(p), columns_(columns) {
    // Repeated to 16 entries, so that the bits above a code do not matter.
    float entries[16] = {0};
    if (kInRegisters)
      for (int i = 0; i < 16; ++i) entries[i] = p.lut[i & ((1 << kBits) - 1)];
    table_ = Simd::LoadTable(entries);
    if (kBytes) byte_table_ = Simd::template LoadByteTable<kByteBits>(p.lut);
    if (kTables == kLinear) std::memcpy(&line_, p.lut, sizeof(line_));
    if (kTables == kFloat8) std::memcpy(&float8_, p.lut, sizeof(float8_));
    if (kTables != kPerColumn) return;
    lut_ = p.lut + (columns.first << kBits);
    for (int j = 0; j < 4; ++j) {
      uint32_t starts[kLanes];
      for (int i = 0; i < kLanes; ++i)
        starts[i] = 4 * i + j < columns.count ? static_cast<uint32_t>(4 * i + j) << kBits : 0;
      tables_[j] = Simd::LoadBytes(reinterpret_cast<const uint8_t*>(starts));
    }
  }

  // Calls use(row, j, value) for the 8 rows of a block and j < 4: Entry of element i of value is the
  // table entry of column 4 i + j of the tile, counted from the first one.
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

  // What a value is in units of the table; and a sum of values.
  inline __attribute__((always_inline)) Float Entry(Float value) const {
    if (kTables == kLinear) return line_.Entry(value);
    return kTables == kFloat8 ? float8_.Entry(value) : value;
  }
  inline __attribute__((always_inline)) Float EntryOfSum(Float value) const {
    return kTables == kLinear ? line_.EntryOfSum(value) : Entry(value);
  }

  // Calls use(j, value) for one row of a tile, whose codes lie `shift` bits into the bytes; those
  // that cross into the next bytes go on there.
  template <bool kCrosses, class Use>
  inline __attribute__((always_inline)) void Row(const uint8_t* bytes, int64_t stride, int shift,
                                                 Use use) const {
    Word word = Simd::RightBy(Simd::LoadBytes(bytes), shift);
    if (kCrosses) {
      const Word next = Simd::LeftBy(Simd::LoadBytes(bytes + stride), 8 - shift);
      word = Simd::Select(0x01010101u * ((1u << (8 - shift)) - 1), word, next);
    }
    LUT_UNROLL
    for (int j = 0; j < 4; ++j) use(j, Lookup(j ? Simd::Right(word, 8 * j) : word, j));
  }

 private:
  static constexpr bool kInRegisters = kTables == kShared && kBits <= 4;
  static constexpr bool kBytes = kTables == kShared && kBits > 4;
  static constexpr int kByteBits = kBits > 4 ? kBits : 5;

  inline __attribute__((always_inline)) Float Lookup(Word index, int j) const {
    if (kInRegisters) return Simd::template Lookup<(kBits <= 3 ? 8 : 16)>(table_, index);
    if (kBytes) return Simd::template LookupByte<kByteBits>(byte_table_, index);
    if (kTables == kLinear) return line_.template Distance<kBits>(index);
    if (kTables == kFloat8) return Float8::Value(index);
    return Simd::Gather(lut_, Simd::Add(Simd::And(index, (1u << kBits) - 1), tables_[j]));
  }

  const Problem& p_;
  const Columns columns_;
  const float* lut_;
  Line line_;
  Float8 float8_;
  Simd::Table table_;
  Simd::ByteTable byte_table_;
  Word tables_[4];
};

void StoreColumns(float* y, const Columns& columns, const Float values[4]) {
  float natural[4][kLanes];
  for (int j = 0; j < 4; ++j) Simd::Store(natural[j], values[j]);
  for (int i = 0; i < columns.count; ++i) y[i] = natural[i % 4][i / 4];
}

// Calls Product::Run for the problem's bits and kind of table.
template <class Product, int kBits, class... Rest>
void DispatchTables(const Problem& p, Rest... rest) {
  if (p.tables > 1) return Product::template Run<kBits, kPerColumn>(p, rest...);
  // Where the table fits a register or two, looking up is as fast as computing.
  if constexpr (kBits > 5) {
    Line line;
    if (FindLine<kBits>(p.lut, &line)) {
      Problem computed = p;
      computed.lut = &line.zero;
      return Product::template Run<kBits, kLinear>(computed, rest...);
    }
  }
  if constexpr (kBits == 8) {
    Float8 float8;
    if (FindFloat8(p.lut, &float8)) {
      Problem computed = p;
      computed.lut = &float8.factor;
      return Product::template Run<kBits, kFloat8>(computed, rest...);
    }
  }
  Product::template Run<kBits, kShared>(p, rest...);
}

// Says for Dispatch whether entries are computed.
struct SayComputed {
  template <int kBits, Tables kTables>
  static void Run(const Problem&, bool* computed) { *computed = AreComputed(kTables); }
};

template <class Product, class... Rest>
void Dispatch(const Problem& p, Rest... rest) {
  switch (p.bits) {
    case 1: return DispatchTables<Product, 1>(p, rest...);
    case 2: return DispatchTables<Product, 2>(p, rest...);
    case 3: return DispatchTables<Product, 3>(p, rest...);
    case 4: return DispatchTables<Product, 4>(p, rest...);
    case 5: return DispatchTables<Product, 5>(p, rest...);
    case 6: return DispatchTables<Product, 6>(p, rest...);
    case 7: return DispatchTables<Product, 7>(p, rest...);
    case 8: return DispatchTables<Product, 8>(p, rest...);
  }
}

}  // namespace

#endif  // PALLAS_KERNELS_NATIVE_DECODER_H_
