#include "common/launch.h"
#include "conformance/kernels.cuh"
#include "conformance/launch.h"

namespace k2k::conformance {

namespace {

using Kernel = void (*)(const uint32_t*, uint32_t*);

template <Kernel kKernel, unsigned kThreads, unsigned kStorageBytes = 0, unsigned kBlocks = 1>
void start(const void* input, void* output, void* stream) {
    LaunchShape shape{kBlocks, kThreads, kStorageBytes};
    shape.stream = stream;
    shape.cooperative = kBlocks > 1;
    launch(shape, kKernel, static_cast<const uint32_t*>(input), static_cast<uint32_t*>(output));
}

}  // namespace

const Launches& launches() {
    static const Launches all = {
        {"approximate", start<approximate_kernel, 256>},
        {"atomics", start<atomics_kernel, 64>},
        {"barriers", start<barriers_kernel, 96, sizeof(BarriersStorage)>},
        {"convert", start<convert_kernel, 256>},
        {"cp_async", start<cp_async_kernel, 32, sizeof(CpAsyncStorage)>},
        {"flags", start<flags_kernel, 64, 0, 2>},
        {"ldmatrix", start<ldmatrix_kernel, 32, sizeof(MatrixStorage)>},
        {"mbarrier", start<mbarrier_kernel, 32, sizeof(MbarrierStorage)>},
        {"mma_bf16", start<mma_kernel<bf16>, 32>},
        {"mma_fp16", start<mma_kernel<fp16>, 32>},
        {"packed", start<packed_kernel, 256>},
        {"redux", start<redux_kernel, 32>},
        {"shuffles", start<shuffles_kernel, 32>},
        {"time", start<time_kernel, 32>},
        {"vectors", start<vectors_kernel, 32>},
        {"votes", start<votes_kernel, 32>},
    };
    return all;
}

}  // namespace k2k::conformance
