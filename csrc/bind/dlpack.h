#pragma once

// The part of DLPack 1.3's C interface (github.com/dmlc/dlpack, include/dlpack/dlpack.h) that
// bind/tensor.h reads a tensor through. PyTorch hands out a DLPackExchangeAPI from release 2.10 on.

#include <cstdint>

extern "C" {

enum DLDeviceType : int32_t { kDLCPU = 1, kDLCUDA = 2 };

enum DLDataTypeCode : uint8_t {
    kDLInt = 0,
    kDLUInt = 1,
    kDLFloat = 2,
    kDLBfloat = 4,
    kDLBool = 6,
    kDLFloat8_e4m3fn = 10,
};

struct DLDevice {
    DLDeviceType device_type;
    int32_t device_id;
};

struct DLDataType {
    uint8_t code, bits;
    uint16_t lanes;
};

struct DLTensor {
    void* data;
    DLDevice device;
    int32_t ndim;
    DLDataType dtype;
    int64_t *shape, *strides;  // in elements; they belong to the tensor's Python object
    uint64_t byte_offset;
};

struct DLPackExchangeAPI {
    struct {
        uint32_t major, minor;
    } version;
    DLPackExchangeAPI* previous;
    void *allocate, *managed_tensor_from_object, *managed_tensor_to_object;  // not called here
    // Fills `tensor` from a Python object without taking a reference; -1 with a Python exception.
    int (*dltensor_from_py_object_no_sync)(void* object, DLTensor* tensor);
    // The stream that is current on a device in PyTorch.
    int (*current_work_stream)(DLDeviceType type, int32_t device, void** stream);
};

}  // extern "C"
