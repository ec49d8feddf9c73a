// The ConvLSTM's kernels in one number format; compiled once for each, with FCL_MATH the name of the format.
#include "conv_lstm.cuh"

template struct fused_convlstm::ConvLSTMLaunchers<fused_convlstm::FCL_MATH>;
