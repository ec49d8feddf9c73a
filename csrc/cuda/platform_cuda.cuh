// The platform on a GPU, sm_80 and later: thin wrappers of PTX instructions.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>

#define FCL_KERNEL(threads, blocks_per_sm) __global__ void __launch_bounds__(threads, blocks_per_sm)
#define FCL_DEVICE __device__ __forceinline__
#define FCL_PARAMS const __grid_constant__

namespace fused_convlstm {

// 16 bits that hold a number: what the kernels store, never what they compute in.
struct Half {
  uint16_t bits;
};
struct Bfloat16 {
  uint16_t bits;
};

FCL_DEVICE float to_float(Half x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}
FCL_DEVICE float to_float(Bfloat16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }
FCL_DEVICE float to_float(float x) { return x; }

template <class T> FCL_DEVICE T from_float(float x); // round to nearest even
template <> FCL_DEVICE Half from_float<Half>(float x) {
  Half y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}
template <> FCL_DEVICE Bfloat16 from_float<Bfloat16>(float x) {
  Bfloat16 y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}
template <> FCL_DEVICE float from_float<float>(float x) { return x; }

// The 32 bits of x rounded to the 10-bit mantissa of tf32.
FCL_DEVICE uint32_t round_to_tf32(uint32_t x) {
  uint32_t y;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(__uint_as_float(x)));
  return y;
}

FCL_DEVICE char *shared_memory() {
  extern __shared__ __align__(128) char memory[];
  return memory;
}
FCL_DEVICE uint32_t shared_address(const void *pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

FCL_DEVICE unsigned thread_index() { return threadIdx.x; }
FCL_DEVICE unsigned block_x() { return blockIdx.x; }
FCL_DEVICE unsigned block_y() { return blockIdx.y; }
FCL_DEVICE unsigned grid_x() { return gridDim.x; }

FCL_DEVICE void sync_block() { __syncthreads(); }

// Copies 16 bytes from global to shared memory, or writes zeros, by the time of a later wait.
FCL_DEVICE void copy_async_16(void *shared, const void *global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(valid ? 16 : 0)
               : "memory");
}
FCL_DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int pending> FCL_DEVICE void copy_async_wait() { // until at most `pending` of the latest groups are under way
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// Four 8x8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8.
FCL_DEVICE void load_matrix_x4(uint32_t (&r)[4], const void *shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(shared))
               : "memory");
}

// d += a * b with a 16 x K, b K x 8, d 16 x 8 in the fragment layout of the PTX manual; K = 16, for tf32 8.
FCL_DEVICE void mma_half(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
FCL_DEVICE void mma_bfloat16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
FCL_DEVICE void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

FCL_DEVICE float shuffle_xor(float x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }

FCL_DEVICE float fast_exp(float x) { return __expf(x); }
FCL_DEVICE float fast_divide(float x, float y) { return __fdividef(x, y); }

// A barrier among the blocks that share a counter, or among those of a cluster. `arrive` publishes what the block
// has written to global memory; after `wait` the block sees what the others published. Split, so that work that needs
// nothing of the others can stand between the two.
class GroupBarrier {
public:
  // counter: zero before the launch and used by this group alone; null: the group is the cluster.
  FCL_DEVICE GroupBarrier(unsigned *counter, unsigned blocks) : counter_(counter), blocks_(blocks), target_(0) {}

  FCL_DEVICE void arrive() {
    if (blocks_ == 1) {
      __syncthreads();
      return;
    }
    if (counter_ == nullptr) {
#if __CUDA_ARCH__ >= 900
      asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#else
      __trap();
#endif
      return;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      __threadfence();
      atomicAdd(counter_, 1u);
    }
    target_ += blocks_;
  }

  FCL_DEVICE void wait() {
    if (blocks_ == 1) {
      return;
    }
    if (counter_ == nullptr) {
#if __CUDA_ARCH__ >= 900
      asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
      return;
    }
    if (threadIdx.x == 0) {
      while (load_acquire() < target_) {
        __nanosleep(20);
      }
      __threadfence();
    }
    __syncthreads();
  }

private:
  FCL_DEVICE unsigned load_acquire() const {
    unsigned value;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(counter_) : "memory");
    return value;
  }

  unsigned *counter_;
  unsigned blocks_;
  unsigned target_;
};

inline void check(cudaError_t status, const char *kernel, const char *call) {
  if (status != cudaSuccess) {
    cudaGetLastError(); // else the next call of anyone in the process would report this error again
    throw std::runtime_error(std::string(kernel) + ": " + call + " failed: " + cudaGetErrorString(status));
  }
}

// Makes `device` current while it lives.
class DeviceGuard {
public:
  DeviceGuard(int device, const char *kernel) {
    check(cudaGetDevice(&before_), kernel, "cudaGetDevice");
    if (before_ != device) {
      check(cudaSetDevice(device), kernel, "cudaSetDevice");
      changed_ = true;
    }
  }
  ~DeviceGuard() {
    if (changed_) {
      cudaSetDevice(before_); // nothing can be thrown here; the next call would report it
    }
  }
  DeviceGuard(const DeviceGuard &) = delete;
  DeviceGuard &operator=(const DeviceGuard &) = delete;

private:
  int before_ = 0;
  bool changed_ = false;
};

using Stream = cudaStream_t;

inline Stream stream_from_handle(uintptr_t handle) { return reinterpret_cast<Stream>(handle); }

struct Launch {
  const char *name; // of the kernel, for errors
  unsigned grid_x, grid_y;
  unsigned threads;
  size_t shared_bytes;
  unsigned cluster = 1;     // blocks a cluster, along x
  bool cooperative = false; // all blocks must be resident at once
  Stream stream;
};

struct DeviceFacts {
  int multiprocessors;
  int compute_capability; // 10 * major + minor
  int shared_bytes_per_block;
};

inline DeviceFacts device_facts(int device, const char *kernel) {
  DeviceFacts facts;
  int major = 0, minor = 0;
  check(cudaDeviceGetAttribute(&facts.multiprocessors, cudaDevAttrMultiProcessorCount, device), kernel,
        "cudaDeviceGetAttribute");
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), kernel, "cudaDeviceGetAttribute");
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), kernel, "cudaDeviceGetAttribute");
  check(cudaDeviceGetAttribute(&facts.shared_bytes_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), kernel,
        "cudaDeviceGetAttribute");
  facts.compute_capability = 10 * major + minor;
  return facts;
}

// Lets a kernel have more shared memory than the 48 KiB that need no asking; asks once a kernel and device.
template <class Params> void allow_shared_memory(const char *name, void (*kernel)(Params), size_t bytes) {
  if (bytes <= 48 * 1024) {
    return;
  }
  static std::mutex mutex;
  static std::map<std::pair<const void *, int>, size_t> allowed;
  int device = 0;
  check(cudaGetDevice(&device), name, "cudaGetDevice");
  const std::lock_guard<std::mutex> lock(mutex);
  size_t &before = allowed[{reinterpret_cast<const void *>(kernel), device}];
  if (before < bytes) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)), name,
          "cudaFuncSetAttribute");
    before = bytes;
  }
}

// How many blocks of this kernel the device holds at once.
template <class Params>
int resident_blocks(const char *name, void (*kernel)(Params), unsigned threads, size_t shared_bytes,
                    const DeviceFacts &facts) {
  int blocks = 0;
  allow_shared_memory(name, kernel, shared_bytes);
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, static_cast<int>(threads), shared_bytes), name,
        "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
  return blocks * facts.multiprocessors;
}

// What the current device's code of a kernel was compiled for, as a compute capability; throws if there is none.
template <class Params> int code_version(const char *name, void (*kernel)(Params)) {
  cudaFuncAttributes attributes;
  check(cudaFuncGetAttributes(&attributes, kernel), name, "cudaFuncGetAttributes");
  return attributes.ptxVersion;
}

// Whether blocks of this kernel form clusters: on a device that has them, unless the code there is the PTX of an older
// one.
template <class Params> bool has_clusters(const char *name, void (*kernel)(Params), const DeviceFacts &facts) {
  return facts.compute_capability >= 90 && code_version(name, kernel) >= 90;
}

template <class Params> void launch(const Launch &l, void (*kernel)(Params), Params params) {
  allow_shared_memory(l.name, kernel, l.shared_bytes);
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(l.grid_x, l.grid_y, 1);
  config.blockDim = dim3(l.threads, 1, 1);
  config.dynamicSmemBytes = l.shared_bytes;
  config.stream = l.stream;
  cudaLaunchAttribute attributes[2];
  config.attrs = attributes;
  if (l.cluster > 1) {
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[config.numAttrs].val.clusterDim = {l.cluster, 1, 1};
    ++config.numAttrs;
  }
  if (l.cooperative) {
    attributes[config.numAttrs].id = cudaLaunchAttributeCooperative;
    attributes[config.numAttrs].val.cooperative = 1;
    ++config.numAttrs;
  }
  check(cudaLaunchKernelEx(&config, kernel, params), l.name, "cudaLaunchKernelEx");
}

inline void fill_zero(void *memory, size_t bytes, Stream stream, const char *kernel) {
  check(cudaMemsetAsync(memory, 0, bytes, stream), kernel, "cudaMemsetAsync");
}

} // namespace fused_convlstm
