// Instruction sets: which ones this build has, which one the machine runs, and how a call reaches it.
//
// Every *_kernels.cpp is compiled once per instruction set with FC_ISA set to its name. All that such a file defines
// lives in namespace fused_convlstm::FC_ISA; it must not use the standard library's templates, because the linker keeps
// one copy of an inline function and could keep one with instructions that the machine does not have.
#pragma once

namespace fused_convlstm {

enum class Isa { portable = 0, avx2 = 1, avx512 = 2, avx512_bf16 = 3 };

// The set in use: the best that is compiled and that the machine has, unless select_isa() chose another.
Isa current_isa();
// Forces one set; false if it is not compiled or the machine does not have it.
bool select_isa(Isa isa);
bool isa_compiled(Isa isa);
bool isa_detected(Isa isa);
const char *isa_name(Isa isa);
constexpr int kIsaCount = 4;

} // namespace fused_convlstm

// Declares a function in the namespace of every compiled instruction set. Use inside namespace fused_convlstm.
#ifdef FC_HAVE_AVX2
#define FC_IF_AVX2(...) __VA_ARGS__
#else
#define FC_IF_AVX2(...)
#endif
#ifdef FC_HAVE_AVX512
#define FC_IF_AVX512(...) __VA_ARGS__
#else
#define FC_IF_AVX512(...)
#endif
#ifdef FC_HAVE_AVX512_BF16
#define FC_IF_AVX512_BF16(...) __VA_ARGS__
#else
#define FC_IF_AVX512_BF16(...)
#endif

#define FC_DECLARE(...)                                                                                                \
  namespace portable {                                                                                                 \
  __VA_ARGS__;                                                                                                         \
  }                                                                                                                    \
  FC_IF_AVX2(namespace avx2 { __VA_ARGS__; })                                                                          \
  FC_IF_AVX512(namespace avx512 { __VA_ARGS__; })                                                                      \
  FC_IF_AVX512_BF16(namespace avx512_bf16 { __VA_ARGS__; })

// Calls `call`, for instance f(x), in the namespace of the current instruction set, and returns its value.
#define FC_DISPATCH(...)                                                                                               \
  switch (::fused_convlstm::current_isa()) {                                                                           \
    FC_IF_AVX2(case ::fused_convlstm::Isa::avx2 : return ::fused_convlstm::avx2::__VA_ARGS__;)                         \
    FC_IF_AVX512(case ::fused_convlstm::Isa::avx512 : return ::fused_convlstm::avx512::__VA_ARGS__;)                   \
    FC_IF_AVX512_BF16(case ::fused_convlstm::Isa::avx512_bf16 : return ::fused_convlstm::avx512_bf16::__VA_ARGS__;)    \
  default:                                                                                                             \
    return ::fused_convlstm::portable::__VA_ARGS__;                                                                    \
  }
