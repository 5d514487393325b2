#pragma once

// Launches kernels, on a stream of a GPU or in the emulator; the only file that does. Throws Error.

#include <algorithm>
#include <map>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>

#include "common/error.h"
#include "common/macros.h"

#ifdef K2K_EMULATED
#include "emulator/emulator.h"
#endif

namespace k2k {

// Kernels started by this OS thread.
inline thread_local long num_launches = 0;

struct LaunchShape {
    dim3 grid;
    dim3 block;
    std::size_t smem_bytes = 0;  // if less than launch<kernel, bytes>() says, or for launch(kernel)
    void* stream = nullptr;      // a cudaStream_t
    unsigned cluster = 1;        // CTAs per cluster, along x
    bool cooperative = false;    // all CTAs are resident at once, for grid-wide barriers
    bool overlap_previous = false;  // programmatic dependent launch, see arch/control.cuh
};

#ifdef K2K_EMULATED

template <class... Parameters, class... Arguments>
void launch(const LaunchShape& shape, void (*kernel)(Parameters...), Arguments&&... arguments) {
    emulator::Grid grid{shape.grid,    shape.block,       shape.smem_bytes,
                        shape.cluster, shape.cooperative, shape.stream};
    std::tuple<Parameters...> parameters(std::forward<Arguments>(arguments)...);
    emulator::launch(grid, [kernel, parameters] { std::apply(kernel, parameters); });
    ++num_launches;
}

#else

inline void check_cuda(cudaError_t status, const char* what) {
    if (status == cudaSuccess) return;
    cudaGetLastError();  // clears it: the next call would report it again
    const std::string message = std::string("k2kernels: ") + what + ": " +
                                cudaGetErrorName(status) + ": " + cudaGetErrorString(status);
    if (status == cudaErrorNoDevice || status == cudaErrorInsufficientDriver) {
        throw NoDeviceError(message);
    }
    throw Error(message);
}

template <class... Parameters, class... Arguments>
void launch(const LaunchShape& shape, void (*kernel)(Parameters...), Arguments&&... arguments) {
    if (shape.smem_bytes > 48 * 1024) {  // above the default limit
        check_cuda(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                        cudaFuncAttributeMaxDynamicSharedMemorySize,
                                        static_cast<int>(shape.smem_bytes)),
                   "reserving shared memory");
    }
    cudaLaunchAttribute attributes[3];
    cudaLaunchConfig_t config = {};
    config.gridDim = shape.grid;
    config.blockDim = shape.block;
    config.dynamicSmemBytes = shape.smem_bytes;
    config.stream = static_cast<cudaStream_t>(shape.stream);
    config.attrs = attributes;
    if (shape.cluster > 1) {
        cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
        attribute.id = cudaLaunchAttributeClusterDimension;
        attribute.val.clusterDim.x = shape.cluster;
        attribute.val.clusterDim.y = 1;
        attribute.val.clusterDim.z = 1;
    }
    if (shape.cooperative) {
        cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
        attribute.id = cudaLaunchAttributeCooperative;
        attribute.val.cooperative = 1;
    }
    if (shape.overlap_previous) {
        cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
        attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attribute.val.programmaticStreamSerializationAllowed = 1;
    }
    check_cuda(cudaLaunchKernelEx(&config, kernel,
                                  static_cast<Parameters>(std::forward<Arguments>(arguments))...),
               "launching a kernel");
    ++num_launches;
}

#endif

// Kernel name -> the most bytes of dynamic shared memory of its launches. It holds every kernel for
// which launch<kernel, bytes>() below is instantiated in this module, launched or not.
inline std::map<std::string_view, std::size_t>& shared_memory() {
    static std::map<std::string_view, std::size_t> bytes;
    return bytes;
}

template <auto kKernel>
std::string_view kernel_name() {
    std::string_view name = __PRETTY_FUNCTION__;  // ... [with auto kKernel = NAME; ...]
    name.remove_prefix(name.find("kKernel = ") + 10);
    return name.substr(0, name.find_first_of(";]"));
}

template <auto kKernel, std::size_t kBytes>
struct Listed {
    static inline const bool once = [] {
        std::size_t& bytes = shared_memory()[kernel_name<kKernel>()];
        bytes = std::max(bytes, kBytes);
        return true;
    }();
};

// Launches kKernel with shape.smem_bytes (0: kShared) of at most kShared bytes of shared memory:
//
//     launch<kernel<T>, sizeof(Storage)>(shape, p);
template <auto kKernel, std::size_t kShared = 0, class... Arguments>
void launch(LaunchShape shape, Arguments&&... arguments) {
    static_cast<void>(Listed<kKernel, kShared>::once);
    if (shape.smem_bytes == 0) shape.smem_bytes = kShared;
    if (shape.smem_bytes > kShared) {
        throw Error("k2kernels: a launch needs " + std::to_string(shape.smem_bytes) +
                    " bytes of shared memory, at most " + std::to_string(kShared) + " are listed");
    }
    launch(shape, kKernel, std::forward<Arguments>(arguments)...);
}

}  // namespace k2k
