#pragma once

// Tiles, as types and as numbers, and the choice of the kernel that serves a call: pure functions.

#include <initializer_list>

#include "common/chip.h"
#include "common/math.h"
#include "fp8_gemm/params.h"

namespace k2k {

constexpr int kBlockK = 128;  // elements of K that share a scale: one stage of a pipeline

// Tile rows of a band (rasterisation): the scheduler goes down 8 rows of tiles before it goes one
// column on. 8 x 128 rows of A and as many of B are 2 MB at K = 1024, so that what 132 CTAs read at
// a time stays in L2.
constexpr int kBand = 8;

// Shared memory of a CTA on sm_90a, if one or two fit on an SM: 228 KiB, less 1 KiB for each CTA.
constexpr int kSharedOfOne = 227 * 1024, kSharedOfTwo = 113 * 1024;

// Upper bound of the number of tiles, for any offsets and counts.
constexpr int64_t tiles_at_most(const Fp8GemmParams& p, int tile_rows, int tile_columns) {
    const int64_t row_tiles = ceil_div(p.a.rows, tile_rows);
    const bool by_rows = p.groups.axis == GemmGroups::Axis::kRows;
    const int64_t of_groups = by_rows ? row_tiles + p.groups.number : row_tiles * p.groups.number;
    return of_groups * ceil_div(p.b.rows, tile_columns);
}

// ---- portable kernel: 8 warps divide a tile of D. A warp keeps the accumulators of the current
// block of K and the result in registers, 2 x (warp_rows x warp_columns / 32) floats per lane.
template <int kRows_, int kColumns_, int kWarpRows_, int kWarpColumns_, int kStages_, int kCtas_>
struct PortableTile {
    static constexpr int kRows = kRows_, kColumns = kColumns_;
    static constexpr int kWarpRows = kWarpRows_, kWarpColumns = kWarpColumns_;
    static constexpr int kStages = kStages_;
    static constexpr int kCtas = kCtas_;  // CTAs per SM
    static constexpr int kThreads = 256;
    // Of PortableStorage: codes, scales, NaN flags, and 32 bytes for each warp's tile of a stage.
    static constexpr int kSharedBytes =
        ((kStages * 132 + 1) * (kRows + kColumns) + kStages * kThreads + 127) / 128 * 128;
    static_assert((kRows / kWarpRows) * (kColumns / kWarpColumns) * 32 == kThreads);
};
// Twice 64 floats per lane: one CTA fills the registers.
using PortableTile128 = PortableTile<128, 128, 64, 32, 4, 1>;
// For GPUs with 99 KB of shared memory per CTA, and for groups of few rows.
using PortableTile64 = PortableTile<64, 128, 32, 32, 3, 1>;
// Decoding: nearly all of a stage is weights; the stages of two CTAs keep 108 KB in flight.
using PortableTile16 = PortableTile<16, 128, 16, 16, 4, 2>;

// ---- kernel for sm_90a: two consumer warpgroups of 64 rows per wave, one below the other or side
// by side. The stages use what the panels of D and the scales leave of 227 KB.
struct LargeTile {  // a variant hides what it changes
    static constexpr int kThreads = 384;
    static constexpr int kPipelines = 1;  // 2: ping-pong
    static constexpr bool kFine = false;  // 1x128 scales of B, not 128x128
    static constexpr bool kSwiglu = false;
};

template <int kRows_, int kColumns_, int kStages_, int kPanels_, bool kFine_>
struct HopperTile : LargeTile {
    static constexpr int kRows = kRows_, kColumns = kColumns_, kStages = kStages_;
    static constexpr int kPanels = kPanels_;  // of a warpgroup: 64 rows x 64 columns of D
    static constexpr bool kFine = kFine_;
    static constexpr int kAcross = kRows < 128 ? 2 : 1;   // warpgroups side by side
    static constexpr int kWaves = kRows * kAcross / 128;  // of 64 rows, for each warpgroup
    // Scales of B per block of K; a tile begins at a multiple of 128 or 64 columns.
    static constexpr int kColumnScales = kFine                  ? kColumns
                                         : kColumns % 128 == 64 ? 2
                                                                : kColumns / 128;
    static_assert(kRows == 64 || kRows == 128 || kRows == 256);
    static_assert(kColumns / kAcross % 64 == 0 && kColumns / kAcross <= 192);
};
using HopperTile128x128 = HopperTile<128, 128, 5, 2, false>;
// Fewer bytes of L2 per product: (128 + 192) / (128 x 192) and (256 + 128) / (256 x 128).
using HopperTile128x192 = HopperTile<128, 192, 4, 3, false>;
using HopperTile256x128 = HopperTile<256, 128, 4, 1, false>;
// Groups of few rows: nearly all of a stage is weights.
using HopperTile64x256 = HopperTile<64, 256, 4, 2, false>;
// 1x128 scales of B (wgrad), and shards that begin inside a block of 128 columns.
using HopperTileFine = HopperTile<128, 128, 5, 2, true>;

// Ping-pong: each warpgroup has a tile, stages and two waves of its own, so that one's prologue and
// epilogue overlap the other's main loop. For short K, where these take much of the time.
template <int kRows_, int kColumns_, int kStages_, int kPanels_>
struct PingPongTile : LargeTile {
    static constexpr int kRows = kRows_, kColumns = kColumns_, kStages = kStages_;
    static constexpr int kPanels = kPanels_;
    static constexpr int kPipelines = 2;
    static constexpr int kAcross = 1;
    static constexpr int kWaves = kRows / 64;
    static constexpr int kColumnScales = kColumns / 128;
    static_assert(kRows == 128 && kColumns == 128);
};
using HopperTilePingPong = PingPongTile<128, 128, 3, 1>;

// SwiGLU: 128 columns of gate in one warpgroup and the same of up in the other, all rows in two
// waves, which give 128 columns of codes.
template <int kStages_>
struct SwigluTile : LargeTile {
    static constexpr int kRows = 128, kColumns = 256, kStages = kStages_;
    static constexpr int kAcross = 2;
    static constexpr int kWaves = 2;
    static constexpr int kColumnScales = 2;
    static constexpr bool kSwiglu = true;
};
using HopperTileSwiglu = SwigluTile<4>;

// The operand that the two CTAs of a cluster share: each loads half of it into both (multicast).
enum class Share : int32_t { kNone, kA, kB };

// ---- kernel for sm_90a and few rows: a warpgroup computes 64 columns of D, the 64 rows of B being
// the long side of wgmma, by 8 to 64 rows of A. Two CTAs fit on an SM.
template <int kTokens_, int kStages_>
struct SmallTile {
    static constexpr int kTokens = kTokens_, kColumns = 64, kStages = kStages_;
    static constexpr int kThreads = 192;
};
using SmallTile8 = SmallTile<8, 10>;
using SmallTile16 = SmallTile<16, 10>;
using SmallTile32 = SmallTile<32, 8>;
using SmallTile64 = SmallTile<64, 5>;
constexpr int kMostSplit = 8;  // CTAs of a cluster: the portable maximum

// ---- which kernel serves a call

enum class GemmKernel : int32_t {
    kPortable128x128,
    kPortable64x128,
    kPortable16x128,
    kHopper128x128,
    kHopper128x192,
    kHopper256x128,
    kHopper64x256,
    kHopperFine,
    kHopperPingPong,
    kHopperSwiglu,
    kSmall8,
    kSmall16,
    kSmall32,
    kSmall64,
};

// What a kernel supports beside the product itself.
enum class GemmFamily : int32_t {
    kPortable,  // sm_80 on
    kLarge,     // sm_90a: pairs of CTAs may share a factor
    kSwiglu,    // a large one, whose result is quantised SwiGLU
    kSmall,     // sm_90a, few rows: K may be split over a cluster
};
constexpr const char* kGemmFamilies[] = {"portable", "sm90", "sm90_swiglu", "sm90_small"};

struct GemmKernelFacts {
    GemmKernel kernel;
    const char* name;
    GemmFamily family;
    int rows, columns;  // of a tile
    int shared_memory;  // bytes that a CTA may need
    // Rows of A and B that warps turn into fp16 where the tensor cores have no e4m3: each warp
    // those of its own rows and columns.
    int decoded_rows = 0;

    constexpr int capability() const { return family == GemmFamily::kPortable ? 80 : 90; }
};

template <class Tile>
constexpr GemmKernelFacts portable_facts(GemmKernel kernel, const char* name) {
    return {kernel,
            name,
            GemmFamily::kPortable,
            Tile::kRows,
            Tile::kColumns,
            Tile::kSharedBytes,
            Tile::kRows * (Tile::kColumns / Tile::kWarpColumns) +
                Tile::kColumns * (Tile::kRows / Tile::kWarpRows)};
}
template <class Tile>
constexpr GemmKernelFacts large_facts(GemmKernel kernel, const char* name) {
    const GemmFamily family = Tile::kSwiglu ? GemmFamily::kSwiglu : GemmFamily::kLarge;
    return {kernel, name, family, Tile::kRows, Tile::kColumns, kSharedOfOne};
}
template <class Tile>
constexpr GemmKernelFacts small_facts(GemmKernel kernel, const char* name) {
    return {kernel, name, GemmFamily::kSmall, Tile::kTokens, Tile::kColumns, kSharedOfTwo};
}

constexpr GemmKernelFacts kGemmKernels[] = {
    portable_facts<PortableTile128>(GemmKernel::kPortable128x128, "portable_128x128"),
    portable_facts<PortableTile64>(GemmKernel::kPortable64x128, "portable_64x128"),
    portable_facts<PortableTile16>(GemmKernel::kPortable16x128, "portable_16x128"),
    large_facts<HopperTile128x128>(GemmKernel::kHopper128x128, "sm90_128x128"),
    large_facts<HopperTile128x192>(GemmKernel::kHopper128x192, "sm90_128x192"),
    large_facts<HopperTile256x128>(GemmKernel::kHopper256x128, "sm90_256x128"),
    large_facts<HopperTile64x256>(GemmKernel::kHopper64x256, "sm90_64x256"),
    large_facts<HopperTileFine>(GemmKernel::kHopperFine, "sm90_128x128_fine"),
    large_facts<HopperTilePingPong>(GemmKernel::kHopperPingPong, "sm90_pingpong_128x128"),
    large_facts<HopperTileSwiglu>(GemmKernel::kHopperSwiglu, "sm90_swiglu_128x256"),
    small_facts<SmallTile8>(GemmKernel::kSmall8, "sm90_small_8x64"),
    small_facts<SmallTile16>(GemmKernel::kSmall16, "sm90_small_16x64"),
    small_facts<SmallTile32>(GemmKernel::kSmall32, "sm90_small_32x64"),
    small_facts<SmallTile64>(GemmKernel::kSmall64, "sm90_small_64x64"),
};

constexpr const GemmKernelFacts& facts_of(GemmKernel kernel) {
    return kGemmKernels[static_cast<int>(kernel)];
}

struct GemmSizes {
    int64_t groups;
    int64_t rows;  // of a group of A, approximate: known without reading counts
    int64_t columns, k;
    bool fine;     // 1x128 scales of B, or a first block of 128 columns that begins before row 0
    bool whole_k;  // no split-K: a row's bits must not depend on the number of rows
    bool swiglu;   // the result is quantised SwiGLU of the two halves of the columns
};

struct GemmPlan {
    GemmKernel kernel;
    Share share = Share::kNone;
    int split = 1;  // parts of K, one per CTA of a cluster; kSmall* only
};

constexpr bool is_small(GemmKernel kernel) { return facts_of(kernel).family == GemmFamily::kSmall; }
constexpr bool is_ping_pong(GemmKernel kernel) { return kernel == GemmKernel::kHopperPingPong; }
constexpr bool is_large_hopper(GemmKernel kernel) {
    return facts_of(kernel).family == GemmFamily::kLarge ||
           facts_of(kernel).family == GemmFamily::kSwiglu;
}

// Cost model: approximate clocks of a call. Only the order of plans matters. Rates are from data
// sheets, fixed clocks are guesses; nothing here has been measured.
constexpr double gemm_clocks(const GemmSizes& sizes, const GemmPlan& plan, const Chip& chip) {
    const GemmKernelFacts& facts = facts_of(plan.kernel);
    // Per SM and clock: bytes from L2 (DeepGEMM's model has 46.6 for H100), its share of the memory
    // bandwidth (3.35 TB/s / 132 at 1.75 GHz), multiply-adds.
    constexpr double kCacheBytes = 46, kMemoryBytes = 14.5;
    const double products =  // 0.85: promotion is not entirely hidden
        0.85 * (facts.capability() == 90 ? 4096 : 1024);
    // Decoding four codes to fp16 takes five instructions; 128 lanes issue per clock.
    constexpr double kDecodeRow = 128 * 5 / 4 / 128.0;
    // Epilogue and prologue of a tile. Synchronisation of a cluster: when the kernel begins and
    // ends, with split-K in each tile.
    constexpr double kTileClocks = 1500, kMeetingClocks = 1000;
    // Fraction of the tensor cores' rate that one warpgroup reaches, as it promotes in between; and
    // that two warpgroups reach in ping-pong, whose epilogues sometimes coincide.
    constexpr double kAlone = 0.65, kPingPong = 0.78;
    constexpr double kSecondKernel = 4000;  // a second launch, until the GPU is full again

    const bool small = is_small(plan.kernel);
    const int cluster = small ? plan.split : plan.share != Share::kNone ? 2 : 1;
    const int64_t unit_rows = facts.rows * (plan.share == Share::kB ? 2 : 1);
    const int64_t unit_columns = facts.columns * (plan.share == Share::kA ? 2 : 1);
    const int64_t units =
        sizes.groups * ceil_div(sizes.rows, unit_rows) * ceil_div(sizes.columns, unit_columns);
    const int64_t ctas_per_sm =  // CTAs per SM
        small && units * cluster > chip.multiprocessors ? 2 : 1;
    const int64_t at_once = ctas_per_sm * chip.multiprocessors / cluster;
    const int64_t rounds = ceil_div(units, at_once > 0 ? at_once : 1);

    const double a_bytes = 128.0 * facts.rows / (plan.share == Share::kA ? 2 : 1);
    const double b_bytes = 128.0 * facts.columns / (plan.share == Share::kB ? 2 : 1);
    // A small tile has one wgmma chain and is bound by its latency, about 300 clocks per block of
    // K.
    const double copy = (a_bytes + b_bytes) * ctas_per_sm / kCacheBytes;
    const double decode = chip.capability < 89 ? kDecodeRow * facts.decoded_rows : 0;
    const double multiply = small ? 300 : 128.0 * facts.rows * facts.columns / products + decode;
    const double block = copy > multiply ? copy : multiply;
    const double blocks = static_cast<double>(ceil_div(ceil_div(sizes.k, 128), plan.split));
    const double result = 2.0 * facts.rows * facts.columns / kCacheBytes;
    const double ends = result + kTileClocks + (plan.split > 1 ? kMeetingClocks : 0);
    double work = static_cast<double>(rounds) * (blocks * block + ends);
    if (is_ping_pong(plan.kernel)) {
        // The first tile runs alone, later ones overlap: main loop, or half of main loop and ends.
        const double product = 128.0 * facts.rows * facts.columns / 4096;
        const double alone = copy > product / kAlone ? copy : product / kAlone;
        const double both = copy > product / kPingPong ? copy : product / kPingPong;
        const double first = blocks * alone + ends;
        const double next = blocks * both > first / 2 ? blocks * both : first / 2;
        work = first + static_cast<double>(rounds - 1) * next;
    }

    const double rows = static_cast<double>(sizes.rows),
                 columns = static_cast<double>(sizes.columns);
    const double k = static_cast<double>(sizes.k);
    // Bytes per result: bfloat16; for SwiGLU codes of half the columns, plus, with a second kernel,
    // float32 stored and loaded.
    const bool second = sizes.swiglu && plan.kernel != GemmKernel::kHopperSwiglu;
    const double result_bytes = second ? 8.5 : sizes.swiglu ? 0.5 : 2;
    const double bytes = sizes.groups * (columns * k + rows * (k + result_bytes * columns));
    const double memory = bytes / (kMemoryBytes * chip.multiprocessors);
    if (cluster > 1) work += kMeetingClocks;
    if (second) work += kSecondKernel;
    // Compute and memory overlap, except at the ends.
    return work > memory ? work + 0.1 * memory : memory + 0.1 * work;
}

// Whether the plan supports such a call.
constexpr bool may_serve(const GemmPlan& plan, const GemmSizes& sizes, const Chip& chip) {
    const GemmKernelFacts& facts = facts_of(plan.kernel);
    if (chip.shared_memory < facts.shared_memory) return false;
    if (facts.capability() == 90) {
        if (chip.capability != 90 || sizes.k == 0) return false;
    } else if (chip.capability == 90 && sizes.k > 0) {
        return false;  // sm_90 has kernels of its own
    }
    if (is_large_hopper(plan.kernel)) {
        if (plan.kernel == GemmKernel::kHopperSwiglu && !(sizes.swiglu && sizes.columns % 256 == 0))
            return false;
        return plan.split == 1 && sizes.fine == (plan.kernel == GemmKernel::kHopperFine);
    }
    if (plan.share != Share::kNone) return false;
    return plan.split == 1 || (is_small(plan.kernel) && !sizes.whole_k);
}

// Calls f with every combination of kernel, share and split.
template <class F>
constexpr void for_each_plan(F&& f) {
    for (const GemmKernelFacts& facts : kGemmKernels) {
        for (const Share share : {Share::kNone, Share::kA, Share::kB}) {
            for (int split = 1; split <= kMostSplit; split *= 2)
                f(GemmPlan{facts.kernel, share, split});
        }
    }
}

// The cheapest plan for these sizes on this chip; of equally cheap ones the first.
constexpr GemmPlan plan_gemm(const GemmSizes& sizes, const Chip& chip) {
    GemmPlan best{GemmKernel::kPortable64x128};
    double least = -1;
    for_each_plan([&](const GemmPlan& plan) {
        if (!may_serve(plan, sizes, chip)) return;
        const double clocks = gemm_clocks(sizes, plan, chip);
        if (least < 0 || clocks < least) {
            best = plan;
            least = clocks;
        }
    });
    return best;
}

// q_a and kv_a of Kimi-K2 for one token: without split-K, 33 tiles would leave 99 of 132 SMs idle.
constexpr Chip kH100{90, 132, kSharedOfOne};
static_assert(plan_gemm({1, 1, 2112, 7168, false, false, false}, kH100).split >= 4);
static_assert(plan_gemm({1, 1, 2112, 7168, false, true, false}, kH100).split == 1);
static_assert(plan_gemm({1, 4096, 2112, 7168, false, false, false}, {80, 108, 163 * 1024}).kernel ==
              GemmKernel::kPortable128x128);
static_assert(plan_gemm({1, 4096, 7168, 2048, false, false, false}, {80, 108, 163 * 1024}).kernel ==
              GemmKernel::kPortable128x128);
// q_b: K of 12 blocks.
static_assert(is_ping_pong(plan_gemm({1, 4096, 12288, 1536, false, false, false}, kH100).kernel));
static_assert(plan_gemm({1, 4096, 4096, 7168, false, false, true}, kH100).kernel ==
              GemmKernel::kHopperSwiglu);

// The plan that serves these arguments if `plan` was requested: 1x128 scales of B and groups along
// K have one large tile on sm_90a, and K = 0 runs on the portable kernel, because TMA cannot copy
// it.
constexpr GemmPlan serving(GemmPlan plan, const Fp8GemmParams& p) {
    const bool small = is_small(plan.kernel), large = is_large_hopper(plan.kernel);
    if ((small || large) && p.k == 0) return {GemmKernel::kPortable16x128};
    const bool fine = p.b.block_shift == 0 || p.b.block_offset != 0;
    const bool along_k = p.groups.axis == GemmGroups::Axis::kK;
    if ((large && fine) || ((large || small) && along_k)) {
        return {GemmKernel::kHopperFine, plan.share};
    }
    return plan;
}

}  // namespace k2k
