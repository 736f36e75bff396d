#include "bindings.h"

namespace fastbert::bindings {
namespace {

using Rows = std::tuple<Address, int64_t, int64_t>;  // a table's address, its number of rows, its row stride

EmbedTable table(const Rows& rows) { return {std::get<0>(rows), nullptr, std::get<1>(rows), std::get<2>(rows)}; }

}  // namespace

void bind_encode_batch(py::module_& m) {
    py::class_<BatchEncoder>(m, "BatchEncoder")
        .def(py::init([](const EncoderKind& kind, int64_t L, Address layers, const Rows& word, const Rows& token_type,
                         const Rows& position, Address weight, Address bias, float embed_eps, Address pooler,
                         int64_t places) {
            BatchEncoder model = {};
            model.layers = encoder_of(kind, L, layers);
            model.embed = {model.layers.dtype, 0, model.layers.E, table(word), table(token_type), table(position), weight,
                           bias, nullptr, nullptr, embed_eps, dropout_of(0, 0.0)};
            model.pooler = pooler;
            model.places = places;
            return model;
        }))
        .def("workspace_bytes", [](const BatchEncoder& model, int64_t B, int64_t S, int isa, int threads) {
            const int dtype = static_cast<int>(model.embed.dtype);
            return encode_batch_workspace_bytes(model, B, S, checked_isa(isa, dtype), threads);
        })
        .def("run", [](const BatchEncoder& model, int64_t B, int64_t S, int mask_bytes, uint64_t one,
                       uint64_t magnitude, Address mask, Address input_ids, Address token_type_ids,
                       Address position_ids, int64_t pad_id, Address states, Address pooled, Address workspace,
                       Address distance_bias, int64_t reach, int isa, int threads) {
            const ReadMask masked = {mask_bytes, one, magnitude, 0, 0, mask, nullptr, nullptr};
            const PaddedBatch batch = {B, S, masked, input_ids, token_type_ids, position_ids, pad_id,
                                       states, pooled, workspace, distance_bias, reach};
            const Isa checked = checked_isa(isa, static_cast<int>(model.embed.dtype));
            py::gil_scoped_release nogil;
            return encode_batch_cpu(model, batch, checked, threads);
        });
}

}  // namespace fastbert::bindings
