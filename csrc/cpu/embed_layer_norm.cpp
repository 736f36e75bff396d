// Distributes embed_layer_norm and its backward over threads. Compiled for the base instruction set.
#include <algorithm>
#include <stdexcept>
#include <string>

#include "kernels.h"
#include "scratch.h"
#include "team.h"

namespace fastbert {
namespace {

// The row kernels do not check ids, so all ids are checked before any of them starts.
void check_ids(const char* name, const EmbedTable& table, int64_t M) {
    for (int64_t m = 0; m < M; ++m)
        if (table.ids[m] < 0 || table.ids[m] >= table.count)
            throw std::invalid_argument("embed_layer_norm: " + std::string(name) + " holds " +
                                        std::to_string(table.ids[m]) + "; its table has " +
                                        std::to_string(table.count) + " rows");
}

void check_all_ids(const EmbedLayerNorm& op) {
    check_ids("input_ids", op.word, op.M);
    check_ids("token_type_ids", op.token_type, op.M);
    check_ids("position_ids", op.position, op.M);
}

// Groups the tokens by table row, in token order: row r has order[starts[r]] to order[starts[r + 1] - 1].
void group(const EmbedTable& table, int64_t M, int64_t* starts, int64_t* order) {
    std::fill(starts, starts + table.count + 2, 0);
    for (int64_t m = 0; m < M; ++m) ++starts[table.ids[m] + 2];
    for (int64_t r = 0; r < table.count; ++r) starts[r + 2] += starts[r + 1];
    for (int64_t m = 0; m < M; ++m) order[starts[table.ids[m] + 1]++] = m;
}

using SumRowsKernel = void (*)(const SumRows& op, int64_t column_begin, int64_t column_end);

// The gradient of a table. A task sums whole rows of it or, in a table of few rows, a range of their columns.
void table_gradient(const EmbedTable& table, int64_t M, int64_t N, const float* dsums, int64_t skipped, char* out,
                    int64_t bytes, int64_t* starts, int64_t* order, SumRowsKernel sum_rows, int threads) {
    constexpr int64_t COLUMNS = 192;  // a multiple of what sum_rows takes at a time on every instruction set
    group(table, M, starts, order);
    const int64_t rows = std::min<int64_t>(std::max<int64_t>(table.count / 256, 1), 64);
    const int64_t columns = table.count < 256 ? COLUMNS : N;
    const int64_t ranges = divide_up(N, columns);
    const int64_t tasks = divide_up(table.count, rows) * ranges;
    Team::share(threads, tasks, [&](int64_t task) {
        const int64_t first = task / ranges * rows, begin = task % ranges * columns, end = std::min(begin + columns, N);
        for (int64_t r = first; r < std::min(first + rows, table.count); ++r) {
            const int64_t count = r == skipped ? 0 : starts[r + 1] - starts[r];
            sum_rows({dsums, N, order + starts[r], count, out + r * N * bytes}, begin, end);
        }
    });
}

}  // namespace

void embed_layer_norm_cpu(const EmbedLayerNorm& op, Isa isa, int threads) {
    check_all_ids(op);
    const EmbedLayerNormKernels& kernels = cpu_kernels(isa).embed_layer_norm;
    const auto rows = op.dtype == DType::f32 ? kernels.f32 : kernels.bf16;
    const int parts = worth(threads, op.M, op.M * op.N);
    const int64_t stride = part_bytes<float>(op.N) / 4;
    float* sums = static_cast<float*>(scratch<struct Rows>(parts * part_bytes<float>(op.N)));
    Team::share(parts, parts, [&](int64_t part) {
        rows(op, op.M * part / parts, op.M * (part + 1) / parts, sums + part * stride);
    });
}

void embed_layer_norm_bwd_cpu(const EmbedLayerNormBwd& op, Isa isa, int threads) {
    const EmbedLayerNorm& of = op.forward;
    check_all_ids(of);
    const EmbedLayerNormKernels& kernels = cpu_kernels(isa).embed_layer_norm;
    const bool wide = of.dtype == DType::f32;
    const auto rows = wide ? kernels.backward_f32 : kernels.backward_bf16;
    const SumRowsKernel sum_rows = wide ? kernels.sum_rows_f32 : kernels.sum_rows_bf16;
    const int64_t M = of.M, N = of.N, bytes = wide ? 4 : 2;
    // Rows per partial sum of dweight and dbias, independent of the number of threads.
    constexpr int64_t BLOCK = 64;
    const int64_t blocks = divide_up(M, BLOCK);
    const int64_t longest = std::max({of.word.count, of.token_type.count, of.position.count});
    char* memory = static_cast<char*>(scratch<struct Gradients>(
        part_bytes<float>(M * N) + part_bytes<float>(3 * blocks * N) + part_bytes<int64_t>(longest + 2) +
        part_bytes<int64_t>(M)));
    float* dsums = take_part<float>(memory, M * N);
    float* partial = take_part<float>(memory, 3 * blocks * N);  // per block: units of one row, dweight, dbias
    int64_t* starts = take_part<int64_t>(memory, longest + 2);
    int64_t* order = take_part<int64_t>(memory, M);

    Team::share(threads, blocks, [&](int64_t b) {
        float* own = partial + 3 * b * N;
        rows(op, b * BLOCK, std::min(M, (b + 1) * BLOCK), dsums, own, own + N, own + 2 * N);
    });
    if (op.dweight) sum_rows({partial + N, 3 * N, nullptr, blocks, op.dweight}, 0, N);
    if (op.dbias) sum_rows({partial + 2 * N, 3 * N, nullptr, blocks, op.dbias}, 0, N);
    const struct {
        const EmbedTable& table;
        void* out;
        int64_t skipped;
    } gradients[] = {{of.word, op.dword, op.padding_idx}, {of.token_type, op.dtoken_type, -1}, {of.position, op.dposition, -1}};
    for (const auto& g : gradients)
        if (g.out)
            table_gradient(g.table, M, N, dsums, g.skipped, static_cast<char*>(g.out), bytes, starts, order, sum_rows,
                           threads);
}

}  // namespace fastbert
