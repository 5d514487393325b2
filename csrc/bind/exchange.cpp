#include <cstddef>

#include "bind/run.h"
#include "exchange/config.h"
#include "exchange/launch.h"

namespace k2k::bind {

namespace {

// k2kernels.ops.exchange.Rank passes these to each step.
using Place = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t>;  // ExchangePlace
// world, rank, live, call, experts, top_k, most_tokens, timeout
using Numbers = std::tuple<int, int, uint64_t, uint32_t, int, int, int64_t, uint64_t>;

Exchange exchange(const Tensor& peers, const Tensor& state, const Tensor& error, const Place& place,
                  const Numbers& numbers) {
    Exchange x;
    x.peers = peers.data<uint8_t* const>();
    x.state = state.data<ExchangeState>();
    x.error = error.data<ExchangeError>();
    std::tie(x.at.abort, x.at.flags, x.at.numbers, x.at.rows, x.at.half, x.at.pitch) = place;
    std::tie(x.world, x.rank, x.live, x.call, x.experts, x.top_k, x.most_tokens, x.timeout) =
        numbers;
    return x;
}

ByteRows byte_rows(const Tensor& rows) {
    if (!rows) return {};
    const int64_t bytes = rows.itemsize();
    return {rows.data<const uint8_t>(), rows.stride(0) * bytes, rows.size(1) * bytes};
}

long scatter(const Tensor& peers, const Tensor& state, const Tensor& error, const Place& place,
             const Numbers& numbers, const Tensor& rows, const OptionalTensor& beside,
             const Tensor& indices, unsigned ctas) {
    ScatterParams p;
    p.exchange = exchange(peers, state, error, place, numbers);
    p.parts[0] = byte_rows(rows);
    p.parts[1] = byte_rows(beside);
    p.second = (p.parts[0].bytes + 15) / 16 * 16;
    p.indices = indices.data<const void>();
    p.wide_indices = indices.is_int64();
    p.tokens = indices.size(0);
    return run(state, [&](void* stream) { launch_scatter(p, ctas, stream); });
}

long scatter_wait(const Tensor& peers, const Tensor& state, const Tensor& error, const Place& place,
                  const Numbers& numbers, const Tensor& experts, const Tensor& arrived) {
    const ScatterWaitParams p{exchange(peers, state, error, place, numbers),
                              experts.data<int32_t>(), arrived.data<int32_t>()};
    return run(state, launch_scatter_wait, p);
}

long gather(const Tensor& peers, const Tensor& state, const Tensor& error, const Place& place,
            const Numbers& numbers, const Tensor& rows, const Tensor& experts,
            const Tensor& slot_of, const Tensor& row_counts, unsigned ctas) {
    const GatherParams p{exchange(peers, state, error, place, numbers), byte_rows(rows),
                         experts.data<const int32_t>(), slot_of.data<const int32_t>(),
                         row_counts.data<const int32_t>()};
    return run(state, [&](void* stream) { launch_gather(p, ctas, stream); });
}

long gather_wait(const Tensor& peers, const Tensor& state, const Tensor& error, const Place& place,
                 const Numbers& numbers, const Tensor& indices, const OptionalTensor& weights,
                 const Tensor& slot_of, const Tensor& poison_weights, const Tensor& half) {
    GatherWaitParams p;
    p.exchange = exchange(peers, state, error, place, numbers);
    p.indices = indices.data<const void>();
    p.wide_indices = indices.is_int64();
    p.tokens = indices.size(0);
    p.weights = weights.data<const float>();
    p.slot_of = slot_of.data<int32_t>();
    p.poison_weights = poison_weights.data<float>();
    p.turn = half.data<int32_t>();
    return run(state, launch_gather_wait, p);
}

}  // namespace

void bind_exchange(py::module_& m) {
    constant(m, "EXCHANGE_MOST_RANKS", kMostRanks);
    constant(m, "EXCHANGE_MOST_TOKENS", kMostFlagRows);
    constant(m, "EXCHANGE_FLAG_BYTES", kFlagBytes);
    constant(m, "EXCHANGE_FLAG_ROWS_BITS", kFlagRowsBits);
    constant(m, "EXCHANGE_STATE_WORDS", sizeof(ExchangeState) / 4);
    constant(m, "EXCHANGE_ERROR_WORDS", sizeof(ExchangeError) / 4);
    constant(m, "EXCHANGE_ERROR_CALL", offsetof(ExchangeError, call) / 4);
    constant(m, "EXCHANGE_ERROR_WHO", offsetof(ExchangeError, who) / 4);
    constant(m, "EXCHANGE_ERROR_NUMBER", offsetof(ExchangeError, number) / 4);
    constant(m, "EXCHANGE_ERROR_FAULT", offsetof(ExchangeError, fault) / 4);
    constant(m, "EXCHANGE_PEER_SILENT", kPeerSilent);
    constant(m, "EXCHANGE_PEER_ABORTED", kPeerAborted);
    constant(m, "EXCHANGE_BAD_INDEX", kBadIndex);
    constant(m, "EXCHANGE_OTHER_CALL", kOtherCall);
    m.def("exchange_scatter", &scatter);
    m.def("exchange_scatter_wait", &scatter_wait);
    m.def("exchange_gather", &gather);
    m.def("exchange_gather_wait", &gather_wait);
}

}  // namespace k2k::bind
