// Vectors of W floats and of W 32-bit words, one struct an instruction set. A word holds the bytes
// of four neighbouring columns, so that shifts alone bring each column's code to the low bits.
#ifndef PALLAS_KERNELS_NATIVE_SIMD_H_
#define PALLAS_KERNELS_NATIVE_SIMD_H_

#include <cstdint>
#include <cstring>

#if defined(LUT_AVX512) || defined(LUT_AVX2)
#include <immintrin.h>
#elif defined(LUT_NEON)
#include <arm_neon.h>
#endif

#if defined(__clang__)
#define LUT_UNROLL _Pragma("clang loop unroll(full)")
#else
#define LUT_UNROLL _Pragma("GCC unroll 16")
#endif

namespace {

constexpr float kLargest = 3.402823466e38f;  // of the finite numbers

#if defined(LUT_AVX512)

struct Simd {
  static constexpr const char* kName = "avx512";
  static constexpr int kLanes = 16;
  static constexpr int kWide = 4;  // tiles of columns that one pass over K keeps in registers
  static constexpr int kRows = 6;  // rows of x that the dense kernel multiplies at a time
  using Float = __m512;
  using Word = __m512i;
  struct Table { Float values; };

  static Float Zero() { return _mm512_setzero_ps(); }
  static Float Set(float a) { return _mm512_set1_ps(a); }
  static Float Load(const float* p) { return _mm512_loadu_ps(p); }
  static void Store(float* p, Float a) { _mm512_storeu_ps(p, a); }
  static Float Sub(Float a, Float b) { return _mm512_sub_ps(a, b); }
  static Float Max(Float a, Float b) { return _mm512_max_ps(a, b); }
  static Float MulAdd(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }
  static Word LoadBytes(const uint8_t* p) { return _mm512_loadu_si512(p); }
  static Word Right(Word a, int bits) { return _mm512_srli_epi32(a, bits); }
  static Word Left(Word a, int bits) { return _mm512_slli_epi32(a, bits); }
  // The same by a number of bits that is not known in advance.
  static Word RightBy(Word a, int bits) { return _mm512_srl_epi32(a, _mm_cvtsi32_si128(bits)); }
  static Word LeftBy(Word a, int bits) { return _mm512_sll_epi32(a, _mm_cvtsi32_si128(bits)); }
  static Word And(Word a, uint32_t b) { return _mm512_and_si512(a, _mm512_set1_epi32(b)); }
  static Word Add(Word a, Word b) { return _mm512_add_epi32(a, b); }
  static Word Bits(Float a) { return _mm512_castps_si512(a); }
  static Float OfBits(Word a) { return _mm512_castsi512_ps(a); }
  static Word SetWord(uint32_t a) { return _mm512_set1_epi32(a); }
  // The lowest bits b as the number 2**(23 - kBits) + 2**-kBits b, of which they are the last ones.
  template <int kBits>
  static constexpr float LowBitsOf0() { return 0x1p23f / (1 << kBits); }
  template <int kBits>
  static Float LowBits(Word a) {
    const Word of_0 = _mm512_set1_epi32(0x4B000000 - (kBits << 23));
    return _mm512_castsi512_ps(Select((1u << kBits) - 1, a, of_0));
  }
  // The nearest finite number, for infinities.
  static Float Finite(Float a) {
    return _mm512_min_ps(_mm512_max_ps(a, Set(-kLargest)), Set(kLargest));
  }
  // Bits of a where the mask is set, of b elsewhere.
  static Word Select(uint32_t mask, Word a, Word b) {
    return _mm512_ternarylogic_epi32(_mm512_set1_epi32(mask), a, b, 0xCA);
  }
  static Float LoadBfloat16(const uint16_t* p) {
    const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(Left(_mm512_cvtepu16_epi32(halves), 16));
  }
  static Float LoadFloat16(const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static Table LoadTable(const float* sixteen) { return {Load(sixteen)}; }
  // The entry that the low 4 bits name (3 bits are enough if kEntries is 8).
  template <int kEntries>
  static Float Lookup(const Table& table, Word index) {
    return _mm512_permutexvar_ps(index, table.values);
  }
  // A table of 2**kBits entries, kBits > 4, in up to half of the registers; twice as fast as gathers.
  struct ByteTable { Float values[16]; };
  template <int kBits>
  static ByteTable LoadByteTable(const float* p) {
    ByteTable t;
    for (int i = 0; i < 1 << (kBits - 4); ++i) t.values[i] = Load(p + 16 * i);
    return t;
  }
  // The entry that the low kBits bits name.
  template <int kBits>
  static Float LookupByte(const ByteTable& t, Word index) {
    constexpr int kParts = 1 << (kBits - 5);
    Float parts[kParts];
    LUT_UNROLL
    for (int i = 0; i < kParts; ++i)
      parts[i] = _mm512_permutex2var_ps(t.values[2 * i], index, t.values[2 * i + 1]);
    LUT_UNROLL
    for (int half = kParts / 2, bit = 1 << (kBits - 1); half > 0; half /= 2, bit /= 2) {
      const __mmask16 upper = _mm512_test_epi32_mask(index, _mm512_set1_epi32(bit));
      LUT_UNROLL
      for (int i = 0; i < half; ++i)
        parts[i] = _mm512_mask_blend_ps(upper, parts[i], parts[i + half]);
    }
    return parts[0];
  }
  static Float Gather(const float* p, Word index) { return _mm512_i32gather_ps(index, p, 4); }
  // Element i of out[j] is p[4 i + j].
  static void Deinterleave(const float* p, Float out[4]) {
    const Float a = Load(p), b = Load(p + 16), c = Load(p + 32), d = Load(p + 48);
    const Word even = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 1, 5, 9, 13, 17, 21, 25, 29);
    const Word odd = _mm512_setr_epi32(2, 6, 10, 14, 18, 22, 26, 30, 3, 7, 11, 15, 19, 23, 27, 31);
    const Float ab01 = _mm512_permutex2var_ps(a, even, b), cd01 = _mm512_permutex2var_ps(c, even, d);
    const Float ab23 = _mm512_permutex2var_ps(a, odd, b), cd23 = _mm512_permutex2var_ps(c, odd, d);
    out[0] = _mm512_shuffle_f32x4(ab01, cd01, 0x44);
    out[1] = _mm512_shuffle_f32x4(ab01, cd01, 0xEE);
    out[2] = _mm512_shuffle_f32x4(ab23, cd23, 0x44);
    out[3] = _mm512_shuffle_f32x4(ab23, cd23, 0xEE);
  }
};

#elif defined(LUT_AVX2)

struct Simd {
  static constexpr const char* kName = "avx2";
  static constexpr int kLanes = 8;
  static constexpr int kWide = 2;
  static constexpr int kRows = 3;
  using Float = __m256;
  using Word = __m256i;
  struct Table { Float low, high; };

  static Float Zero() { return _mm256_setzero_ps(); }
  static Float Set(float a) { return _mm256_set1_ps(a); }
  static Float Load(const float* p) { return _mm256_loadu_ps(p); }
  static void Store(float* p, Float a) { _mm256_storeu_ps(p, a); }
  static Float Sub(Float a, Float b) { return _mm256_sub_ps(a, b); }
  static Float Max(Float a, Float b) { return _mm256_max_ps(a, b); }
  static Float MulAdd(Float a, Float b, Float c) { return _mm256_fmadd_ps(a, b, c); }
  static Word LoadBytes(const uint8_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }
  static Word Right(Word a, int bits) { return _mm256_srli_epi32(a, bits); }
  static Word Left(Word a, int bits) { return _mm256_slli_epi32(a, bits); }
  static Word RightBy(Word a, int bits) { return _mm256_srl_epi32(a, _mm_cvtsi32_si128(bits)); }
  static Word LeftBy(Word a, int bits) { return _mm256_sll_epi32(a, _mm_cvtsi32_si128(bits)); }
  static Word And(Word a, uint32_t b) { return _mm256_and_si256(a, _mm256_set1_epi32(b)); }
  static Word Add(Word a, Word b) { return _mm256_add_epi32(a, b); }
  static Word Bits(Float a) { return _mm256_castps_si256(a); }
  static Float OfBits(Word a) { return _mm256_castsi256_ps(a); }
  static Word SetWord(uint32_t a) { return _mm256_set1_epi32(a); }
  template <int kBits>
  static constexpr float LowBitsOf0() { return 0x1p23f / (1 << kBits); }
  template <int kBits>
  static Float LowBits(Word a) {
    const Word of_0 = _mm256_set1_epi32(0x4B000000 - (kBits << 23));
    return _mm256_castsi256_ps(_mm256_or_si256(And(a, (1u << kBits) - 1), of_0));
  }
  static Float Finite(Float a) {
    return _mm256_min_ps(_mm256_max_ps(a, Set(-kLargest)), Set(kLargest));
  }
  static Word Select(uint32_t mask, Word a, Word b) {
    const Word m = _mm256_set1_epi32(mask);
    return _mm256_or_si256(_mm256_and_si256(m, a), _mm256_andnot_si256(m, b));
  }
  static Float LoadBfloat16(const uint16_t* p) {
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(Left(_mm256_cvtepu16_epi32(halves), 16));
  }
  static Float LoadFloat16(const uint16_t* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static Table LoadTable(const float* sixteen) { return {Load(sixteen), Load(sixteen + 8)}; }
  template <int kEntries>
  static Float Lookup(const Table& table, Word index) {
    const Float low = _mm256_permutevar8x32_ps(table.low, index);
    if (kEntries <= 8) return low;
    const Float high = _mm256_permutevar8x32_ps(table.high, index);
    return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(Left(index, 28)));
  }
  static Float Gather(const float* p, Word index) { return _mm256_i32gather_ps(p, index, 4); }
  struct ByteTable { const float* values; };
  template <int kBits>
  static ByteTable LoadByteTable(const float* p) { return {p}; }
  template <int kBits>
  static Float LookupByte(const ByteTable& t, Word index) {
    return Gather(t.values, And(index, (1u << kBits) - 1));
  }
  static void Deinterleave(const float* p, Float out[4]) {
    const Word index = _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28);
    for (int j = 0; j < 4; ++j) out[j] = Gather(p + j, index);
  }
};

#elif defined(LUT_NEON)

struct Simd {
  static constexpr const char* kName = "neon";
  static constexpr int kLanes = 4;
  static constexpr int kWide = 4;
  static constexpr int kRows = 5;
  using Float = float32x4_t;
  using Word = uint32x4_t;
  struct Table { uint8x16x4_t bytes; };

  static Float Zero() { return vdupq_n_f32(0); }
  static Float Set(float a) { return vdupq_n_f32(a); }
  static Float Load(const float* p) { return vld1q_f32(p); }
  static void Store(float* p, Float a) { vst1q_f32(p, a); }
  static Float Sub(Float a, Float b) { return vsubq_f32(a, b); }
  static Float Max(Float a, Float b) { return vmaxq_f32(a, b); }
  static Float MulAdd(Float a, Float b, Float c) { return vfmaq_f32(c, a, b); }
  static Word LoadBytes(const uint8_t* p) { return vreinterpretq_u32_u8(vld1q_u8(p)); }
  static Word Right(Word a, int bits) { return vshlq_u32(a, vdupq_n_s32(-bits)); }
  static Word Left(Word a, int bits) { return vshlq_u32(a, vdupq_n_s32(bits)); }
  static Word RightBy(Word a, int bits) { return Right(a, bits); }
  static Word LeftBy(Word a, int bits) { return Left(a, bits); }
  static Float LoadBfloat16(const uint16_t* p) {
    return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16));
  }
  static Float LoadFloat16(const uint16_t* p) {
    return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p)));
  }
  static Word And(Word a, uint32_t b) { return vandq_u32(a, vdupq_n_u32(b)); }
  static Word Add(Word a, Word b) { return vaddq_u32(a, b); }
  static Word Bits(Float a) { return vreinterpretq_u32_f32(a); }
  static Float OfBits(Word a) { return vreinterpretq_f32_u32(a); }
  static Word SetWord(uint32_t a) { return vdupq_n_u32(a); }
  template <int kBits>
  static constexpr float LowBitsOf0() { return 0x1p23f / (1 << kBits); }
  template <int kBits>
  static Float LowBits(Word a) {
    const Word of_0 = vdupq_n_u32(0x4B000000 - (kBits << 23));
    return vreinterpretq_f32_u32(Select((1u << kBits) - 1, a, of_0));
  }
  static Float Finite(Float a) { return vminq_f32(vmaxq_f32(a, Set(-kLargest)), Set(kLargest)); }
  static Word Select(uint32_t mask, Word a, Word b) { return vbslq_u32(vdupq_n_u32(mask), a, b); }
  static Table LoadTable(const float* sixteen) {
    return {vld1q_u8_x4(reinterpret_cast<const uint8_t*>(sixteen))};
  }
  template <int kEntries>
  static Float Lookup(const Table& table, Word index) {
    // The four byte positions of entry c: 4 c + {0, 1, 2, 3}.
    const Word bytes = vmlaq_n_u32(vdupq_n_u32(0x03020100), And(index, kEntries - 1), 0x04040404);
    return vreinterpretq_f32_u8(vqtbl4q_u8(table.bytes, vreinterpretq_u8_u32(bytes)));
  }
  static Float Gather(const float* p, Word index) {
    uint32_t i[4];
    vst1q_u32(i, index);
    const float values[4] = {p[i[0]], p[i[1]], p[i[2]], p[i[3]]};
    return Load(values);
  }
  struct ByteTable { const float* values; };
  template <int kBits>
  static ByteTable LoadByteTable(const float* p) { return {p}; }
  template <int kBits>
  static Float LookupByte(const ByteTable& t, Word index) {
    return Gather(t.values, And(index, (1u << kBits) - 1));
  }
  static void Deinterleave(const float* p, Float out[4]) {
    const float32x4x4_t parts = vld4q_f32(p);
    for (int j = 0; j < 4; ++j) out[j] = parts.val[j];
  }
};

#else  // The vector extensions of GCC and Clang on any machine.

struct Simd {
  static constexpr const char* kName = "portable";
  static constexpr int kLanes = 4;
  static constexpr int kWide = 1;
  static constexpr int kRows = 2;
  typedef float Float __attribute__((vector_size(16)));
  typedef uint32_t Word __attribute__((vector_size(16)));
  struct Table { float values[16]; };

  static Float Zero() { return Set(0); }
  static Float Set(float a) { return Float{a, a, a, a}; }
  static Float Load(const float* p) {
    Float a;
    std::memcpy(&a, p, sizeof(a));
    return a;
  }
  static void Store(float* p, Float a) { std::memcpy(p, &a, sizeof(a)); }
  static Float Sub(Float a, Float b) { return a - b; }
  static Float Max(Float a, Float b) { return a > b ? a : b; }
  static Float MulAdd(Float a, Float b, Float c) { return a * b + c; }
  static Word LoadBytes(const uint8_t* p) {
    Word a;
    std::memcpy(&a, p, sizeof(a));
    return a;
  }
  static Word Right(Word a, int bits) { return a >> bits; }
  static Word Left(Word a, int bits) { return a << bits; }
  static Word RightBy(Word a, int bits) { return a >> bits; }
  static Word LeftBy(Word a, int bits) { return a << bits; }
  static Float LoadBfloat16(const uint16_t* p) {
    const uint32_t bits[4] = {uint32_t{p[0]} << 16, uint32_t{p[1]} << 16, uint32_t{p[2]} << 16,
                              uint32_t{p[3]} << 16};
    return Load(reinterpret_cast<const float*>(bits));
  }
  static float FromFloat16(uint16_t half) {
    const uint32_t magnitude = half & 0x7FFF;
    // Subnormal numbers by a product, as XLA's threads take subnormal float32 for zero.
    float value = static_cast<float>(magnitude) * 0x1p-24f;
    if (magnitude >= 0x0400) {
      const uint32_t bits = (magnitude << 13) + (magnitude >= 0x7C00 ? 224u << 23 : 112u << 23);
      std::memcpy(&value, &bits, sizeof(value));
    }
    return half & 0x8000 ? -value : value;
  }
  static Float LoadFloat16(const uint16_t* p) {
    return Float{FromFloat16(p[0]), FromFloat16(p[1]), FromFloat16(p[2]), FromFloat16(p[3])};
  }
  static Word And(Word a, uint32_t b) { return a & b; }
  static Word Add(Word a, Word b) { return a + b; }
  static Word Bits(Float a) { return reinterpret_cast<Word>(a); }
  static Float OfBits(Word a) { return reinterpret_cast<Float>(a); }
  static Word SetWord(uint32_t a) { return Word{a, a, a, a}; }
  template <int kBits>
  static constexpr float LowBitsOf0() { return 0; }
  template <int kBits>
  static Float LowBits(Word a) {
    return __builtin_convertvector(a & ((1u << kBits) - 1), Float) * Set(1.0f / (1 << kBits));
  }
  static Float Finite(Float a) {
    for (int i = 0; i < kLanes; ++i) {
      if (a[i] > kLargest) a[i] = kLargest;
      if (a[i] < -kLargest) a[i] = -kLargest;
    }
    return a;
  }
  static Word Select(uint32_t mask, Word a, Word b) { return (a & mask) | (b & ~mask); }
  static Table LoadTable(const float* sixteen) {
    Table t;
    std::memcpy(t.values, sixteen, sizeof(t.values));
    return t;
  }
  template <int kEntries>
  static Float Lookup(const Table& table, Word index) {
    return Gather(table.values, index & (kEntries - 1));
  }
  static Float Gather(const float* p, Word i) { return Float{p[i[0]], p[i[1]], p[i[2]], p[i[3]]}; }
  struct ByteTable { const float* values; };
  template <int kBits>
  static ByteTable LoadByteTable(const float* p) { return {p}; }
  template <int kBits>
  static Float LookupByte(const ByteTable& t, Word index) {
    return Gather(t.values, And(index, (1u << kBits) - 1));
  }
  static void Deinterleave(const float* p, Float out[4]) {
    for (int j = 0; j < 4; ++j) out[j] = Float{p[j], p[4 + j], p[8 + j], p[12 + j]};
  }
};

#endif

}  // namespace

#endif  // PALLAS_KERNELS_NATIVE_SIMD_H_
