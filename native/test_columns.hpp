// The native test of nested GPTQ's columns.
#pragma once

#include <cstdint>
#include <vector>

#include "gptq/columns.hpp"
#include "test_fixture.hpp"

namespace matquant {

// The tables of methods/parts/cells.py for the widths 8 and 2.
struct CellTables {
  std::vector<std::int32_t> code = std::vector<std::int32_t>(260), first = code, last = code, low{0, 64, 128, 192},
                            high{63, 127, 191, 255}, start{0, 256};
  std::vector<float> limit{255, 3}, positions = std::vector<float>(512);

  CellTables() {
    for (int q = 0; q < 256; ++q) {
      code[q] = q;
      first[q] = last[q] = q / 64;
      positions[q] = static_cast<float>(q);
      positions[256 + q] = static_cast<float>(q / 64);
    }
    for (int cell = 0; cell < 4; ++cell) code[256 + cell] = first[256 + cell] = last[256 + cell] = cell;
  }
  Cells view() const {
    return {2, limit.data(), nullptr, start.data(), code.data(), first.data(), last.data(), low.data(), high.data(),
            positions.data()};
  }
};

// How often a code is better than the one that a pass of nested GPTQ at 8 and 2 bits chooses, on buffers of exactly
// their size. The Python tests compare all rules, grids and widths with their oracle.
inline int wrong_columns() {
  constexpr int ROWS = 5, COLUMNS = 9, GROUPS = 3, WIDTHS = 2;
  const CellTables tables;
  std::vector<std::int32_t> group(COLUMNS);
  for (int column = 0; column < COLUMNS; ++column) group[column] = column * GROUPS / COLUMNS;
  std::vector<double> target(WIDTHS * ROWS * COLUMNS), matrix(COLUMNS * COLUMNS), scale(WIDTHS * ROWS * GROUPS),
      zero(scale.size()), changes(target.size());
  for (double& value : target) value = 300 * draw_float();
  for (double& value : matrix) value = 0.1 * draw_float();
  for (int column = 0; column < COLUMNS; ++column) matrix[column * COLUMNS + column] = 1;
  for (std::size_t at = 0; at < scale.size(); ++at) {
    scale[at] = (at < scale.size() / 2 ? 1.5 : 90) + draw_float();
    zero[at] = at < scale.size() / 2 ? 128 : 1.5;
  }
  std::vector<std::uint8_t> codes(ROWS * COLUMNS);
  std::vector<double> values = target;
  const double lambdas[] = {1, 0.2};
  const Columns<double> of{ROWS, COLUMNS, GROUPS, false, values.data(), ROWS * COLUMNS, COLUMNS, matrix.data(), COLUMNS,
                           codes.data(), COLUMNS, scale.data(), zero.data(), group.data(), lambdas, changes.data()};
  for (int thread = 0; thread < 3; ++thread) solve_columns(tables.view(), of, thread, 3);
  int wrong = 0;
  for (int row = 0; row < ROWS; ++row)
    for (int column = 0; column < COLUMNS; ++column) {
      const auto read = [&](int width, int q) {
        const int at = (width * ROWS + row) * GROUPS + group[column];
        return scale[at] * (tables.positions[width * 256 + q] - zero[at]);
      };
      const auto cost = [&](int q) {
        double sum = 0;
        for (int width = 0; width < WIDTHS; ++width) {
          const double error = target[(width * ROWS + row) * COLUMNS + column] - read(width, q);
          sum += lambdas[width] * error * error;
        }
        return sum;
      };
      const int chosen = codes[row * COLUMNS + column];
      for (int q = 0; q < 256; ++q) wrong += cost(q) < cost(chosen) * (1 - 1e-9);
      for (int width = 0; width < WIDTHS; ++width) {
        double* const targets = &target[(width * ROWS + row) * COLUMNS];
        const double error = targets[column] - read(width, chosen);
        for (int later = column + 1; later < COLUMNS; ++later)
          targets[later] -= error * matrix[column * COLUMNS + later];
      }
    }
  return wrong;
}

}  // namespace matquant
