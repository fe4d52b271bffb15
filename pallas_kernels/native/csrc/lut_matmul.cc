// The XLA custom call of lut_matmul: checks the buffers, picks the instruction set, splits the work.

#include <cstdlib>
#include <memory>

#include "work.h"

namespace {

namespace ffi = xla::ffi;
using lut::Has;
using lut::Kernels;
using lut::Problem;
using lut::ScaleBuffers;
using lut::Shape;

ffi::Error Run(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::U8> words,
               ffi::Buffer<ffi::F32> lut, ffi::AnyBuffer scale_values,
               ffi::Buffer<ffi::U8> scale_words, ffi::Buffer<ffi::F32> scale_floor,
               ffi::AnyBuffer offset_values, ffi::Buffer<ffi::U8> offset_words,
               ffi::Buffer<ffi::F32> offset_floor, ffi::Result<ffi::Buffer<ffi::F32>> y, int64_t k,
               int64_t group_size, bool transpose, std::string_view instructions,
               ffi::Span<const int64_t> scale_form, ffi::Span<const int64_t> offset_form) {
  const ScaleBuffers scales = {scale_values, scale_words, scale_floor, scale_form};
  const ScaleBuffers offsets = {offset_values, offset_words, offset_floor, offset_form};
  const auto error = [&](const char* what) {
    std::ostringstream s;
    s << "lut_matmul: " << what << "; x" << Shape(x) << " words" << Shape(words) << " lut"
      << Shape(lut) << " scales" << scales << " offsets" << offsets << " y" << Shape(*y)
      << " k=" << k << " group_size=" << group_size << " transpose=" << transpose
      << " instructions=" << std::string(instructions);
    return ffi::Error::InvalidArgument(s.str());
  };
  if (x.dimensions().size() != 2 || words.dimensions().size() != 3 || lut.dimensions().size() != 2)
    return error("wrong number of axes");
  const int64_t m = x.dimensions()[0], blocks = words.dimensions()[0], bits = words.dimensions()[1],
                n = words.dimensions()[2], tables = lut.dimensions()[0];
  if (bits < 1 || bits > 8) return error("1 to 8 bits a code are possible");
  if (k < 1 || k > 8 * blocks || k <= 8 * (blocks - 1)) return error("k does not fit the words");
  if (group_size < 8 || group_size % 8) return error("group_size must be a multiple of 8");
  if (!Has(x, {m, transpose ? n : 8 * blocks})) return error("x does not fit the words");
  if (!Has(*y, {m, transpose ? k : n})) return error("y does not fit x and the words");
  if ((tables != 1 && tables != n) || !Has(lut, {tables, int64_t{1} << bits}))
    return error("lut does not fit the words");
  if (n > (int64_t{1} << 31) >> bits && tables > 1) return error("lut is too large to index");
  const int64_t groups = (8 * blocks - 1) / group_size + 1;
  const Kernels* kernels = lut::Find(std::string(instructions));
  if (!kernels) return error("this machine lacks the instruction set");
  if (m == 0 || n == 0) return ffi::Error::Success();
  Problem problem = {};
  if (const char* what = lut::FindScales(scales, offsets, groups, n, &problem)) return error(what);
  const bool shifted = problem.offsets.values != nullptr;

  std::unique_ptr<float[]> sums;
  if (shifted && !transpose) {
    sums.reset(new float[m * groups]);
    for (int64_t i = 0; i < m; ++i)
      for (int64_t g = 0; g < groups; ++g) {
        const float* row = x.typed_data() + i * 8 * blocks;
        const int64_t stop = std::min((g + 1) * group_size, 8 * blocks);
        float parts[8] = {0};  // groups are whole blocks of eight
        for (int64_t j = g * group_size; j < stop; j += 8)
          for (int64_t p = 0; p < 8; ++p) parts[p] += row[j + p];
        sums[i * groups + g] = ((parts[0] + parts[1]) + (parts[2] + parts[3])) +
                               ((parts[4] + parts[5]) + (parts[6] + parts[7]));
      }
  }
  problem.x = x.typed_data();
  problem.words = words.typed_data();
  problem.lut = lut.typed_data();
  problem.y = y->typed_data();
  problem.sums = sums.get();
  problem.m = m;
  problem.k = 8 * blocks;
  problem.n = n;
  problem.rows = k;
  problem.group = group_size;
  problem.tables = tables;
  problem.bits = static_cast<int>(bits);
  const int64_t units = transpose ? blocks : (n + kernels->columns - 1) / kernels->columns;
  const bool ok = lut::Parallel(pool, units, 8 * blocks * n * m, [=](int64_t first, int64_t last) {
    const int64_t floats = kernels->scratch(problem, transpose);
    void* scratch = nullptr;
    if (floats && posix_memalign(&scratch, 64, floats * sizeof(float))) return false;
    const auto run = transpose ? kernels->transposed : kernels->product;
    run(problem, first, last, static_cast<float*>(scratch));
    std::free(scratch);
    return true;
  });
  if (!ok) return ffi::Error(ffi::ErrorCode::kResourceExhausted, "lut_matmul: out of memory");
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(LutMatmul, Run,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::U8>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::U8>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::U8>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<int64_t>("k")
                                  .Attr<int64_t>("group_size")
                                  .Attr<bool>("transpose")
                                  .Attr<std::string_view>("instructions")
                                  .Attr<ffi::Span<const int64_t>>("scale_form")
                                  .Attr<ffi::Span<const int64_t>>("offset_form"));
