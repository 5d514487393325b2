// wgmma: each of the four warps of a warpgroup multiplies its 16 rows, asynchronously.
//
// No warp waits for the other three, as on a GPU. The first warp to issue an operation records the
// operands' bytes; different bytes at the issue by another warp, or at the end of the operation,
// reveal a missing barrier or an early overwrite. The product is computed at issue and stored
// separately; the accumulator registers hold poison until wgmma_wait.
#include <algorithm>
#include <cstring>

#include "emulator/machine.h"
#include "emulator/tensor_core.h"
#include "emulator/tensor_map.h"

namespace k2k::emulator {

namespace {

constexpr int kRows = 64, kWarpRows = 16, kRowBytes = 32;  // of A and of B, transposed

struct Operands {
    std::vector<uint8_t> a, b;  // rows of 32 bytes, K contiguous; `a` is empty if in registers
    bool operator==(const Operands& other) const { return a == other.a && b == other.b; }
};

struct Operation {
    WgmmaShape shape;
    uint64_t a_descriptor, b_descriptor;
    bool a_in_registers, accumulate;
    Where where;
    Operands operands;
    std::vector<float> a_values, b_values;
    unsigned warps_done = 0;
};

// The lanes' arguments of one instruction.
struct Argument {
    WgmmaShape shape;
    float* d;
    const uint32_t* a_registers;
    uint64_t a_descriptor, b_descriptor;
    bool accumulate;
    Where where;
};

bool same(const WgmmaShape& x, const WgmmaShape& y) {
    return x.type == y.type && x.n == y.n && x.a_mn_major == y.a_mn_major &&
           x.b_mn_major == y.b_mn_major;
}

// ---- operands in shared memory

struct Descriptor {
    uint32_t start, leading_bytes, stride_bytes;
    unsigned swizzle_bytes;
};

Descriptor decode(uint64_t bits, Where where) {
    constexpr unsigned kSwizzle[] = {0, 128, 64, 32};
    if (bits >> 49 & 7) fail(where, "wgmma: the descriptor has a base offset; none is supported");
    const auto field = [bits](int shift) {
        return static_cast<uint32_t>(bits >> shift & 0x3fff) << 4;
    };
    return {field(0), field(16), field(32), kSwizzle[bits >> 62]};
}

// The address, before swizzling, of 16 bytes of an operand.
// K-major: row r, half c of its 32 bytes. PTX: #asynchronous-warpgroup-k-major-no-swizzle-mode ff.
uint32_t k_major_address(const Descriptor& d, uint32_t row, uint32_t half) {
    const uint32_t group = d.start + row / 8 * d.stride_bytes;
    if (d.swizzle_bytes == 0) return group + row % 8 * 16 + half * d.leading_bytes;
    return group + row % 8 * d.swizzle_bytes + half * 16;
}

// MN-major: 8 neighbours along M (or N) from 8 i on, at k.
// PTX: #asynchronous-warpgroup-mn-major-no-swizzle-mode ff.
uint32_t mn_major_address(const Descriptor& d, uint32_t i, uint32_t k) {
    if (d.swizzle_bytes == 0) {
        return d.start + i * d.stride_bytes + k % 8 * 16 + k / 8 * d.leading_bytes;
    }
    const uint32_t per_row = d.swizzle_bytes / 16;
    return d.start + i % per_row * 16 + i / per_row * d.leading_bytes + k % 8 * d.swizzle_bytes +
           k / 8 * d.stride_bytes;
}

// Calls visit(address, row, half or k) for each 16 bytes of the operand.
template <class Visit>
void for_each_chunk(const Descriptor& d, int rows, bool mn_major, Visit visit) {
    if (mn_major) {
        for (int i = 0; i < rows / 8; ++i) {
            for (int k = 0; k < 16; ++k) visit(mn_major_address(d, i, k), 8 * i, k);
        }
    } else {
        for (int row = 0; row < rows; ++row) {
            for (int half = 0; half < 2; ++half) visit(k_major_address(d, row, half), row, half);
        }
    }
}

std::vector<uint8_t> read_operand(uint64_t bits, int rows, bool mn_major, bool check_fence,
                                  Where where) {
    const Descriptor d = decode(bits, where);
    Block& block = *self()->block;
    std::vector<uint8_t> bytes(static_cast<std::size_t>(rows) * kRowBytes);
    if (check_fence) settle_proxy_fence(block);
    for_each_chunk(d, rows, mn_major, [&](uint32_t address, int row, int part) {
        const uint8_t* chunk =
            shared_bytes(swizzle(address, d.swizzle_bytes), 16, 16, "wgmma operand", where);
        if (check_fence) require_proxy_fence(block, chunk, 16, where);
        if (!mn_major) {
            std::memcpy(&bytes[row * kRowBytes + part * 16], chunk, 16);
            return;
        }
        for (int j = 0; j < 8; ++j) {  // 2-byte elements
            std::memcpy(&bytes[(row + j) * kRowBytes + part * 2], chunk + 2 * j, 2);
        }
    });
    return bytes;
}

Operands read_operands(const Argument& q, bool check_fence) {
    Operands operands;
    if (!q.a_registers) {
        operands.a = read_operand(q.a_descriptor, kRows, q.shape.a_mn_major, check_fence, q.where);
    }
    operands.b = read_operand(q.b_descriptor, q.shape.n, q.shape.b_mn_major, check_fence, q.where);
    return operands;
}

// ---- accumulators: lane l = 4 g + t holds D[g + 8 h][8 j + 2 t + e] in d[4 j + 2 h + e]

template <class Move>
void for_each_accumulator(int n, int lane, Move move) {
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < n / 2; ++i) {
        const int j = i / 4, h = i / 2 % 2, e = i % 2;
        move(i, (g + 8 * h) * n + 8 * j + 2 * t + e);
    }
}

bool is_poison(float value) { return soft::float_bits(value) == kPoison; }

void require_untouched(const float* d, int n, Where where, const char* when) {
    if (!std::all_of(d, d + n / 2, is_poison)) {
        fail(where, "the accumulator registers of a wgmma in flight were written before %s", when);
    }
}

}  // namespace

// Operations that some warp of the warpgroup has yet to issue or finish.
struct WarpgroupWgmma {
    std::deque<Operation> operations;
    std::size_t first = 0;  // number of operations[0]
};

// The operations that one warp has in flight.
struct WarpWgmma {
    struct Pending {
        std::size_t operation;
        unsigned group;
        float* d[kWarpSize];
        std::shared_ptr<std::vector<float>> result;  // [16][n]
    };
    std::size_t issued = 0;
    std::vector<Pending> pending;
};

namespace {

WarpgroupWgmma& warpgroup_of(const Thread& thread) {
    auto& state = thread.block->warpgroups[thread.warp / 4];
    if (!state) state = std::make_shared<WarpgroupWgmma>();
    return *state;
}

WarpWgmma& warp_of(const Thread& thread) {
    auto& state = thread.block->warps[thread.warp].wgmma;
    if (!state) state = std::make_shared<WarpWgmma>();
    return *state;
}

// The operation this warp issues: recorded by the first warp, compared by the others.
Operation& join_operation(const Thread& thread, const Argument& q) {
    WarpgroupWgmma& warpgroup = warpgroup_of(thread);
    const std::size_t index = warp_of(thread).issued++ - warpgroup.first;
    Operands operands = read_operands(q, /*check_fence=*/true);
    if (index == warpgroup.operations.size()) {
        Operation operation{q.shape,
                            q.a_descriptor,
                            q.b_descriptor,
                            q.a_registers != nullptr,
                            q.accumulate,
                            q.where,
                            std::move(operands),
                            {},
                            {}};
        const int k_count = k_of(q.shape.type);
        operation.b_values.resize(static_cast<std::size_t>(k_count) * q.shape.n);
        decode_columns(q.shape.type, operation.operands.b.data(), q.shape.n,
                       operation.b_values.data());
        if (!q.a_registers) {
            operation.a_values.resize(static_cast<std::size_t>(kRows) * k_count);
            decode_rows(q.shape.type, operation.operands.a.data(), kRows,
                        operation.a_values.data());
        }
        warpgroup.operations.push_back(std::move(operation));
        return warpgroup.operations.back();
    }
    Operation& operation = warpgroup.operations[index];
    if (!same(operation.shape, q.shape) || operation.accumulate != q.accumulate ||
        operation.where.line != q.where.line || operation.a_descriptor != q.a_descriptor ||
        operation.b_descriptor != q.b_descriptor) {
        fail(q.where, "the warpgroup diverged: another of its warps issued another wgmma at %s:%d",
             operation.where.file, operation.where.line);
    }
    if (!(operation.operands == operands)) {
        fail(q.where,
             "the warps of the warpgroup see different operands of one wgmma: shared "
             "memory was written without a barrier in between");
    }
    return operation;
}

void execute_wgmma(Thread** lanes, void** arguments, uint32_t) {
    const auto at = [&](unsigned lane) { return static_cast<Argument*>(arguments[lane]); };
    const Argument& q = *at(0);
    const Thread& thread = *lanes[0];
    for (unsigned lane = 1; lane < kWarpSize; ++lane) {
        if (at(lane)->a_descriptor != q.a_descriptor || at(lane)->b_descriptor != q.b_descriptor ||
            at(lane)->accumulate != q.accumulate) {
            fail(q.where, "wgmma: descriptors or scale-d differ between the lanes of a warp");
        }
    }
    const Operation& operation = join_operation(thread, q);
    WarpWgmma& warp = warp_of(thread);
    const int n = q.shape.n, k_count = k_of(q.shape.type);

    float a_fragment[kWarpRows * kMaxK];
    const float* a = operation.a_values.data() + thread.warp % 4 * kWarpRows * k_count;
    if (q.a_registers) {
        uint32_t rows[kWarpRows][8];
        for (int l = 0; l < 32; ++l) {
            for (int i = 0; i < 4; ++i) {
                rows[l / 4 + 8 * (i % 2)][l % 4 + 4 * (i / 2)] = at(l)->a_registers[i];
            }
        }
        decode_rows(q.shape.type, rows, kWarpRows, a_fragment);
        a = a_fragment;
    }

    // An accumulator in flight is continued; else it is read from the registers.
    std::shared_ptr<std::vector<float>> result;
    for (const auto& pending : warp.pending) {
        if (pending.d[0] == q.d) result = pending.result;
    }
    const bool chained = result != nullptr;
    if (!chained) result = std::make_shared<std::vector<float>>(kWarpRows * n);
    for (int l = 0; l < 32; ++l) {
        float* d = at(l)->d;
        if (chained) {
            require_untouched(d, n, q.where, "the next wgmma");
            continue;
        }
        for_each_accumulator(n, l, [&](int i, int j) { (*result)[j] = d[i]; });
        std::memset(d, 0xff, sizeof(float) * n / 2);
    }
    if (!q.accumulate) std::fill(result->begin(), result->end(), 0.0f);
    multiply(q.shape.type, result->data(), a, operation.b_values.data(), kWarpRows, n,
             g_machine->options.hopper_fp8);

    WarpWgmma::Pending pending{warp.issued - 1, thread.wgmma_groups, {}, result};
    for (unsigned lane = 0; lane < kWarpSize; ++lane) pending.d[lane] = at(lane)->d;
    warp.pending.push_back(std::move(pending));
}

void issue(WgmmaShape shape, float* d, const uint32_t* a_registers, uint64_t a, uint64_t b,
           bool accumulate, Where where) {
    race::Quiet quiet;
    enter("wgmma", where, 90);
    const Thread* thread = self();
    if ((thread->warp / 4 + 1) * kWarpgroupSize > thread->block->grid->shape.threads.count()) {
        fail(where, "wgmma: the warpgroup is not whole");
    }
    if (!thread->wgmma_fenced)
        fail(where, "wgmma without wgmma_fence since the registers were free");
    Argument argument{shape, d, a_registers, a, b, accumulate, where};
    rendezvous("wgmma", kFullWarp, &argument, execute_wgmma, where);
}

void finish_pending(const Thread& thread, Thread** lanes, long done_groups) {
    WarpgroupWgmma& warpgroup = warpgroup_of(thread);
    auto& pending = warp_of(thread).pending;
    std::size_t finished = 0;
    for (; finished < pending.size() && long(pending[finished].group) < done_groups; ++finished) {
        const auto& p = pending[finished];
        Operation& operation = warpgroup.operations[p.operation - warpgroup.first];
        ++operation.warps_done;
        const Argument again{operation.shape,
                             nullptr,
                             operation.a_in_registers ? &kPoison : nullptr,
                             operation.a_descriptor,
                             operation.b_descriptor,
                             operation.accumulate,
                             operation.where};
        if (!(read_operands(again, /*check_fence=*/false) == operation.operands)) {
            fail(operation.where, "shared memory was overwritten while a wgmma read it; issued");
        }
        const bool carried_on =
            std::any_of(pending.begin() + long(finished) + 1, pending.end(),
                        [&](const auto& later) { return later.d[0] == p.d[0]; });
        if (carried_on) continue;
        for (unsigned lane = 0; lane < kWarpSize; ++lane) {
            require_untouched(p.d[lane], operation.shape.n, lanes[lane]->where, "wgmma_wait");
            for_each_accumulator(operation.shape.n, static_cast<int>(lane),
                                 [&](int i, int j) { p.d[lane][i] = (*p.result)[j]; });
        }
    }
    pending.erase(pending.begin(), pending.begin() + long(finished));
    while (!warpgroup.operations.empty() && warpgroup.operations.front().warps_done == 4) {
        warpgroup.operations.pop_front();
        ++warpgroup.first;
    }
}

}  // namespace

void wgmma_fence(Where where) {
    enter("wgmma_fence", where, 90);
    self()->wgmma_fenced = true;
}

void wgmma_ss(WgmmaShape shape, float* d, uint64_t a, uint64_t b, bool accumulate, Where where) {
    issue(shape, d, nullptr, a, b, accumulate, where);
}

void wgmma_rs(WgmmaShape shape, float* d, const uint32_t* a, uint64_t b, bool accumulate,
              Where where) {
    issue(shape, d, a, 0, b, accumulate, where);
}

void wgmma_commit(Where where) {
    enter("wgmma_commit", where, 90);
    ++self()->wgmma_groups;
}

void wgmma_wait(int pending_groups, Where where) {
    race::Quiet quiet;
    enter("wgmma_wait", where, 90);
    Thread* thread = self();
    thread->wgmma_fenced = false;
    long done_groups = long(thread->wgmma_groups) - pending_groups;
    rendezvous(
        "wgmma_wait", kFullWarp, &done_groups,
        [](Thread** lanes, void** arguments, uint32_t) {
            finish_pending(*lanes[0], lanes, *static_cast<long*>(arguments[0]));
        },
        where);
}

}  // namespace k2k::emulator
