#include "bindings.h"

#include <pybind11/stl.h>

#include "platform_host.h"

namespace py = pybind11;

namespace fused_convlstm::host {

namespace {

Order order_from_name(const std::string &name) {
  if (name == "forward") {
    return Order::forward;
  }
  if (name == "reverse") {
    return Order::reverse;
  }
  if (name == "random") {
    return Order::random;
  }
  throw py::value_error("order: expected 'forward', 'reverse' or 'random', got '" + name + "'");
}

// --- kernels that are right or wrong on purpose
// -----------------------------------------------------------------------

struct ShimTest {
  float *data;
  int count;
  int with_barrier;
  int shift;
};

// Thread t puts data[t] at its place and reads that of thread (t + 32) % 64 back, through shared memory.
FCL_KERNEL(64, 1) exchange(FCL_PARAMS ShimTest p) {
  auto *shared = reinterpret_cast<float *>(shared_memory());
  const unsigned t = thread_index();
  shared[t] = p.data[t];
  if (p.with_barrier != 0) {
    sync_block();
  }
  p.data[t] = shared[(t + 32) % 64];
}

// As `exchange`, but the copy is asynchronous and the wait for it may be left out.
FCL_KERNEL(64, 1) exchange_async(FCL_PARAMS ShimTest p) {
  auto *shared = reinterpret_cast<float *>(shared_memory());
  const unsigned t = thread_index();
  copy_async_16(shared + 4 * t, p.data + 4 * t, true);
  copy_async_commit();
  if (p.with_barrier != 0) {
    copy_async_wait<0>();
  }
  sync_block();
  for (unsigned k = 0; k < 4; ++k) {
    p.data[4 * t + k] = shared[(4 * t + k + 128) % 256];
  }
}

// Only half of the block reaches the barrier.
FCL_KERNEL(64, 1) divergent(FCL_PARAMS ShimTest) {
  if (thread_index() < 32) {
    sync_block();
  }
}

// Reads global memory `shift` elements further than asked, and shared memory as well.
FCL_KERNEL(64, 1) out_of_bounds_global(FCL_PARAMS ShimTest p) {
  const unsigned t = thread_index();
  const float value = p.data[static_cast<int>(t) + p.shift];
  sync_block();
  p.data[t] = value;
}
FCL_KERNEL(64, 1) out_of_bounds_shared(FCL_PARAMS ShimTest p) {
  auto *shared = reinterpret_cast<float *>(shared_memory());
  const unsigned t = thread_index();
  shared[static_cast<int>(t) + p.shift] = p.data[t];
}

// Every block adds its number to the sum of all, `count` times; block_x tells what it saw after the last barrier.
struct GroupTest {
  int *sums;          // a word a round
  int *seen;          // a word a block
  unsigned *counters; // a word a group, or null for clusters
  int rounds;
  unsigned group;
};
FCL_KERNEL(32, 1) group_sum(FCL_PARAMS GroupTest p) {
  const unsigned group = block_x() / p.group;
  GroupBarrier barrier(p.counters == nullptr ? nullptr : p.counters + group, p.group);
  int *sums = p.sums + group * static_cast<unsigned>(p.rounds);
  for (int round = 0; round < p.rounds; ++round) {
    if (thread_index() == 0) {
      sums[round] += 1 + (round > 0 ? sums[round - 1] : 0);
    }
    barrier.arrive();
    barrier.wait();
  }
  if (thread_index() == 0) {
    p.seen[block_x()] = sums[p.rounds - 1];
  }
}

// c += a * b through fragments, as the kernels build them: a is rows x K by the row, b columns x K by the column.
struct FragmentTest {
  const char *a; // 16 rows of 32 bytes
  const char *b; // 16 rows of 32 bytes: two fragments
  float *c;      // (16, 16)
  int number;
};
FCL_KERNEL(32, 1) fragments(FCL_PARAMS FragmentTest p) {
  char *shared = shared_memory();
  const unsigned lane = thread_index();
  copy_async_16(shared + 16 * lane, p.a + 16 * lane, true);
  copy_async_16(shared + 512 + 16 * lane, p.b + 16 * lane, true);
  copy_async_commit();
  copy_async_wait<0>();
  sync_block();
  uint32_t a[4], b[4];
  load_matrix_x4(a, shared + 32 * (lane % 16) + 16 * (lane / 16));
  load_matrix_x4(b, shared + 512 + 32 * (lane / 16 * 8 + lane % 8) + 16 * (lane / 8 % 2));
  for (unsigned n = 0; n < 2; ++n) {
    float d[4];
    float *at[4];
    for (unsigned k = 0; k < 4; ++k) {
      at[k] = p.c + (lane / 4 + 8 * (k / 2)) * 16 + 8 * n + 2 * (lane % 4) + k % 2;
      d[k] = *at[k];
    }
    const uint32_t part[2] = {b[2 * n], b[2 * n + 1]};
    if (p.number == 0) {
      mma_half(d, a, part);
    } else if (p.number == 1) {
      mma_bfloat16(d, a, part);
    } else {
      mma_tf32(d, a, part);
    }
    for (unsigned k = 0; k < 4; ++k) {
      *at[k] = d[k];
    }
  }
}

Launch one_block(const char *name, unsigned threads, size_t shared_bytes) {
  Launch l{};
  l.name = name;
  l.grid_x = l.grid_y = 1;
  l.threads = threads;
  l.shared_bytes = shared_bytes;
  return l;
}

} // namespace

void bind_settings(py::module_ &m) {
  m.def(
      "set_schedule",
      [](const std::string &order, uint64_t seed, bool eager_copies) {
        settings().schedule = {order_from_name(order), seed, eager_copies};
      },
      py::arg("order") = "forward", py::arg("seed") = 0, py::arg("eager_copies") = false);
  m.def(
      "set_device",
      [](int compute_capability, int multiprocessors, int resident_blocks, int shared_bytes_per_block) {
        settings().compute_capability = compute_capability;
        settings().multiprocessors = multiprocessors;
        settings().resident_blocks = resident_blocks;
        settings().shared_bytes_per_block = shared_bytes_per_block;
      },
      py::arg("compute_capability") = 80, py::arg("multiprocessors") = 2, py::arg("resident_blocks") = 8,
      py::arg("shared_bytes_per_block") = 227 * 1024);
  m.def("test_kernel", [](const std::string &name, uintptr_t data, int count, int with_barrier, int shift) {
    const ShimTest p{reinterpret_cast<float *>(data), count, with_barrier, shift};
    if (name == "exchange") {
      launch(one_block("exchange", 64, 64 * 4), exchange, p);
    } else if (name == "exchange_async") {
      launch(one_block("exchange_async", 64, 256 * 4), exchange_async, p);
    } else if (name == "divergent") {
      launch(one_block("divergent", 64, 0), divergent, p);
    } else if (name == "out_of_bounds_global") {
      launch(one_block("out_of_bounds_global", 64, 0), out_of_bounds_global, p);
    } else if (name == "out_of_bounds_shared") {
      launch(one_block("out_of_bounds_shared", 64, 64 * 4), out_of_bounds_shared, p);
    } else {
      throw py::value_error("name: unknown test kernel " + name);
    }
  });
  m.def("test_group", [](uintptr_t sums, uintptr_t seen, uintptr_t counters, int rounds, int groups, int group) {
    const GroupTest p{reinterpret_cast<int *>(sums), reinterpret_cast<int *>(seen),
                      reinterpret_cast<unsigned *>(counters), rounds, static_cast<unsigned>(group)};
    Launch l = one_block("group_sum", 32, 0);
    l.grid_x = static_cast<unsigned>(groups * group);
    l.cooperative = counters != 0;
    l.cluster = counters == 0 ? p.group : 1;
    launch(l, group_sum, p);
  });
  m.def("test_fragments", [](int number, uintptr_t a, uintptr_t b, uintptr_t c) {
    const FragmentTest p{reinterpret_cast<const char *>(a), reinterpret_cast<const char *>(b),
                         reinterpret_cast<float *>(c), number};
    launch(one_block("fragments", 32, 1024), fragments, p);
  });
  m.def("take_launches", [] { return std::exchange(launches(), {}); });
  m.def("half_to_float", [](int bits) { return half_to_float(static_cast<uint16_t>(bits)); });
  m.def("float_to_half", [](float x) { return float_to_half(x); });
  m.def("float_to_bfloat16", [](float x) { return float_to_bfloat16(x); });
}

} // namespace fused_convlstm::host
