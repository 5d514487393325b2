#include "bind/run.h"
#include "mla_decode/config.h"
#include "mla_decode/launch.h"

namespace k2k::bind {

namespace {

// Keys that a row of the block table can name.
int64_t capacity_of(const Tensor& kv_cache, const Tensor& block_table) {
    return std::min<int64_t>(block_table.size(1) * kv_cache.size(1), INT32_MAX);
}

int64_t tokens_of(const Tensor& q) { return q.size(0) * (q.dims() == 4 ? q.size(1) : 1); }

// Queries of each sequence; 0 where they differ.
int64_t queries_of(const Tensor& q, int64_t batch, const Tensor& cu_seqlens_q) {
    return cu_seqlens_q || batch == 0 ? 0 : tokens_of(q) / batch;
}

// Strides of tokens and heads of [B, s_q, H, D], contiguous, or of [T, H, D].
std::pair<int64_t, int64_t> row_strides(const Tensor& x) {
    if (x.is_contiguous()) return {x.size(-2) * x.size(-1), x.size(-1)};
    return {x.stride(0), x.stride(1)};
}

MlaDecodePlan plan(const Chip& chip, const Tensor& q, const Tensor& kv_cache,
                   const Tensor& block_table, const OptionalTensor& cu_seqlens_q,
                   int64_t split_keys) {
    const bool quantized = kv_cache.type() == Type::kU8;
    // What TMA can copy: strides of less than 2**40 bytes, multiples of 16 (which Python checks).
    const auto copied = [](int64_t stride) { return stride > 0 && stride < int64_t(1) << 39; };
    const bool whole_rows = !quantized && kv_cache.size(0) > 0 && copied(kv_cache.stride(0)) &&
                            copied(kv_cache.stride(1));
    return make_plan(
        chip, {block_table.size(0), tokens_of(q), q.size(-2),
               queries_of(q, block_table.size(0), cu_seqlens_q), capacity_of(kv_cache, block_table),
               kv_cache.size(1), split_keys, quantized, whole_rows});
}

int64_t workspace_floats(const MlaDecodePlan& plan, const Tensor& q) {
    const int64_t parts = plan.partials * plan.tile_rows;
    return parts * (kLatent + 2) + 2 * tokens_of(q) * q.size(-2);
}

long decode(const Tensor& q, const Tensor& kv_cache, const Tensor& block_table,
            const Tensor& seq_lens, const OptionalTensor& cu_seqlens_q, float softmax_scale,
            bool causal, const Tensor& out, const Tensor& lse, const Tensor& max_logits,
            const Tensor& workspace, const MlaDecodePlan& plan) {
    MlaDecodeParams p;
    p.q = q.data<const void>();
    p.type = q.type();
    std::tie(p.q_token_stride, p.q_head_stride) = row_strides(q);
    p.tokens = tokens_of(q);
    p.heads = narrow(q.size(-2));
    p.queries_per_sequence = narrow(queries_of(q, seq_lens.size(0), cu_seqlens_q));
    p.cache = kv_cache.data<const void>();
    p.cache_type = kv_cache.type();
    p.pages = kv_cache.size(0);
    p.page_size = narrow(kv_cache.size(1));
    p.page_stride = kv_cache.stride(0);
    p.slot_stride = kv_cache.stride(1);
    p.block_table = block_table.data<const int32_t>();
    p.table_stride = block_table.stride(0);
    p.capacity = narrow(capacity_of(kv_cache, block_table));
    p.seq_lens = seq_lens.data<const int32_t>();
    p.batch = narrow(seq_lens.size(0));
    p.cu_seqlens_q = cu_seqlens_q.data<const int32_t>();
    p.scale = softmax_scale;
    p.causal = causal;
    p.out = out.data<void>();
    std::tie(p.out_token_stride, p.out_head_stride) = row_strides(out);
    p.lse = lse.data<float>();
    p.max_logits = max_logits.numel() > 0 ? max_logits.data<float>() : nullptr;
    const int64_t parts = plan.partials * plan.tile_rows;
    p.partial_out = workspace.data<float>();
    p.partial_stats = reinterpret_cast<float2*>(p.partial_out + parts * kLatent);
    p.split_rows = reinterpret_cast<SplitRow*>(p.partial_stats + parts);
    p.plan = plan;
    return run(q, launch_mla_decode, p);
}

// For tests: the tasks of each CTA, which these arguments determine.
long schedule(const Tensor& seq_lens, const OptionalTensor& cu_seqlens_q, int64_t tokens,
              int64_t heads, int64_t queries_per_sequence, int64_t capacity,
              const MlaDecodePlan& plan, const Tensor& tasks) {
    MlaDecodeParams p = {};
    p.seq_lens = seq_lens.data<const int32_t>();
    p.batch = narrow(seq_lens.size(0));
    p.cu_seqlens_q = cu_seqlens_q.data<const int32_t>();
    p.tokens = tokens;
    p.heads = narrow(heads);
    p.queries_per_sequence = narrow(queries_per_sequence);
    p.capacity = narrow(capacity);
    p.plan = plan;
    return run(seq_lens, [&](void* stream) {
        launch_mla_schedule(p, tasks.data<MlaTask>(), narrow(tasks.size(1)), stream);
    });
}

long merge(const Tensor& out_a, const Tensor& lse_a, const Tensor& out_b, const Tensor& lse_b,
           const Tensor& out, const Tensor& lse) {
    const MergeParams p{out_a.data<const void>(),
                        out_b.data<const void>(),
                        lse_a.data<const float>(),
                        lse_b.data<const float>(),
                        out.data<void>(),
                        lse.data<float>(),
                        out.type(),
                        lse.numel(),
                        out.size(-1)};
    return run(out, launch_merge_attention_states, p);
}

}  // namespace

void bind_mla_decode(py::module_& m) {
    py::class_<MlaDecodePlan>(m, "MlaDecodePlan", py::module_local(),
                              "How a call is served: csrc/mla_decode/params.h")
        .def_readonly("tile_rows", &MlaDecodePlan::tile_rows)
        .def_readonly("stages", &MlaDecodePlan::stages)
        .def_readonly("teams", &MlaDecodePlan::teams)
        .def_readonly("team_size", &MlaDecodePlan::team_size)
        .def_readonly("split_blocks", &MlaDecodePlan::split_blocks)
        .def_readonly("partials", &MlaDecodePlan::partials)
        .def_property_readonly("kernel",
                               [](const MlaDecodePlan& p) {
                                   return p.kernel == MlaDecodeKernel::kSm90 ? "sm90" : "sm80";
                               })
        .def("workspace_floats", &workspace_floats);
    m.def("mla_decode_plan", &plan);
    m.def(
        "mla_decode_plan_of",
        [](const Chip& chip, int64_t batch, int64_t tokens, int64_t heads,
           int64_t queries_per_sequence, int64_t capacity, int64_t page_size, int64_t split_keys,
           bool quantized, bool whole_rows) {
            return make_plan(chip, {batch, tokens, heads, queries_per_sequence, capacity, page_size,
                                    split_keys, quantized, whole_rows});
        },
        "The plan of an MlaDecodeShape, field by field.");
    m.def("mla_decode", &decode);
    m.def("mla_decode_schedule", &schedule,
          "Writes the MlaTasks of each CTA to int32 [CTAs, tasks of a CTA, 13].");
    m.def("merge_attention_states", &merge);
}

}  // namespace k2k::bind
