#pragma once

// A torch.Tensor as a parameter of a bound function. It is read through the DLPack C exchange
// interface that torch.Tensor carries: a plain C struct, no torch header and no symbol of torch, so
// that the modules do not depend on torch's ABI; and cheaper than its address, sizes and strides as
// Python numbers.

#include "bind/bind.h"
#include "bind/dlpack.h"
#include "common/dtypes.h"

namespace k2k::bind {

const DLPackExchangeAPI& exchange_api();  // tensor.cpp

// A view of a tensor. Shapes, dtypes and devices have been checked in Python; a negative axis counts
// from the end.
class Tensor {
  public:
    explicit operator bool() const { return !none_; }  // false for None

    // Where the elements begin; null for None.
    template <class T>
    T* data() const {
        return static_cast<T*>(static_cast<void*>(static_cast<char*>(t_.data) + t_.byte_offset));
    }
    int32_t dims() const { return t_.ndim; }
    int64_t size(int axis) const { return t_.shape[axis < 0 ? t_.ndim + axis : axis]; }
    int64_t stride(int axis) const { return t_.strides[axis < 0 ? t_.ndim + axis : axis]; }
    // The same, or `other` where the tensor has no such axis: one matrix rather than several.
    int64_t size_or(int axis, int64_t other) const { return has(axis) ? size(axis) : other; }
    int64_t stride_or(int axis, int64_t other) const { return has(axis) ? stride(axis) : other; }
    int64_t numel() const;
    bool is_contiguous() const;  // strides of axes of size 1 do not matter
    Type type() const;           // kF32 for None
    int64_t itemsize() const { return t_.dtype.bits / 8; }
    bool is_int64() const { return t_.dtype.code == kDLInt && t_.dtype.bits == 64; }
    DLDevice device() const { return t_.device; }

  private:
    friend struct py::detail::type_caster<Tensor>;
    bool read(py::handle object);  // false for what is no tensor in memory
    bool has(int axis) const { return axis < 0 ? t_.ndim + axis >= 0 : axis < t_.ndim; }

    DLTensor t_ = {};
    bool none_ = true;
};

// A tensor, or None: a Tensor without axes that converts to false.
struct OptionalTensor : Tensor {};

// A size for a field of 32 bits.
inline int32_t narrow(int64_t size) { return static_cast<int32_t>(size); }

}  // namespace k2k::bind

namespace pybind11::detail {

// Where load() returns false, pybind11 raises TypeError, and names all arguments.
template <>
struct type_caster<k2k::bind::Tensor> {
    PYBIND11_TYPE_CASTER(k2k::bind::Tensor, const_name("torch.Tensor"));
    bool load(handle object, bool) { return value.read(object); }
    static bool load(k2k::bind::Tensor& tensor, handle object) { return tensor.read(object); }
};

template <>
struct type_caster<k2k::bind::OptionalTensor> {
    PYBIND11_TYPE_CASTER(k2k::bind::OptionalTensor, const_name("torch.Tensor | None"));
    bool load(handle object, bool) {
        return object.is_none() || type_caster<k2k::bind::Tensor>::load(value, object);
    }
};

}  // namespace pybind11::detail
