#include "common/dispatch.h"
#include "common/launch.h"
#include "mla_cache/kernel.cuh"
#include "mla_cache/launch.h"

namespace k2k {

namespace {

LaunchShape shape_of(const MlaCacheParams& p, void* stream) {
    const int64_t blocks = ceil_div(p.tokens, kCacheWarps);
    return {static_cast<unsigned>(blocks), 32 * kCacheWarps, 0, stream};
}

// Calls f with null pointers of the two types.
template <class F>
void by_types(const MlaCacheParams& p, F&& f) {
    by_float_type(p.rows_type, [&](auto* row) {
        if (p.cache_type == Type::kU8) return f(row, static_cast<uint8_t*>(nullptr));
        by_float_type(p.cache_type, [&](auto* cache) { f(row, cache); });
    });
}

}  // namespace

void launch_mla_append(const MlaCacheParams& p, void* stream) {
    if (p.tokens == 0) return;
    by_types(p, [&](auto* row, auto* cache) {
        launch<mla_append_kernel<Element<decltype(row)>, Element<decltype(cache)>>>(
            shape_of(p, stream), p);
    });
}

void launch_mla_gather(const MlaCacheParams& p, void* stream) {
    if (p.tokens == 0) return;
    by_types(p, [&](auto* row, auto* cache) {
        launch<mla_gather_kernel<Element<decltype(row)>, Element<decltype(cache)>>>(
            shape_of(p, stream), p);
    });
}

}  // namespace k2k
