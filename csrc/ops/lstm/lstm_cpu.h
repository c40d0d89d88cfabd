// The CPU kernels of the lstm family. The caller owns the threads.
#pragma once

#include "common/cpu/declare.h"
#include "ops/lstm/lstm.h"

namespace llmkernels::cpu {

// How the sequence kernels of one instruction set want their memory; `forward` or backward.
//
// A call has one or two products a step: that with w_hh, and that with w_hr if there is a projection. The columns of a
// product are cut into blocks, which threads share out; each has a panel of its weights, in the order they are read,
// unless the weights are read where they are (`packed` is false), which pays for few rows in all.
struct LSTMLayout {
  bool packed;
  int64_t hh_blocks, hr_blocks;
  int64_t hh_panel_bytes, hr_panel_bytes;  // of one block
  int64_t operand_bytes;                   // of all rows of a left operand, once: h and m, or dgates and dh
  int64_t inner_operand_bytes;
};

// What the kernels keep between steps; memory of the caller's, aligned to 64 bytes.
struct LSTMScratch {
  void* hh_panels;
  void* hr_panels;
  void* operand[2];  // h or dgates of the last step and of this one, in turns
  void* inner;       // m, or dh of all rows with a projection
  void* c;           // [batch, hidden] Acc: c or dc
  void* dh;          // [batch, size] Acc: backward
};

// Memory of a product of rows: `blocks` panels of weights, and for each thread the operand of `group` rows.
struct RowsProductLayout {
  int64_t blocks, panel_bytes;
  int64_t group, operand_bytes;
};

LLMKERNELS_CPU_DECLARE(
    RowsProductLayout rows_product_layout(const RowsProductParams& params);
    // Panels of blocks [begin, end).
    void rows_product_pack(const RowsProductParams& params, void* panels, int64_t begin, int64_t end);
    // Groups [begin, end) of rows.
    void rows_product(const RowsProductParams& params, const void* panels, void* operand, int64_t begin, int64_t end);

    void lstm_cell_fwd(const LSTMCellFwdParams& params, int64_t begin, int64_t end);
    void lstm_cell_bwd(const LSTMCellBwdParams& params, int64_t begin, int64_t end);

    LSTMLayout lstm_layout(DType dtype, const LSTMSteps& at, bool projection, bool forward);
    // The state before the first step. Single-threaded.
    void lstm_fwd_begin(const LSTMFwdParams& params, const LSTMScratch& scratch);
    void lstm_bwd_begin(const LSTMBwdParams& params, const LSTMScratch& scratch);
    // Panels of blocks [begin, end); `projection` names the product.
    void lstm_fwd_pack(const LSTMFwdParams& params, const LSTMScratch& scratch, bool projection, int64_t begin,
                       int64_t end);
    void lstm_bwd_pack(const LSTMBwdParams& params, const LSTMScratch& scratch, bool projection, int64_t begin,
                       int64_t end);
    // Blocks [begin, end) of a step. With a projection a step has two stages; all blocks of a stage are done before the
    // next one begins. The backward goes from step steps - 1 down to -1, which only has the first stage.
    void lstm_fwd_step(const LSTMFwdParams& params, const LSTMScratch& scratch, bool packed, int64_t step,
                       bool projection, int64_t begin, int64_t end);
    void lstm_bwd_step(const LSTMBwdParams& params, const LSTMScratch& scratch, bool packed, int64_t step,
                       bool projection, int64_t begin, int64_t end);
    // h_n and c_n, dh0 and dc0. Single-threaded.
    void lstm_fwd_end(const LSTMFwdParams& params, const LSTMScratch& scratch);
    void lstm_bwd_end(const LSTMBwdParams& params, const LSTMScratch& scratch);)

}  // namespace llmkernels::cpu
