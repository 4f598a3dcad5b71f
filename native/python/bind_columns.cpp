// Columns of nested GPTQ for Python.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <stdexcept>

#include "core/team.hpp"
#include "gptq/columns.hpp"

namespace nb = nanobind;

namespace matquant {
namespace {

template <class T, std::size_t Dims>
using Array = nb::ndarray<T, nb::ndim<Dims>, nb::device::cpu>;  // any strides
template <class T, std::size_t Dims>
using Packed = nb::ndarray<T, nb::ndim<Dims>, nb::c_contig, nb::device::cpu>;
using Indices = Packed<const std::int32_t, 1>;

void check(bool holds, const char* what) {
  if (!holds) throw std::invalid_argument(what);
}

// The tables, in the order of cells.Cells; places: empty for the uniform grid.
struct Tables {
  Packed<const float, 1> limit, places;
  Indices start, code, first, last, low, high;
  Packed<const float, 2> positions;

  Tables(Packed<const float, 1> limit_, Packed<const float, 1> places_, Indices start_, Indices code_, Indices first_,
         Indices last_, Indices low_, Indices high_, Packed<const float, 2> positions_)
      : limit(limit_), places(places_), start(start_), code(code_), first(first_), last(last_), low(low_), high(high_),
        positions(positions_) {}

  Cells view() const {
    const std::size_t widths = limit.shape(0);
    check(widths >= 1 && widths <= MOST_WIDTHS, "1 to 8 widths are needed");
    check(start.shape(0) == widths && positions.shape(0) == widths && positions.shape(1) == 256,
          "the tables are of different widths");
    check(places.shape(0) == 0 || places.shape(0) == widths, "places are of different widths");
    return {static_cast<int>(widths), limit.data(), places.shape(0) ? places.data() : nullptr, start.data(),
            code.data(), first.data(), last.data(), low.data(), high.data(), positions.data()};
  }
};

template <class T>
void solve(const Tables& tables, const Array<T, 3>& values, const Array<const T, 2>& matrix,
           const Array<std::uint8_t, 2>& codes, const Packed<const T, 3>& scale, const Packed<const T, 3>& zero,
           const Indices& group, const Packed<const T, 1>& lambdas, const Packed<T, 3>& changes, bool descends,
           int threads) {
  const Cells cells = tables.view();
  const std::size_t rows = values.shape(1), columns = values.shape(2), groups = scale.shape(2);
  const auto widths = static_cast<std::size_t>(cells.widths);
  check(values.shape(0) == widths && lambdas.shape(0) == widths, "values or lambdas are of different widths");
  check(scale.shape(0) == widths && scale.shape(1) == rows, "the scales are not [widths, rows, groups]");
  check(zero.shape(0) == widths && zero.shape(1) == rows && zero.shape(2) == groups,
        "the zero-points are not [widths, rows, groups]");
  check(matrix.shape(0) == columns && matrix.shape(1) == columns, "the matrix is not [columns, columns]");
  check(codes.shape(0) == rows && codes.shape(1) == columns, "the codes are not [rows, columns]");
  check(changes.shape(0) == widths && changes.shape(1) == rows && changes.shape(2) == columns,
        "the changes are not [widths, rows, columns]");
  check(group.shape(0) == columns, "every column needs a group");
  check(columns <= 1 || (values.stride(2) == 1 && matrix.stride(1) == 1 && codes.stride(1) == 1),
        "the columns of a row are not contiguous");
  for (std::size_t column = 0; column < columns; ++column)
    check(group.data()[column] >= 0 && static_cast<std::size_t>(group.data()[column]) < groups,
          "a column is in no group");
  const Columns<T> of{static_cast<int>(rows), static_cast<int>(columns), static_cast<int>(groups), descends,
                      values.data(), values.stride(0), values.stride(1), matrix.data(), matrix.stride(0),
                      codes.data(), codes.stride(0), scale.data(), zero.data(), group.data(), lambdas.data(),
                      changes.data()};
  const nb::gil_scoped_release released;
  on_threads(threads, [&](Team& team, int thread) { solve_columns(cells, of, thread, team.threads()); });
}

template <class T>
void define(nb::module_& module) {
  module.def("solve_columns", &solve<T>, nb::arg("cells"), nb::arg("values"), nb::arg("matrix"), nb::arg("codes"),
             nb::arg("scale"), nb::arg("zero"), nb::arg("group"), nb::arg("lambdas"), nb::arg("changes"),
             nb::arg("descends"), nb::arg("threads"));
}

}  // namespace

void bind_columns(nb::module_& module) {
  nb::class_<Tables>(module, "Cells")
      .def(nb::init<Packed<const float, 1>, Packed<const float, 1>, Indices, Indices, Indices, Indices, Indices,
                    Indices, Packed<const float, 2>>(),
           nb::arg("limit"), nb::arg("places"), nb::arg("start"), nb::arg("code"), nb::arg("first"), nb::arg("last"),
           nb::arg("low"), nb::arg("high"), nb::arg("positions"));
  define<float>(module);
  define<double>(module);
}

}  // namespace matquant
