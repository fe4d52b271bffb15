// What the XLA handlers share: the instruction sets of this machine, threads, shapes in messages.
#ifndef PALLAS_KERNELS_NATIVE_WORK_H_
#define PALLAS_KERNELS_NATIVE_WORK_H_

#include <algorithm>
#include <cstdint>
#include <functional>
#include <initializer_list>
#include <sstream>
#include <string>

#include "kernels.h"
#include "xla/ffi/api/ffi.h"

namespace lut {

// The kernels of an instruction set of this machine, of the best one if the name is empty, or null.
const Kernels* Find(const std::string& name);

// Does units [first, last); false means out of memory.
using Range = std::function<bool(int64_t first, int64_t last)>;

// Splits `units` over XLA's own threads if `operations` are worth several. False if any range failed.
bool Parallel(xla::ffi::ThreadPool& pool, int64_t units, int64_t operations, Range range);

// The type of a buffer of scales; false if there are no kernels for it.
inline bool FindScaleType(const xla::ffi::AnyBuffer& scales, ScaleType* type) {
  switch (scales.element_type()) {
    case xla::ffi::F32: *type = ScaleType::kFloat32; return true;
    case xla::ffi::BF16: *type = ScaleType::kBfloat16; return true;
    case xla::ffi::F16: *type = ScaleType::kFloat16; return true;
    default: return false;
  }
}

template <class B>
std::string Shape(const B& buffer) {
  std::ostringstream s;
  s << '[';
  const auto dims = buffer.dimensions();
  for (size_t i = 0; i < dims.size(); ++i) s << (i ? "," : "") << dims[i];
  s << ']';
  return s.str();
}

template <class B>
bool Has(const B& buffer, std::initializer_list<int64_t> shape) {
  const auto dims = buffer.dimensions();
  return dims.size() == shape.size() && std::equal(shape.begin(), shape.end(), dims.begin());
}

}  // namespace lut

#endif  // PALLAS_KERNELS_NATIVE_WORK_H_
