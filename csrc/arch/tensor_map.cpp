#include "arch/tensor_map.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>

#ifdef K2K_EMULATED
#include "emulator/tensor_map.h"
#else
#include <cuda.h>
#include <cuda_runtime.h>
#endif

namespace k2k::arch {

namespace {

void require(bool condition, const char* rule, uint64_t got) {
    if (condition) return;
    throw std::invalid_argument(std::string("make_tensor_map: ") + rule + ", got " +
                                std::to_string(got));
}

void check(Type type, const void* base, std::initializer_list<uint64_t> sizes,
           std::initializer_list<uint64_t> stride_bytes, std::initializer_list<uint32_t> box,
           Swizzle swizzle) {
    require(sizes.size() >= 1 && sizes.size() <= 5, "1 to 5 dimensions", sizes.size());
    require(stride_bytes.size() + 1 == sizes.size(), "a stride per outer dimension",
            stride_bytes.size());
    require(box.size() == sizes.size(), "a box size per dimension", box.size());
    require(reinterpret_cast<uintptr_t>(base) % 16 == 0, "a base at a multiple of 16",
            reinterpret_cast<uintptr_t>(base));
    for (const uint64_t size : sizes) {
        require(size >= 1 && size <= uint64_t(1) << 32, "sizes of 1 to 2^32", size);
    }
    for (const uint64_t stride : stride_bytes) {
        // The driver's rules; it refuses a stride of 0.
        require(stride % 16 == 0 && stride > 0 && stride < uint64_t(1) << 40,
                "strides: multiples of 16 above 0", stride);
    }
    for (const uint32_t extent : box) {
        require(extent >= 1 && extent <= 256, "box sizes of 1 to 256", extent);
    }
    const uint32_t inner = *box.begin() * bytes_of(type);
    require(inner % 16 == 0, "an inner box of a multiple of 16 bytes", inner);
    require(swizzle == Swizzle::kNone || inner <= static_cast<uint32_t>(swizzle),
            "an inner box no wider than the swizzle", inner);
}

// All arguments of a map, the key of the cache: equal arguments make equal maps, whatever is stored
// at the address. Without padding, because it is compared as bytes.
struct Arguments {
    uint64_t base = 0;
    uint64_t sizes[5] = {}, stride_bytes[4] = {};
    uint32_t box[5] = {};
    uint16_t rank = 0, swizzle = 0;
    uint64_t type = 0;

    bool operator==(const Arguments& other) const {
        return std::memcmp(this, &other, sizeof *this) == 0;
    }
    std::size_t hash() const {  // of the arguments that mostly differ
        const uint64_t mixed =
            (base + (sizes[1] << 44) + (uint64_t(box[1]) << 36)) * 0x9e3779b97f4a7c15;
        return static_cast<std::size_t>(mixed >> 40);
    }
};
static_assert(sizeof(Arguments) == 8 + 9 * 8 + 5 * 4 + 2 * 2 + 8, "no padding");

TensorMap encode(Type type, const void* base, std::initializer_list<uint64_t> sizes,
                 std::initializer_list<uint64_t> stride_bytes, std::initializer_list<uint32_t> box,
                 Swizzle swizzle);

}  // namespace

TensorMap make_tensor_map(Type type, const void* base, std::initializer_list<uint64_t> sizes,
                          std::initializer_list<uint64_t> stride_bytes,
                          std::initializer_list<uint32_t> box, Swizzle swizzle) {
    check(type, base, sizes, stride_bytes, box, swizzle);
    Arguments arguments;
    arguments.base = reinterpret_cast<uintptr_t>(base);
    std::copy(sizes.begin(), sizes.end(), arguments.sizes);
    std::copy(stride_bytes.begin(), stride_bytes.end(), arguments.stride_bytes);
    std::copy(box.begin(), box.end(), arguments.box);
    arguments.rank = static_cast<uint16_t>(sizes.size());
    arguments.swizzle = static_cast<uint16_t>(swizzle);
    arguments.type = static_cast<uint64_t>(type);

    // A direct-mapped cache of this thread's maps: weights, and buffers that the caller's allocator
    // reuses, have the same addresses in call after call. 1,024 entries take 256 KB per thread.
    struct Kept {
        Arguments arguments;  // rank 0: an empty entry
        TensorMap map;
    };
    constexpr std::size_t kPlaces = 1024;
    static thread_local const std::unique_ptr<Kept[]> kept(new Kept[kPlaces]);
    Kept& place = kept[arguments.hash() % kPlaces];
    if (!(place.arguments == arguments)) {
        place.map = encode(type, base, sizes, stride_bytes, box, swizzle);
        place.arguments = arguments;
    }
    return place.map;
}

namespace {

#ifdef K2K_EMULATED

TensorMap encode(Type type, const void* base, std::initializer_list<uint64_t> sizes,
                 std::initializer_list<uint64_t> stride_bytes, std::initializer_list<uint32_t> box,
                 Swizzle swizzle) {
    emulator::TensorMapFields fields = {};
    fields.mark = emulator::TensorMapFields::kMark;
    fields.type = static_cast<uint8_t>(type);
    fields.rank = static_cast<uint8_t>(sizes.size());
    fields.swizzle_bytes = static_cast<uint16_t>(swizzle);
    fields.base = reinterpret_cast<uint64_t>(base);
    for (std::size_t d = 0; d < sizes.size(); ++d) {
        fields.sizes[d] = sizes.begin()[d];
        fields.box[d] = static_cast<uint16_t>(box.begin()[d]);
        if (d > 0) fields.stride_bytes[d - 1] = stride_bytes.begin()[d - 1];
    }
    TensorMap map = {};
    std::memcpy(&map, &fields, sizeof fields);
    return map;
}

#else

static_assert(sizeof(TensorMap) == sizeof(CUtensorMap));

using Encode = decltype(&cuTensorMapEncodeTiled);

// The driver's function, found once.
Encode encode_function() {
    static const Encode function = [] {
        void* entry = nullptr;
        cudaDriverEntryPointQueryResult found;
        const cudaError_t status = cudaGetDriverEntryPointByVersion(
            "cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found);
        if (status != cudaSuccess || found != cudaDriverEntryPointSuccess) entry = nullptr;
        return reinterpret_cast<Encode>(entry);
    }();
    if (!function) {
        throw std::runtime_error(
            "make_tensor_map: the CUDA driver has no cuTensorMapEncodeTiled "
            "(it must be of CUDA 12.0 or later)");
    }
    return function;
}

CUtensorMapDataType data_type(Type type) {
    switch (type) {
        case Type::kF32:
            return CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
        case Type::kBf16:
            return CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
        case Type::kFp16:
            return CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
        case Type::kS32:
            return CU_TENSOR_MAP_DATA_TYPE_INT32;
        case Type::kU32:
            return CU_TENSOR_MAP_DATA_TYPE_UINT32;
        default:
            return CU_TENSOR_MAP_DATA_TYPE_UINT8;
    }
}

CUtensorMapSwizzle swizzle_mode(Swizzle swizzle) {
    switch (swizzle) {
        case Swizzle::k32:
            return CU_TENSOR_MAP_SWIZZLE_32B;
        case Swizzle::k64:
            return CU_TENSOR_MAP_SWIZZLE_64B;
        case Swizzle::k128:
            return CU_TENSOR_MAP_SWIZZLE_128B;
        default:
            return CU_TENSOR_MAP_SWIZZLE_NONE;
    }
}

TensorMap encode(Type type, const void* base, std::initializer_list<uint64_t> sizes,
                 std::initializer_list<uint64_t> stride_bytes, std::initializer_list<uint32_t> box,
                 Swizzle swizzle) {
    cuuint64_t map_sizes[5], map_strides[5] = {};
    cuuint32_t map_box[5];
    const cuuint32_t element_strides[5] = {1, 1, 1, 1, 1};
    for (std::size_t d = 0; d < sizes.size(); ++d) {
        map_sizes[d] = sizes.begin()[d];
        map_box[d] = box.begin()[d];
        if (d > 0) map_strides[d - 1] = stride_bytes.begin()[d - 1];
    }
    TensorMap map;
    const CUresult status = encode_function()(
        reinterpret_cast<CUtensorMap*>(&map), data_type(type),
        static_cast<cuuint32_t>(sizes.size()), const_cast<void*>(base), map_sizes, map_strides,
        map_box, element_strides, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle_mode(swizzle),
        CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (status != CUDA_SUCCESS) {
        throw std::runtime_error("make_tensor_map: cuTensorMapEncodeTiled failed with " +
                                 std::to_string(static_cast<int>(status)));
    }
    return map;
}

#endif

}  // namespace

}  // namespace k2k::arch
