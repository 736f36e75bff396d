#include "bindings.h"

namespace fastbert::bindings {
namespace {

// (rows, ids, count, stride) of a table.
using Table = std::tuple<uintptr_t, uintptr_t, int64_t, int64_t>;

EmbedTable table(const Table& t) {
    return {pointer(std::get<0>(t)), static_cast<const int64_t*>(pointer(std::get<1>(t))), std::get<2>(t), std::get<3>(t)};
}

EmbedLayerNorm forward_args(int dtype, int64_t M, int64_t N, const Table& word, const Table& token_type,
                            const Table& position, uintptr_t weight, uintptr_t bias, uintptr_t y, uintptr_t statistics,
                            float eps, float dropout_p, uint64_t seed) {
    return {static_cast<DType>(dtype), M, N, table(word), table(token_type), table(position), pointer(weight),
            pointer(bias), pointer(y), static_cast<float*>(pointer(statistics)), eps, dropout_of(seed, dropout_p)};
}

void embed_layer_norm_cpu_binding(int dtype, int64_t M, int64_t N, const Table& word, const Table& token_type,
                                  const Table& position, uintptr_t weight, uintptr_t bias, uintptr_t y,
                                  uintptr_t statistics, float eps, float dropout_p, uint64_t seed, int isa, int threads) {
    const Isa checked = checked_isa(isa, dtype);
    const EmbedLayerNorm op =
        forward_args(dtype, M, N, word, token_type, position, weight, bias, y, statistics, eps, dropout_p, seed);
    py::gil_scoped_release nogil;
    embed_layer_norm_cpu(op, checked, threads);
}

void embed_layer_norm_backward_cpu_binding(int dtype, int64_t M, int64_t N, const Table& word, const Table& token_type,
                                           const Table& position, uintptr_t weight, uintptr_t statistics,
                                           float dropout_p, uint64_t seed, uintptr_t dy, int64_t stride_dym,
                                           uintptr_t dword, uintptr_t dtoken_type, uintptr_t dposition,
                                           uintptr_t dweight, uintptr_t dbias, int64_t padding_idx, int isa, int threads) {
    const Isa checked = checked_isa(isa, dtype);
    const EmbedLayerNormBackward op = {
        forward_args(dtype, M, N, word, token_type, position, weight, 0, 0, statistics, 0.0f, dropout_p, seed),
        pointer(dy), stride_dym, pointer(dword), pointer(dtoken_type), pointer(dposition), pointer(dweight),
        pointer(dbias), padding_idx};
    py::gil_scoped_release nogil;
    embed_layer_norm_backward_cpu(op, checked, threads);
}

}  // namespace

void bind_embed_layer_norm(py::module_& m) {
    m.def("embed_layer_norm_cpu", &embed_layer_norm_cpu_binding);
    m.def("embed_layer_norm_backward_cpu", &embed_layer_norm_backward_cpu_binding);
}

}  // namespace fastbert::bindings
