// The kernels of one instruction set (LUT_AVX512, LUT_AVX2, LUT_NEON, none), as an object of its own.

#include "lut_kernels.h"
#include "sparse_kernels.h"

#if defined(LUT_AVX512)
#define LUT_ENTRY Avx512Kernels
#elif defined(LUT_AVX2)
#define LUT_ENTRY Avx2Kernels
#elif defined(LUT_NEON)
#define LUT_ENTRY NeonKernels
#else
#define LUT_ENTRY PortableKernels
#endif

namespace lut {

const Kernels* LUT_ENTRY() {
  static const Kernels kernels = {Simd::kName,
                                  kTile,
                                  Scratch,
                                  Dispatch<RunProduct, int64_t, int64_t, float*>,
                                  Dispatch<RunTransposed, int64_t, int64_t, float*>,
                                  SparseDense,
                                  Dispatch<RunSparse, const Live&, int64_t, int64_t>,
                                  Dispatch<SayComputed, bool*>};
  return &kernels;
}

}  // namespace lut
