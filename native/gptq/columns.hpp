// The column by column part of nested GPTQ (methods/parts/compensation.py), for some columns of a weight.
//
// R widths, N rows, C columns, G groups of a row, T float or double. Rows do not depend on each other, so threads share
// them, and a row stays in the cache for all of its columns. Every product is rounded before it is added.
#pragma once

#include <cstddef>
#include <cstdint>

namespace matquant {

constexpr int MOST_WIDTHS = 8;

// The tables of methods/parts/cells.py, which explains them.
struct Cells {
  int widths;
  const float* limit;                       // [R]
  const float* places;                      // [R]; null: the uniform grid
  const std::int32_t* start;                // [R]
  const std::int32_t *code, *first, *last;  // by place
  const std::int32_t *low, *high;           // by cell
  const float* positions;                   // [R][256]
};

template <class T>
struct Columns {
  int rows, columns, groups;
  bool descends;  // coordinate descent, not the pass
  T* values;      // [R][N][C] with strides: targets of the pass, or gradients of the descent; overwritten
  std::ptrdiff_t width_stride, row_stride;
  const T* matrix;  // [C][C]: these columns of U or of H
  std::ptrdiff_t matrix_stride;
  std::uint8_t* codes;  // [N][C]: chosen here; the descent begins with those that it finds
  std::ptrdiff_t code_stride;
  const T *scale, *zero;      // [R][N][G]
  const std::int32_t* group;  // [C], the group of each column
  const T* lambdas;           // [R]
  T* changes;                 // [R][N][C]: errors over U_jj of the pass, or the change of what is read
};

// Thread `thread`'s rows.
template <class T>
void solve_columns(const Cells& cells, const Columns<T>& columns, int thread, int threads);

}  // namespace matquant
