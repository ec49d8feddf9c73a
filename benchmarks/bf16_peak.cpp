// The highest rate of bfloat16 multiply-adds of a thread: a loop of 24 chains, as many as the kernels' register tile has,
// that reads no memory.
#include <cstdint>

// clang-format off
#define FC_CHAIN(n) "vdpbf16ps %%zmm30, %%zmm31, %%zmm" #n "\n"
#define FC_CLEAR(n) "vpxord %%zmm" #n ", %%zmm" #n ", %%zmm" #n "\n"
#define FC_EACH(f)                                                                                                     \
  f(0) f(1) f(2) f(3) f(4) f(5) f(6) f(7) f(8) f(9) f(10) f(11) f(12) f(13) f(14) f(15) f(16) f(17) f(18) f(19) f(20)  \
  f(21) f(22) f(23)
// clang-format on

// 24 * 32 multiply-adds a round.
extern "C" void multiply_add(int64_t rounds) {
  asm volatile(FC_EACH(FC_CLEAR) FC_CLEAR(30) FC_CLEAR(31) ".p2align 5\n1:\n" FC_EACH(FC_CHAIN) "dec %0\njnz 1b\n"
               : "+r"(rounds)
               :
               : "cc", "zmm0", "zmm1", "zmm2", "zmm3", "zmm4", "zmm5", "zmm6", "zmm7", "zmm8", "zmm9", "zmm10", "zmm11",
                 "zmm12", "zmm13", "zmm14", "zmm15", "zmm16", "zmm17", "zmm18", "zmm19", "zmm20", "zmm21", "zmm22",
                 "zmm23", "zmm30", "zmm31");
}
