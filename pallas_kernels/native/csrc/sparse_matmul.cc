// The XLA custom calls of sparse_matmul: check the buffers, list the live rows of every range of
// columns, split the tiles over threads.

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
using lut::Shape;

using Splits = ffi::Span<const int64_t>;

// The live rows of one range of columns.
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
LiveRows FindLiveRows(const float* x, int64_t m, int64_t k, const float* thresholds, bool per_row,
                      int64_t group, Row row) {
  LiveRows live;
  live.rows.resize(k + 1);
  live.x.resize((k + 1) * m);
  const auto add = [&](int64_t first, int64_t last, bool crosses) {
    for (int64_t i = first; i < last; ++i) {
      if (row.crosses(i) != crosses) continue;
      const float threshold = thresholds[per_row ? i : 0];
      bool alive = false;
      for (int64_t j = 0; j < m; ++j) {
        const float value = x[j * k + i];
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

// Calls run(range, first tile, last tile) on XLA's threads; tiles are those of `columns` of a range.
template <class Run>
void ParallelRanges(ffi::ThreadPool& pool, Splits splits, int64_t columns, int64_t operations,
                    const Run& run) {
  std::vector<int64_t> starts = {0};
  for (int64_t size : splits) starts.push_back(starts.back() + (size + columns - 1) / columns);
  lut::Parallel(pool, starts.back(), operations, [&](int64_t first, int64_t last) {
    for (size_t i = 0; i < splits.size(); ++i) {
      const int64_t from = std::max(first, starts[i]), to = std::min(last, starts[i + 1]);
      if (from < to) run(i, from - starts[i], to - starts[i]);
    }
    return true;
  });
}

std::string Describe(Splits splits) {
  std::ostringstream s;
  for (int64_t size : splits) s << (s.tellp() ? "," : "") << size;
  return "(" + s.str() + ")";
}

// What is wrong with the arguments that both calls have, or null.
const char* Check(const ffi::Buffer<ffi::F32>& x, const ffi::Buffer<ffi::F32>& thresholds,
                  const ffi::Buffer<ffi::F32>& y, int64_t k, int64_t n, Splits splits,
                  const Kernels* kernels) {
  if (x.dimensions().size() != 2) return "wrong number of axes";
  const int64_t m = x.dimensions()[0], ranges = splits.size();
  if (m > lut::kFewRows) return "too many rows of x";
  if (!Has(x, {m, k})) return "x does not fit the weight";
  if (!Has(y, {m, n})) return "y does not fit x and the weight";
  int64_t total = 0;
  for (int64_t size : splits) {
    if (size < 1 || size > n) return "splits must be positive and add up to n";
    total += size;
  }
  if (total != n) return "splits must be positive and add up to n";
  if (!Has(thresholds, {ranges, 1}) && !Has(thresholds, {ranges, k}))
    return "thresholds do not fit the splits and x";
  if (!kernels) return "this machine lacks the instruction set";
  return nullptr;
}

ffi::Error Dense(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::F32> thresholds,
                 ffi::AnyBuffer weight, ffi::Result<ffi::Buffer<ffi::F32>> y, Splits splits,
                 std::string_view instructions) {
  const auto error = [&](const char* what) {
    std::ostringstream s;
    s << "sparse_matmul: " << what << "; x" << Shape(x) << " thresholds" << Shape(thresholds)
      << " weight" << Shape(weight) << " y" << Shape(*y) << " splits=" << Describe(splits)
      << " instructions=" << std::string(instructions);
    return ffi::Error::InvalidArgument(s.str());
  };
  if (weight.dimensions().size() != 2) return error("wrong number of axes");
  const auto type = weight.element_type();
  if (type != ffi::F32 && type != ffi::BF16) return error("the weight must be float32 or bfloat16");
  const int64_t k = weight.dimensions()[0], n = weight.dimensions()[1];
  const Kernels* kernels = lut::Find(std::string(instructions));
  if (const char* what = Check(x, thresholds, *y, k, n, splits, kernels)) return error(what);
  const int64_t m = x.dimensions()[0], width = thresholds.dimensions()[1];
  if (m == 0 || k == 0 || n == 0) {
    std::fill_n(y->typed_data(), m * n, 0.0f);
    return ffi::Error::Success();
  }

  std::vector<LiveRows> live;
  std::vector<DenseProblem> problems;
  const bool bfloat16 = type == ffi::BF16;
  int64_t start = 0, operations = 0;
  for (size_t i = 0; i < splits.size(); ++i) {
    live.push_back(FindLiveRows(x.typed_data(), m, k, thresholds.typed_data() + i * width,
                                width > 1, k, DenseRow{n}));
    const char* columns = static_cast<const char*>(weight.untyped_data()) + start * (bfloat16 ? 2 : 4);
    problems.push_back({columns, y->typed_data() + start, m, splits[i], n, bfloat16});
    start += splits[i];
    operations += live[i].count * splits[i] * m;
  }
  ParallelRanges(pool, splits, kernels->columns, operations,
                 [&](size_t i, int64_t first, int64_t last) {
                   kernels->sparse_dense(problems[i], live[i].view(), first, last);
                 });
  return ffi::Error::Success();
}

ffi::Error Packed(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::F32> thresholds,
                  ffi::Buffer<ffi::U8> words, ffi::AnyBuffer scales, ffi::Buffer<ffi::F32> lut,
                  ffi::AnyBuffer offsets, ffi::Result<ffi::Buffer<ffi::F32>> y, Splits splits,
                  int64_t k, int64_t group_size, std::string_view instructions) {
  const auto error = [&](const char* what) {
    std::ostringstream s;
    s << "sparse_matmul: " << what << "; x" << Shape(x) << " thresholds" << Shape(thresholds)
      << " words" << Shape(words) << " scales" << Shape(scales) << " lut" << Shape(lut)
      << " offsets" << Shape(offsets) << " y" << Shape(*y) << " splits=" << Describe(splits)
      << " k=" << k << " group_size=" << group_size
      << " instructions=" << std::string(instructions);
    return ffi::Error::InvalidArgument(s.str());
  };
  if (words.dimensions().size() != 3 || lut.dimensions().size() != 2)
    return error("wrong number of axes");
  const int64_t blocks = words.dimensions()[0], bits = words.dimensions()[1],
                n = words.dimensions()[2];
  if (bits < 2 || bits > 8) return error("2 to 8 bits a code are possible");
  if (k < 1 || k > 8 * blocks || k <= 8 * (blocks - 1)) return error("k does not fit the words");
  if (group_size < 1) return error("group_size must be positive");
  if (!Has(lut, {1, int64_t{1} << bits})) return error("lut does not fit the words");
  const int64_t groups = (k - 1) / group_size + 1;
  if (!Has(scales, {groups, n})) return error("scales do not fit the words and group_size");
  const bool shifted = offsets.element_count() > 0;
  if (shifted && !Has(offsets, {groups, n})) return error("offsets do not fit the scales");
  lut::ScaleType type;
  if (!lut::FindScaleType(scales, &type) || offsets.element_type() != scales.element_type())
    return error("scales and offsets must both be float32, bfloat16 or float16");
  const Kernels* kernels = lut::Find(std::string(instructions));
  if (const char* what = Check(x, thresholds, *y, k, n, splits, kernels)) return error(what);
  const int64_t m = x.dimensions()[0], width = thresholds.dimensions()[1];
  if (m == 0 || n == 0) return ffi::Error::Success();

  std::vector<LiveRows> live;
  std::vector<std::vector<float>> sums;
  std::vector<Problem> problems;
  const int64_t element = type == lut::ScaleType::kFloat32 ? 4 : 2;
  int64_t start = 0, operations = 0;
  for (size_t i = 0; i < splits.size(); ++i) {
    live.push_back(FindLiveRows(x.typed_data(), m, k, thresholds.typed_data() + i * width,
                                width > 1, group_size, PackedRow{n, bits}));
    sums.emplace_back(shifted ? m * groups : 0);
    for (int64_t g = 0, at = 0; shifted && g < groups; ++g)
      for (; at < live[i].ends[2 * g + 1]; ++at)
        for (int64_t j = 0; j < m; ++j) sums[i][j * groups + g] += live[i].x[at * m + j];
    const auto columns = [&](const ffi::AnyBuffer& buffer) {
      return static_cast<const char*>(buffer.untyped_data()) + start * element;
    };
    problems.push_back({nullptr,
                        words.typed_data() + start,
                        columns(scales),
                        shifted ? columns(offsets) : nullptr,
                        lut.typed_data(),
                        y->typed_data() + start,
                        sums[i].data(),
                        m,
                        k,
                        splits[i],
                        k,
                        group_size,
                        1,
                        static_cast<int>(bits),
                        type,
                        n});
    start += splits[i];
    operations += live[i].count * splits[i] * m;
  }
  ParallelRanges(pool, splits, kernels->columns, operations,
                 [&](size_t i, int64_t first, int64_t last) {
                   kernels->sparse(problems[i], live[i].view(), first, last);
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
                                  .Attr<ffi::Span<const int64_t>>("splits")
                                  .Attr<std::string_view>("instructions"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(SparsePacked, Packed,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::U8>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<ffi::Span<const int64_t>>("splits")
                                  .Attr<int64_t>("k")
                                  .Attr<int64_t>("group_size")
                                  .Attr<std::string_view>("instructions"));
