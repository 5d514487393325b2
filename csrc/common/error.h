#pragma once

#include <stdexcept>

namespace k2k {

// An error on the host side of a launch; in Python k2kernels._C.Error, a RuntimeError.
class Error : public std::runtime_error {
  public:
    using std::runtime_error::runtime_error;
};

// No GPU, or no driver for it.
class NoDeviceError : public Error {
  public:
    using Error::Error;
};

}  // namespace k2k
