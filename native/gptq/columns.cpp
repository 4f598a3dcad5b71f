#include "gptq/columns.hpp"

#include <algorithm>
#include <limits>

#include "core/team.hpp"

namespace matquant {
namespace {

// A row of a group at every width.
template <class T>
struct Affines {
  T scale[MOST_WIDTHS], zero[MOST_WIDTHS];
};

template <class T>
T read_at(const Cells& cells, const Affines<T>& affine, int width, int code) {
  return affine.scale[width] * (static_cast<T>(cells.positions[width * 256 + code]) - affine.zero[width]);
}

// The place of a target, from the first one of its width on.
template <class T>
int place_of(const Cells& cells, const Affines<T>& affine, int width, T target) {
  const T position = target / affine.scale[width] + affine.zero[width];
  // Rounded down by the conversion to an integer.
  const T place = cells.places ? static_cast<T>(static_cast<float>(position) * cells.places[width])
                               : position + static_cast<T>(0.5);
  const float limit = cells.limit[width];
  if (!(place < limit)) return static_cast<int>(limit);  // also of NaN
  return place > 0 ? static_cast<int>(place) : 0;
}

// The best 8-bit code for the targets of all widths (cells.py).
template <class T>
int choose(const Cells& cells, const Affines<T>& affine, const T* target, const T* lambdas) {
  int master = 0, below = std::numeric_limits<int>::max(), above = 0;
  for (int width = 0; width < cells.widths; ++width) {
    const int at = cells.start[width] + place_of(cells, affine, width, target[width]);
    if (width == 0) master = cells.code[at];
    below = std::min(below, static_cast<int>(cells.last[at]));
    above = std::max(above, static_cast<int>(cells.first[at]));
  }
  const auto code_in = [&](int cell) {
    return std::min(std::max(master, static_cast<int>(cells.low[cell])), static_cast<int>(cells.high[cell]));
  };
  const auto cost_of = [&](int code) {
    T cost = 0;
    for (int width = 0; width < cells.widths; ++width) {
      const T error = target[width] - read_at(cells, affine, width, code);
      cost += lambdas[width] * (error * error);
    }
    return cost;
  };
  int best = code_in(below);
  if (below == above) return best;
  T least = cost_of(best);
  for (int cell = below + 1; cell <= above; ++cell) {
    const int code = code_in(cell);
    const T cost = cost_of(code);
    if (!(cost < least)) continue;
    least = cost;
    best = code;
  }
  return best;
}

template <class T>
void solve_row(const Cells& cells, const Columns<T>& of, std::int64_t row) {
  T* values[MOST_WIDTHS];
  for (int width = 0; width < cells.widths; ++width)
    values[width] = of.values + width * of.width_stride + row * of.row_stride;
  std::uint8_t* const codes = of.codes + row * of.code_stride;
  Affines<T> affine;
  for (int column = 0, group = -1; column < of.columns; ++column) {
    if (of.group[column] != group) {
      group = of.group[column];
      for (int width = 0; width < cells.widths; ++width) {
        const std::size_t at = (static_cast<std::size_t>(width) * of.rows + row) * of.groups + group;
        affine.scale[width] = of.scale[at];
        affine.zero[width] = of.zero[at];
      }
    }
    const T* const factors = of.matrix + column * of.matrix_stride;
    const T diagonal = of.descends ? std::max(factors[column], std::numeric_limits<T>::min()) : factors[column];
    T before[MOST_WIDTHS], target[MOST_WIDTHS];
    for (int width = 0; width < cells.widths; ++width) {
      before[width] = of.descends ? read_at(cells, affine, width, codes[column]) : values[width][column];
      target[width] = of.descends ? before[width] + values[width][column] / diagonal : before[width];
    }
    const int code = choose(cells, affine, target, of.lambdas);
    codes[column] = static_cast<std::uint8_t>(code);
    for (int width = 0; width < cells.widths; ++width) {
      const T difference = before[width] - read_at(cells, affine, width, code);
      const T change = of.descends ? difference : difference / diagonal;
      of.changes[(static_cast<std::size_t>(width) * of.rows + row) * of.columns + column] = change;
      if (change == 0) continue;
      const T factor = of.descends ? change : -change;
      T* const later = values[width];
      for (int at = column + 1; at < of.columns; ++at) later[at] += factor * factors[at];
    }
  }
}

}  // namespace

template <class T>
void solve_columns(const Cells& cells, const Columns<T>& columns, int thread, int threads) {
  const Share mine = share_of(columns.rows, thread, threads);
  for (std::int64_t row = mine.start; row < mine.stop; ++row) solve_row(cells, columns, row);
}

template void solve_columns(const Cells&, const Columns<float>&, int, int);
template void solve_columns(const Cells&, const Columns<double>&, int, int);

}  // namespace matquant
