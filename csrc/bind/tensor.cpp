#include "bind/tensor.h"

#include <atomic>
#include <stdexcept>

namespace k2k::bind {

const DLPackExchangeAPI& exchange_api() {
    // No static initializer: one that runs Python code can deadlock with a thread that waits for it
    // and holds the GIL.
    static std::atomic<const DLPackExchangeAPI*> api = nullptr;
    if (const auto* found = api.load()) return *found;
    const py::object tensor = py::module_::import("torch").attr("Tensor");
    const py::object capsule = py::getattr(tensor, "__dlpack_c_exchange_api__", py::none());
    const auto* found =
        capsule.is_none() ? nullptr : py::capsule(capsule).get_pointer<DLPackExchangeAPI>();
    if (found == nullptr || found->version.major != 1) {
        throw std::runtime_error(
            "k2kernels: kernels read tensors through version 1 of DLPack's C exchange interface, "
            "which this torch does not have; install torch >= 2.10");
    }
    api = found;
    return *found;
}

bool Tensor::read(py::handle object) {
    if (object.is_none()) return false;
    none_ = exchange_api().dltensor_from_py_object_no_sync(object.ptr(), &t_) != 0;
    if (none_) PyErr_Clear();
    if (!none_ && t_.data == nullptr && numel() > 0) {
        throw py::value_error(
            "a kernel was given a tensor without memory: its storage was freed, as fully_shard "
            "frees "
            "parameters outside their module's forward and backward");
    }
    return !none_;
}

int64_t Tensor::numel() const {
    int64_t count = 1;
    for (int axis = 0; axis < t_.ndim; ++axis) count *= t_.shape[axis];
    return count;
}

bool Tensor::is_contiguous() const {
    int64_t step = 1;
    for (int axis = t_.ndim - 1; axis >= 0; --axis) {
        if (t_.shape[axis] == 0) return true;
        if (t_.shape[axis] != 1 && t_.strides[axis] != step) return false;
        step *= t_.shape[axis];
    }
    return true;
}

Type Tensor::type() const {
    const int code = t_.dtype.code, bits = t_.dtype.bits;
    if (none_ || (code == kDLFloat && bits == 32)) return Type::kF32;
    if (code == kDLBfloat && bits == 16) return Type::kBf16;
    if (code == kDLFloat && bits == 16) return Type::kFp16;
    if (code == kDLFloat8_e4m3fn) return Type::kE4m3;
    if (code == kDLUInt && bits == 8) return Type::kU8;
    if (code == kDLInt && bits == 32) return Type::kS32;
    throw std::invalid_argument("no kernel takes a tensor of this dtype");
}

}  // namespace k2k::bind
