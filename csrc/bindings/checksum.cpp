#include "bindings.h"

namespace fastbert::bindings {
namespace {

// Python has the chunks as they lie here: three words of 64 bits each.
static_assert(sizeof(Chunk) == 3 * sizeof(uint64_t));

void checksum_binding(uintptr_t chunks, int64_t count, int threads) {
    py::gil_scoped_release nogil;
    checksum_cpu(static_cast<Chunk*>(pointer(chunks)), count, threads);
}

int64_t first_changed_binding(uintptr_t chunks, int64_t count, int threads) {
    py::gil_scoped_release nogil;
    return first_changed_cpu(static_cast<const Chunk*>(pointer(chunks)), count, threads);
}

}  // namespace

void bind_checksum(py::module_& m) {
    m.def("checksum_cpu", &checksum_binding);
    m.def("first_changed_cpu", &first_changed_binding);
}

}  // namespace fastbert::bindings
