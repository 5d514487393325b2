#pragma once

// One kernel per facility of csrc/arch, which stores the results of its instructions. Input and
// output are 32-bit words; `out` has a row per value and a column per thread.
// python_tests/emulator/conformance_cases.py makes the inputs and the expected outputs.

#include "arch/control.cuh"
#include "arch/convert.cuh"
#include "arch/cp_async.cuh"
#include "arch/fence.cuh"
#include "arch/ldst.cuh"
#include "arch/matrix.cuh"
#include "arch/mbarrier.cuh"
#include "arch/packed.cuh"
#include "arch/smem.cuh"
#include "arch/warp.cuh"
#include "conformance/shared.cuh"

namespace k2k::conformance {

using arch::Scope;

// ---- warps

// Input: a word per lane; the lowest three bits are predicates, few other bits differ.
__global__ void __launch_bounds__(32) votes_kernel(const uint32_t* input, uint32_t* output) {
    Rows out(output);
    const uint32_t value = input[threadIdx.x];
    for (int bit = 0; bit < 3; ++bit) {
        const bool predicate = value >> bit & 1;
        out(arch::ballot(predicate));
        out(arch::any(predicate));
        out(arch::all(predicate));
    }
    for (const uint32_t bits : {0u, 1u, 3u, 0xffffffffu}) out(arch::match_any(value & bits));
}

// Input: a word per lane.
__global__ void __launch_bounds__(32) shuffles_kernel(const uint32_t* input, uint32_t* output) {
    Rows out(output);
    const uint32_t value = input[threadIdx.x];
    const auto wide = static_cast<unsigned long long>(value) << 32 | ~value;
    out(arch::shuffle(value, (arch::lane_id() * 7 + 3) % 32));
    out(arch::shuffle(value, 5));
    for (const uint32_t n : {1, 2, 4, 8, 16, 31}) {
        out(arch::shuffle_xor(value, n));
        out(arch::shuffle_up(value, n));
        out(arch::shuffle_down(value, n));
        const auto moved = arch::shuffle_xor(wide, n);
        out(static_cast<uint32_t>(moved));
        out(static_cast<uint32_t>(moved >> 32));
    }
}

// Input: a word per lane.
__global__ void __launch_bounds__(32) redux_kernel(const uint32_t* input, uint32_t* output) {
    Rows out(output);
    const uint32_t value = input[threadIdx.x];
    const auto with_sign = static_cast<int32_t>(value);
    out(arch::redux_add(value));
    out(arch::redux_min(value));
    out(arch::redux_max(value));
    out(arch::redux_add(with_sign));
    out(arch::redux_min(with_sign));
    out(arch::redux_max(with_sign));
}

// Three warps pass 32 words round: through sync_warp, named barriers and sync_block.
// Input: a word per lane.
struct BarriersStorage {
    uint32_t first[32], second[32], third[32];
};
__global__ void __launch_bounds__(96) barriers_kernel(const uint32_t* input, uint32_t* output) {
    BarriersStorage& smem = arch::shared_storage<BarriersStorage>();
    const uint32_t lane = arch::lane_id(), warp = arch::warp_id();
    if (warp == 0) {
        smem.first[lane] = input[lane];
        arch::sync_warp();
        smem.second[lane] = smem.first[31 - lane] + 1;
        arch::barrier_arrive(1, 64);
    } else if (warp == 1) {
        arch::barrier_sync(1, 64);
        smem.third[lane] = smem.second[lane ^ 1] + 1;
    }
    arch::sync_block();
    Rows out(output);
    out(smem.third[lane ^ 2] + warp);
    out(lane);
    out(warp);
}

// Input: none. The clock is monotonic, and nanosleep returns.
__global__ void __launch_bounds__(32) time_kernel(const uint32_t*, uint32_t* output) {
    Rows out(output);
    const uint64_t before = arch::globaltimer();
    arch::nanosleep(100);
    const uint64_t after = arch::globaltimer();
    if (after < before) arch::trap();
    out(after >= before);
}

// ---- loads, stores, atomics

// Copies 32 threads' words. Input: 2 x (32 + 64 + 128) words; output: those and 128 more.
__global__ void __launch_bounds__(32) vectors_kernel(const uint32_t* input, uint32_t* output) {
    const uint32_t lane = arch::lane_id();
    const auto copy = [&](auto* type, auto load) {
        using T = std::remove_pointer_t<decltype(type)>;
        const T value = load(reinterpret_cast<const T*>(input) + lane);
        arch::store_streaming(reinterpret_cast<T*>(output) + lane, value);
        input += 32 * sizeof(T) / 4;
        output += 32 * sizeof(T) / 4;
        return value;
    };
    const auto plain = [](auto* source) { return arch::load_nc(source); };
    const auto no_allocate = [](auto* source) { return arch::load_nc_no_allocate(source); };
    copy(static_cast<uint32_t*>(nullptr), plain);
    copy(static_cast<uint2*>(nullptr), plain);
    copy(static_cast<uint4*>(nullptr), plain);
    copy(static_cast<uint32_t*>(nullptr), no_allocate);
    copy(static_cast<uint2*>(nullptr), no_allocate);
    const uint4 last = copy(static_cast<uint4*>(nullptr), no_allocate);
    arch::store(reinterpret_cast<uint4*>(output) + lane, last);
}

// CTA 0 writes words and sets flags of 4 and 8 bytes; CTA 1 waits for the flags and copies the
// words; for each scope. Input: 64 words; output: 2 x 64 words of CTA 0, 2 x 64 of CTA 1, then
// four flags of 16 bytes.
template <Scope kScope>
K2K_DEVICE void pass_flags(const uint32_t* input, uint32_t* sent, uint32_t* got, uint32_t* flags) {
    auto* const narrow = flags;
    auto* const wide = reinterpret_cast<unsigned long long*>(flags + 4);
    const uint32_t start = 0xa5a5a5a5;  // the initial content of the output
    if (blockIdx.x == 0) {
        sent[threadIdx.x] = input[threadIdx.x];
        arch::fence_acq_rel<kScope>();
        arch::sync_block();
        if (threadIdx.x == 0) arch::store_release<kScope>(narrow, 1u);
        if (threadIdx.x == 32) arch::store_release<kScope>(wide, 0x200000001ull);
    } else {
        if (threadIdx.x < 32) {
            while (arch::load_acquire<kScope>(narrow) == start) arch::nanosleep(20);
        } else {
            while (uint32_t(arch::load_acquire<kScope>(wide) >> 32) == start) arch::nanosleep(20);
        }
        arch::sync_block();
        got[threadIdx.x] = sent[threadIdx.x];
    }
}
__global__ void __launch_bounds__(64) flags_kernel(const uint32_t* input, uint32_t* output) {
    uint32_t* flags = output + 256;
    pass_flags<Scope::kGpu>(input, output, output + 128, flags);
    pass_flags<Scope::kSystem>(input, output + 64, output + 192, flags + 8);
}

// Every thread adds to (or takes the maximum with) each counter; only thread 0 stores what the
// atomics return. Input: a word per thread; output: 32 counters, then thread 0's values.
template <Scope kScope>
K2K_DEVICE void count(uint32_t value, uint32_t* counters) {
    arch::atomic_add<kScope>(counters + 0, value);
    arch::atomic_add<kScope>(reinterpret_cast<float*>(counters + 1), static_cast<float>(value));
    arch::reduce_add<kScope>(counters + 2, value);
    arch::reduce_add_release<kScope>(counters + 3, value);
    arch::atomic_add_acq_rel<kScope>(counters + 4, value);
    arch::atomic_cas<kScope>(counters + 5, 0, 77);
}
template <Scope kScope>
K2K_DEVICE uint32_t* show_old(uint32_t* cell, uint32_t* shown) {
    *shown++ = arch::atomic_add<kScope>(cell, 5u);
    *shown++ = arch::atomic_add_acq_rel<kScope>(cell, 7u);
    *shown++ = arch::atomic_cas<kScope>(cell, 12, 30);
    *shown++ = arch::atomic_cas<kScope>(cell, 12, 40);
    *shown++ = arch::atomic_max(cell, 35u);
    *shown++ = arch::atomic_max(cell, 1u);
    *shown++ = arch::load_acquire<kScope>(cell);
    arch::store_release<kScope>(cell, 0u);
    return shown;
}
__global__ void __launch_bounds__(64) atomics_kernel(const uint32_t* input, uint32_t* output) {
    if (threadIdx.x < 32) output[threadIdx.x] = 0;
    arch::sync_block();
    const uint32_t value = input[threadIdx.x];
    count<Scope::kGpu>(value, output);
    count<Scope::kSystem>(value, output + 6);
    arch::atomic_max(output + 12, value);
    arch::atomic_max(reinterpret_cast<int32_t*>(output + 13), static_cast<int32_t>(value) - 100);
    arch::sync_block();
    if (threadIdx.x == 0) {
        uint32_t* shown = show_old<Scope::kGpu>(output + 31, output + 32);
        show_old<Scope::kSystem>(output + 31, shown);
    }
}

// ---- asynchronous copies, mbarriers

// The copies of odd threads are invalid and write zeros. Input: 32 x (1 + 2 + 4) words; output: the
// tiles of 4, 8 and 16 bytes, each read as soon as its group has completed; then the first lane / 2
// bytes of 16.
struct CpAsyncStorage {
    uint4 sixteen[32];
    uint2 eight[32];
    uint32_t four[32];
};
__global__ void __launch_bounds__(32) cp_async_kernel(const uint32_t* input, uint32_t* output) {
    CpAsyncStorage& smem = arch::shared_storage<CpAsyncStorage>();
    const uint32_t lane = arch::lane_id();
    const bool valid = lane % 2 == 0;
    arch::cp_async<4>(arch::smem_address(&smem.four[lane]), input + lane, valid);
    arch::cp_async_commit();
    arch::cp_async<8>(arch::smem_address(&smem.eight[lane]), input + 32 + 2 * lane, valid);
    arch::cp_async_commit();
    arch::cp_async(arch::smem_address(&smem.sixteen[lane]), input + 96 + 4 * lane, valid);
    arch::cp_async_commit();
    arch::cp_async_wait<2>();
    output[lane] = smem.four[lane];
    arch::cp_async_wait<1>();
    reinterpret_cast<uint2*>(output + 32)[lane] = smem.eight[lane];
    arch::cp_async_wait<0>();
    reinterpret_cast<uint4*>(output + 96)[lane] = smem.sixteen[lane];
    arch::cp_async_partial(arch::smem_address(&smem.sixteen[lane]), input + 96 + 4 * lane,
                           static_cast<int>(lane / 2));
    arch::cp_async_commit();
    arch::cp_async_wait<0>();
    reinterpret_cast<uint4*>(output + 224)[lane] = smem.sixteen[lane];
}

// The results of test_wait for both parities during two phases of a barrier of 3 arrivals; then
// each thread's cp.async arrives at another barrier. Input: 32 words; output: thread 0's answers
// (20 words), 32 words.
struct MbarrierStorage {
    arch::Mbarrier by_hand, by_copies;
    uint32_t words[32];
};
__global__ void __launch_bounds__(32) mbarrier_kernel(const uint32_t* input, uint32_t* output) {
    MbarrierStorage& smem = arch::shared_storage<MbarrierStorage>();
    const uint32_t lane = arch::lane_id();
    if (lane == 0) {
        arch::mbarrier_init(smem.by_hand, 3);
        arch::mbarrier_init(smem.by_copies, 32);
        for (int arrived = 0; arrived <= 6; ++arrived) {
            if (arrived > 0) arch::mbarrier_arrive(smem.by_hand);
            for (const uint32_t parity : {0, 1}) {
                output[2 * arrived + parity] = arch::mbarrier_test_wait(smem.by_hand, parity);
            }
        }
        arch::mbarrier_inval(smem.by_hand);
    }
    arch::sync_warp();
    arch::cp_async<4>(arch::smem_address(&smem.words[lane]), input + lane);
    arch::cp_async_arrive(smem.by_copies);
    while (!arch::mbarrier_test_wait(smem.by_copies, 0)) {
    }
    output[14 + lane] = smem.words[31 - lane];
}

// ---- matrices

// Row r of the stored matrices is row 5 r mod 32 of the input's tile of 32 x 8: the lanes'
// addresses determine the rows. Input: 32 x 4 words; output: 1, 2, 4 rows, and the same transposed.
template <int kCount, bool kTransposed>
K2K_DEVICE void show_ldmatrix(Rows& out, uint32_t address) {
    uint32_t r[kCount];
    arch::ldmatrix<kCount, kTransposed>(r, address);
    for (const uint32_t word : r) out(word);
}
__global__ void __launch_bounds__(32) ldmatrix_kernel(const uint32_t* input, uint32_t* output) {
    MatrixStorage& smem = arch::shared_storage<MatrixStorage>();
    const uint32_t lane = arch::lane_id();
    for (int i = 0; i < 4; ++i) smem.words[lane * 4 + i] = input[lane * 4 + i];
    arch::sync_warp();
    const uint32_t address = arch::smem_address(&smem.words[lane * 5 % 32 * 4]);
    Rows out(output);
    show_ldmatrix<1, false>(out, address);
    show_ldmatrix<2, false>(out, address);
    show_ldmatrix<4, false>(out, address);
    show_ldmatrix<1, true>(out, address);
    show_ldmatrix<2, true>(out, address);
    show_ldmatrix<4, true>(out, address);
}

// ---- conversions

// Input: 256 floats; output: rows of a word per thread.
__global__ void __launch_bounds__(256) convert_kernel(const uint32_t* input, uint32_t* output) {
    const uint32_t i = threadIdx.x;
    const float value = soft::bits_float(input[i]), next = soft::bits_float(input[(i + 1) % 256]);
    const float third = soft::bits_float(input[(i + 2) % 256]);
    const float fourth = soft::bits_float(input[(i + 3) % 256]);
    Rows out(output);
    out(uint32_t(arch::to_bf16(value).bits));
    out(uint32_t(arch::to_fp16(value).bits));
    out(arch::pack_bf16(value, next));
    out(arch::pack_fp16(value, next));
    out(arch::pack_e4m3(value, next, third, fourth));
    // From the value's halves, and every code of e4m3.
    out(arch::to_float(bf16{static_cast<uint16_t>(input[i] >> 16)}));
    out(arch::to_float(fp16{static_cast<uint16_t>(input[i])}));
    out(arch::to_float(e4m3{static_cast<uint8_t>(i)}));
}

// Input: 3 x 256 words; output: rows of a word per thread.
__global__ void __launch_bounds__(256) packed_kernel(const uint32_t* input, uint32_t* output) {
    const uint32_t a = input[threadIdx.x], b = input[256 + threadIdx.x];
    const uint32_t c = input[512 + threadIdx.x];
    Rows out(output);
    out(arch::fma_bf16x2(a, b, c));
    out(arch::mul_bf16x2(a, b));
    for (const uint32_t selector : {0x3210u, 0x7654u, 0x0404u, 0x3232u, 0x6325u}) {
        out(arch::byte_permute(a, b, selector));
    }
    out(arch::low_twice(a));
    out(arch::high_twice(a));
    out(arch::and_or(a, b, c));
    out(arch::kept(a));
}

// Input: 256 floats; output: three rows.
__global__ void __launch_bounds__(256) approximate_kernel(const uint32_t* input, uint32_t* output) {
    const float value = soft::bits_float(input[threadIdx.x]);
    Rows out(output);
    out(arch::exp2_approx(value));
    out(arch::reciprocal_approx(value));
    out(arch::rsqrt_approx(value < 0 ? -value : value));
}

}  // namespace k2k::conformance
