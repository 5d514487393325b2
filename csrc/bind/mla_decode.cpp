#include <pybind11/stl.h>

#include "bind/run.h"
#include "mla_decode/config.h"
#include "mla_decode/launch.h"

namespace k2k::bind {

namespace {

// (tile_rows, stages, teams, team_size, split_blocks, partials, hopper)
using PlanTuple = std::tuple<int, int, int, int, int, int64_t, bool>;

PlanTuple plan(std::tuple<int, int, int> chip,
               std::tuple<int64_t, int64_t, int64_t> sizes,
               int64_t queries_per_sequence,
               int64_t capacity,
               int64_t page_size,
               int64_t split_keys,
               bool quantized,
               bool whole_rows) {
    const auto [capability, multiprocessors, shared_memory] = chip;
    const auto [batch, tokens, heads] = sizes;
    const MlaDecodePlan p =
        make_plan(Chip{capability, multiprocessors, shared_memory},
                  MlaDecodeShape{batch, tokens, heads, queries_per_sequence, capacity, page_size,
                                 split_keys, quantized, whole_rows});
    return {p.tile_rows, p.stages, p.teams, p.team_size, p.split_blocks, p.partials, p.hopper};
}

void set_sizes(MlaDecodeParams& p,
               const std::tuple<int64_t, int64_t, int64_t>& sizes,
               int64_t queries_per_sequence,
               int64_t capacity,
               const PlanTuple& plan) {
    const auto [batch, tokens, heads] = sizes;
    p.batch = static_cast<int32_t>(batch);
    p.tokens = tokens;
    p.heads = static_cast<int32_t>(heads);
    p.queries_per_sequence = static_cast<int32_t>(queries_per_sequence);
    p.capacity = static_cast<int32_t>(capacity);
    std::tie(p.plan.tile_rows, p.plan.stages, p.plan.teams, p.plan.team_size, p.plan.split_blocks,
             p.plan.partials, p.plan.hopper) = plan;
}

long decode(Address q,
            int type,
            std::tuple<int64_t, int64_t> q_strides,
            Address cache,
            int cache_type,
            std::tuple<int64_t, int64_t> cache_sizes,
            std::tuple<int64_t, int64_t> cache_strides,
            Address block_table,
            int64_t table_stride,
            Address seq_lens,
            Address cu_seqlens_q,
            std::tuple<int64_t, int64_t, int64_t> sizes,
            int64_t queries_per_sequence,
            int64_t capacity,
            float scale,
            bool causal,
            std::tuple<Address, Address, Address> results,
            std::tuple<int64_t, int64_t> out_strides,
            std::tuple<Address, Address, Address> workspace,
            PlanTuple plan,
            int device,
            Address stream) {
    MlaDecodeParams p;
    p.q = pointer<const void>(q);
    p.type = static_cast<Type>(type);
    std::tie(p.q_token_stride, p.q_head_stride) = q_strides;
    p.cache = pointer<const void>(cache);
    p.cache_type = static_cast<Type>(cache_type);
    const auto [pages, page_size] = cache_sizes;
    p.pages = pages;
    p.page_size = static_cast<int32_t>(page_size);
    std::tie(p.page_stride, p.slot_stride) = cache_strides;
    p.block_table = pointer<const int32_t>(block_table);
    p.table_stride = table_stride;
    p.seq_lens = pointer<const int32_t>(seq_lens);
    p.cu_seqlens_q = pointer<const int32_t>(cu_seqlens_q);
    set_sizes(p, sizes, queries_per_sequence, capacity, plan);
    p.scale = scale;
    p.causal = causal;
    const auto [out, lse, max_logits] = results;
    p.out = pointer<void>(out);
    p.lse = pointer<float>(lse);
    p.max_logits = pointer<float>(max_logits);
    std::tie(p.out_token_stride, p.out_head_stride) = out_strides;
    const auto [partial_out, partial_stats, split_rows] = workspace;
    p.partial_out = pointer<float>(partial_out);
    p.partial_stats = pointer<float2>(partial_stats);
    p.split_rows = pointer<SplitRow>(split_rows);
    return run(device, [&] { launch_mla_decode(p, pointer<void>(stream)); });
}

long schedule(Address seq_lens,
              Address cu_seqlens_q,
              std::tuple<int64_t, int64_t, int64_t> sizes,
              int64_t queries_per_sequence,
              int64_t capacity,
              PlanTuple plan,
              Address tasks,
              int tasks_of_a_block,
              int device,
              Address stream) {
    MlaDecodeParams p = {};
    p.seq_lens = pointer<const int32_t>(seq_lens);
    p.cu_seqlens_q = pointer<const int32_t>(cu_seqlens_q);
    set_sizes(p, sizes, queries_per_sequence, capacity, plan);
    return run(device, [&] {
        launch_mla_schedule(p, pointer<MlaTask>(tasks), tasks_of_a_block, pointer<void>(stream));
    });
}

long merge(Address out_a,
           Address lse_a,
           Address out_b,
           Address lse_b,
           Address out,
           Address lse,
           int type,
           int64_t rows,
           int64_t columns,
           int device,
           Address stream) {
    const MergeParams p{pointer<const void>(out_a),
                        pointer<const void>(out_b),
                        pointer<const float>(lse_a),
                        pointer<const float>(lse_b),
                        pointer<void>(out),
                        pointer<float>(lse),
                        static_cast<Type>(type),
                        rows,
                        columns};
    return run(device, [&] { launch_merge_attention_states(p, pointer<void>(stream)); });
}

}  // namespace

void bind_mla_decode(py::module_& m) {
    m.def("mla_decode_plan", &plan, py::arg("chip"), py::arg("sizes"),
          py::arg("queries_per_sequence"), py::arg("capacity"), py::arg("page_size"),
          py::arg("split_keys"), py::arg("quantized"), py::arg("whole_rows"),
          "make_plan of csrc/mla_decode/config.h: (tile_rows, stages, teams, team_size, "
          "split_blocks, partials, hopper).");
    m.def("mla_decode", &decode, py::arg("q"), py::arg("type"), py::arg("q_strides"),
          py::arg("cache"), py::arg("cache_type"), py::arg("cache_sizes"), py::arg("cache_strides"),
          py::arg("block_table"), py::arg("table_stride"), py::arg("seq_lens"),
          py::arg("cu_seqlens_q"), py::arg("sizes"), py::arg("queries_per_sequence"),
          py::arg("capacity"), py::arg("scale"), py::arg("causal"), py::arg("results"),
          py::arg("out_strides"), py::arg("workspace"), py::arg("plan"), py::arg("device"),
          py::arg("stream"),
          "See csrc/mla_decode/params.h; returns the number of kernels started.");
    m.def("mla_decode_schedule", &schedule, py::arg("seq_lens"), py::arg("cu_seqlens_q"),
          py::arg("sizes"), py::arg("queries_per_sequence"), py::arg("capacity"), py::arg("plan"),
          py::arg("tasks"), py::arg("tasks_of_a_block"), py::arg("device"), py::arg("stream"),
          "Writes the MlaTasks of each block (csrc/mla_decode/params.h), to int32 "
          "[blocks, tasks_of_a_block, 13]; returns the number of kernels started.");
    m.def("merge_attention_states", &merge, py::arg("out_a"), py::arg("lse_a"), py::arg("out_b"),
          py::arg("lse_b"), py::arg("out"), py::arg("lse"), py::arg("type"), py::arg("rows"),
          py::arg("columns"), py::arg("device"), py::arg("stream"),
          "See csrc/mla_decode/params.h; returns the number of kernels started.");
}

}  // namespace k2k::bind
