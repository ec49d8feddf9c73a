#include "platform_host.h"

#include <algorithm>
#include <exception>
#include <numeric>
#include <random>
#include <utility>

namespace fused_convlstm {

namespace host {

Thread *current = nullptr;

Settings &settings() {
  static Settings instance;
  return instance;
}

std::vector<std::string> &launches() {
  static std::vector<std::string> names;
  return names;
}

namespace {

constexpr unsigned warp_size = 32;

// The grid that runs. Launches do not nest and the tests are single-threaded.
struct Running {
  const Grid *grid = nullptr;
  const std::function<void()> *kernel = nullptr;
  std::deque<Thread *> ready;
  std::exception_ptr error;
  std::mt19937_64 random;
};
Running running;

std::vector<std::unique_ptr<Thread>> &thread_pool() { // stacks are kept from launch to launch
  static std::vector<std::unique_ptr<Thread>> pool;
  return pool;
}

void thread_entry(void *argument) {
  auto *thread = static_cast<Thread *>(argument);
  try {
    (*running.kernel)();
  } catch (...) {
    running.error = std::current_exception();
  }
  thread->finished = true;
  thread->fiber.finish();
}

template <class Items> void put_in_order(Items &items) {
  switch (settings().schedule.order) {
  case Order::forward:
    break;
  case Order::reverse:
    std::reverse(items.begin(), items.end());
    break;
  case Order::random:
    std::shuffle(items.begin(), items.end(), running.random);
    break;
  }
}

void run_until_done(std::vector<Thread *> threads) {
  put_in_order(threads);
  running.ready.assign(threads.begin(), threads.end());
  while (!running.ready.empty()) {
    auto next = running.ready.begin();
    if (settings().schedule.order == Order::random) {
      next += static_cast<std::ptrdiff_t>(running.random() % running.ready.size());
    }
    current = *next;
    running.ready.erase(next);
    current->fiber.resume();
    current = nullptr;
    if (running.error) {
      std::rethrow_exception(std::exchange(running.error, nullptr));
    }
  }
  for (const Thread *thread : threads) {
    if (!thread->finished) {
      throw std::logic_error(std::string(running.grid->name) +
                             ": deadlock: some threads wait at a barrier that others never reach");
    }
  }
}

void wake(Meeting &meeting, Thread *first, unsigned count) {
  std::vector<Thread *> waiting;
  for (unsigned k = 0; k < count; ++k) {
    auto *thread = static_cast<Thread *>(meeting.operands[2 * k + 1]);
    if (thread != first) {
      waiting.push_back(thread);
    }
  }
  put_in_order(waiting);
  running.ready.insert(running.ready.end(), waiting.begin(), waiting.end());
}

void meet(Meeting &meeting, unsigned place, unsigned count, const char *what, void *operand,
          const std::function<void(void **)> &act) {
  if (meeting.arrived == 0) {
    meeting.what = what;
    meeting.operands.resize(2 * count);
  } else if (std::strcmp(meeting.what, what) != 0) {
    throw std::logic_error(std::string(running.grid->name) + ": divergence: one thread is at " + what +
                           ", another of its group waits at " + meeting.what);
  }
  meeting.operands[2 * place] = operand;
  meeting.operands[2 * place + 1] = current;
  if (++meeting.arrived < count) {
    current->fiber.give_way();
    return;
  }
  meeting.arrived = 0;
  act(meeting.operands.data());
  wake(meeting, current, count);
}

} // namespace

unsigned grid_x() { return running.grid->x; }
unsigned grid_y() { return running.grid->y; }

void meet_warp(const char *what, void *operand, const std::function<void(void **)> &act) {
  Block &block = *current->block;
  meet(block.warps[current->index / warp_size], current->index % warp_size, warp_size, what, operand, act);
}

void meet_block(const char *what) {
  Block &block = *current->block;
  meet(block.barrier, current->index, block.threads, what, nullptr, [](void **) {});
}

void yield() {
  running.ready.push_back(current);
  current->fiber.give_way();
}

void copy_now(const Copy &copy) {
  if (copy.valid) {
    std::memcpy(copy.shared, copy.global, 16);
  } else {
    std::memset(copy.shared, 0, 16);
  }
}

void check_alignment(const void *pointer, const char *what) {
  if (reinterpret_cast<uintptr_t>(pointer) % 16 != 0) {
    throw std::logic_error(std::string(what) + " is not a multiple of 16");
  }
}

void run_grid(const Grid &grid, const std::function<void()> &kernel) {
  if (grid.threads == 0 || grid.threads > 1024 || grid.threads % warp_size != 0) {
    throw std::logic_error(std::string(grid.name) + ": the shim runs whole warps, up to 1024 threads a block");
  }
  launches().push_back(grid.name);
  running = Running{};
  running.grid = &grid;
  running.kernel = &kernel;
  running.random.seed(settings().schedule.seed);

  std::vector<unsigned> block_order(static_cast<size_t>(grid.x) * grid.y);
  std::iota(block_order.begin(), block_order.end(), 0u);
  put_in_order(block_order);
  const size_t at_once = grid.all_at_once ? block_order.size() : 1;
  auto &pool = thread_pool();
  while (pool.size() < at_once * grid.threads) {
    pool.push_back(std::make_unique<Thread>());
  }
  std::vector<Cluster> clusters(block_order.size() / grid.cluster + 1);
  for (size_t first = 0; first < block_order.size(); first += at_once) {
    std::vector<std::unique_ptr<Block>> blocks;
    std::vector<Thread *> threads;
    for (size_t k = 0; k < at_once; ++k) {
      const unsigned number = block_order[first + k];
      auto block = std::make_unique<Block>();
      block->x = number % grid.x;
      block->y = number / grid.x;
      block->threads = grid.threads;
      block->shared.reset(new char[grid.shared_bytes]);
      std::memset(block->shared.get(), 0xff, grid.shared_bytes); // NaN in every type
      block->warps.resize(grid.threads / warp_size);
      block->cluster = &clusters[number / grid.cluster];
      for (unsigned t = 0; t < grid.threads; ++t) {
        Thread *thread = pool[k * grid.threads + t].get();
        thread->index = t;
        thread->block = block.get();
        thread->finished = false;
        thread->open_copies.clear();
        thread->copy_groups.clear();
        thread->fiber.start(thread_entry, thread);
        threads.push_back(thread);
      }
      blocks.push_back(std::move(block));
    }
    run_until_done(std::move(threads));
  }
}

float half_to_float(uint16_t bits) {
  const uint32_t sign = (bits & 0x8000u) << 16;
  const uint32_t exponent = (bits >> 10) & 0x1fu;
  const uint32_t mantissa = bits & 0x3ffu;
  if (exponent == 0) { // zero or subnormal
    const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
    return sign != 0 ? -magnitude : magnitude;
  }
  if (exponent == 31) {
    return float_of(sign | 0x7f800000u | (mantissa << 13));
  }
  return float_of(sign | ((exponent + 112) << 23) | (mantissa << 13));
}

uint16_t float_to_half(float x) {
  const uint32_t bits = bits_of(x);
  const auto sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) {
    return 0x7fffu;
  }
  if (magnitude >= 0x477ff000u) { // rounds to 65536 or more
    return sign | 0x7c00u;
  }
  if (magnitude < 0x38800000u) { // below the smallest normal number: a multiple of 2^-24
    return sign | static_cast<uint16_t>(std::nearbyint(float_of(magnitude) * 0x1p24f));
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return sign | static_cast<uint16_t>((rounded - 0x38000000u) >> 13);
}

uint16_t float_to_bfloat16(float x) {
  const uint32_t bits = bits_of(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) {
    return 0x7fffu;
  }
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

namespace {

struct MatrixLoad {
  uint32_t *r;
  const void *row;
};

struct MatrixMultiply {
  float *d;
  const uint32_t *a;
  const uint32_t *b;
};

float low_half(uint32_t pair) { return half_to_float(static_cast<uint16_t>(pair)); }
float low_bfloat16(uint32_t pair) { return float_of(pair << 16); }

// The multiply of a warp, from the fragments of its lanes. PTX ISA, "Matrix fragments for mma.m16n8k16" and "... k8":
// lane = 4 * group + place; `per_register` elements of k in a register; d[2 * i + j] is row group + 8 * i, column
// 2 * place + j.
template <int per_register, class Element> void multiply(void **operands, Element element) {
  constexpr int depth = 8 * per_register;
  float a[16][depth], b[depth][8];
  for (int lane = 0; lane < 32; ++lane) {
    const int group = lane / 4, place = lane % 4;
    const auto &m = *static_cast<MatrixMultiply *>(operands[2 * lane]);
    for (int e = 0; e < per_register; ++e) {
      const int k = per_register * place + e;
      for (int r = 0; r < 4; ++r) {
        a[group + 8 * (r % 2)][k + depth / 2 * (r / 2)] = element(m.a[r], e);
      }
      for (int r = 0; r < 2; ++r) {
        b[k + depth / 2 * r][group] = element(m.b[r], e);
      }
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    const int group = lane / 4, place = lane % 4;
    const auto &m = *static_cast<MatrixMultiply *>(operands[2 * lane]);
    for (int n = 0; n < 4; ++n) {
      float sum = m.d[n];
      for (int k = 0; k < depth; ++k) {
        sum += a[group + 8 * (n / 2)][k] * b[k][2 * place + n % 2];
      }
      m.d[n] = sum;
    }
  }
}

} // namespace

} // namespace host

void load_matrix_x4(uint32_t (&r)[4], const void *shared) {
  host::check_alignment(shared, "ldmatrix: shared address");
  host::MatrixLoad load{r, shared};
  host::meet_warp("ldmatrix", &load, [](void **operands) {
    for (int lane = 0; lane < 32; ++lane) {
      for (int matrix = 0; matrix < 4; ++matrix) {
        const auto *source = static_cast<host::MatrixLoad *>(operands[2 * (8 * matrix + lane / 4)]);
        std::memcpy(&static_cast<host::MatrixLoad *>(operands[2 * lane])->r[matrix],
                    static_cast<const char *>(source->row) + 4 * (lane % 4), 4);
      }
    }
  });
}

void mma_half(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  host::MatrixMultiply m{d, a, b};
  host::meet_warp("mma.f16", &m, [](void **operands) {
    host::multiply<2>(operands, [](uint32_t pair, int e) { return host::low_half(pair >> (16 * e)); });
  });
}

void mma_bfloat16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  host::MatrixMultiply m{d, a, b};
  host::meet_warp("mma.bf16", &m, [](void **operands) {
    host::multiply<2>(operands, [](uint32_t pair, int e) { return host::low_bfloat16(pair >> (16 * e)); });
  });
}

void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  host::MatrixMultiply m{d, a, b};
  host::meet_warp("mma.tf32", &m, [](void **operands) {
    host::multiply<1>(operands, [](uint32_t word, int) { return float_of(word & 0xffffe000u); });
  });
}

float shuffle_xor(float x, int mask) {
  struct Exchange {
    float in, out;
    int mask;
  } exchange{x, 0.0f, mask};
  host::meet_warp("shuffle_xor", &exchange, [](void **operands) {
    for (int lane = 0; lane < 32; ++lane) {
      auto *mine = static_cast<Exchange *>(operands[2 * lane]);
      mine->out = static_cast<Exchange *>(operands[2 * (lane ^ mine->mask)])->in;
    }
  });
  return exchange.out;
}

} // namespace fused_convlstm
