#include <algorithm>
#include <string>
#include <vector>

#include "bindings.h"

namespace fastbert::bindings {
namespace {

double peak_binding(const std::string& kind, int isa, int threads) {
    const std::vector<std::string> kinds = {"fp32", "bf16", "int8", "read"};
    const auto found = std::find(kinds.begin(), kinds.end(), kind);
    if (found == kinds.end()) throw py::value_error("no peak of kind '" + kind + "': fp32, bf16, int8 or read");
    if (threads < 1) throw py::value_error("threads must be at least 1");
    const Isa checked = checked_isa(isa, static_cast<int>(DType::f32));
    py::gil_scoped_release nogil;
    return peak_cpu(static_cast<PeakKind>(found - kinds.begin()), checked, threads);
}

}  // namespace

void bind_peak(py::module_& m) {
    m.def("peak", &peak_binding);
    m.def("widens_bf16", [](int isa) { return widens_bf16(checked_isa(isa, static_cast<int>(DType::bf16))); });
}

}  // namespace fastbert::bindings
