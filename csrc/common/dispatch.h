#pragma once

// From a type chosen at run time to a template argument.

#include <string>
#include <type_traits>

#include "common/dtypes.h"
#include "common/error.h"

namespace k2k {

// Calls f with a null pointer to the float type that `type` names:
//
//     by_float_type(p.type, [&](auto* type) {
//         launch<kernel<Element<decltype(type)>>>(shape, p);
//     });
template <class F>
void by_float_type(Type type, F&& f) {
    switch (type) {
        case Type::kBf16:
            return f(static_cast<bf16*>(nullptr));
        case Type::kFp16:
            return f(static_cast<fp16*>(nullptr));
        case Type::kF32:
            return f(static_cast<float*>(nullptr));
        default:
            throw Error("k2kernels: kernels take bfloat16, float16 and float32 here, got type " +
                        std::to_string(static_cast<int>(type)));
    }
}

template <class Pointer>
using Element = std::remove_pointer_t<Pointer>;

}  // namespace k2k
