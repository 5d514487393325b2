// Shared memory as an arena per CTA and "global" memory with guard zones.
//
// A shared-space address is 0x400 + the offset in the CTA's storage, as on a GPU, where the first
// kilobyte is the system's. It names the CTA's own memory; another CTA's has pointers only.
#include <sys/mman.h>
#include <unistd.h>

#include <cstring>
#include <map>
#include <mutex>
#include <new>

#include "emulator/machine.h"

#ifdef K2K_ASAN
#include <sanitizer/asan_interface.h>
#endif

namespace k2k::emulator {

namespace {

constexpr uint32_t kFirstAddress = 0x400;
constexpr std::size_t kAlignment = 1024;
constexpr std::size_t kGuard = 64 * 1024;
constexpr std::size_t kZone = std::size_t(64) << 20;  // for strided overruns

std::size_t round_up(std::size_t value, std::size_t unit) {
    return (value + unit - 1) / unit * unit;
}

struct Allocation {
    char* map;
    std::size_t map_bytes, bytes;
};
std::mutex g_mutex;
std::map<void*, Allocation> g_allocations;

}  // namespace

// ---- shared memory

void map_shared_memory(SharedMemory& smem, std::size_t bytes) {
    const std::size_t page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    const std::size_t capacity = round_up(bytes, kAlignment);
    const std::size_t inner = round_up(capacity, page);
#ifdef K2K_TSAN
    unmap_shared_memory(smem);  // clears the accesses of the previous CTA
#endif
    if (!smem.map || smem.map_bytes != inner + 2 * kGuard) {
        unmap_shared_memory(smem);
        smem.map_bytes = inner + 2 * kGuard;
        void* map = mmap(nullptr, smem.map_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (map == MAP_FAILED) throw std::bad_alloc();
        smem.map = static_cast<uint8_t*>(map);
    }
    if (inner) mprotect(smem.map + kGuard, inner, PROT_READ | PROT_WRITE);
    smem.base = smem.map + kGuard + inner - capacity;
    smem.bytes = bytes;
    smem.capacity = capacity;
    smem.fence_pending = false;
    smem.mbarriers.clear();
    smem.async_view.assign(bytes, 0xff);
#ifdef K2K_ASAN
    __asan_unpoison_memory_region(smem.map + kGuard, inner);
#endif
    std::memset(smem.map + kGuard, 0xff, inner);
#ifdef K2K_ASAN
    __asan_poison_memory_region(smem.map + kGuard, inner - capacity);
    __asan_poison_memory_region(smem.base + bytes, capacity - bytes);
#endif
}

void unmap_shared_memory(SharedMemory& smem) {
    if (smem.map) munmap(smem.map, smem.map_bytes);
    smem.map = nullptr;
}

void close_shared_memory(SharedMemory& smem) {
    mprotect(smem.map + kGuard, smem.map_bytes - 2 * kGuard, PROT_NONE);
}

bool shared_memory_overrun(const SharedMemory& smem) {
#ifndef K2K_ASAN
    for (const uint8_t* p = smem.map + kGuard; p < smem.base; ++p) {
        if (*p != 0xff) return true;
    }
    for (const uint8_t* p = smem.base + smem.bytes; p < smem.base + smem.capacity; ++p) {
        if (*p != 0xff) return true;
    }
#else
    (void)smem;
#endif
    return false;
}

void* shared_storage(std::size_t bytes, Where where) {
    enter("shared_storage", where);
    SharedMemory& smem = self()->block->smem;
    if (bytes > smem.bytes) {
        fail(where, "the storage struct has %zu bytes, the launch has %zu of shared memory", bytes,
             smem.bytes);
    }
    return smem.base;
}

uint32_t smem_address(const void* pointer, Where where) {
    const SharedMemory& smem = self()->block->smem;
    const auto offset = static_cast<const uint8_t*>(pointer) - smem.base;
    if (offset < 0 || offset > static_cast<long>(smem.bytes)) {
        fail(where, "%p is not in this block's shared memory", pointer);
    }
    return kFirstAddress + static_cast<uint32_t>(offset);
}

uint8_t* shared_bytes(uint32_t address, std::size_t bytes, unsigned align, const char* what,
                      Where where) {
    const SharedMemory& smem = self()->block->smem;
    if (address < kFirstAddress || address - kFirstAddress + bytes > smem.bytes) {
        fail(where, "%s: shared address 0x%x (%zu bytes) is outside the block's %zu bytes", what,
             address, bytes, smem.bytes);
    }
    if (address % align) {
        fail(where, "%s: shared address 0x%x is not a multiple of %u", what, address, align);
    }
    return smem.base + (address - kFirstAddress);
}

Block* owner_of(const void* pointer) {
    const auto* byte = static_cast<const uint8_t*>(pointer);
    for (std::size_t i = 0; i < g_machine->resident_blocks; ++i) {
        Block& block = *g_machine->blocks[i];
        if (byte >= block.smem.base && byte < block.smem.base + block.smem.bytes) return &block;
    }
    return nullptr;
}

uint8_t* peer(const void* pointer, uint32_t rank, Where where) {
    const Block& block = *self()->block;
    if (rank >= block.cluster->blocks.size()) {
        fail(where, "%s: rank %u of a cluster of %zu", self()->doing, rank,
             block.cluster->blocks.size());
    }
    return block.cluster->blocks[rank]->smem.base + (smem_address(pointer, where) - kFirstAddress);
}

void* cluster_pointer(const void* pointer, uint32_t rank, Where where) {
    race::Quiet quiet;
    enter("cluster_pointer", where, 90);
    fall_behind();  // the other CTA may end before the pointer is used
    return peer(pointer, rank, where);
}

Block& shared_range(const void* pointer, std::size_t bytes, const char* what, Where where) {
    Block* block = owner_of(pointer);
    const auto* byte = static_cast<const uint8_t*>(pointer);
    if (!block || byte + bytes > block->smem.base + block->smem.bytes) {
        fail(where, "%s: %p (%zu bytes) is not within shared memory", what, pointer, bytes);
    }
    return *block;
}

Block& own_range(const void* pointer, std::size_t bytes, const char* what, Where where) {
    Block& block = shared_range(pointer, bytes, what, where);
    if (&block != self()->block) fail(where, "%s: from another block's shared memory", what);
    return block;
}

// ---- the two proxies: stores by threads are visible to asynchronous instructions after a fence
//
// `async_view` is the content of shared memory visible to the async proxy. A fence covers all that
// threads have written so far; it takes effect at the next barrier or asynchronous read.

void fence_proxy_async(Where where) {
    enter("fence.proxy.async", where, 90);
    self()->block->smem.fence_pending = true;
}

void settle_proxy_fence(Block& block) {
    SharedMemory& smem = block.smem;
    if (!smem.fence_pending) return;
    std::memcpy(smem.async_view.data(), smem.base, smem.bytes);
    smem.fence_pending = false;
}

void async_proxy_writes(Block& block, uint8_t* target, const void* data, std::size_t bytes) {
    std::memcpy(target, data, bytes);
    std::memcpy(block.smem.async_view.data() + (target - block.smem.base), data, bytes);
}

void require_proxy_fence(Block& block, const uint8_t* source, std::size_t bytes, Where where) {
    settle_proxy_fence(block);
    if (std::memcmp(block.smem.async_view.data() + (source - block.smem.base), source, bytes)) {
        fail(where, "%s reads shared memory that threads wrote without fence.proxy.async",
             self()->doing);
    }
}

// ---- plain accesses that go through a wrapper

static void check_alignment(const void* address, std::size_t bytes, Where where) {
    if (reinterpret_cast<uintptr_t>(address) % bytes) {
        fail(where, "%s: %p is not a multiple of %zu", self()->doing, address, bytes);
    }
}

void load(void* value, const void* source, std::size_t bytes, Where where) {
    race::Quiet quiet;
    enter("load", where);
    check_alignment(source, bytes, where);
    race::read(source, bytes);
    std::memcpy(value, source, bytes);
    g_machine->counters.bytes_loaded += bytes;
}

void store(void* target, const void* value, std::size_t bytes, Where where) {
    race::Quiet quiet;
    enter("store", where);
    check_alignment(target, bytes, where);
    race::write(target, bytes);
    std::memcpy(target, value, bytes);
    g_machine->counters.bytes_stored += bytes;
}

void before_atomic(const void* address, std::size_t bytes, Order order, bool is_poll, Where where) {
    race::Quiet quiet;
    enter(is_poll ? "a loop over ld.acquire" : "atomic", where);
    check_alignment(address, bytes, where);
    if (is_poll) {
        poll("a loop over ld.acquire", where);
    } else {
        preempt("atomic", where);
    }
    if (order == Order::kRelease || order == Order::kAcqRel) race::release(address);
    race::ignore_begin();  // the operation itself is no race
}

void after_atomic(const void* address, Order order) {
    race::ignore_end();
    race::Quiet quiet;
    if (order == Order::kAcquire || order == Order::kAcqRel) race::acquire(address);
    // After the release a waiting thread may run before this one continues.
    if (order == Order::kRelease || order == Order::kAcqRel) fall_behind();
}

// For TSan each fence is ordered after all earlier fences: stronger than PTX, but without it the
// relaxed atomics around fences would be reported as races.
void fence(Where where) {
    race::Quiet quiet;
    enter("fence", where);
    preempt("fence", where);
    race::acquire(&g_allocations);
    race::release(&g_allocations);
}

void nanosleep(Where where) {
    race::Quiet quiet;
    enter("nanosleep", where);
    poll("nanosleep", where);
}

uint64_t globaltimer() { return g_machine->time += 100; }

void trap(Where where) { fail(where, "the kernel trapped"); }

// ---- global memory

void* allocate(std::size_t bytes) {
    const std::size_t page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    const std::size_t inner = round_up(bytes, page);
    const std::size_t map_bytes = inner + 2 * kZone;
    void* map =
        mmap(nullptr, map_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (map == MAP_FAILED) throw std::bad_alloc();
    char* start = static_cast<char*>(map) + kZone;
    if (inner) mprotect(start, inner, PROT_READ | PROT_WRITE);
    std::memset(start, 0xff, inner);
    void* pointer = start + inner - round_up(bytes, 16);
    const std::lock_guard<std::mutex> lock(g_mutex);
    g_allocations[pointer] = {static_cast<char*>(map), map_bytes, bytes};
    return pointer;
}

void release(void* pointer) {
    const std::lock_guard<std::mutex> lock(g_mutex);
    const auto found = g_allocations.find(pointer);
    if (found == g_allocations.end()) return;
    munmap(found->second.map, found->second.map_bytes);
    g_allocations.erase(found);
}

const char* explain_address(const void* address) {
    const auto* byte = static_cast<const char*>(address);
    {
        const std::lock_guard<std::mutex> lock(g_mutex);  // no kernel holds it
        for (const auto& [pointer, allocation] : g_allocations) {
            if (byte < allocation.map || byte >= allocation.map + allocation.map_bytes) continue;
            return byte < pointer ? "access before a global allocation"
                                  : "access beyond a global allocation";
        }
    }
    for (std::size_t i = 0; i < g_machine->resident_blocks; ++i) {
        const Block& block = *g_machine->blocks[i];
        const auto* map = reinterpret_cast<const char*>(block.smem.map);
        if (!map || byte < map || byte >= map + block.smem.map_bytes) continue;
        return block.live == 0 ? "access to the shared memory of a block that has ended"
                               : "access outside shared memory";
    }
    const Fiber& fiber = self()->fiber;
    if (byte < fiber.stack && byte >= fiber.stack - kGuard) return "a thread's stack overflows";
    return "access outside every allocation, or a misaligned vector access";
}

}  // namespace k2k::emulator
