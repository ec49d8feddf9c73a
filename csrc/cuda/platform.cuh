// What the kernels need of the machine, behind one set of names: nvcc compiles them to PTX, a host compiler to the
// fibers of host_shim/. Kernel sources use nothing else of CUDA.
#pragma once

#ifdef __CUDACC__
#include "platform_cuda.cuh"
#else
#include "host_shim/platform_host.h"
#endif
