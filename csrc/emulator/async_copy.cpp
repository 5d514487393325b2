// Asynchronous copies. Targets are poisoned at issue; the data arrive at the time that the options
// choose. A source must not have changed by the time of the wait.
#include <algorithm>
#include <array>
#include <cstring>

#include "emulator/machine.h"

namespace k2k::emulator {

// ---- cp.async: by thread, in groups, waited for by the thread

static void deliver(const CpAsync& copy) {
    if (copy.source_bytes && std::memcmp(copy.data, copy.source, copy.source_bytes)) {
        fail(copy.where, "the source of a cp.async was overwritten while it was in flight");
    }
    std::memcpy(copy.target, copy.data, copy.bytes);
}

void cp_async(uint32_t target, const void* source, int bytes, int source_bytes, Where where) {
    race::Quiet quiet;
    enter("cp.async", where);
    uint8_t* data = shared_bytes(target, bytes, bytes, "cp.async", where);
    if (source_bytes < 0 || source_bytes > bytes) {
        fail(where, "cp.async: %d of %d bytes from the source", source_bytes, bytes);
    }
    if (reinterpret_cast<uintptr_t>(source) % bytes) {
        fail(where, "cp.async: the source %p is not a multiple of %d", source, bytes);
    }
    const Thread& thread = *self();
    const std::size_t group = thread.cp_async_groups.empty() ? 0 : thread.cp_async_groups.back();
    for (std::size_t i = group; i < thread.cp_async.size(); ++i) {
        const CpAsync& other = thread.cp_async[i];
        if (data < other.target + other.bytes && other.target < data + bytes) {
            fail(where, "cp.async: another one of the same group (%s:%d) has this target",
                 other.where.file, other.where.line);
        }
    }
    CpAsync copy{data, bytes, source_bytes, source, {}, where};
    race::read(source, source_bytes);
    race::write(data, bytes);
    std::memcpy(copy.data, source, source_bytes);
    g_machine->counters.bytes_loaded += source_bytes;
    if (deliver_now()) {
        deliver(copy);
    } else {
        std::memset(data, 0xff, bytes);
        self()->cp_async.push_back(copy);
    }
}

void cp_async_commit(Where where) {
    race::Quiet quiet;
    enter("cp_async_commit", where);
    self()->cp_async_groups.push_back(self()->cp_async.size());
}

void cp_async_wait(int pending_groups, Where where) {
    race::Quiet quiet;
    enter("cp_async_wait", where);
    Thread* thread = self();
    auto& groups = thread->cp_async_groups;
    const int done = static_cast<int>(groups.size()) - pending_groups;
    if (done <= 0) return;
    const std::size_t end = groups[done - 1];
    for (std::size_t i = 0; i < end; ++i) deliver(thread->cp_async[i]);
    thread->cp_async.erase(thread->cp_async.begin(), thread->cp_async.begin() + long(end));
    groups.erase(groups.begin(), groups.begin() + done);
    for (std::size_t& group : groups) group -= end;
}

void cp_async_arrive(void* barrier, Where where) {
    race::Quiet quiet;
    enter("cp_async_arrive", where);
    own_mbarrier(barrier, "cp_async_arrive", where);
    race::release(barrier);
    auto copies = std::make_shared<std::vector<CpAsync>>(self()->cp_async);
    self()->cp_async.clear();
    for (std::size_t& group : self()->cp_async_groups) group = 0;
    add_copy(where, self()->block, [copies, barrier, where] {
        for (const CpAsync& copy : *copies) deliver(copy);
        mbarrier_complete_arrival(barrier, where);
    });
}

// ---- bulk copies into shared memory: by the async proxy, announced to an mbarrier

static void check_bulk(const void* target, const void* source, uint32_t bytes, Where where) {
    const auto odd = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 != 0; };
    if (odd(target) || odd(source) || bytes % 16 || bytes == 0) {
        fail(where, "%s: addresses and size must be multiples of 16, got %p, %p, %u", self()->doing,
             target, source, bytes);
    }
}

void bulk_prefetch(const void* source, uint32_t bytes, Where where) {
    enter("bulk_prefetch", where, 90);
    check_bulk(source, source, bytes, where);
    const auto* first = static_cast<const volatile uint8_t*>(source);
    (void)first[0], (void)first[bytes - 1];  // faults on unallocated memory
}

void bulk_load(void* target, const void* source, uint32_t bytes, void* barrier, uint32_t cta_mask,
               Where where) {
    race::Quiet quiet;
    enter("bulk_load", where, 90);
    check_bulk(target, source, bytes, where);
    Block& own = *self()->block;
    if (cta_mask == 0) cta_mask = 1u << own.cluster_rank;
    for (unsigned rank = 0; cta_mask >> rank; ++rank) {
        if (!(cta_mask >> rank & 1)) continue;
        uint8_t* data = peer(target, rank, where);
        Block* block = &shared_range(data, bytes, "bulk_load", where);
        void* remote = peer(barrier, rank, where);
        checked_mbarrier(remote, "bulk_load", where);
        const std::vector<uint8_t> poison(bytes, 0xff);
        async_proxy_writes(*block, data, poison.data(), bytes);
        add_copy(where, block, [=] {
            async_proxy_writes(*block, data, source, bytes);
            g_machine->counters.bytes_loaded += bytes;
            mbarrier_complete_tx(remote, bytes, where);
        });
    }
    preempt("bulk_load", where);
}

void bulk_copy_to_cluster(void* local_target, const void* source, uint32_t bytes,
                          void* local_barrier, uint32_t rank, Where where) {
    race::Quiet quiet;
    enter("bulk_copy_to_cluster", where, 90);
    if (rank == self()->cluster_rank) {
        fail(where,
             "bulk_copy_to_cluster: to the block itself; PTX has copies to other blocks only");
    }
    uint8_t* target = peer(local_target, rank, where);
    void* barrier = peer(local_barrier, rank, where);
    check_bulk(target, source, bytes, where);
    Block& from = own_range(source, bytes, "bulk_copy_to_cluster", where);
    Block& to = shared_range(target, bytes, "bulk_copy_to_cluster", where);
    require_proxy_fence(from, static_cast<const uint8_t*>(source), bytes, where);
    checked_mbarrier(barrier, "bulk_copy_to_cluster", where);
    const auto* first = static_cast<const uint8_t*>(source);
    const std::vector<uint8_t> data(first, first + bytes), poison(bytes, 0xff);
    async_proxy_writes(to, target, poison.data(), bytes);
    add_copy(where, &to, [=, to_block = &to] {
        if (std::memcmp(source, data.data(), bytes)) {
            fail(where, "the source of a bulk copy was overwritten while it was in flight");
        }
        async_proxy_writes(*to_block, target, data.data(), bytes);
        mbarrier_complete_tx(barrier, bytes, where);
    });
    preempt("bulk_copy_to_cluster", where);
}

// ---- stores by threads that are announced to an mbarrier of another CTA

void store_async(void* local_target, const void* value, std::size_t bytes, void* local_barrier,
                 uint32_t rank, Where where) {
    race::Quiet quiet;
    enter("store_async", where, 90);
    if (cluster_size() == 1) fail(where, "store_async: in a cluster of one block");
    uint8_t* target = peer(local_target, rank, where);
    void* barrier = peer(local_barrier, rank, where);
    checked_mbarrier(barrier, "store_async", where);
    Block& block = shared_range(target, bytes, "store_async", where);
    if (reinterpret_cast<uintptr_t>(target) % bytes) {
        fail(where, "store_async: %p is not a multiple of %zu", local_target, bytes);
    }
    std::array<uint8_t, 16> data;
    std::memcpy(data.data(), value, bytes);
    std::memset(target, 0xff, bytes);
    add_copy(where, &block, [=] {
        std::memcpy(target, data.data(), bytes);
        mbarrier_complete_tx(barrier, static_cast<uint32_t>(bytes), where);
    });
    preempt("store_async", where);
}

// ---- bulk copies out of shared memory: by thread, in groups

void add_bulk_store(const void* source, uint32_t bytes, std::function<void(const uint8_t*)> write,
                    Where where) {
    Block& block = own_range(source, bytes, self()->doing, where);
    require_proxy_fence(block, static_cast<const uint8_t*>(source), bytes, where);
    const auto* first = static_cast<const uint8_t*>(source);
    auto data = std::make_shared<std::vector<uint8_t>>(first, first + bytes);
    Thread* thread = self();
    thread->bulk_stores.push_back(
        {[source, data] { return !std::memcmp(source, data->data(), data->size()); },
         [write = std::move(write), data] {
             write(data->data());
             g_machine->counters.bytes_stored += data->size();
         },
         where, thread->bulk_groups, false});
    preempt(thread->doing, where);
}

void bulk_store(void* target, const void* source, uint32_t bytes, Where where) {
    race::Quiet quiet;
    enter("bulk_store", where, 90);
    check_bulk(target, source, bytes, where);
    add_bulk_store(
        source, bytes, [=](const uint8_t* data) { std::memcpy(target, data, bytes); }, where);
}

void add_elements(Type type, uint8_t* target, const uint8_t* source, uint32_t bytes, Where where) {
    const uint32_t width = bytes_of(type);
    for (uint32_t i = 0; i < bytes; i += width) {
        if (type == Type::kF32) {
            float sum, term;
            std::memcpy(&sum, target + i, 4);
            std::memcpy(&term, source + i, 4);
            sum += term;
            std::memcpy(target + i, &sum, 4);
        } else if (type == Type::kBf16 || type == Type::kFp16) {
            uint16_t a, b;
            std::memcpy(&a, target + i, 2);
            std::memcpy(&b, source + i, 2);
            const bool bf = type == Type::kBf16;
            const float sum = bf ? soft::bf16_to_float({a}) + soft::bf16_to_float({b})
                                 : soft::fp16_to_float({a}) + soft::fp16_to_float({b});
            a = bf ? soft::float_to_bf16(sum).bits : soft::float_to_fp16(sum).bits;
            std::memcpy(target + i, &a, 2);
        } else if (type == Type::kS32 || type == Type::kU32) {
            uint32_t sum, term;
            std::memcpy(&sum, target + i, 4);
            std::memcpy(&term, source + i, 4);
            sum += term;
            std::memcpy(target + i, &sum, 4);
        } else {
            fail(where, "a bulk reduction does not add this type");
        }
    }
}

void bulk_reduce_add(Type type, void* target, const void* source, uint32_t bytes, Where where) {
    race::Quiet quiet;
    enter("bulk_reduce_add", where, 90);
    check_bulk(target, source, bytes, where);
    add_bulk_store(
        source, bytes,
        [=](const uint8_t* data) {
            add_elements(type, static_cast<uint8_t*>(target), data, bytes, where);
        },
        where);
}

void bulk_commit(Where where) {
    enter("bulk_commit", where, 90);
    ++self()->bulk_groups;
}

void bulk_wait(int pending_groups, bool only_read, Where where) {
    race::Quiet quiet;
    enter("bulk_wait", where, 90);
    Thread* thread = self();
    auto& stores = thread->bulk_stores;
    const long done = long(thread->bulk_groups) - pending_groups;
    for (BulkStore& store : stores) {
        if (long(store.group) >= done) continue;
        if (!store.read && !store.source_unchanged()) {
            fail(store.where, "shared memory was overwritten while a bulk store read it");
        }
        store.read = true;
        if (!only_read) store.write();
    }
    if (!only_read) {
        stores.erase(std::remove_if(stores.begin(), stores.end(),
                                    [&](const BulkStore& s) { return long(s.group) < done; }),
                     stores.end());
    }
}

// ---- the end of a thread

void check_thread_exit(Thread& thread) {
    for (const BulkStore& store : thread.bulk_stores) {
        if (store.group == thread.bulk_groups) {
            fail(store.where, "a thread ends without committing its bulk store");
        }
        if (!store.read)
            fail(store.where, "a thread ends while its bulk store reads shared memory");
        add_copy(store.where, nullptr, store.write);
    }
    thread.bulk_stores.clear();
    for (const Copy& copy : g_machine->in_flight) {
        if (thread.block->live == 1 && copy.target == thread.block) {
            fail(copy.where, "the block ends with a copy into its shared memory in flight");
        }
    }
}

}  // namespace k2k::emulator
