#include "work.h"

#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace lut {
namespace {

constexpr int64_t kOperationsPerThread = 150'000;  // about ten microseconds

#if defined(__x86_64__)
// Conversions from float16, by a name that older compilers know. Asked once: in a virtual machine the
// instruction takes longer than a small product.
bool SupportsF16c() {
  static const bool supported = [] {
    unsigned a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
  }();
  return supported;
}
#endif

// Instruction sets of this machine, best first; the last runs everywhere.
int Available(const Kernels* list[3]) {
  int count = 0;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && SupportsF16c();
  if (avx2 && __builtin_cpu_supports("avx512f")) list[count++] = Avx512Kernels();
  if (avx2) list[count++] = Avx2Kernels();
#elif defined(__aarch64__)
  list[count++] = NeonKernels();
#endif
  list[count++] = PortableKernels();
  return count;
}

constexpr int kSpins = 500;  // some microseconds to some tens of them

void Pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Threads take ranges until none is left. The caller works too and waits only for ranges that
// were taken, so a pool whose threads are all busy, or waiting like this one, is no deadlock.
class Work {
 public:
  Work(Range range, int64_t units, int64_t parts)
      : range_(std::move(range)), units_(units), parts_(parts) {}

  void Run() {
    for (int64_t part; (part = next_.fetch_add(1)) < parts_;) {
      if (!range_(units_ * part / parts_, units_ * (part + 1) / parts_)) failed_ = true;
      if (done_.fetch_add(1) + 1 < parts_) continue;
      std::lock_guard<std::mutex> lock(mutex_);  // the caller is not between its test and its sleep
      finished_.notify_all();
    }
  }

  // Most waits are shorter than falling asleep and being woken.
  bool Wait() {
    for (int i = 0; i < kSpins && done_ < parts_; ++i) Pause();
    std::unique_lock<std::mutex> lock(mutex_);
    finished_.wait(lock, [this] { return done_ == parts_; });
    return !failed_;
  }

 private:
  const Range range_;
  const int64_t units_, parts_;
  std::atomic<int64_t> next_{0};
  std::mutex mutex_;
  std::condition_variable finished_;
  std::atomic<int64_t> done_{0};
  std::atomic<bool> failed_{false};
};

}  // namespace

const Kernels* Find(const std::string& name) {
  const Kernels* list[3];
  const int count = Available(list);
  if (name.empty()) return list[0];
  for (int i = 0; i < count; ++i)
    if (name == list[i]->name) return list[i];
  return nullptr;
}

namespace {

// Whether the buffers are scales [groups, n].
bool Fill(const ScaleBuffers& buffers, int64_t groups, int64_t n, Scales* out) {
  const auto& [values, words, floor, form] = buffers;
  switch (values.element_type()) {
    case xla::ffi::F32: out->type = ScaleType::kFloat32; break;
    case xla::ffi::BF16: out->type = ScaleType::kBfloat16; break;
    case xla::ffi::F16: out->type = ScaleType::kFloat16; break;
    default: return false;
  }
  if (values.element_count() > 0) out->values = values.untyped_data();
  if (words.element_count() == 0) return Has(values, {groups, n});
  if (form.size() != 3 || form[0] < 1 || form[1] < 1 || words.dimensions().size() != 3) return false;
  out->words = words.typed_data();
  out->bits = static_cast<int>(words.dimensions()[1]);
  out->zero = static_cast<float>(form[2]);
  out->floor = floor.element_count() > 0 ? floor.typed_data()[0] : 0.0f;
  out->rows = form[0];
  out->columns = form[1];
  return out->bits >= 1 && out->bits <= 8 && Has(words, {(groups + 7) / 8, out->bits, n}) &&
         Has(values, {(groups - 1) / form[0] + 1, (n - 1) / form[1] + 1});
}

}  // namespace

const char* FindScales(const ScaleBuffers& scales, const ScaleBuffers& offsets, int64_t groups,
                       int64_t n, Problem* problem) {
  if (!Fill(scales, groups, n, &problem->scales))
    return "scales do not fit the words, group_size and form, or are not float32, bfloat16 or "
           "float16";
  if (offsets.values.element_count() > 0 && !Fill(offsets, groups, n, &problem->offsets))
    return "offsets do not fit the words, group_size and form, or are not float32, bfloat16 or "
           "float16";
  return nullptr;
}

bool Parallel(xla::ffi::ThreadPool& pool, int64_t units, int64_t operations, Range range) {
  const int64_t wanted = std::max<int64_t>(1, operations / kOperationsPerThread);
  const int64_t parts = std::min({units, wanted, std::max<int64_t>(1, pool.num_threads())});
  if (parts <= 1) return range(0, units);
  const auto work = std::make_shared<Work>(std::move(range), units, parts);
  for (int64_t i = 1; i < parts; ++i) pool.Schedule([work] { work->Run(); });
  work->Run();
  return work->Wait();
}

}  // namespace lut

// The instruction sets of this machine, best first, separated by commas.
extern "C" const char* NativeInstructions() {
  static const std::string names = [] {
    const lut::Kernels* list[3];
    std::string s;
    for (int i = 0, count = lut::Available(list); i < count; ++i)
      s += (i ? "," : "") + std::string(list[i]->name);
    return s;
  }();
  return names.c_str();
}

// Whether the kernels compute the entries of a table of 2**bits instead of looking them up.
extern "C" bool NativeComputes(const char* instructions, const float* lut, int bits) {
  const lut::Kernels* kernels = lut::Find(instructions);
  lut::Problem problem = {};
  problem.lut = lut;
  problem.tables = 1;
  problem.bits = bits;
  bool computed = false;
  if (kernels) kernels->computed(problem, &computed);
  return computed;
}
