#include "bindings.h"

namespace fastbert::bindings {

// Python lays out the chunks the same way: three words of 64 bits each.
static_assert(sizeof(Chunk) == 3 * sizeof(uint64_t));

void bind_checksum(py::module_& m) {
    m.def("checksum_cpu", [](Address chunks, int64_t count, int threads) {
        py::gil_scoped_release nogil;
        checksum_cpu(chunks, count, threads);
    });
    m.def("changed_cpu", [](Address chunks, int64_t always, int64_t begin, int64_t end, int threads) {
        py::gil_scoped_release nogil;
        return changed_cpu(chunks, always, begin, end, threads);
    });
}

}  // namespace fastbert::bindings
