// What only the module for GPUs has: launches on PyTorch's current stream, queries of the driver.
#include "common/device.h"

#include <stdexcept>

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
               "reading the compute capability");
    check_cuda(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device),
               "reading the compute capability");
    return {major, minor};
}

int cudart_version() {
    int version = 0;
    check_cuda(cudaRuntimeGetVersion(&version), "reading the runtime's version");
    return version;
}

}  // namespace

long run_on(DLDevice device, void (*launch)(void*, void*), void* context) {
    if (device.device_type != kDLCUDA) throw std::invalid_argument("kernels take CUDA tensors");
    const DeviceGuard guard(device.device_id);  // which reports a machine without a GPU
    void* stream = nullptr;
    if (exchange_api().current_work_stream(device.device_type, device.device_id, &stream) != 0) {
        const py::gil_scoped_acquire gil;
        throw py::error_already_set();
    }
    const long before = num_launches;
    launch(context, stream);
    return num_launches - before;
}

void bind_runtime(py::module_& m) {
    m.def("device_count", &device_count, "GPUs that the CUDA runtime sees; 0 without a driver.");
    m.def("compute_capability", &compute_capability, py::arg("device"), "(major, minor).");
    m.def("cudart_version", &cudart_version, "Of the CUDA runtime in this module: 13000 is 13.0.");
    bind_kernels(m);
}

}  // namespace k2k::bind
