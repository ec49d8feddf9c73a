// A fiber: a stack of its own that runs until it gives way.
#pragma once

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#include <cstddef>
#include <cstdint>
#include <memory>

#if defined(__SANITIZE_ADDRESS__)
#define FCL_ADDRESS_SANITIZER 1
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#else
#define FCL_ADDRESS_SANITIZER 0
#endif

namespace fused_convlstm::host {

#if defined(__x86_64__)
// Saves the callee-saved registers on the current stack and continues on another. swapcontext would do the same with
// a system call for the signal mask each time, ten times as slow.
extern "C" void fcl_switch_stack(void **save_stack_pointer, void *stack_pointer);
#endif

class Fiber {
public:
  Fiber() = default;
  Fiber(const Fiber &) = delete;
  Fiber &operator=(const Fiber &) = delete;

  // Sets the fiber up to run entry(argument) from the start at the next resume. The entry must not return, it ends
  // with `finish`.
  void start(void (*entry)(void *), void *argument);

  // From the scheduler: runs the fiber until it gives way.
  void resume();

  // From the fiber: back to the scheduler; returns when resumed.
  void give_way();

  // From the fiber: back to the scheduler for good.
  [[noreturn]] void finish();

private:
  static constexpr size_t stack_bytes = FCL_ADDRESS_SANITIZER ? 512 * 1024 : 128 * 1024;

  static void enter();
  void before_switch(void **fake_stack, const void *bottom, size_t bytes);
  void after_switch(void *fake_stack, const void **bottom, size_t *bytes);
  void switch_to_fiber();
  void switch_to_scheduler();

  std::unique_ptr<char[]> stack_;
  void (*entry_)(void *) = nullptr;
  void *argument_ = nullptr;
#if defined(__x86_64__)
  void *stack_pointer_ = nullptr;
  void *scheduler_stack_pointer_ = nullptr;
#else
  ucontext_t context_;
  ucontext_t scheduler_context_;
#endif
  const void *scheduler_bottom_ = nullptr;
  size_t scheduler_bytes_ = 0;
};

} // namespace fused_convlstm::host
