#include <cstddef>

#include "bind/run.h"
#include "exchange/config.h"
#include "exchange/launch.h"

namespace k2k::bind {

namespace {

using Peers = std::tuple<Address, Address, Address>;  // buffers, state, error
// As ExchangePlace: abort, flags, numbers, rows, half, pitch.
using Place = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t>;
// world, rank, live, call, experts, top_k, most_tokens, timeout
using Ranks = std::tuple<int, int, uint64_t, uint32_t, int, int, int64_t, uint64_t>;
using Rows = std::tuple<Address, int64_t, int64_t>;  // as ByteRows
using Indices = std::tuple<Address, bool, int64_t>;  // address, int64, tokens

Exchange exchange(const Peers& peers, const Place& place, const Ranks& ranks) {
    Exchange x;
    x.peers = pointer<uint8_t* const>(std::get<0>(peers));
    x.state = pointer<ExchangeState>(std::get<1>(peers));
    x.error = pointer<ExchangeError>(std::get<2>(peers));
    std::tie(x.at.abort, x.at.flags, x.at.numbers, x.at.rows, x.at.half, x.at.pitch) = place;
    std::tie(x.world, x.rank, x.live, x.call, x.experts, x.top_k, x.most_tokens, x.timeout) = ranks;
    return x;
}

ByteRows byte_rows(const Rows& rows) {
    const auto [values, row_stride, bytes] = rows;
    return {pointer<const uint8_t>(values), row_stride, bytes};
}

long moe_scatter(const Peers& peers,
                 const Place& place,
                 const Ranks& ranks,
                 const Rows& first,
                 const Rows& second,
                 int64_t second_at,
                 const Indices& indices,
                 unsigned blocks,
                 int device,
                 Address stream) {
    ScatterParams p;
    p.exchange = exchange(peers, place, ranks);
    p.parts[0] = byte_rows(first);
    p.parts[1] = byte_rows(second);
    p.second = second_at;
    p.indices = pointer<const void>(std::get<0>(indices));
    p.wide_indices = std::get<1>(indices);
    p.tokens = std::get<2>(indices);
    return run(device, [&] { launch_scatter(p, blocks, pointer<void>(stream)); });
}

long moe_scatter_wait(const Peers& peers,
                      const Place& place,
                      const Ranks& ranks,
                      Address experts,
                      Address told,
                      int device,
                      Address stream) {
    ScatterWaitParams p;
    p.exchange = exchange(peers, place, ranks);
    p.experts = pointer<int32_t>(experts);
    p.arrived = pointer<int32_t>(told);
    return run(device, [&] { launch_scatter_wait(p, pointer<void>(stream)); });
}

long moe_gather(const Peers& peers,
                const Place& place,
                const Ranks& ranks,
                const Rows& rows,
                Address experts,
                Address slot_of,
                Address told,
                unsigned blocks,
                int device,
                Address stream) {
    GatherParams p;
    p.exchange = exchange(peers, place, ranks);
    p.rows = byte_rows(rows);
    p.experts = pointer<const int32_t>(experts);
    p.slot_of = pointer<const int32_t>(slot_of);
    p.arrived = pointer<const int32_t>(told);
    return run(device, [&] { launch_gather(p, blocks, pointer<void>(stream)); });
}

long moe_gather_wait(const Peers& peers,
                     const Place& place,
                     const Ranks& ranks,
                     const Indices& indices,
                     Address weights,
                     Address slot_of,
                     Address poison_weights,
                     Address turn,
                     int device,
                     Address stream) {
    GatherWaitParams p;
    p.exchange = exchange(peers, place, ranks);
    p.indices = pointer<const void>(std::get<0>(indices));
    p.wide_indices = std::get<1>(indices);
    p.tokens = std::get<2>(indices);
    p.weights = pointer<const float>(weights);
    p.slot_of = pointer<int32_t>(slot_of);
    p.poison_weights = pointer<float>(poison_weights);
    p.turn = pointer<int32_t>(turn);
    return run(device, [&] { launch_gather_wait(p, pointer<void>(stream)); });
}

const char* const kSeeExchange =
    "See csrc/exchange/params.h; returns the number of kernels started.";

}  // namespace

void bind_moe_exchange(py::module_& m) {
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

    m.def("moe_scatter", &moe_scatter, py::arg("peers"), py::arg("place"), py::arg("ranks"),
          py::arg("first"), py::arg("second"), py::arg("second_at"), py::arg("indices"),
          py::arg("blocks"), py::arg("device"), py::arg("stream"), kSeeExchange);
    m.def("moe_scatter_wait", &moe_scatter_wait, py::arg("peers"), py::arg("place"),
          py::arg("ranks"), py::arg("experts"), py::arg("told"), py::arg("device"),
          py::arg("stream"), kSeeExchange);
    m.def("moe_gather", &moe_gather, py::arg("peers"), py::arg("place"), py::arg("ranks"),
          py::arg("rows"), py::arg("experts"), py::arg("slot_of"), py::arg("told"),
          py::arg("blocks"), py::arg("device"), py::arg("stream"), kSeeExchange);
    m.def("moe_gather_wait", &moe_gather_wait, py::arg("peers"), py::arg("place"), py::arg("ranks"),
          py::arg("indices"), py::arg("weights"), py::arg("slot_of"), py::arg("poison_weights"),
          py::arg("turn"), py::arg("device"), py::arg("stream"), kSeeExchange);
}

}  // namespace k2k::bind
