// Single instructions on operands that the caller has laid out: test_cute_layouts.py compares what
// they read and write with CuTe's layouts.
#include "arch/fence.cuh"
#include "arch/matrix.cuh"
#include "arch/mma.cuh"
#include "arch/tma.cuh"
#include "arch/warp.cuh"
#include "arch/wgmma.cuh"
#include "support.h"

using arch::Major;
using arch::Swizzle;
using arch::TensorMap;

// ---- wgmma: products of operands in an image of shared memory, one by one

constexpr int kImageBytes = 160 * 1024;

struct alignas(1024) ImageStorage {
    uint8_t image[kImageBytes];
};

// Where an operand lies, in bytes.
struct Operand {
    int start, swizzle, leading_bytes, stride_bytes, step;
};

K2K_DEVICE uint64_t descriptor_of(const uint8_t* image, const Operand& o) {
    return arch::matrix_descriptor(image + o.start, static_cast<Swizzle>(o.swizzle),
                                   o.leading_bytes, o.stride_bytes) +
           arch::descriptor_step(o.step);
}

// A in registers if kRegisters: `fragments` has four words for each thread.
template <class T, int N, Major kMajorA, Major kMajorB, bool kRegisters>
__global__ void __launch_bounds__(128) wgmma_products_kernel(const uint8_t* image,
                                                             const uint32_t* fragments,
                                                             const Operand* operands,
                                                             float* result,
                                                             uint64_t* descriptors,
                                                             int products) {
    ImageStorage& smem = arch::shared_storage<ImageStorage>();
    for (int i = threadIdx.x * 16; i < kImageBytes; i += 128 * 16) {
        *reinterpret_cast<uint4*>(smem.image + i) = *reinterpret_cast<const uint4*>(image + i);
    }
    arch::fence_proxy_async();
    arch::sync_block();
    for (int p = 0; p < products; ++p) {
        const uint64_t a = descriptor_of(smem.image, operands[2 * p]);
        const uint64_t b = descriptor_of(smem.image, operands[2 * p + 1]);
        float d[N / 2];
        uint32_t fragment[4];
        for (int i = 0; i < 4; ++i) fragment[i] = fragments[threadIdx.x * 4 + i];
        arch::wgmma_fence();
        if constexpr (kRegisters) {
            arch::wgmma_rs<T, N, kMajorB>(d, fragment, b, false);
        } else {
            arch::wgmma_ss<T, N, kMajorA, kMajorB>(d, a, b, false);
        }
        arch::wgmma_commit();
        arch::wgmma_wait<0>();
        for (int i = 0; i < N / 2; ++i) result[(p * 128 + threadIdx.x) * (N / 2) + i] = d[i];
        if (threadIdx.x == 0) {
            descriptors[2 * p] = a;
            descriptors[2 * p + 1] = b;
        }
    }
}

extern "C" int wgmma_products(const uint8_t* image,
                              const uint32_t* fragments,
                              const Operand* operands,
                              float* result,
                              uint64_t* descriptors,
                              int products,
                              int type,
                              int n,
                              int mn_major_a,
                              int mn_major_b,
                              int registers) {
    return guard([=] {
        bool found = false;
        const auto match = [&](auto kernel, Type t, int columns, bool a_mn, bool b_mn, bool rs) {
            if (static_cast<Type>(type) != t || n != columns || mn_major_a != a_mn ||
                mn_major_b != b_mn || registers != rs) {
                return;
            }
            found = true;
            launch({1, 128, sizeof(ImageStorage)}, kernel, image, fragments, operands, result,
                   descriptors, products);
        };
        constexpr Major K = Major::kK, MN = Major::kMN;
        match(wgmma_products_kernel<bf16, 64, K, K, false>, Type::kBf16, 64, false, false, false);
        match(wgmma_products_kernel<bf16, 128, K, K, false>, Type::kBf16, 128, false, false, false);
        match(wgmma_products_kernel<bf16, 256, K, MN, false>, Type::kBf16, 256, false, true, false);
        match(wgmma_products_kernel<bf16, 64, MN, MN, false>, Type::kBf16, 64, true, true, false);
        match(wgmma_products_kernel<bf16, 128, MN, MN, false>, Type::kBf16, 128, true, true, false);
        match(wgmma_products_kernel<e4m3, 8, K, K, false>, Type::kE4m3, 8, false, false, false);
        match(wgmma_products_kernel<e4m3, 16, K, K, false>, Type::kE4m3, 16, false, false, false);
        match(wgmma_products_kernel<e4m3, 32, K, K, false>, Type::kE4m3, 32, false, false, false);
        match(wgmma_products_kernel<e4m3, 64, K, K, false>, Type::kE4m3, 64, false, false, false);
        match(wgmma_products_kernel<e4m3, 128, K, K, false>, Type::kE4m3, 128, false, false, false);
        match(wgmma_products_kernel<e4m3, 192, K, K, false>, Type::kE4m3, 192, false, false, false);
        match(wgmma_products_kernel<e4m3, 256, K, K, false>, Type::kE4m3, 256, false, false, false);
        match(wgmma_products_kernel<bf16, 64, K, K, true>, Type::kBf16, 64, false, false, true);
        match(wgmma_products_kernel<fp16, 64, K, K, true>, Type::kFp16, 64, false, false, true);
        match(wgmma_products_kernel<e4m3, 64, K, K, true>, Type::kE4m3, 64, false, false, true);
        if (!found) throw Error("wgmma_products: no such instance");
    });
}

// ---- mma.sync, ldmatrix, stmatrix: words of each lane

template <class T>
__global__ void __launch_bounds__(32)
    mma_once_kernel(const uint32_t* a, const uint32_t* b, float* result) {
    uint32_t a_words[4], b_words[2];
    float d[4] = {};
    for (int i = 0; i < 4; ++i) a_words[i] = a[threadIdx.x * 4 + i];
    for (int i = 0; i < 2; ++i) b_words[i] = b[threadIdx.x * 2 + i];
    arch::mma_sync<T>(d, a_words, b_words);
    for (int i = 0; i < 4; ++i) result[threadIdx.x * 4 + i] = d[i];
}

extern "C" int mma_once(const uint32_t* a, const uint32_t* b, float* result, int type) {
    return guard([=] {
        switch (static_cast<Type>(type)) {
            case Type::kBf16:
                return launch({1, 32}, mma_once_kernel<bf16>, a, b, result);
            case Type::kFp16:
                return launch({1, 32}, mma_once_kernel<fp16>, a, b, result);
            default:
                return launch({1, 32}, mma_once_kernel<e4m3>, a, b, result);
        }
    });
}

struct alignas(128) MatrixStorage {
    uint16_t rows[32][8];
};

// Row r of the matrices is at rows[r]; lane l gives the address of row l.
template <int kCount, bool kTransposed>
__global__ void __launch_bounds__(32)
    matrices_once_kernel(uint16_t* memory, uint32_t* registers, int store) {
    MatrixStorage& smem = arch::shared_storage<MatrixStorage>();
    const int lane = threadIdx.x;
    uint32_t words[kCount];
    for (int i = 0; i < 8; ++i) smem.rows[lane][i] = memory[lane * 8 + i];
    for (int i = 0; i < kCount; ++i) words[i] = registers[lane * kCount + i];
    arch::sync_warp();
    const uint32_t address = arch::smem_address(smem.rows[lane]);
    if (store != 0) {
        arch::stmatrix<kCount, kTransposed>(words, address);
    } else {
        arch::ldmatrix<kCount, kTransposed>(words, address);
    }
    arch::sync_warp();
    for (int i = 0; i < 8; ++i) memory[lane * 8 + i] = smem.rows[lane][i];
    for (int i = 0; i < kCount; ++i) registers[lane * kCount + i] = words[i];
}

extern "C" int matrices_once(
    uint16_t* memory, uint32_t* registers, int count, int transposed, int store) {
    const auto go = [=](auto kernel) {
        return guard(
            [=] { launch({1, 32, sizeof(MatrixStorage)}, kernel, memory, registers, store); });
    };
    switch (count * 2 + transposed) {
        case 2:
            return go(matrices_once_kernel<1, false>);
        case 3:
            return go(matrices_once_kernel<1, true>);
        case 4:
            return go(matrices_once_kernel<2, false>);
        case 5:
            return go(matrices_once_kernel<2, true>);
        case 8:
            return go(matrices_once_kernel<4, false>);
        default:
            return go(matrices_once_kernel<4, true>);
    }
}

// ---- TMA: 64 rows of 64 bf16, brought as boxes as wide as the swizzle, of `box_rows` rows each

struct alignas(1024) TileStorage {
    uint8_t tile[64 * 128];
    arch::Mbarrier landed;
};

__global__ void __launch_bounds__(32) tma_boxes_kernel(const __grid_constant__ TensorMap map,
                                                       uint8_t* tile,
                                                       int box_columns,
                                                       int box_rows) {
    TileStorage& smem = arch::shared_storage<TileStorage>();
    if (threadIdx.x == 0) {
        arch::mbarrier_init(smem.landed, 1);
        arch::fence_mbarrier_init();
        arch::mbarrier_arrive_expect_tx(smem.landed, sizeof smem.tile);
        for (int column = 0; column < 64; column += box_columns) {
            for (int row = 0; row < 64; row += box_rows) {
                uint8_t* target = smem.tile + column * 64 * 2 + row * box_columns * 2;
                arch::tma_load_2d(target, map, smem.landed, column, row);
            }
        }
    }
    arch::sync_warp();
    arch::mbarrier_wait(smem.landed, 0);
    for (unsigned i = threadIdx.x; i < sizeof smem.tile; i += 32) tile[i] = smem.tile[i];
}

extern "C" int tma_boxes(const uint16_t* x, uint8_t* tile, int swizzle, int box_rows) {
    return guard([=] {
        const uint32_t columns = swizzle == 0 ? 64 : swizzle / 2;
        const TensorMap map = arch::make_tensor_map(Type::kBf16, x, {64, 64}, {128},
                                                    {columns, static_cast<uint32_t>(box_rows)},
                                                    static_cast<Swizzle>(swizzle));
        launch({1, 32, sizeof(TileStorage)}, tma_boxes_kernel, map, tile, static_cast<int>(columns),
               box_rows);
    });
}

// The map of a tensor of two or three dimensions; `numbers`: sizes, strides in bytes, box.
extern "C" int tensor_map(
    void* map, const void* base, const uint64_t* numbers, int type, int rank, int swizzle) {
    return guard([=] {
        const uint64_t* n = numbers;
        const auto box = [=](int d) { return static_cast<uint32_t>(n[2 * rank - 1 + d]); };
        const auto t = static_cast<Type>(type);
        const auto s = static_cast<Swizzle>(swizzle);
        *static_cast<TensorMap*>(map) =
            rank == 2 ? arch::make_tensor_map(t, base, {n[0], n[1]}, {n[2]}, {box(0), box(1)}, s)
                      : arch::make_tensor_map(t, base, {n[0], n[1], n[2]}, {n[3], n[4]},
                                              {box(0), box(1), box(2)}, s);
    });
}
