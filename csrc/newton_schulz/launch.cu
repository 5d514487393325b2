#include "common/dispatch.h"
#include "common/launch.h"
#include "newton_schulz/kernel_prologue.cuh"
#include "newton_schulz/kernel_sm80.cuh"
#include "newton_schulz/kernel_small.cuh"
#include "newton_schulz/launch.h"

namespace k2k {

namespace {

LaunchShape shape_of(int64_t blocks, int threads, void* stream) {
    if (blocks > INT32_MAX) {
        throw Error("k2kernels: newton_schulz: " + std::to_string(blocks) +
                    " tiles are more than a grid holds; pass fewer matrices at once");
    }
    LaunchShape shape{static_cast<unsigned>(blocks), static_cast<unsigned>(threads)};
    shape.stream = stream;
    return shape;
}

template <class Row>
void upload(Row* table, const std::vector<Row>& rows, void* stream) {
    const int count = static_cast<int>(rows.size());
    for (int first = 0; first < count; first += kNsTablePiece) {
        NsTablePiece<Row> piece = {};
        piece.target = table + first;
        piece.count = std::min(count - first, kNsTablePiece);
        std::copy_n(rows.begin() + first, piece.count, piece.rows);
        launch<newton_schulz_table_kernel<Row>>(shape_of(1, kNsTablePiece, stream), piece);
    }
}

// The sum of count(m, n) over the matrices of tensors begin .. end - 1.
template <class Count>
int64_t total(const std::vector<NsTensor>& tensors, int begin, int end, Count&& count) {
    int64_t sum = 0;
    for (int i = begin; i < end; ++i) sum += tensors[i].batch * count(tensors[i].m, tensors[i].n);
    return sum;
}

// Adds the ops of a program's stage for tensors begin .. end - 1, if it has that stage.
void add_ops(NsStage& stage, const NsProgram& program, std::size_t index,
             const std::vector<NsTensor>& tensors, int begin, int end) {
    if (begin == end || index >= program.size()) return;
    for (NsOp op : program[index]) {
        op.begin = begin;
        op.end = end;
        op.tiles =
            total(tensors, begin, end, op.kind == NsKind::kMultiply ? full_tiles : triangle_tiles);
        stage.ops[stage.num_ops++] = op;
    }
}

template <class T, bool kUpdates>
void launch_prologue(const LaunchShape& shape, const NsPrologue& prologue) {
    launch<newton_schulz_norm_kernel<kUpdates>, sizeof(NsSums)>(shape, prologue);
    launch<newton_schulz_cast_kernel<T, kUpdates>, sizeof(NsSums)>(shape, prologue);
}

// The iteration of small matrices with a short side of kBlocks blocks of 64.
template <class T, int kBlocks>
void launch_small(const NsCall& call, const NsTables& tables, int begin, int64_t matrices,
                  void* stream) {
    if (matrices == 0) return;
    NsSmall small = {};
    small.tables = tables;
    small.begin = begin;
    small.end = begin + call.counts[1 + kBlocks];
    small.num_steps = static_cast<int>(call.steps.size());
    std::copy(call.steps.begin(), call.steps.end(), small.steps);
    launch<newton_schulz_small_kernel<T, kBlocks>, sizeof(NsSmallStorage<kBlocks>)>(
        shape_of(matrices, ns_small_threads(kBlocks), stream), small);
}

template <class T>
void launch_stages(const NsCall& call, std::vector<NsTensor> tensors, void* stream) {
    const int count = static_cast<int>(tensors.size());
    int begins[std::size(call.counts) + 1] = {};
    for (std::size_t i = 0; i < std::size(call.counts); ++i) {
        begins[i + 1] = begins[i] + call.counts[i];
    }
    auto* table = reinterpret_cast<NsTensor*>(call.workspace);
    auto* updates = reinterpret_cast<NsUpdate*>(table + count);
    auto* square_sums = reinterpret_cast<double*>(updates + call.updates.size());
    const int64_t chunks = total(tensors, 0, count, norm_chunks);
    const int64_t before = reinterpret_cast<char*>(square_sums + chunks) - call.workspace;
    char* buffers = call.workspace + ceil_div(before, 16) * 16;
    int64_t matrices[std::size(call.counts)] = {};
    for (std::size_t kind = 0; kind < std::size(call.counts); ++kind) {
        for (int i = begins[kind]; i < begins[kind + 1]; ++i) {
            NsTensor& t = tensors[i];
            t.first_triangle = total(tensors, begins[kind], i, triangle_tiles);
            t.first_tile = total(tensors, begins[kind], i, full_tiles);
            t.first_chunk = total(tensors, 0, i, norm_chunks);
            t.first_matrix = matrices[kind];
            matrices[kind] += t.batch;
            t.workspace = buffers;
            buffers += ns_buffer_bytes(t.batch, t.m, t.n, t.gram, kind >= 2);
        }
    }
    upload(table, tensors, stream);
    if (!call.updates.empty()) upload(updates, call.updates, stream);

    const NsTables tables{table, call.updates.empty() ? nullptr : updates, call.rule};
    const NsPrologue prologue{tables, count, square_sums};
    const LaunchShape by_chunks = shape_of(chunks, kNsThreads, stream);
    if (call.updates.empty()) {
        launch_prologue<T, false>(by_chunks, prologue);
    } else {
        launch_prologue<T, true>(by_chunks, prologue);
    }

    const NsProgram standard = standard_program(call.steps);
    const NsProgram gram = gram_program(call.steps);
    for (std::size_t i = 0;; ++i) {
        NsStage stage = {};
        stage.tables = tables;
        add_ops(stage, standard, i, tensors, begins[0], begins[1]);
        add_ops(stage, gram, i, tensors, begins[1], begins[2]);
        if (stage.num_ops == 0) break;
        int64_t tiles = 0;
        for (int j = 0; j < stage.num_ops; ++j) tiles += stage.ops[j].tiles;
        const LaunchShape shape = shape_of(tiles, kNsThreads, stream);
        if (ns_by_wgmma(call.capability)) {
            launch_newton_schulz_sm90(stage, call.iterate_type, shape.grid.x, stream);
        } else {
            launch<newton_schulz_sm80_kernel<T>, sizeof(NsStorage)>(shape, stage);
        }
    }
    launch_small<T, 1>(call, tables, begins[2], matrices[2], stream);
    launch_small<T, 2>(call, tables, begins[3], matrices[3], stream);
    launch_small<T, 3>(call, tables, begins[4], matrices[4], stream);
}

}  // namespace

void launch_newton_schulz(const NsCall& call, void* stream) {
    if (call.tensors.empty()) return;
    if (call.steps.size() > kNsMostSteps) {
        throw Error("k2kernels: newton_schulz: there are at most 100 steps");
    }
    if (call.iterate_type == Type::kFp16) {
        launch_stages<fp16>(call, call.tensors, stream);
    } else if (call.iterate_type == Type::kBf16) {
        launch_stages<bf16>(call, call.tensors, stream);
    } else {
        throw Error("k2kernels: newton_schulz: kernels iterate in float16 and bfloat16");
    }
}

}  // namespace k2k
