#include "common/error.h"
#include "mla_prefill/launch.h"

namespace k2k {

void launch_mla_prefill_dkv_sm90(const MlaPrefillBackwardParams&, void*) {
    throw Error("k2kernels: mla_prefill: no kernel yet");
}

}  // namespace k2k
