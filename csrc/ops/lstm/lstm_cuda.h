// Host launchers of the CUDA lstm_cell kernels: planned params in, CUDA's error sentence out (null for none).
#pragma once

#include "ops/lstm/lstm_plan.h"

namespace llmkernels::cuda {

const char* lstm_cell_fwd(const LSTMCellFwdParams& params, const LSTMCellPlan& plan, void* stream);
const char* lstm_cell_bwd(const LSTMCellBwdParams& params, const LSTMCellPlan& plan, void* stream);

}  // namespace llmkernels::cuda
