#include "host.h"

#include <cstdlib>
#include <new>

namespace lipfast {
namespace {

const Kernels& choose() {
  __builtin_cpu_init();
  const char* wish = std::getenv("LIPFAST_CPU_CAPABILITY");
  const std::string want = wish ? wish : "avx512";
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (want == "avx512" && avx512) return isa_avx512::kernels();
  if (want != "default" && avx2) return isa_avx2::kernels();
  return isa_default::kernels();
}

struct Buffer {
  void* data = nullptr;
  int64_t size = 0;
  ~Buffer() { std::free(data); }
};

std::string cpu_capability() { return kernels().name; }

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

void* scratch(int which, int64_t bytes) {
  thread_local Buffer buffers[3];
  Buffer& b = buffers[which];
  if (b.size < bytes) {
    std::free(b.data);
    b.size = 0;
    const int64_t size = (bytes + 63) / 64 * 64;
    b.data = std::aligned_alloc(64, size);
    if (!b.data) throw std::bad_alloc();
    b.size = size;
  }
  return b.data;
}

int dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Double:
      return kFloat64;
    case ScalarType::Float:
      return kFloat32;
    case ScalarType::BFloat16:
      return kBFloat16;
    case ScalarType::Half:
      return kFloat16;
    default:
      STD_TORCH_CHECK(false, "lipfast: unsupported dtype");
      return -1;
  }
}

double gamma_of(bool outward, int64_t terms, int dtype) {
  if (!outward) return -1;
  const double unit = dtype == kFloat64 ? 0x1p-53 : 0x1p-24, gamma = 1.01 * double(terms + 16) * unit;
  STD_TORCH_CHECK(gamma <= 0.25, "outward: at most ", int64_t(0.24 / unit), " terms can be summed soundly, got ",
                  terms);
  return gamma;
}

}  // namespace lipfast

STABLE_TORCH_LIBRARY_FRAGMENT(lipfast, m) { m.def("cpu_capability() -> str"); }
STABLE_TORCH_LIBRARY_IMPL(lipfast, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", TORCH_BOX(&lipfast::cpu_capability));
}
