// The pooled-gate cell's kernels in one number format; compiled once for each, with FCL_MATH the name of the format.
#include "pooled_gate.cuh"

template struct fused_convlstm::PooledGateLaunchers<fused_convlstm::FCL_MATH>;
