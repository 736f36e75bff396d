#include <string>

#include "bindings.h"

namespace fastbert::bindings {

void bind_rotary(py::module_& m) {
    m.def("rotary_cpu", [](int dtype, int64_t T, int64_t H, int64_t G, int64_t D, Address x, Address y, Address table,
                           Address positions, int64_t places, bool backward, int isa, int threads) {
        const int64_t* at = positions;
        for (int64_t t = 0; t < T; ++t)
            if (at[t] < 0 || at[t] >= places)
                throw py::value_error("positions holds " + std::to_string(at[t]) + "; the table has " +
                                      std::to_string(places) + " rows");
        const Rotary op = {static_cast<DType>(dtype), T, H, G, D, x, y, table, at, backward};
        call(rotary_cpu, op, dtype, isa, threads);
    });
}

}  // namespace fastbert::bindings
