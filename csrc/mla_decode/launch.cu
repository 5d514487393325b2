#include "common/dispatch.h"
#include "common/launch.h"
#include "mla_decode/kernel_combine.cuh"
#include "mla_decode/kernel_schedule.cuh"
#include "mla_decode/kernel_sm80.cuh"
#include "mla_decode/launch.h"

namespace k2k {

namespace {

template <class T, int kRowWarps, bool kQuantized>
void launch_portable(const MlaDecodeParams& p, void* stream) {
    LaunchShape shape{static_cast<unsigned>(p.plan.teams * p.plan.team_size), kPortableThreads};
    shape.smem_bytes = portable_shared_memory(kQuantized, p.plan.stages);
    shape.stream = stream;
    launch<mla_decode_sm80_kernel<T, kRowWarps, kQuantized>,
           portable_shared_memory(kQuantized, /*stages=*/4)>(shape, p);
}

template <class T, bool kQuantized>
void by_tile_rows(const MlaDecodeParams& p, void* stream) {
    switch (p.plan.tile_rows) {
        case 16:
            return launch_portable<T, 1, kQuantized>(p, stream);
        case 32:
            return launch_portable<T, 2, kQuantized>(p, stream);
        default:
            return launch_portable<T, 4, kQuantized>(p, stream);
    }
}

void launch_combine(const MlaDecodeParams& p, void* stream) {
    if (!needs_combine(p)) return;
    const int64_t rows = p.tokens * p.heads;
    const int rows_per_block = combine_rows_per_block(rows);
    LaunchShape shape{static_cast<unsigned>(ceil_div(rows, rows_per_block)), kCombineThreads};
    shape.stream = stream;
    if (p.type == Type::kBf16) {
        launch<mla_combine_kernel<bf16>, sizeof(MlaCombineStorage)>(shape, p, rows_per_block);
    } else {
        launch<mla_combine_kernel<fp16>, sizeof(MlaCombineStorage)>(shape, p, rows_per_block);
    }
}

}  // namespace

void launch_mla_decode(const MlaDecodeParams& p, void* stream) {
    if (p.tokens * p.heads == 0) return;
    if (p.plan.kernel == MlaDecodeKernel::kSm90) return launch_mla_decode_sm90(p, stream);
    if (p.cache_type == Type::kU8) {
        by_tile_rows<bf16, /*kQuantized=*/true>(p, stream);
    } else if (p.type == Type::kBf16) {
        by_tile_rows<bf16, /*kQuantized=*/false>(p, stream);
    } else {
        by_tile_rows<fp16, /*kQuantized=*/false>(p, stream);
    }
    launch_combine(p, stream);
}

void launch_mla_schedule(const MlaDecodeParams& p, MlaTask* tasks, int capacity, void* stream) {
    LaunchShape shape{static_cast<unsigned>(p.plan.teams * p.plan.team_size), 32};
    shape.stream = stream;
    launch<mla_schedule_kernel, sizeof(MlaScheduleStorage)>(shape, p, tasks, capacity);
}

void launch_merge_attention_states(const MergeParams& p, void* stream) {
    if (p.rows == 0) return;
    LaunchShape shape{static_cast<unsigned>(ceil_div(p.rows, kMergeThreads / 32)), kMergeThreads};
    shape.stream = stream;
    by_float_type(p.type, [&](auto* type) {
        launch<merge_attention_states_kernel<Element<decltype(type)>>>(shape, p);
    });
}

}  // namespace k2k
