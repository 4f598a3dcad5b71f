// matquant._native
#include <nanobind/nanobind.h>

namespace matquant {
void bind_linear(nanobind::module_& module);
#ifdef MATQUANT_MODEL
void bind_model(nanobind::module_& module);
#endif
}  // namespace matquant

NB_MODULE(_native, module) {
  matquant::bind_linear(module);
#ifdef MATQUANT_MODEL
  matquant::bind_model(module);
#endif
}
