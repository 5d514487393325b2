#include "common/launch.h"
#include "conformance/kernels_sm90.cuh"
#include "conformance/launch.h"

namespace k2k::conformance {

namespace {

const uint32_t* words(const void* input) { return static_cast<const uint32_t*>(input); }
uint32_t* words(void* output) { return static_cast<uint32_t*>(output); }

LaunchShape shape_of(unsigned threads, std::size_t storage_bytes, void* stream) {
    LaunchShape shape{1, threads, storage_bytes};
    shape.stream = stream;
    return shape;
}

using Kernel = void (*)(const uint32_t*, uint32_t*);

template <Kernel kKernel, unsigned kThreads, unsigned kStorageBytes = 0>
void start(const void* input, void* output, void* stream) {
    launch(shape_of(kThreads, kStorageBytes, stream), kKernel, words(input), words(output));
}

template <Kernel kKernel, unsigned kStorageBytes>
void start_cluster(const void* input, void* output, void* stream) {
    LaunchShape shape = shape_of(32, kStorageBytes, stream);
    shape.grid = 4;
    shape.cluster = 4;
    launch(shape, kKernel, words(input), words(output));
}

void start_dependent(const void* input, void* output, void* stream) {
    LaunchShape shape = shape_of(32, 0, stream);
    launch(shape, first_kernel, words(input), words(output));
    shape.overlap_previous = true;
    launch(shape, second_kernel, words(input), words(output));
}

// ---- TMA: 1,000 floats; 160 x 20 bf16 in rows of 168; 25 x 6 x 5 integers in rows of 28, planes
// of 7

template <int kRank>
TensorMap tensor_map(const void* base, Swizzle swizzle) {
    if constexpr (kRank == 1) {
        return arch::make_tensor_map(Type::kF32, base, {1000}, {}, {64}, swizzle);
    } else if constexpr (kRank == 2) {
        const uint32_t inner = swizzle == Swizzle::kNone ? 64 : static_cast<uint32_t>(swizzle);
        return arch::make_tensor_map(Type::kBf16, base, {160, 20}, {336}, {inner / 2, 16}, swizzle);
    } else {
        return arch::make_tensor_map(Type::kU32, base, {25, 6, 5}, {112, 784}, {8, 4, 3}, swizzle);
    }
}

template <int kRank>
Boxes boxes(Swizzle swizzle) {
    if constexpr (kRank == 1) return {{{100}, {-12}, {980}}, 64 * 4};
    if constexpr (kRank == 3) return {{{9, 1, 1}, {-3, -1, -1}, {20, 4, 3}}, 8 * 4 * 3 * 4};
    const uint32_t inner = swizzle == Swizzle::kNone ? 64 : static_cast<uint32_t>(swizzle);
    return {{{64, 2}, {-8, -3}, {130, 12}}, inner * 16};
}

template <int kRank, Swizzle kSwizzle = Swizzle::kNone>
void start_load(const void* input, void* output, void* stream) {
    launch(shape_of(128, sizeof(TilesStorage), stream), tma_load_kernel<kRank>,
           tensor_map<kRank>(input, kSwizzle), boxes<kRank>(kSwizzle), words(output));
}

template <int kRank, Swizzle kSwizzle = Swizzle::kNone>
void start_multicast(const void* input, void* output, void* stream) {
    LaunchShape shape = shape_of(128, sizeof(TilesStorage), stream);
    shape.grid = 2;
    shape.cluster = 2;
    launch(shape, tma_multicast_kernel<kRank>, tensor_map<kRank>(input, kSwizzle),
           boxes<kRank>(kSwizzle), words(output));
}

template <int kRank, bool kAdd, Swizzle kSwizzle = Swizzle::kNone>
void start_store(const void* input, void* output, void* stream) {
    launch(shape_of(128, sizeof(TilesStorage), stream), tma_store_kernel<kRank, kAdd>,
           tensor_map<kRank>(output, kSwizzle), boxes<kRank>(kSwizzle), words(input));
}

// ---- wgmma

constexpr OperandLayout operand_layout(Major major, Swizzle swizzle, uint32_t rows) {
    const uint32_t width = swizzle == Swizzle::kNone ? 16 : static_cast<uint32_t>(swizzle);
    if (major == Major::kMN) {
        // Columns of 32 k, as wide as the swizzle; without swizzle, 8 x 8 matrices, k fastest.
        if (swizzle == Swizzle::kNone) return {128, 512, 256};
        return {32 * width, 8 * width, 16 * width};
    }
    // Rows as wide as the swizzle; if two K steps need more, one such tile after the other.
    if (width >= 64) return {0, 8 * width, 32};
    if (width == 32) return {0, 8 * width, rows * width};
    return {rows * width, 8 * width, 2 * rows * width};
}

template <class T, int N, Swizzle kSwizzle = Swizzle::k128, Major kMajorA = Major::kK,
          Major kMajorB = Major::kK>
void start_wgmma(const void* input, void* output, void* stream) {
    launch(shape_of(128, sizeof(WgmmaStorage<N>), stream), wgmma_kernel<T, N, kMajorA, kMajorB>,
           words(input), words(output), kSwizzle, operand_layout(kMajorA, kSwizzle, 64),
           operand_layout(kMajorB, kSwizzle, N));
}

template <class T>
void add_sizes(Launches& all, const std::string& name) {
    all[name + "_n8"] = start_wgmma<T, 8>;
    all[name + "_n16"] = start_wgmma<T, 16>;
    all[name + "_n24"] = start_wgmma<T, 24>;
    all[name + "_n32"] = start_wgmma<T, 32>;
    all[name + "_n64"] = start_wgmma<T, 64>;
    all[name + "_n96"] = start_wgmma<T, 96>;
    all[name + "_n128"] = start_wgmma<T, 128>;
    all[name + "_n160"] = start_wgmma<T, 160>;
    all[name + "_n192"] = start_wgmma<T, 192>;
    all[name + "_n256"] = start_wgmma<T, 256>;
}

template <class T, Swizzle kSwizzle>
void add_majors(Launches& all, const std::string& name) {
    constexpr Major kK = Major::kK, kMN = Major::kMN;
    all[name + "_k_k"] = start_wgmma<T, 64, kSwizzle, kK, kK>;
    if constexpr (!std::is_same_v<T, e4m3>) {
        all[name + "_mn_k"] = start_wgmma<T, 64, kSwizzle, kMN, kK>;
        all[name + "_k_mn"] = start_wgmma<T, 64, kSwizzle, kK, kMN>;
        all[name + "_mn_mn"] = start_wgmma<T, 64, kSwizzle, kMN, kMN>;
    }
}

template <class T>
void add_wgmma(Launches& all, const std::string& name) {
    add_sizes<T>(all, name);
    add_majors<T, Swizzle::kNone>(all, name + "_swizzle0");
    add_majors<T, Swizzle::k32>(all, name + "_swizzle32");
    add_majors<T, Swizzle::k64>(all, name + "_swizzle64");
    add_majors<T, Swizzle::k128>(all, name + "_swizzle128");
}

}  // namespace

const Launches& launches_sm90() {
    static const Launches all = [] {
        Launches all = {
            {"add_vector", start<add_vector_kernel, 32>},
            {"bulk", start<bulk_kernel, 32, sizeof(BulkStorage)>},
            {"cluster", start_cluster<cluster_kernel, sizeof(ClusterStorage)>},
            {"dependent", start_dependent},
            {"elect", start<elect_kernel, 64>},
            {"mma_e4m3", start<mma_kernel<e4m3>, 32>},
            {"registers", start<registers_kernel, 384>},
            {"store_async", start_cluster<store_async_kernel, sizeof(StoreAsyncStorage)>},
            {"stmatrix", start<stmatrix_kernel, 32, sizeof(MatrixStorage)>},
            {"transaction", start<transaction_kernel, 32, sizeof(TransactionStorage)>},
            {"tma_load_1d", start_load<1>},
            {"tma_load_2d_swizzle0", start_load<2>},
            {"tma_load_2d_swizzle32", start_load<2, Swizzle::k32>},
            {"tma_load_2d_swizzle64", start_load<2, Swizzle::k64>},
            {"tma_load_2d_swizzle128", start_load<2, Swizzle::k128>},
            {"tma_load_3d", start_load<3, Swizzle::k32>},
            {"tma_multicast_1d", start_multicast<1>},
            {"tma_multicast_2d", start_multicast<2, Swizzle::k128>},
            {"tma_multicast_3d", start_multicast<3>},
            {"tma_reduce_add_1d", start_store<1, true>},
            {"tma_reduce_add_2d", start_store<2, true, Swizzle::k128>},
            {"tma_reduce_add_3d", start_store<3, true>},
            {"tma_store_1d", start_store<1, false>},
            {"tma_store_2d_swizzle0", start_store<2, false>},
            {"tma_store_2d_swizzle32", start_store<2, false, Swizzle::k32>},
            {"tma_store_2d_swizzle64", start_store<2, false, Swizzle::k64>},
            {"tma_store_2d_swizzle128", start_store<2, false, Swizzle::k128>},
            {"tma_store_3d", start_store<3, false, Swizzle::k32>},
        };
        add_wgmma<bf16>(all, "wgmma_bf16");
        add_wgmma<fp16>(all, "wgmma_fp16");
        add_wgmma<e4m3>(all, "wgmma_e4m3");
        return all;
    }();
    return all;
}

}  // namespace k2k::conformance
