// lstm_cell and the recurrence of one layer and direction: the contract between kernels and bindings.
//
//   i, f, g, o = the four quarters of  gates_x + h @ w_hh^T
//   c' = sigmoid(f) * c + sigmoid(i) * tanh(g);   m = sigmoid(o) * tanh(c');   h' = m, or m @ w_hr^T with a projection
//
// Hochreiter, Schmidhuber 1997, doi:10.1162/neco.1997.9.8.1735; Gers et al. 2000, doi:10.1162/089976600300015015
// (forget gate); Sak et al. 2014, arXiv:1402.1128 (projection).
//
// T is the element type of every tensor but `cells`: double, float, bfloat16 or float16. Acc, double for double and
// float otherwise, is that of sums and of c; h is rounded to T at every step. Every tensor is contiguous, with the
// alignment of its elements. "Activated" gates are i, f, g, o behind their sigmoid or tanh.
#pragma once

#include "common/dtype.h"

namespace llmkernels {

struct LSTMCellFwdParams {
  const void* gates_x;  // [batch, 4 * hidden]  T
  const void* gates_h;  // [batch, 4 * hidden]  T
  const void* c;        // [batch, hidden]      T
  void* next_h;         // [batch, hidden]      T
  void* next_c;         // [batch, hidden]      T
  void* gates;          // [batch, 4 * hidden]  T, activated; null: not wanted
  int64_t batch;
  int64_t hidden;
  DType dtype;
};

struct LSTMCellBwdParams {
  const void* dh;      // [batch, hidden]      T; null: zero
  const void* dc;      // [batch, hidden]      T; null: zero
  const void* gates;   // [batch, 4 * hidden]  T, activated
  const void* c;       // [batch, hidden]      T
  const void* next_c;  // [batch, hidden]      T
  void* dgates;        // [batch, 4 * hidden]  T, of the gates before their activation
  void* dlast_c;       // [batch, hidden]      T
  int64_t batch;
  int64_t hidden;
  DType dtype;
};

// The steps in the order of the computation. The sequences of a step are the first ones of the batch.
struct LSTMSteps {
  const int64_t* first;  // [steps]: the row of a step's first sequence in tensors of N rows
  const int64_t* count;  // [steps]: how many sequences it has
  int64_t steps;
  int64_t batch;   // B
  int64_t hidden;  // H
  int64_t size;    // R: that of h
};

struct LSTMFwdParams {
  LSTMSteps at;
  const void* gates_x;  // [N, 4 * H]  T
  const void* h0;       // [B, R]      T
  const void* c0;       // [B, H]      T
  const void* w_hh;     // [4 * H, R]  T
  const void* w_hr;     // [R, H]      T; null: no projection, R is H
  void* y;              // [N, R]      T
  void* h_n;            // [B, R]      T
  void* c_n;            // [B, H]      T
  void* gates;          // [N, 4 * H]  T, activated; null: not wanted
  void* cells;          // [N, H]      Acc; null: not wanted
  DType dtype;
};

struct LSTMBwdParams {
  LSTMSteps at;
  const void* dy;      // [N, R]      T; null: zero
  const void* dh_n;    // [B, R]      T; null: zero
  const void* dc_n;    // [B, H]      T; null: zero
  const void* dcells;  // [N, H]      Acc; null: zero
  const void* c0;      // [B, H]      T
  const void* w_hh;    // [4 * H, R]  T
  const void* w_hr;    // [R, H]      T; null: no projection
  const void* gates;   // [N, 4 * H]  T, activated
  const void* cells;   // [N, H]      Acc
  void* dgates;        // [N, 4 * H]  T
  void* dh0;           // [B, R]      T
  void* dc0;           // [B, H]      T
  void* dh;            // [N, R]      T: all that arrives at each h; null: not wanted. With a projection only
  void* m;             // [N, H]      T: what each step projects; null: not wanted. With a projection only
  DType dtype;
};

// What the input of all steps adds to the gates, and its gradient: a product of many rows.
struct RowsProductParams {
  const void* x;        // [rows, common]  T
  const void* weights;  // [cols, common]  T, or [common, cols] if `columns`
  const void* bias;     // [cols]          T; null: zero
  void* out;            // [rows, cols]    T
  int64_t rows, common, cols;
  bool columns;
  DType dtype;
};

// One step of the recurrence behind its product, where that is a matrix product of its own. Rows are the sequences of
// the step; c and its gradient go from step to step in Acc.
struct LSTMStepFwdParams {
  const void* gates_x;  // [rows, 4 * hidden]  T
  const void* gates_h;  // [rows, 4 * hidden]  T
  void* c;              // [rows, hidden]      Acc, before the step and then after it
  void* m;              // [rows, hidden]      T
  void* gates;          // [rows, 4 * hidden]  T, activated; null: not wanted
  void* cells;          // [rows, hidden]      Acc, c after the step; null: not wanted
  int64_t rows;
  int64_t hidden;
  DType dtype;
};

struct LSTMStepBwdParams {
  const void* dm;      // [rows, hidden]      T
  const void* dy;      // [rows, hidden]      T, arrives at m as well; null: zero
  const void* dcells;  // [rows, hidden]      Acc; null: zero
  void* dc;            // [rows, hidden]      Acc, at c after the step and then before it
  const void* gates;   // [rows, 4 * hidden]  T, activated
  const void* cells;   // [rows, hidden]      Acc, c after the step
  const void* before;  // [known, hidden]     Acc, c before the step, of the first rows
  const void* c0;      // [rows, hidden]      T, that of the others
  void* dgates;        // [rows, 4 * hidden]  T
  void* m;             // [rows, hidden]      T, as forward; null: not wanted
  int64_t known;
  int64_t rows;
  int64_t hidden;
  DType dtype;
};

}  // namespace llmkernels
