// The XLA custom call: checks the buffers, picks the instruction set, splits the work over XLA's
// own threads.

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <sstream>
#include <string>

#include "kernels.h"
#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;
using lut::Kernels;
using lut::Problem;

constexpr int64_t kWorkPerThread = 200'000;  // codes times rows: tens of microseconds

// Instruction sets of this machine, best first; the last runs everywhere.
int Available(const Kernels* list[3]) {
  int count = 0;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (avx2 && __builtin_cpu_supports("avx512f")) list[count++] = lut::Avx512Kernels();
  if (avx2) list[count++] = lut::Avx2Kernels();
#elif defined(__aarch64__)
  list[count++] = lut::NeonKernels();
#endif
  list[count++] = lut::PortableKernels();
  return count;
}

const Kernels* Find(const std::string& name) {
  const Kernels* list[3];
  const int count = Available(list);
  if (name.empty()) return list[0];
  for (int i = 0; i < count; ++i)
    if (name == list[i]->name) return list[i];
  return nullptr;
}

// Threads take ranges until none is left. The caller works too and waits only for ranges that
// were taken, so a pool whose threads are all busy, or waiting like this one, is no deadlock.
class Work {
 public:
  Work(const Kernels* kernels, const Problem& problem, bool transpose, int64_t units, int64_t parts)
      : kernels_(kernels), problem_(problem), transpose_(transpose), units_(units), parts_(parts) {}

  void Run() {
    for (int64_t part; (part = next_.fetch_add(1)) < parts_;) {
      const bool ok = RunPart(part);
      std::lock_guard<std::mutex> lock(mutex_);
      failed_ |= !ok;
      if (++done_ == parts_) finished_.notify_all();
    }
  }

  bool Wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    finished_.wait(lock, [this] { return done_ == parts_; });
    return !failed_;
  }

 private:
  bool RunPart(int64_t part) {
    const int64_t first = units_ * part / parts_, last = units_ * (part + 1) / parts_;
    const int64_t floats = kernels_->scratch(problem_, transpose_);
    void* scratch = nullptr;
    if (floats && posix_memalign(&scratch, 64, floats * sizeof(float))) return false;
    const auto run = transpose_ ? kernels_->transposed : kernels_->product;
    run(problem_, first, last, static_cast<float*>(scratch));
    std::free(scratch);
    return true;
  }

  const Kernels* kernels_;
  const Problem problem_;
  const bool transpose_;
  const int64_t units_, parts_;
  std::atomic<int64_t> next_{0};
  std::mutex mutex_;
  std::condition_variable finished_;
  int64_t done_ = 0;
  bool failed_ = false;
};

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

ffi::Error Run(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::U8> words,
               ffi::AnyBuffer scales, ffi::Buffer<ffi::F32> lut, ffi::AnyBuffer offsets,
               ffi::Result<ffi::Buffer<ffi::F32>> y, int64_t k, int64_t group_size, bool transpose,
               std::string_view instructions) {
  const auto error = [&](const char* what) {
    std::ostringstream s;
    s << "lut_matmul: " << what << "; x" << Shape(x) << " words" << Shape(words) << " scales"
      << Shape(scales) << " lut" << Shape(lut) << " offsets" << Shape(offsets) << " y" << Shape(*y)
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
  if (!Has(scales, {groups, n})) return error("scales do not fit the words and group_size");
  const bool shifted = offsets.element_count() > 0;
  if (shifted && !Has(offsets, {groups, n})) return error("offsets do not fit the scales");
  const auto type = scales.element_type();
  if ((type != ffi::F32 && type != ffi::BF16) || offsets.element_type() != type)
    return error("scales and offsets must both be float32 or both be bfloat16");
  const Kernels* kernels = Find(std::string(instructions));
  if (!kernels) return error("this machine lacks the instruction set");
  if (m == 0 || n == 0) return ffi::Error::Success();

  std::unique_ptr<float[]> sums;
  if (shifted && !transpose) {
    sums.reset(new float[m * groups]());
    for (int64_t i = 0; i < m; ++i)
      for (int64_t j = 0; j < 8 * blocks; ++j)
        sums[i * groups + j / group_size] += x.typed_data()[i * 8 * blocks + j];
  }
  const Problem problem = {x.typed_data(),
                           words.typed_data(),
                           scales.untyped_data(),
                           shifted ? offsets.untyped_data() : nullptr,
                           lut.typed_data(),
                           y->typed_data(),
                           sums.get(),
                           m,
                           8 * blocks,
                           n,
                           k,
                           group_size,
                           tables,
                           static_cast<int>(bits),
                           type == ffi::BF16};
  const int64_t units = transpose ? blocks : (n + kernels->columns - 1) / kernels->columns;
  const int64_t wanted = std::max<int64_t>(1, 8 * blocks * n / kWorkPerThread * m);
  const int64_t parts = std::min({units, wanted, std::max<int64_t>(1, pool.num_threads())});
  const auto work = std::make_shared<Work>(kernels, problem, transpose, units, parts);
  for (int64_t i = 1; i < parts; ++i) pool.Schedule([work] { work->Run(); });
  work->Run();
  if (!work->Wait())
    return ffi::Error(ffi::ErrorCode::kResourceExhausted, "lut_matmul: out of memory");
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(LutMatmul, Run,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::U8>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<int64_t>("k")
                                  .Attr<int64_t>("group_size")
                                  .Attr<bool>("transpose")
                                  .Attr<std::string_view>("instructions"));

// The instruction sets of this machine, best first, separated by commas.
extern "C" const char* LutMatmulInstructions() {
  static const std::string names = [] {
    const Kernels* list[3];
    std::string s;
    for (int i = 0, count = Available(list); i < count; ++i)
      s += (i ? "," : "") + std::string(list[i]->name);
    return s;
  }();
  return names.c_str();
}
