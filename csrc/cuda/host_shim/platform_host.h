// The platform on the host: a launch runs the threads of each block as fibers. For tests, not for speed.
//
// What a GPU leaves open is varied by the schedule, so that a kernel that relies on it shows: the order in which
// threads and blocks run, and when an asynchronous copy takes place (as soon as it is issued, or only when it is waited
// for). Shared memory is a heap block of exactly the size asked for, so that AddressSanitizer sees accesses past its
// end.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "fiber.h"

#define FCL_KERNEL(threads, blocks_per_sm) void
#define FCL_DEVICE inline
#define FCL_PARAMS const

namespace fused_convlstm {

namespace host {

enum class Order { forward, reverse, random };

struct Schedule {
  Order order = Order::forward;
  uint64_t seed = 0;
  bool eager_copies = false;
};

// What the tests set before a launch.
struct Settings {
  Schedule schedule;
  int compute_capability = 80;
  int multiprocessors = 2;
  int resident_blocks = 8;
  int shared_bytes_per_block = 227 * 1024;
};
Settings &settings();

// Names of the kernels that were launched, for tests to take.
std::vector<std::string> &launches();

struct Copy {
  void *shared;
  const void *global;
  bool valid;
};

// Lanes or threads that meet: the last to arrive acts for all.
struct Meeting {
  const char *what = nullptr;
  unsigned arrived = 0;
  std::vector<void *> operands;
};

struct Cluster {
  unsigned arrivals = 0;
};

struct Block {
  unsigned x, y;
  unsigned threads;
  std::unique_ptr<char[]> shared;
  Meeting barrier;
  std::vector<Meeting> warps;
  Cluster *cluster;
};

struct Thread {
  Fiber fiber;
  unsigned index;
  Block *block;
  bool finished;
  std::vector<Copy> open_copies;
  std::deque<std::vector<Copy>> copy_groups;
};

extern Thread *current; // the thread that runs

unsigned grid_x();
unsigned grid_y();

// Blocks the thread until all of its warp or block are there; the last one calls act(operands) first.
void meet_warp(const char *what, void *operand, const std::function<void(void **)> &act);
void meet_block(const char *what);
void yield();

void copy_now(const Copy &copy);
void check_alignment(const void *pointer, const char *what);

struct Grid {
  const char *name;
  unsigned x, y, threads;
  size_t shared_bytes;
  unsigned cluster;
  bool all_at_once;
};
void run_grid(const Grid &grid, const std::function<void()> &kernel);

float half_to_float(uint16_t bits);
uint16_t float_to_half(float x);
uint16_t float_to_bfloat16(float x);

} // namespace host

struct Half {
  uint16_t bits;
};
struct Bfloat16 {
  uint16_t bits;
};

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

inline float to_float(Half x) { return host::half_to_float(x.bits); }
inline float to_float(Bfloat16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }
inline float to_float(float x) { return x; }

template <class T> T from_float(float x);
template <> inline Half from_float<Half>(float x) { return {host::float_to_half(x)}; }
template <> inline Bfloat16 from_float<Bfloat16>(float x) { return {host::float_to_bfloat16(x)}; }
template <> inline float from_float<float>(float x) { return x; }

inline uint32_t round_to_tf32(uint32_t x) { return (x + 0x1000u) & 0xffffe000u; } // cvt.rna: ties away from zero

inline unsigned thread_index() { return host::current->index; }
inline unsigned block_x() { return host::current->block->x; }
inline unsigned block_y() { return host::current->block->y; }
inline unsigned grid_x() { return host::grid_x(); }

inline char *shared_memory() { return host::current->block->shared.get(); }
inline void sync_block() { host::meet_block("sync_block"); }

inline void copy_async_16(void *shared, const void *global, bool valid) {
  host::check_alignment(shared, "cp.async: shared address");
  host::check_alignment(global, "cp.async: global address");
  const host::Copy copy{shared, global, valid};
  if (host::settings().schedule.eager_copies) {
    host::copy_now(copy);
  } else {
    host::current->open_copies.push_back(copy);
  }
}
inline void copy_async_commit() {
  host::current->copy_groups.push_back(std::move(host::current->open_copies));
  host::current->open_copies.clear();
}
template <int pending> inline void copy_async_wait() {
  auto &groups = host::current->copy_groups;
  while (groups.size() > static_cast<size_t>(pending)) {
    for (const host::Copy &copy : groups.front()) {
      host::copy_now(copy);
    }
    groups.pop_front();
  }
}

void load_matrix_x4(uint32_t (&r)[4], const void *shared);
void mma_half(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
void mma_bfloat16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
float shuffle_xor(float x, int mask);

inline float fast_exp(float x) { return std::exp(x); }
inline float fast_divide(float x, float y) { return x / y; }

class GroupBarrier {
public:
  GroupBarrier(unsigned *counter, unsigned blocks) : counter_(counter), blocks_(blocks), target_(0) {}

  void arrive() {
    if (blocks_ == 1) {
      sync_block();
      return;
    }
    if (counter_ == nullptr) {
      ++host::current->block->cluster->arrivals;
      target_ += blocks_ * host::current->block->threads;
      return;
    }
    sync_block();
    if (thread_index() == 0) {
      ++*counter_;
    }
    target_ += blocks_;
  }

  void wait() {
    if (blocks_ == 1) {
      return;
    }
    if (counter_ == nullptr) {
      while (host::current->block->cluster->arrivals < target_) {
        host::yield();
      }
      return;
    }
    if (thread_index() == 0) {
      while (*counter_ < target_) {
        host::yield();
      }
    }
    sync_block();
  }

private:
  unsigned *counter_;
  unsigned blocks_;
  unsigned target_;
};

class DeviceGuard {
public:
  DeviceGuard(int, const char *) {}
};

using Stream = uintptr_t;
inline Stream stream_from_handle(uintptr_t handle) { return handle; }

struct Launch {
  const char *name;
  unsigned grid_x, grid_y;
  unsigned threads;
  size_t shared_bytes;
  unsigned cluster = 1;
  bool cooperative = false;
  Stream stream;
};

struct DeviceFacts {
  int multiprocessors;
  int compute_capability;
  int shared_bytes_per_block;
};

inline DeviceFacts device_facts(int, const char *) {
  const host::Settings &s = host::settings();
  return {s.multiprocessors, s.compute_capability, s.shared_bytes_per_block};
}

template <class Params> int resident_blocks(const char *, void (*)(Params), unsigned, size_t, const DeviceFacts &) {
  return host::settings().resident_blocks;
}

template <class Params> int code_version(const char *, void (*)(Params)) { return host::settings().compute_capability; }

template <class Params> bool has_clusters(const char *, void (*)(Params), const DeviceFacts &facts) {
  return facts.compute_capability >= 90;
}

template <class Params> void launch(const Launch &l, void (*kernel)(Params), Params params) {
  if (l.grid_x == 0 || l.grid_y == 0 || l.grid_y > 65535) {
    throw std::runtime_error(std::string(l.name) + ": launch failed: invalid grid");
  }
  if (l.shared_bytes > static_cast<size_t>(host::settings().shared_bytes_per_block)) {
    throw std::runtime_error(std::string(l.name) + ": launch failed: too much shared memory");
  }
  if (l.cluster > 1 && (l.grid_x % l.cluster != 0 || host::settings().compute_capability < 90)) {
    throw std::runtime_error(std::string(l.name) + ": launch failed: invalid cluster");
  }
  if (l.cooperative && l.grid_x * l.grid_y > static_cast<unsigned>(host::settings().resident_blocks)) {
    throw std::runtime_error(std::string(l.name) + ": launch failed: too many blocks for a cooperative launch");
  }
  host::run_grid({l.name, l.grid_x, l.grid_y, l.threads, l.shared_bytes, l.cluster, l.cooperative || l.cluster > 1},
                 [&] { kernel(params); });
}

inline void fill_zero(void *memory, size_t bytes, Stream, const char *) { std::memset(memory, 0, bytes); }

} // namespace fused_convlstm
