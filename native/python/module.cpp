// matquant._native. The files of this folder are the only ones that know Python. Importing the module has no effect beyond
// itself: threads start and the instruction set is chosen when they are first needed.
#include <nanobind/nanobind.h>

namespace matquant {
void bind_linear(nanobind::module_& module);
void bind_model(nanobind::module_& module);
void bind_step(nanobind::module_& module);
void bind_stream(nanobind::module_& module);
}  // namespace matquant

NB_MODULE(_native, module) {
  matquant::bind_linear(module);
  matquant::bind_model(module);
  matquant::bind_step(module);
  matquant::bind_stream(module);
}
