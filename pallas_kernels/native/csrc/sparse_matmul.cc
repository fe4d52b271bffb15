// The XLA custom calls of sparse_matmul: check the buffers, list the live rows, split the tiles of
// columns over threads.

#include <cmath>
#include <vector>

#include "work.h"

namespace {

namespace ffi = xla::ffi;
using lut::DenseProblem;
using lut::Has;
using lut::Kernels;
using lut::Live;
using lut::LiveRow;
using lut::Problem;
using lut::ScaleBuffers;
using lut::Shape;

// What a lut::Live points to.
struct LiveRows {
  std::vector<LiveRow> rows;
  std::vector<float> x;
  std::vector<int64_t> ends;
  int64_t count = 0;

  Live view() const { return {rows.data(), x.data(), ends.data(), count}; }
};

// Where the row k of a weight starts.
struct DenseRow {
  int64_t n;
  bool crosses(int64_t) const { return false; }
  LiveRow operator()(int64_t k) const { return {k * n, 0}; }
};

struct PackedRow {
  int64_t n, bits;
  bool crosses(int64_t k) const { return k * bits % 8 + bits > 8; }
  LiveRow operator()(int64_t k) const {
    return {k * bits / 8 * n, static_cast<int32_t>(k * bits % 8)};
  }
};

// |x| <= t is false for NaN, which is therefore kept.
template <class Row>
LiveRows FindLiveRows(const ffi::Buffer<ffi::F32>& x, const ffi::Buffer<ffi::F32>& thresholds,
                      int64_t group, Row row) {
  const int64_t m = x.dimensions()[0], k = x.dimensions()[1];
  const bool per_row = thresholds.dimensions()[0] > 1;
  const float *values = x.typed_data(), *levels = thresholds.typed_data();
  LiveRows live;
  live.rows.resize(k + 1);
  live.x.resize((k + 1) * m);
  const auto add = [&](int64_t first, int64_t last, bool crosses) {
    for (int64_t i = first; i < last; ++i) {
      if (row.crosses(i) != crosses) continue;
      const float threshold = levels[per_row ? i : 0];
      bool alive = false;
      for (int64_t j = 0; j < m; ++j) {
        const float value = values[j * k + i];
        const bool kept = !(std::fabs(value) <= threshold);
        live.x[live.count * m + j] = kept ? value : 0;
        alive |= kept;
      }
      live.rows[live.count] = row(i);
      live.count += alive;  // no branch: it could not be predicted
    }
    live.ends.push_back(live.count);
  };
  for (int64_t first = 0; first < k; first += group) {
    const int64_t last = std::min(k, first + group);
    add(first, last, false);
    add(first, last, true);
  }
  return live;
}

// What is wrong with the arguments that both calls have, or null.
const char* Check(const ffi::Buffer<ffi::F32>& x, const ffi::Buffer<ffi::F32>& thresholds,
                  const ffi::Buffer<ffi::F32>& y, int64_t k, int64_t n, const Kernels* kernels) {
  if (x.dimensions().size() != 2) return "wrong number of axes";
  const int64_t m = x.dimensions()[0];
  if (m > lut::kFewRows) return "too many rows of x";
  if (!Has(x, {m, k})) return "x does not fit the weight";
  if (!Has(y, {m, n})) return "y does not fit x and the weight";
  if (!Has(thresholds, {1}) && !Has(thresholds, {k})) return "thresholds do not fit x";
  if (!kernels) return "this machine lacks the instruction set";
  return nullptr;
}

// Calls run(first tile, last tile) on XLA's threads.
template <class Run>
void RunTiles(ffi::ThreadPool& pool, const Kernels* kernels, const LiveRows& live, int64_t m,
              int64_t n, const Run& run) {
  const int64_t tiles = (n + kernels->columns - 1) / kernels->columns;
  lut::Parallel(pool, tiles, live.count * n * m, [&](int64_t first, int64_t last) {
    run(first, last);
    return true;
  });
}

ffi::Error Dense(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::F32> thresholds,
                 ffi::AnyBuffer weight, ffi::Result<ffi::Buffer<ffi::F32>> y,
                 std::string_view instructions) {
  const auto error = [&](const char* what) {
    std::ostringstream s;
    s << "sparse_matmul: " << what << "; x" << Shape(x) << " thresholds" << Shape(thresholds)
      << " weight" << Shape(weight) << " y" << Shape(*y)
      << " instructions=" << std::string(instructions);
    return ffi::Error::InvalidArgument(s.str());
  };
  if (weight.dimensions().size() != 2) return error("wrong number of axes");
  const auto type = weight.element_type();
  if (type != ffi::F32 && type != ffi::BF16) return error("the weight must be float32 or bfloat16");
  const int64_t k = weight.dimensions()[0], n = weight.dimensions()[1];
  const Kernels* kernels = lut::Find(std::string(instructions));
  if (const char* what = Check(x, thresholds, *y, k, n, kernels)) return error(what);
  const int64_t m = x.dimensions()[0];
  if (m == 0 || k == 0 || n == 0) {
    std::fill_n(y->typed_data(), m * n, 0.0f);
    return ffi::Error::Success();
  }

  const LiveRows live = FindLiveRows(x, thresholds, k, DenseRow{n});
  const DenseProblem problem = {weight.untyped_data(), y->typed_data(), m, n, type == ffi::BF16};
  RunTiles(pool, kernels, live, m, n, [&](int64_t first, int64_t last) {
    kernels->sparse_dense(problem, live.view(), first, last);
  });
  return ffi::Error::Success();
}

ffi::Error Packed(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::F32> thresholds,
                  ffi::Buffer<ffi::U8> words, ffi::Buffer<ffi::F32> lut,
                  ffi::AnyBuffer scale_values, ffi::Buffer<ffi::U8> scale_words,
                  ffi::Buffer<ffi::F32> scale_floor, ffi::AnyBuffer offset_values,
                  ffi::Buffer<ffi::U8> offset_words, ffi::Buffer<ffi::F32> offset_floor,
                  ffi::Result<ffi::Buffer<ffi::F32>> y, int64_t k, int64_t group_size,
                  std::string_view instructions, ffi::Span<const int64_t> scale_form,
                  ffi::Span<const int64_t> offset_form) {
  const ScaleBuffers scales = {scale_values, scale_words, scale_floor, scale_form};
  const ScaleBuffers offsets = {offset_values, offset_words, offset_floor, offset_form};
  const auto error = [&](const char* what) {
    std::ostringstream s;
    s << "sparse_matmul: " << what << "; x" << Shape(x) << " thresholds" << Shape(thresholds)
      << " words" << Shape(words) << " lut" << Shape(lut) << " scales" << scales << " offsets"
      << offsets << " y" << Shape(*y) << " k=" << k
      << " group_size=" << group_size << " instructions=" << std::string(instructions);
    return ffi::Error::InvalidArgument(s.str());
  };
  if (words.dimensions().size() != 3 || lut.dimensions().size() != 2)
    return error("wrong number of axes");
  const int64_t blocks = words.dimensions()[0], bits = words.dimensions()[1],
                n = words.dimensions()[2];
  if (bits < 1 || bits > 8) return error("1 to 8 bits a code are possible");
  if (k < 1 || k > 8 * blocks || k <= 8 * (blocks - 1)) return error("k does not fit the words");
  if (group_size < 1) return error("group_size must be positive");
  if (!Has(lut, {1, int64_t{1} << bits})) return error("lut does not fit the words");
  const int64_t groups = (k - 1) / group_size + 1;
  const Kernels* kernels = lut::Find(std::string(instructions));
  if (const char* what = Check(x, thresholds, *y, k, n, kernels)) return error(what);
  const int64_t m = x.dimensions()[0];
  if (m == 0 || n == 0) return ffi::Error::Success();
  Problem problem = {};
  if (const char* what = lut::FindScales(scales, offsets, groups, n, &problem)) return error(what);
  const bool shifted = problem.offsets.values != nullptr;

  const LiveRows live = FindLiveRows(x, thresholds, group_size, PackedRow{n, bits});
  std::vector<float> sums(shifted ? m * groups : 0);
  for (int64_t g = 0, at = 0; shifted && g < groups; ++g)
    for (; at < live.ends[2 * g + 1]; ++at)
      for (int64_t j = 0; j < m; ++j) sums[j * groups + g] += live.x[at * m + j];
  problem.words = words.typed_data();
  problem.lut = lut.typed_data();
  problem.y = y->typed_data();
  problem.sums = sums.data();
  problem.m = m;
  problem.k = k;
  problem.n = n;
  problem.rows = k;
  problem.group = group_size;
  problem.tables = 1;
  problem.bits = static_cast<int>(bits);
  RunTiles(pool, kernels, live, m, n, [&](int64_t first, int64_t last) {
    kernels->sparse(problem, live.view(), first, last);
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(SparseDense, Dense,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<std::string_view>("instructions"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(SparsePacked, Packed,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
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
                                  .Attr<std::string_view>("instructions")
                                  .Attr<ffi::Span<const int64_t>>("scale_form")
                                  .Attr<ffi::Span<const int64_t>>("offset_form"));
