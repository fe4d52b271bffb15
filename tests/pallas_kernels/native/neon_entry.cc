// The entry point of the emulated program: one call of one kernel.
#include <cstddef>

#include "kernels.h"

// There is no C library in the program; compiled without builtins, so that these are loops.
extern "C" void* memcpy(void* to, const void* from, size_t size) {
  for (size_t i = 0; i < size; ++i) static_cast<char*>(to)[i] = static_cast<const char*>(from)[i];
  return to;
}

extern "C" void* memset(void* to, int value, size_t size) {
  for (size_t i = 0; i < size; ++i) static_cast<char*>(to)[i] = static_cast<char>(value);
  return to;
}

struct Call {
  int64_t kernel;  // 0 product, 1 transposed, 2 sparse, 3 sparse_dense
  const lut::Problem* problem;
  const lut::DenseProblem* dense;
  const lut::Live* live;
  float* scratch;
  int64_t scratch_floats;  // at hand; set to those needed
};

extern "C" void Entry(Call* call) {
  const lut::Kernels* kernels = lut::NeonKernels();
  const auto tiles = [&](int64_t n) { return (n + kernels->columns - 1) / kernels->columns; };
  if (call->kernel == 3)
    return kernels->sparse_dense(*call->dense, *call->live, 0, tiles(call->dense->n));
  const lut::Problem& p = *call->problem;
  if (call->kernel == 2) return kernels->sparse(p, *call->live, 0, tiles(p.n));
  const bool transpose = call->kernel == 1;
  const int64_t needed = kernels->scratch(p, transpose), at_hand = call->scratch_floats;
  call->scratch_floats = needed;
  if (needed > at_hand) return;
  (transpose ? kernels->transposed : kernels->product)(
      p, 0, transpose ? p.k / 8 : tiles(p.n), call->scratch);
}
