// matquant._native. Only the files of this folder know Python. Importing the module changes nothing in the process:
// threads are started, and the instruction set is chosen, when first needed.
#include <nanobind/nanobind.h>

namespace matquant {
void bind_columns(nanobind::module_& module);
void bind_linear(nanobind::module_& module);
void bind_model(nanobind::module_& module);
void bind_step(nanobind::module_& module);
void bind_stream(nanobind::module_& module);
}  // namespace matquant

NB_MODULE(_native, module) {
  matquant::bind_columns(module);
  matquant::bind_linear(module);
  matquant::bind_model(module);
  matquant::bind_step(module);
  matquant::bind_stream(module);
}
