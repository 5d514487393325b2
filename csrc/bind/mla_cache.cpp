#include "bind/run.h"
#include "mla_cache/config.h"
#include "mla_cache/launch.h"

namespace k2k::bind {

namespace {

MlaCacheParams params(const Tensor& rows, const Tensor& kv_cache, const Tensor& block_table,
                      const Tensor& positions, bool power_of_two) {
    MlaCacheParams p;
    p.rows = rows.data<void>();
    p.rows_type = rows.type();
    p.row_stride = rows.stride(0);
    p.columns = rows.size(1);
    p.cache = kv_cache.data<void>();
    p.cache_type = kv_cache.type();
    p.page_size = kv_cache.size(1);
    p.page_stride = kv_cache.stride(0);
    p.slot_stride = kv_cache.stride(1);
    p.block_table = block_table.data<const int32_t>();
    p.table_stride = block_table.stride(0);
    p.positions = positions.data<const void>();
    p.long_positions = positions.is_int64();
    p.tokens = positions.size(0);
    p.tokens_per_sequence = p.tokens / std::max<int64_t>(1, block_table.size(0));
    p.power_of_two = power_of_two;
    return p;
}

}  // namespace

void bind_mla_cache(py::module_& m) {
    constant(m, "MLA_LATENT", kLatent);
    constant(m, "MLA_ROPE", kRope);
    constant(m, "MLA_ROW_BYTES", kRowBytes);
    m.def("mla_append", [](const Tensor& kv, const Tensor& kv_cache, const Tensor& block_table,
                           const Tensor& positions, bool power_of_two) {
        return run(kv, launch_mla_append,
                   params(kv, kv_cache, block_table, positions, power_of_two));
    });
    m.def("mla_gather", [](const Tensor& rows, const Tensor& kv_cache, const Tensor& block_table,
                           const Tensor& positions) {
        return run(rows, launch_mla_gather,
                   params(rows, kv_cache, block_table, positions, /*power_of_two=*/false));
    });
}

}  // namespace k2k::bind
