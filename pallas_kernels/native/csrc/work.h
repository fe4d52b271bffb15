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

// Scales or offsets as a call gets them; see Scales. `form` is {rows, columns, zero}; words and floor
// may be empty, and for no offsets so are the values.
struct ScaleBuffers {
  const xla::ffi::AnyBuffer& values;
  const xla::ffi::Buffer<xla::ffi::U8>& words;
  const xla::ffi::Buffer<xla::ffi::F32>& floor;
  xla::ffi::Span<const int64_t> form;
};

// Fills in the scales and offsets of a problem; what is wrong with the buffers, or null.
const char* FindScales(const ScaleBuffers& scales, const ScaleBuffers& offsets, int64_t groups,
                       int64_t n, Problem* problem);

inline std::ostream& operator<<(std::ostream& s, const ScaleBuffers& b) {
  return s << Shape(b.values) << " words" << Shape(b.words) << " floor" << Shape(b.floor);
}

}  // namespace lut

#endif  // PALLAS_KERNELS_NATIVE_WORK_H_
