#include "common/launch.h"
#include "exchange/kernel.cuh"
#include "exchange/launch.h"

namespace k2k {

namespace {

void check(const Exchange& x, int64_t tokens = 0) {
    if (x.world < 1 || x.world > kMostRanks || x.top_k < 0 || x.top_k > 32 || x.experts < x.world) {
        throw Error("k2kernels: exchanges support 1 to 64 ranks, each with an expert, and top-32");
    }
    if (x.most_tokens > kMostFlagRows || x.call >> kFlagCallBits != 0) {
        throw Error(
            "k2kernels: exchanges support up to 2^24 - 1 tokens per rank, and calls up to 255");
    }
    if (tokens < 0 || tokens > x.most_tokens) {
        throw Error("k2kernels: an exchange has more tokens than the capacity of its buffers");
    }
}

LaunchShape blocks_for(int64_t tasks, unsigned most, void* stream) {
    const int64_t blocks = std::clamp<int64_t>(ceil_div(tasks, kExchangeWarps), 1, most);
    return {static_cast<unsigned>(blocks), kExchangeThreads, 0, stream};
}

LaunchShape block_for_each_rank(const Exchange& x, void* stream) {
    return {static_cast<unsigned>(x.world), kExchangeThreads, 0, stream};
}

}  // namespace

void launch_scatter(const ScatterParams& p, unsigned blocks, void* stream) {
    check(p.exchange, p.tokens);
    const int64_t tasks = p.tokens * (pieces_of(p.parts[0]) + pieces_of(p.parts[1]));
    launch<scatter_kernel>(blocks_for(tasks, blocks, stream), p);
}

void launch_scatter_wait(const ScatterWaitParams& p, void* stream) {
    check(p.exchange);
    launch<scatter_wait_kernel, sizeof(Announced)>(block_for_each_rank(p.exchange, stream), p);
}

void launch_gather(const GatherParams& p, unsigned blocks, void* stream) {
    check(p.exchange);
    const int64_t tasks = p.exchange.world * p.exchange.most_tokens * pieces_of(p.rows);
    launch<gather_kernel>(blocks_for(tasks, blocks, stream), p);
}

void launch_gather_wait(const GatherWaitParams& p, void* stream) {
    check(p.exchange, p.tokens);
    launch<gather_wait_kernel, sizeof(Announced)>(block_for_each_rank(p.exchange, stream), p);
}

}  // namespace k2k
