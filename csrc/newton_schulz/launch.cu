#include "common/dispatch.h"
#include "common/launch.h"
#include "newton_schulz/kernel_prologue.cuh"
#include "newton_schulz/kernel_sm80.cuh"
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

void upload(NsTensor* table, const std::vector<NsTensor>& tensors, void* stream) {
    const int count = static_cast<int>(tensors.size());
    for (int first = 0; first < count; first += kNsTablePiece) {
        NsTablePiece piece = {};
        piece.target = table + first;
        piece.count = std::min(count - first, kNsTablePiece);
        std::copy_n(tensors.begin() + first, piece.count, piece.tensors);
        launch<newton_schulz_table_kernel>(shape_of(1, kNsTablePiece, stream), piece);
    }
}

// What tensors begin .. end - 1 have of something.
template <class Count>
int64_t total(const std::vector<NsTensor>& tensors, int begin, int end, Count&& count) {
    int64_t sum = 0;
    for (int i = begin; i < end; ++i) sum += tensors[i].batch * count(tensors[i].m, tensors[i].n);
    return sum;
}

// Adds the ops of one stage, if there is one, for tensors begin .. end - 1.
void add_ops(NsStage& stage,
             const NsProgram& program,
             std::size_t index,
             const std::vector<NsTensor>& tensors,
             int begin,
             int end) {
    if (begin == end || index >= program.size()) return;
    for (NsOp op : program[index]) {
        op.begin = begin;
        op.end = end;
        op.tiles =
            total(tensors, begin, end, op.kind == NsKind::kMultiply ? full_tiles : triangle_tiles);
        stage.ops[stage.num_ops++] = op;
    }
}

template <class T>
void launch_stages(const NsCall& call, std::vector<NsTensor> tensors, void* stream) {
    const int count = static_cast<int>(tensors.size()), num_standard = call.num_standard;
    auto* table = reinterpret_cast<NsTensor*>(call.workspace);
    auto* square_sums = reinterpret_cast<double*>(table + count);
    const int64_t chunks = total(tensors, 0, count, norm_chunks);
    char* buffers = reinterpret_cast<char*>(square_sums + ceil_div(chunks, 2) * 2);
    for (int i = 0; i < count; ++i) {
        NsTensor& t = tensors[i];
        const int begin = i < num_standard ? 0 : num_standard;
        t.first_triangle = total(tensors, begin, i, triangle_tiles);
        t.first_tile = total(tensors, begin, i, full_tiles);
        t.first_chunk = total(tensors, 0, i, norm_chunks);
        t.workspace = buffers;
        buffers += ns_buffer_bytes(t.batch, t.m, t.n, i >= num_standard);
    }
    upload(table, tensors, stream);

    const NsPrologue prologue{table, count, square_sums};
    const LaunchShape by_chunks = shape_of(chunks, kNsThreads, stream);
    launch<newton_schulz_norm_kernel, sizeof(NsSums)>(by_chunks, prologue);
    launch<newton_schulz_cast_kernel<T>, sizeof(NsSums)>(by_chunks, prologue);

    const NsProgram standard = standard_program(call.steps);
    const NsProgram gram = gram_program(call.steps, call.restarts);
    for (std::size_t i = 0;; ++i) {
        NsStage stage = {};
        stage.tensors = table;
        add_ops(stage, standard, i, tensors, 0, num_standard);
        add_ops(stage, gram, i, tensors, num_standard, count);
        if (stage.num_ops == 0) return;
        int64_t tiles = 0;
        for (int j = 0; j < stage.num_ops; ++j) tiles += stage.ops[j].tiles;
        launch<newton_schulz_sm80_kernel<T>, sizeof(NsStorage)>(shape_of(tiles, kNsThreads, stream),
                                                                stage);
    }
}

}  // namespace

void launch_newton_schulz(const NsCall& call, void* stream) {
    if (call.tensors.empty()) return;
    if (call.iterate_type == Type::kFp16) {
        launch_stages<fp16>(call, call.tensors, stream);
    } else if (call.iterate_type == Type::kBf16) {
        launch_stages<bf16>(call, call.tensors, stream);
    } else {
        throw Error("k2kernels: newton_schulz: kernels iterate in float16 and bfloat16");
    }
}

}  // namespace k2k
