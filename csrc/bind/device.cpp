// What only the module for GPUs has: questions to the driver.
#include "bind/run.h"

namespace k2k::bind {

namespace {

int device_count() {
    int count = 0;
    const cudaError_t status = cudaGetDeviceCount(&count);
    if (status == cudaErrorNoDevice || status == cudaErrorInsufficientDriver) {
        cudaGetLastError();
        return 0;
    }
    check_cuda(status, "counting devices");
    return count;
}

std::pair<int, int> compute_capability(int device) {
    int major, minor;
    check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device),
               "asking for the compute capability");
    check_cuda(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device),
               "asking for the compute capability");
    return {major, minor};
}

int cudart_version() {
    int version = 0;
    check_cuda(cudaRuntimeGetVersion(&version), "asking for the runtime's version");
    return version;
}

}  // namespace

void bind_runtime(py::module_& m) {
    m.def("device_count", &device_count, "GPUs that the CUDA runtime sees; 0 without a driver.");
    m.def("compute_capability", &compute_capability, py::arg("device"), "(major, minor).");
    m.def("cudart_version", &cudart_version, "Of the CUDA runtime in this module: 13000 is 13.0.");
    bind_types(m);
    bind_shared_memory(m);
    bind_quant(m);
    bind_mla_cache(m);
    bind_mla_decode(m);
    bind_fp8_gemm(m);
    bind_newton_schulz(m);
    bind_moe(m);
    bind_moe_exchange(m);
    bind_conformance(m);
}

}  // namespace k2k::bind
