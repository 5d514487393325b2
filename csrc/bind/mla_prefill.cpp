#include "bind/run.h"
#include "mla_prefill/config.h"
#include "mla_prefill/launch.h"

namespace k2k::bind {

namespace {

// What TMA can copy: strides of less than 2**40 bytes, multiples of 16 (which Python checks).
bool copied_by_tma(const Tensor& x) {
    const auto copied = [](int64_t stride) { return stride > 0 && stride < int64_t(1) << 39; };
    return x.size(0) > 0 && copied(x.stride(0)) && (x.dims() == 2 || copied(x.stride(1)));
}

// In all that follows k is [Tk, H, 192], or with k_rope [Tk, 64] [Tk, H, 128]; then v may be None, and k
// is [Tk, H, 256], keys and values side by side.

MlaPrefillPlan plan(const Chip& chip, const Tensor& q, const Tensor& k, const OptionalTensor& v,
                    const OptionalTensor& k_rope) {
    const bool by_tma = copied_by_tma(q) && copied_by_tma(k) && (!v || copied_by_tma(v)) &&
                        (!k_rope || copied_by_tma(k_rope));
    return make_prefill_plan(chip, k.size(0), q.size(1), by_tma);
}

MlaPrefillInputs inputs(const Tensor& q, const Tensor& k, const OptionalTensor& v,
                        const OptionalTensor& k_rope, const Tensor& cu_seqlens_q,
                        const Tensor& cu_seqlens_k, const OptionalTensor& diagonal,
                        float softmax_scale, bool causal, const MlaPrefillPlan& plan) {
    MlaPrefillInputs in;
    in.q = q.data<const void>();
    in.k = k.data<const void>();
    const Tensor& values = v ? static_cast<const Tensor&>(v) : k;
    in.v = values.data<const char>() + (v ? 0 : kNope * 2);
    in.q_token_stride = q.stride(0), in.q_head_stride = q.stride(1);
    in.k_token_stride = k.stride(0), in.k_head_stride = k.stride(1);
    in.v_token_stride = values.stride(0), in.v_head_stride = values.stride(1);
    if (k_rope) {
        in.k_rope = k_rope.data<const void>();
        in.k_rope_token_stride = k_rope.stride(0), in.k_rope_head_stride = 0;
    } else {
        in.k_rope = k.data<const char>() + kNope * 2;
        in.k_rope_token_stride = k.stride(0), in.k_rope_head_stride = k.stride(1);
    }
    in.cu_seqlens_q = cu_seqlens_q.data<const int32_t>();
    in.cu_seqlens_k = cu_seqlens_k.data<const int32_t>();
    in.diagonal = diagonal.data<const int32_t>();
    in.type = q.type();
    in.q_tokens = narrow(q.size(0));
    in.k_tokens = narrow(k.size(0));
    in.heads = narrow(q.size(1));
    in.batch = narrow(cu_seqlens_q.size(0) - 1);
    in.scale = softmax_scale;
    in.causal = causal;
    in.plan = plan;
    return in;
}

float* floats(const Tensor& x) { return x && x.numel() > 0 ? x.data<float>() : nullptr; }

long forward(const Tensor& q, const Tensor& k, const OptionalTensor& v,
             const OptionalTensor& k_rope, const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
             const OptionalTensor& diagonal, float softmax_scale, bool causal, const Tensor& out,
             const Tensor& lse, const Tensor& max_logits, const OptionalTensor& state_in,
             const OptionalTensor& state_out, const Tensor& ticket, const MlaPrefillPlan& plan) {
    const MlaPrefillParams p{
        inputs(q, k, v, k_rope, cu_seqlens_q, cu_seqlens_k, diagonal, softmax_scale, causal, plan),
        out.data<void>(),
        lse.data<float>(),
        floats(max_logits),
        state_in.data<const float>(),
        state_out.data<float>(),
        ticket.data<int32_t>()};
    return run(q, launch_mla_prefill, p);
}

long backward(const Tensor& grad_out, const Tensor& grad_lse, const Tensor& q, const Tensor& k,
              const OptionalTensor& v, const OptionalTensor& k_rope, const Tensor& out,
              const Tensor& lse, const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
              float softmax_scale, bool causal, const Tensor& grad_q, const Tensor& grad_k,
              const Tensor& grad_v, const OptionalTensor& grad_k_rope, const Tensor& workspace,
              const Tensor& tickets, const MlaPrefillPlan& plan) {
    MlaPrefillBackwardParams p;
    p.in = inputs(q, k, v, k_rope, cu_seqlens_q, cu_seqlens_k, OptionalTensor{}, softmax_scale,
                  causal, plan);
    p.grad_out = grad_out.data<const void>();
    p.grad_out_token_stride = grad_out.stride(0), p.grad_out_head_stride = grad_out.stride(1);
    p.out = out.data<const void>();
    p.lse = lse.data<const float>();
    p.grad_lse = grad_lse.data<const float>();
    const int64_t rows = q.size(0) * q.size(1);
    p.lse2 = workspace.data<float>();
    p.delta = p.lse2 + rows;
    p.grad_q = grad_q.data<void>();
    p.grad_k = grad_k.data<void>();
    const Tensor& values = v ? grad_v : grad_k;
    p.grad_v = values.data<char>() + (v ? 0 : kNope * 2);
    p.grad_k_token_stride = grad_k.stride(0), p.grad_k_head_stride = grad_k.stride(1);
    p.grad_v_token_stride = values.stride(0), p.grad_v_head_stride = values.stride(1);
    // Behind lse2 and delta, at a multiple of 16 bytes.
    p.rope_parts = k_rope ? p.lse2 + ceil_div(2 * rows, int64_t(4)) * 4 : nullptr;
    p.grad_k_rope = grad_k_rope.data<void>();
    p.tickets = tickets.data<int32_t>();
    return run(q, launch_mla_prefill_backward, p);
}

// Of the backward.
int64_t workspace_floats(const MlaPrefillPlan&, const Tensor& q, const Tensor& k,
                         bool shared_rope) {
    const int64_t rows = q.size(0) * q.size(1);
    return ceil_div(2 * rows, int64_t(4)) * 4 +
           (shared_rope ? k.size(0) * k.size(1) * kRopeDims : 0);
}

// For tests: the task of each ticket, which these arguments determine.
long schedule(const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
              const OptionalTensor& diagonal, int64_t q_tokens, int64_t k_tokens, int64_t heads,
              int64_t heads_per_group, bool causal, bool over_keys, int64_t rows,
              const Tensor& tasks) {
    MlaPrefillInputs in = {};
    in.cu_seqlens_q = cu_seqlens_q.data<const int32_t>();
    in.cu_seqlens_k = cu_seqlens_k.data<const int32_t>();
    in.diagonal = diagonal.data<const int32_t>();
    in.q_tokens = narrow(q_tokens);
    in.k_tokens = narrow(k_tokens);
    in.heads = narrow(heads);
    in.batch = narrow(cu_seqlens_q.size(0) - 1);
    in.causal = causal;
    in.plan.heads_per_group = narrow(heads_per_group);
    return run(cu_seqlens_q, [&](void* stream) {
        launch_mla_prefill_schedule(in, over_keys, narrow(rows), tasks.data<MlaPrefillTask>(),
                                    narrow(tasks.size(0)), stream);
    });
}

}  // namespace

void bind_mla_prefill(py::module_& m) {
    constant(m, "PREFILL_NOPE", kNope);
    constant(m, "PREFILL_ROPE", kRopeDims);
    constant(m, "PREFILL_VALUE", kVDim);
    constant(m, "PREFILL_STATE_FLOATS", kStateFloats);
    py::class_<MlaPrefillPlan>(m, "MlaPrefillPlan", py::module_local(),
                               "How a call is served: csrc/mla_prefill/params.h")
        .def_readonly("heads_per_group", &MlaPrefillPlan::heads_per_group)
        .def("workspace_floats", &workspace_floats)
        .def_property_readonly("kernel", [](const MlaPrefillPlan& p) {
            return p.kernel == MlaPrefillKernel::kSm90 ? "sm90" : "sm80";
        });
    m.def("mla_prefill_plan", &plan);
    m.def("mla_prefill", &forward);
    m.def("mla_prefill_backward", &backward);
    m.def("mla_prefill_schedule", &schedule,
          "Writes the MlaPrefillTask of each ticket to int32 [tickets, 9].");
}

}  // namespace k2k::bind
