// mbarrier: a phase ends when all arrivals and all announced bytes have arrived.
//
// The 8 bytes of the object, low to high: pending arrivals (20 bits), arrivals per phase (20),
// pending bytes plus 2^20 (21), phase (1), and 0b10 as a mark, by which an uninitialised or
// overwritten object is detected.
#include <algorithm>

#include "emulator/machine.h"

namespace k2k::emulator {

namespace {

constexpr uint64_t kCountMask = 0xfffff, kTxMask = 0x1fffff, kNoTx = uint64_t(1) << 20;
constexpr int kExpectedShift = 20, kTxShift = 40, kPhaseShift = 61, kMarkShift = 62;

unsigned missing(uint64_t state) { return state & kCountMask; }
unsigned expected(uint64_t state) { return state >> kExpectedShift & kCountMask; }
long tx_bytes(uint64_t state) { return long(state >> kTxShift & kTxMask) - long(kNoTx); }
unsigned phase(uint64_t state) { return state >> kPhaseShift & 1; }

uint64_t fresh(uint64_t count, uint64_t phase) {
    return count | count << kExpectedShift | kNoTx << kTxShift | phase << kPhaseShift |
           uint64_t(2) << kMarkShift;
}

void finish_phase_if_complete(uint64_t* barrier) {
    if (missing(*barrier) || tx_bytes(*barrier)) return;
    *barrier = fresh(expected(*barrier), phase(*barrier) ^ 1);
    if (Block* block = owner_of(barrier)) {
        settle_proxy_fence(*block);
        block->smem.mbarriers[barrier] = false;
    }
    g_machine->progress = true;
    auto& waiters = g_machine->mbarrier_waiters;
    for (std::size_t i = 0; i < waiters.size();) {
        if (waiters[i]->mbarrier == barrier) {
            make_ready(waiters[i]);
            waiters[i] = waiters.back();
            waiters.pop_back();
        } else {
            ++i;
        }
    }
}

void expect_bytes(uint64_t* barrier, uint32_t bytes, Where where) {
    if (tx_bytes(*barrier) + long(bytes) >= long(kNoTx)) {
        fail(where, "mbarrier: %ld bytes pending, and %u more exceed the count", tx_bytes(*barrier),
             bytes);
    }
    *barrier += uint64_t(bytes) << kTxShift;
}

void arrive(uint64_t* barrier, uint32_t count, Where where) {
    race::release(barrier);
    if (count == 0 || count > missing(*barrier)) {
        fail(where, "mbarrier arrive: %u arrivals, %u of the phase's %u are missing", count,
             missing(*barrier), expected(*barrier));
    }
    const Block* block = owner_of(barrier);
    if (block && !block->smem.mbarriers.at(barrier)) {
        fail(where, "mbarrier arrive: no thread has seen the end of the phase before");
    }
    *barrier -= count;
    finish_phase_if_complete(barrier);
}

// An mbarrier in the shared memory of a resident CTA.
bool& seen(const void* barrier) { return owner_of(barrier)->smem.mbarriers[barrier]; }

bool phase_ended(const uint64_t* barrier, uint32_t parity) {
    if (phase(*barrier) == parity) return false;
    seen(barrier) = true;
    return true;
}

}  // namespace

uint64_t* checked_mbarrier(void* barrier, const char* what, Where where) {
    if (reinterpret_cast<uintptr_t>(barrier) % 8) fail(where, "%s: misaligned mbarrier", what);
    const Block* block = owner_of(barrier);
    if (!block) fail(where, "%s: the mbarrier is not in shared memory", what);
    if (block->cluster != self()->block->cluster) fail(where, "%s: foreign mbarrier", what);
    if (block->live == 0) fail(where, "%s: the mbarrier's block has ended", what);
    auto* state = static_cast<uint64_t*>(barrier);
    if (*state >> kMarkShift != 2 || block->smem.mbarriers.count(barrier) == 0) {
        fail(where, "%s: mbarrier smem+%ld is not initialised, or was overwritten (0x%016llx)",
             what, long(static_cast<uint8_t*>(barrier) - block->smem.base),
             static_cast<unsigned long long>(*state));
    }
    return state;
}

uint64_t* own_mbarrier(void* barrier, const char* what, Where where) {
    uint64_t* state = checked_mbarrier(barrier, what, where);
    if (owner_of(barrier) != self()->block) fail(where, "%s: another block's mbarrier", what);
    return state;
}

std::string describe_mbarrier(const Thread& thread) {
    if (!thread.mbarrier) return "";
    const uint64_t state = *thread.mbarrier;
    const auto offset = reinterpret_cast<const uint8_t*>(thread.mbarrier) - thread.block->smem.base;
    return format(
        " on smem+%ld for parity %u [phase %u, %u of %u arrivals missing, %ld bytes to "
        "come]",
        long(offset), thread.parity, phase(state), missing(state), expected(state),
        tx_bytes(state));
}

void mbarrier_init(void* barrier, uint32_t count, Where where) {
    race::Quiet quiet;
    enter("mbarrier_init", where);
    if (reinterpret_cast<uintptr_t>(barrier) % 8 || owner_of(barrier) != self()->block) {
        fail(where, "mbarrier_init: %p is not in this block's shared memory, or misaligned",
             barrier);
    }
    if (count == 0 || count > kCountMask) fail(where, "mbarrier_init: a count of %u", count);
    if (!self()->block->smem.mbarriers.emplace(barrier, true).second) {
        fail(where, "mbarrier_init: of an mbarrier; mbarrier_inval comes before");
    }
    race::write(barrier, 8);
    *static_cast<uint64_t*>(barrier) = fresh(count, 0);
}

void mbarrier_inval(void* barrier, Where where) {
    race::Quiet quiet;
    enter("mbarrier_inval", where);
    *own_mbarrier(barrier, "mbarrier_inval", where) = ~uint64_t(0);
    owner_of(barrier)->smem.mbarriers.erase(barrier);
}

void mbarrier_arrive(void* barrier, uint32_t count, uint32_t bytes, Where where) {
    race::Quiet quiet;
    enter("mbarrier_arrive", where, bytes ? 90 : 80);
    uint64_t* state = own_mbarrier(barrier, "mbarrier_arrive", where);
    expect_bytes(state, bytes, where);
    arrive(state, count, where);
    preempt("mbarrier_arrive", where);
}

// For both scopes: the emulator does not distinguish releases to the cluster and to the CTA.
void mbarrier_arrive_remote(void* barrier, uint32_t rank, uint32_t count, const char* name,
                            Where where) {
    race::Quiet quiet;
    enter(name, where, 90);
    void* remote = peer(barrier, rank, where);
    arrive(checked_mbarrier(remote, name, where), count, where);
    preempt(name, where);
}

void mbarrier_expect_tx(void* barrier, uint32_t bytes, Where where) {
    race::Quiet quiet;
    enter("mbarrier_expect_tx", where, 90);
    expect_bytes(own_mbarrier(barrier, "mbarrier_expect_tx", where), bytes, where);
}

// A copy may complete while any thread runs, so that only the object itself is checked.
static uint64_t* still_valid(void* barrier, Where where) {
    auto* state = static_cast<uint64_t*>(barrier);
    if (*state >> kMarkShift != 2) {
        fail(where, "the mbarrier of a copy was overwritten while the copy was in flight");
    }
    return state;
}

void mbarrier_complete_tx(void* barrier, uint32_t bytes, Where where) {
    uint64_t* state = still_valid(barrier, where);
    if (tx_bytes(*state) - long(bytes) <= -long(kNoTx)) {
        fail(where, "mbarrier: more bytes have come than its count holds");
    }
    *state -= uint64_t(bytes) << kTxShift;
    finish_phase_if_complete(state);
}

void mbarrier_complete_arrival(void* barrier, Where where) {
    arrive(still_valid(barrier, where), 1, where);
}

bool mbarrier_test_wait(void* barrier, uint32_t parity, Where where) {
    race::Quiet quiet;
    enter("mbarrier_test_wait", where);
    const uint64_t* state = own_mbarrier(barrier, "mbarrier_test_wait", where);
    if (!phase_ended(state, parity)) {
        poll("mbarrier_test_wait", where);
        return false;
    }
    race::acquire(barrier);
    self()->polls = 0;
    return true;
}

bool mbarrier_try_wait(void* barrier, uint32_t parity, Where where) {
    enter_sm90("mbarrier_try_wait", where);
    return mbarrier_test_wait(barrier, parity, where);
}

void mbarrier_wait(void* barrier, uint32_t parity, Where where) {
    race::Quiet quiet;
    enter("mbarrier_wait", where, 90);
    Thread* thread = self();
    if (g_machine->options.schedule == Schedule::kPct) preempt("mbarrier_wait", where);
    // Checks again after each wake-up: the barrier may be in a later phase, as on a GPU.
    while (!phase_ended(own_mbarrier(barrier, "mbarrier_wait", where), parity)) {
        thread->mbarrier = static_cast<uint64_t*>(barrier);
        thread->parity = parity;
        g_machine->mbarrier_waiters.push_back(thread);
        wait("mbarrier_wait", where);
        thread->mbarrier = nullptr;
    }
    race::acquire(barrier);
}

}  // namespace k2k::emulator
