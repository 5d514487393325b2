#pragma once

// Selects the current GPU: PyTorch does not do so for ops written in Python.

#include "common/launch.h"

namespace k2k {

#ifdef K2K_EMULATED

class DeviceGuard {
  public:
    explicit DeviceGuard(int) {}
    ~DeviceGuard() {}
};

#else

// Makes `device` current until the end of the scope.
class DeviceGuard {
  public:
    explicit DeviceGuard(int device) {
        int current;
        check_cuda(cudaGetDevice(&current), "asking for the current device");
        if (current == device) return;
        check_cuda(cudaSetDevice(device), "switching devices");
        previous_ = current;
    }
    ~DeviceGuard() {
        if (previous_ >= 0) cudaSetDevice(previous_);
    }
    DeviceGuard(const DeviceGuard&) = delete;
    DeviceGuard& operator=(const DeviceGuard&) = delete;

  private:
    int previous_ = -1;
};

#endif

}  // namespace k2k
