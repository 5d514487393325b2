// Barriers of a CTA (16, numbered; 0 is that of all threads) and of a cluster.
#include <algorithm>
#include <iterator>

#include "emulator/machine.h"

namespace k2k::emulator {

static void arrive(NamedBarrier& barrier, unsigned expected, bool waits, const char* name,
                   Where where) {
    Thread* thread = self();
    race::release(&barrier);
    if (barrier.arrived == 0) {
        barrier.expected = expected;
        barrier.where = where;
    } else if (barrier.expected != expected) {
        fail(where, "%s: %u threads expected here, %u at %s:%d", name, expected, barrier.expected,
             barrier.where.file, barrier.where.line);
    }
    int& line = barrier.lines[thread->warp];
    if (line != 0 && line != where.line) {
        fail(where, "%s: lanes of one warp come from two places, here and line %d", name, line);
    }
    line = where.line;
    if (++barrier.arrived < expected) {
        if (waits) {
            barrier.waiting.push_back(thread);
            wait(name, where);
        }
    } else {
        barrier.arrived = 0;
        std::fill(std::begin(barrier.lines), std::end(barrier.lines), 0);
        settle_proxy_fence(*thread->block);
        for (Thread* waiting : barrier.waiting) make_ready(waiting);
        barrier.waiting.clear();
        g_machine->progress = true;
        if (g_machine->options.schedule != Schedule::kRoundRobin) yield(name, where);
    }
    if (waits) race::acquire(&barrier);
}

void sync_block(Where where) {
    race::Quiet quiet;
    enter("sync_block", where);
    Block& block = *self()->block;
    NamedBarrier& barrier = block.barriers[0];
    if (block.live != block.grid->shape.threads.count()) {
        fail(where, "sync_block after a thread of the block has ended");
    }
    if (barrier.arrived && barrier.where.line != where.line) {
        fail(where, "sync_block is reached from two places: others wait at %s:%d",
             barrier.where.file, barrier.where.line);
    }
    barrier.whole_block = true;
    arrive(barrier, block.live, /*waits=*/true, "sync_block", where);
}

static NamedBarrier& named_barrier(uint32_t id, uint32_t num_threads, Where where) {
    if (id == 0 || id > 15) fail(where, "barrier %u: named barriers are 1 to 15", id);
    if (num_threads == 0 || num_threads % kWarpSize) {
        fail(where, "barrier %u: %u threads; warps arrive whole", id, num_threads);
    }
    if (num_threads > self()->block->grid->shape.threads.count()) {
        fail(where, "barrier %u: %u threads, more than the block has", id, num_threads);
    }
    return self()->block->barriers[id];
}

void barrier_sync(uint32_t id, uint32_t num_threads, Where where) {
    race::Quiet quiet;
    enter("barrier_sync", where);
    arrive(named_barrier(id, num_threads, where), num_threads, true, "barrier_sync", where);
}

void barrier_arrive(uint32_t id, uint32_t num_threads, Where where) {
    race::Quiet quiet;
    enter("barrier_arrive", where);
    arrive(named_barrier(id, num_threads, where), num_threads, false, "barrier_arrive", where);
}

// ---- clusters: each thread arrives, then waits, once per phase

uint32_t cluster_size() { return static_cast<uint32_t>(self()->block->cluster->blocks.size()); }

void cluster_recheck(Cluster& cluster) {
    if (cluster.arrived == 0 || cluster.arrived < cluster.live) return;
    cluster.arrived = 0;
    ++cluster.phase;
    for (Block* block : cluster.blocks) settle_proxy_fence(*block);
    for (Thread* waiting : cluster.waiting) make_ready(waiting);
    cluster.waiting.clear();
}

static void arrive_at_cluster(bool releases, const char* name, Where where) {
    race::Quiet quiet;
    enter(name, where, 90);
    Thread* thread = self();
    Cluster& cluster = *thread->block->cluster;
    if (thread->cluster_arrived) fail(where, "%s twice without cluster_wait", name);
    thread->cluster_arrived = true;
    if (releases) race::release(&cluster);
    ++cluster.arrived;
    cluster_recheck(cluster);
    preempt(name, where);
}

void cluster_arrive(Where where) { arrive_at_cluster(true, "cluster_arrive", where); }

void cluster_arrive_relaxed(Where where) {
    arrive_at_cluster(false, "cluster_arrive_relaxed", where);
}

void cluster_wait(Where where) {
    race::Quiet quiet;
    enter("cluster_wait", where, 90);
    Thread* thread = self();
    Cluster& cluster = *thread->block->cluster;
    if (!thread->cluster_arrived) fail(where, "cluster_wait without cluster_arrive");
    if (thread->cluster_phase == cluster.phase) {
        cluster.waiting.push_back(thread);
        wait("cluster_wait", where);
    }
    thread->cluster_arrived = false;
    thread->cluster_phase = cluster.phase;
    race::acquire(&cluster);
}

}  // namespace k2k::emulator
