#include "fiber.h"

#include <cstdlib>

namespace fused_convlstm::host {

namespace {
Fiber *starting = nullptr; // the fiber whose first switch is under way
}

#if defined(__x86_64__)
asm(R"(
    .text
    .globl fcl_switch_stack
    .hidden fcl_switch_stack
    .type fcl_switch_stack, @function
fcl_switch_stack:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size fcl_switch_stack, .-fcl_switch_stack
)");
#endif

void Fiber::start(void (*entry)(void *), void *argument) {
  entry_ = entry;
  argument_ = argument;
  if (!stack_) {
    stack_.reset(new char[stack_bytes]); // not make_unique: that would touch every page
  }
#if FCL_ADDRESS_SANITIZER
  ASAN_UNPOISON_MEMORY_REGION(stack_.get(), stack_bytes); // what the frames of an earlier run left behind
#endif
#if defined(__x86_64__)
  auto top = reinterpret_cast<uintptr_t>(stack_.get() + stack_bytes) & ~uintptr_t{15};
  auto *words = reinterpret_cast<void **>(top);
  words[-1] = nullptr; // where a caller's return address would be
  words[-2] = reinterpret_cast<void *>(&Fiber::enter);
  for (int k = 3; k <= 8; ++k) {
    words[-k] = nullptr; // the six registers
  }
  stack_pointer_ = words - 8;
#else
  getcontext(&context_);
  context_.uc_stack.ss_sp = stack_.get();
  context_.uc_stack.ss_size = stack_bytes;
  context_.uc_link = nullptr;
  makecontext(&context_, &Fiber::enter, 0);
#endif
}

void Fiber::resume() {
  starting = this;
  void *fake_stack = nullptr;
  before_switch(&fake_stack, stack_.get(), stack_bytes);
  switch_to_fiber();
  after_switch(fake_stack, nullptr, nullptr);
}

void Fiber::give_way() {
  void *fake_stack = nullptr;
  before_switch(&fake_stack, scheduler_bottom_, scheduler_bytes_);
  switch_to_scheduler();
  after_switch(fake_stack, &scheduler_bottom_, &scheduler_bytes_);
}

void Fiber::finish() {
  before_switch(nullptr, scheduler_bottom_, scheduler_bytes_);
  switch_to_scheduler();
  std::abort(); // a finished fiber is never resumed
}

void Fiber::enter() {
  Fiber *fiber = starting;
  fiber->after_switch(nullptr, &fiber->scheduler_bottom_, &fiber->scheduler_bytes_);
  fiber->entry_(fiber->argument_);
  std::abort(); // the entry ends with finish
}

#if FCL_ADDRESS_SANITIZER
void Fiber::before_switch(void **fake_stack, const void *bottom, size_t bytes) {
  __sanitizer_start_switch_fiber(fake_stack, bottom, bytes);
}
void Fiber::after_switch(void *fake_stack, const void **bottom, size_t *bytes) {
  __sanitizer_finish_switch_fiber(fake_stack, bottom, bytes);
}
#else
void Fiber::before_switch(void **, const void *, size_t) {}
void Fiber::after_switch(void *, const void **, size_t *) {}
#endif

#if defined(__x86_64__)
void Fiber::switch_to_fiber() { fcl_switch_stack(&scheduler_stack_pointer_, stack_pointer_); }
void Fiber::switch_to_scheduler() { fcl_switch_stack(&stack_pointer_, scheduler_stack_pointer_); }
#else
void Fiber::switch_to_fiber() { swapcontext(&scheduler_context_, &context_); }
void Fiber::switch_to_scheduler() { swapcontext(&context_, &scheduler_context_); }
#endif

} // namespace fused_convlstm::host
