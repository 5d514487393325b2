#include "bind/run.h"
#include "mla_cache/config.h"
#include "mla_cache/launch.h"

namespace k2k::bind {

namespace {

using LaunchMlaCache = void (*)(const MlaCacheParams&, void*);

// The two functions take the same arguments.
void bind_mover(py::module_& m, const char* name, LaunchMlaCache launch) {
    m.def(
        name,
        [launch](Address rows, int rows_type, int64_t row_stride, Address cache, int cache_type,
                 std::tuple<int64_t, int64_t> cache_strides, Address block_table,
                 int64_t table_stride, Address positions, bool long_positions,
                 std::tuple<int64_t, int64_t, int64_t, int64_t> sizes, bool power_of_two,
                 int device, Address stream) {
            MlaCacheParams p;
            p.rows = pointer<void>(rows);
            p.rows_type = static_cast<Type>(rows_type);
            p.row_stride = row_stride;
            p.cache = pointer<void>(cache);
            p.cache_type = static_cast<Type>(cache_type);
            std::tie(p.page_stride, p.slot_stride) = cache_strides;
            p.block_table = pointer<const int32_t>(block_table);
            p.table_stride = table_stride;
            p.positions = pointer<const void>(positions);
            p.long_positions = long_positions;
            std::tie(p.tokens, p.tokens_per_sequence, p.columns, p.page_size) = sizes;
            p.power_of_two = power_of_two;
            return run(device, [&] { launch(p, pointer<void>(stream)); });
        },
        py::arg("rows"), py::arg("rows_type"), py::arg("row_stride"), py::arg("cache"),
        py::arg("cache_type"), py::arg("cache_strides"), py::arg("block_table"),
        py::arg("table_stride"), py::arg("positions"), py::arg("long_positions"), py::arg("sizes"),
        py::arg("power_of_two"), py::arg("device"), py::arg("stream"),
        "See csrc/mla_cache/params.h; returns the number of kernels started.");
}

}  // namespace

void bind_mla_cache(py::module_& m) {
    constant(m, "MLA_LATENT", kLatent);
    constant(m, "MLA_ROPE", kRope);
    constant(m, "MLA_ROW_BYTES", kRowBytes);
    bind_mover(m, "mla_append", launch_mla_append);
    bind_mover(m, "mla_gather", launch_mla_gather);
}

}  // namespace k2k::bind
