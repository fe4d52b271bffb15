// The interface between the XLA handlers and the kernels, which are compiled once an instruction set.
#ifndef PALLAS_KERNELS_NATIVE_KERNELS_H_
#define PALLAS_KERNELS_NATIVE_KERNELS_H_

#include <cstdint>

namespace lut {

enum class ScaleType : int32_t { kFloat32, kBfloat16, kFloat16 };

// Scales or offsets [groups, n] as they are, or quantised: floor + (code - zero) * step.
struct Scales {
  const void* values;    // [groups, n], or steps [groups / rows, n / columns], rounded up
  const uint8_t* words;  // packed codes [groups / 8, bits, n], or null
  ScaleType type;        // of the values
  int bits;
  float zero, floor;
  int64_t rows, columns;  // scales that share a step
};

// One product with a packed weight [k, n]; k counts the padded rows, 8 * blocks. (The sparse product
// has no x here, sums of what it keeps of x, any group, and in k the rows without padding.)
struct Problem {
  const float* x;        // [m, k], or [m, n] transposed
  const uint8_t* words;  // [k / 8, bits, n]
  Scales scales;         // [groups, n]
  Scales offsets;        // like scales; no values if there are none
  const float* lut;      // [tables, 2**bits], tables is 1 or n
  float* y;              // [m, n], or [m, rows] transposed
  const float* sums;     // [m, groups]: sums of x over each group; null without offsets
  int64_t m, k, n, rows;  // rows: those of the weight without padding
  int64_t group;          // rows that share a scale, a multiple of 8
  int64_t tables;
  int bits;
};

// One product with a dense weight, a row-major matrix.
struct DenseProblem {
  const void* weight;  // float32 or bfloat16
  float* y;            // [m, n]
  int64_t m, n;
  bool bfloat16;
};

// A row of the weight that some row of x needs.
struct LiveRow {
  int64_t start;  // of the row in the weight: elements, or bytes of words
  int32_t shift;  // of its codes within those bytes
};

struct Live {
  const LiveRow* rows;
  const float* x;       // [live rows, m], 0 where a row of x ignores what another one needs
  const int64_t* ends;  // [groups, 2]: in a group, rows whose codes lie within a byte come first,
                        // then those whose codes lie in two
  int64_t count;
};

// The unit of work is a tile of columns, or a block of 8 rows for the transposed product; what a
// unit computes does not depend on the range it is in.
struct Kernels {
  const char* name;
  int64_t columns;  // of a tile
  int64_t (*scratch)(const Problem&, bool transpose);  // floats a range needs
  void (*product)(const Problem&, int64_t first, int64_t last, float* scratch);
  void (*transposed)(const Problem&, int64_t first, int64_t last, float* scratch);
  void (*sparse_dense)(const DenseProblem&, const Live&, int64_t first, int64_t last);
  void (*sparse)(const Problem&, const Live&, int64_t first, int64_t last);
  void (*computed)(const Problem&, bool*);  // whether entries are, instead of being looked up
};

constexpr int64_t kFewRows = 4;  // rows of x that look codes up themselves, and may skip rows of W

// Null where the compiler does not target the instruction set.
const Kernels* Avx512Kernels();
const Kernels* Avx2Kernels();
const Kernels* NeonKernels();
const Kernels* PortableKernels();

}  // namespace lut

#endif  // PALLAS_KERNELS_NATIVE_KERNELS_H_
