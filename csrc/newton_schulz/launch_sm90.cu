#include "common/launch.h"
#include "newton_schulz/kernel_sm90.cuh"
#include "newton_schulz/launch.h"

namespace k2k {

void launch_newton_schulz_sm90(const NsStage& stage, Type iterate_type, unsigned tiles,
                               void* stream) {
    LaunchShape shape{tiles, kNsHopperThreads};
    shape.stream = stream;
    if (iterate_type == Type::kFp16) {
        launch<newton_schulz_sm90_kernel<fp16>, sizeof(NsHopperStorage)>(shape, stage);
    } else {
        launch<newton_schulz_sm90_kernel<bf16>, sizeof(NsHopperStorage)>(shape, stage);
    }
}

}  // namespace k2k
