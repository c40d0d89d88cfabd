// Host launchers of the CUDA kernels of the lstm family: planned params in, CUDA's error sentence out (null for none).
#pragma once

#include "ops/lstm/lstm_plan.h"
#include "ops/lstm/lstm_recurrence_plan.h"

namespace llmkernels::cuda {

const char* lstm_cell_fwd(const LSTMCellFwdParams& params, const LSTMCellPlan& plan, void* stream);
const char* lstm_cell_bwd(const LSTMCellBwdParams& params, const LSTMCellPlan& plan, void* stream);

// All steps, for a plan that is `resident`.
const char* lstm_recurrence_fwd(const LSTMResident<LSTMFwdParams>& params, const LSTMRecurrencePlan& plan,
                                void* stream);
const char* lstm_recurrence_bwd(const LSTMResident<LSTMBwdParams>& params, const LSTMRecurrencePlan& plan,
                                void* stream);

// One step behind its product.
const char* lstm_step_fwd(const LSTMStepFwdParams& params, const LSTMCellPlan& plan, void* stream);
const char* lstm_step_bwd(const LSTMStepBwdParams& params, const LSTMCellPlan& plan, void* stream);

}  // namespace llmkernels::cuda
