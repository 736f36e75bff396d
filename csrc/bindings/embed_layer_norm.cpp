#include "bindings.h"

namespace fastbert::bindings {
namespace {

// (rows, ids, count, stride) of a table.
using Table = std::tuple<Address, Address, int64_t, int64_t>;

EmbedTable table(const Table& t) { return {std::get<0>(t), std::get<1>(t), std::get<2>(t), std::get<3>(t)}; }

}  // namespace

void bind_embed_layer_norm(py::module_& m) {
    m.def("embed_layer_norm_cpu", [](int dtype, int64_t M, int64_t N, const Table& word, const Table& token_type,
                                     const Table& position, Address weight, Address bias, Address y,
                                     Address statistics, float eps, float dropout_p, uint64_t seed, int isa,
                                     int threads) {
        const EmbedLayerNorm op = {static_cast<DType>(dtype), M, N, table(word), table(token_type), table(position),
                                   weight, bias, y, statistics, eps, dropout_of(seed, dropout_p)};
        call(embed_layer_norm_cpu, op, dtype, isa, threads);
    });
    m.def("embed_layer_norm_bwd_cpu", [](int dtype, int64_t M, int64_t N, const Table& word,
                                              const Table& token_type, const Table& position, Address weight,
                                              Address statistics, float dropout_p, uint64_t seed, Address dy,
                                              int64_t stride_dym, Address dword, Address dtoken_type,
                                              Address dposition, Address dweight, Address dbias, int64_t padding_idx,
                                              int isa, int threads) {
        const EmbedLayerNorm op = {static_cast<DType>(dtype), M, N, table(word), table(token_type), table(position),
                                   weight, nullptr, nullptr, statistics, 0.0f, dropout_of(seed, dropout_p)};
        call(embed_layer_norm_bwd_cpu,
             EmbedLayerNormBwd{op, dy, stride_dym, dword, dtoken_type, dposition, dweight, dbias, padding_idx},
             dtype, isa, threads);
    });
}

}  // namespace fastbert::bindings
