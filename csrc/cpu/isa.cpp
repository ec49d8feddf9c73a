#include "isa.h"

#include <atomic>

namespace fused_convlstm {

namespace {

Isa best_isa() {
  for (int k = kIsaCount - 1; k > 0; --k) {
    if (isa_compiled(Isa(k)) && isa_detected(Isa(k)))
      return Isa(k);
  }
  return Isa::portable;
}

std::atomic<Isa> &chosen() {
  static std::atomic<Isa> isa{best_isa()};
  return isa;
}

} // namespace

bool isa_compiled(Isa isa) {
  switch (isa) {
  case Isa::portable:
    return true;
  case Isa::avx2:
    FC_IF_AVX2(return true;)
    break;
  case Isa::avx512:
    FC_IF_AVX512(return true;)
    break;
  case Isa::avx512_bf16:
    FC_IF_AVX512_BF16(return true;)
    break;
  }
  return false;
}

bool isa_detected(Isa isa) {
#if defined(__x86_64__)
  // These builtins also ask whether the operating system saves the registers.
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  switch (isa) {
  case Isa::portable:
    return true;
  case Isa::avx2:
    return avx2;
  case Isa::avx512:
    return avx512;
  case Isa::avx512_bf16:
    return avx512 FC_IF_AVX512_BF16(&&__builtin_cpu_supports("avx512bf16"));
  }
  return false;
#else
  return isa == Isa::portable;
#endif
}

const char *isa_name(Isa isa) {
  switch (isa) {
  case Isa::portable:
    return "portable";
  case Isa::avx2:
    return "avx2";
  case Isa::avx512:
    return "avx512";
  case Isa::avx512_bf16:
    return "avx512_bf16";
  }
  return "?";
}

Isa current_isa() { return chosen().load(std::memory_order_relaxed); }

bool select_isa(Isa isa) {
  if (!isa_compiled(isa) || !isa_detected(isa))
    return false;
  chosen().store(isa, std::memory_order_relaxed);
  return true;
}

} // namespace fused_convlstm
