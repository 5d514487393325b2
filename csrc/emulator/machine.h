#pragma once

// Shared by the emulator's files: the state of the running program (threads, warps, CTAs, clusters,
// copies in flight), and the functions that suspend a thread and resume others.

#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "emulator/device.h"
#include "emulator/emulator.h"
#include "emulator/fiber.h"
#include "emulator/race.h"

namespace k2k::emulator {

constexpr unsigned kWarpSize = 32, kWarpgroupSize = 128;
constexpr uint32_t kFullWarp = 0xffffffffu;
constexpr uint32_t kPoison = 0xffffffffu;  // NaN in every float format, and an absurd index

struct Block;
struct WarpgroupWgmma;
struct WarpWgmma;

// ---- threads and warps

enum class State { kReady, kRunning, kWaiting, kPolling, kDone };

// cp.async: the data of a copy until the thread waits for its group.
struct CpAsync {
    uint8_t* target;
    int bytes, source_bytes;
    const void* source;
    uint8_t data[16];  // as it was when the copy was issued
    Where where;
};

// Bulk copies out of shared memory, by the thread that commits them.
struct BulkStore {
    std::function<bool()> source_unchanged;
    std::function<void()> write;
    Where where;
    unsigned group;
    bool read = false;
};

struct Thread : Builtins {
    Fiber fiber;
    Block* block = nullptr;
    unsigned linear = 0;        // in its CTA
    unsigned machine_warp = 0;  // among all warps that are resident
    State state = State::kDone;

    // For reports: its current or last wrapper.
    const char* doing = "";
    Where where{"", 0};
    const uint64_t* mbarrier = nullptr;
    uint32_t parity = 0;
    unsigned polls = 0;  // in a row

    std::vector<CpAsync> cp_async;
    std::vector<std::size_t> cp_async_groups;  // where each committed group ends
    std::vector<BulkStore> bulk_stores;
    unsigned bulk_groups = 0;
    bool wgmma_fenced = false;
    unsigned wgmma_groups = 0;
    bool cluster_arrived = false;
    unsigned cluster_phase = 0;
    int registers = 0;
    unsigned register_calls = 0;  // of setmaxnreg
};

// A rendezvous of the lanes in `mask`: the last to arrive executes the instruction for all.
struct Rendezvous {
    const char* name = "";
    uint32_t mask = 0, arrived = 0;
    Where where{"", 0};
    Thread* lanes[kWarpSize] = {};
    void* arguments[kWarpSize] = {};
};

struct Warp {
    uint32_t live = 0;
    Rendezvous rendezvous[4];
    std::shared_ptr<WarpWgmma> wgmma;
};

// ---- CTAs and clusters

struct NamedBarrier {
    unsigned expected = 0, arrived = 0;
    bool whole_block = false;
    Where where{"", 0};
    std::vector<Thread*> waiting;
    int lines[kWarpSize] = {};  // where each warp arrives in this phase
};

struct SharedMemory {
    uint8_t* map = nullptr;  // with a page that faults at either end
    std::size_t map_bytes = 0;
    uint8_t* base = nullptr;  // at a multiple of 1024
    std::size_t bytes = 0, capacity = 0;
    std::vector<uint8_t> async_view;  // the content visible to the async proxy
    bool fence_pending = false;
    // Initialised mbarriers -> whether a wait has observed the end of the previous phase.
    std::map<const void*, bool> mbarriers;
};

// Register counts for setmaxnreg.
struct Registers {
    long free = 0;
    std::vector<Thread*> waiting;
    std::vector<unsigned> calls;  // by warpgroup
    Where where{"", 0};           // of the last
};

struct Cluster {
    std::vector<Block*> blocks;
    unsigned live = 0, arrived = 0, phase = 0;
    Where where{"", 0};
    std::vector<Thread*> waiting;
};

struct GridRun {
    Grid shape;
    std::function<void()> kernel;
    unsigned number;
    int next = -1;                 // the launch after this one in its stream
    bool waits = false;            // for an earlier launch of its stream
    mutable std::size_t live = 0;  // threads
};

struct Block {
    const GridRun* grid = nullptr;
    Cluster* cluster = nullptr;
    uint3 index{};
    unsigned cluster_rank = 0, live = 0;
    SharedMemory smem;
    Registers registers;
    std::vector<Warp> warps;
    std::vector<std::shared_ptr<WarpgroupWgmma>> warpgroups;
    NamedBarrier barriers[16];
};

// ---- the machine

// A copy by the async proxy that has not taken effect yet.
struct Copy {
    std::function<void()> deliver;
    Where where;
    Block* target;  // null for global memory
};

class Scheduler {
  public:
    virtual ~Scheduler() = default;
    virtual void push(Thread* thread) = 0;
    virtual Thread* pop() = 0;  // null if no thread is ready
    // Gives the thread's warp the lowest priority, in schedules with priorities.
    virtual void demote(Thread*) {}
};

struct Machine;
std::unique_ptr<Scheduler> make_scheduler(Machine& machine, std::size_t num_warps);

struct Machine {
    Options options;
    uint64_t random_state = 1;
    std::unique_ptr<Scheduler> scheduler;
    Fiber main;
    std::vector<std::unique_ptr<Thread>> threads;  // the first `resident_threads` take part
    std::vector<std::unique_ptr<Block>> blocks;
    std::vector<std::unique_ptr<Cluster>> clusters;
    std::size_t resident_threads = 0, resident_blocks = 0, live = 0;
    unsigned num_grids = 1;
    const std::vector<GridRun>* grids = nullptr;
    std::size_t warps_per_block = 1;  // of the first CTA that is resident
    std::vector<Copy> in_flight;
    const Where* delivering = nullptr;  // for reports: the copy that faults
    std::vector<Thread*> pollers;
    std::vector<Thread*> mbarrier_waiters;
    unsigned idle_rounds = 0;
    bool progress = false;
    uint64_t time = 0;
    bool failed = false;
    std::string error;
    Counters counters;

    Machine() = default;
    ~Machine();
    uint32_t random();
};

extern __thread Machine* g_machine;

inline Thread* self() { return static_cast<Thread*>(g_current); }

// ---- suspending and resuming (scheduler.cpp)

void make_ready(Thread* thread);
// Suspends the calling thread until make_ready() is called for it.
void wait(const char* doing, Where where);
// Runs other threads first.
void yield(const char* doing, Where where);
// After a write that other threads can observe: the schedule may switch to another warp.
void preempt(const char* doing, Where where);
// After a release: the schedule may delay the calling warp behind those that waited for it.
void fall_behind();
// In a polling loop: runs other threads; reports a deadlock if none makes progress.
void poll(const char* doing, Where where);
void switch_to(Thread* next);
Thread* next_thread();
void add_copy(Where where, Block* target, std::function<void()> deliver);
void deliver_all();
bool deliver_now();  // by the options, for copies that complete when they are waited for

// ---- reports (report.cpp)

std::string format(const char* text, ...) __attribute__((format(printf, 1, 2)));
std::string describe(const Thread& thread);
// Ends the launch: throws Error with the message, the line and the calling thread.
[[noreturn]] void fail(Where where, const char* text, ...) __attribute__((format(printf, 2, 3)));
[[noreturn]] void report_deadlock(const char* what);
// Enters a wrapper: later reports name it. Refuses it where the chip of the options lacks it.
void enter(const char* doing, Where where, int arch = 80);

// ---- memory (memory.cpp)

void map_shared_memory(SharedMemory& smem, std::size_t bytes);
void unmap_shared_memory(SharedMemory& smem);
void close_shared_memory(SharedMemory& smem);  // any later access faults
bool shared_memory_overrun(const SharedMemory& smem);
// The bytes at a shared-space address.
uint8_t* shared_bytes(uint32_t address, std::size_t bytes, unsigned align, const char* what,
                      Where where);
// The corresponding address in the shared memory of CTA `rank` of the cluster.
uint8_t* peer(const void* pointer, uint32_t rank, Where where);
// The CTA whose shared memory holds the pointer; null if none.
Block* owner_of(const void* pointer);
// The async proxy writes, or reads, shared memory of `block`.
void async_proxy_writes(Block& block, uint8_t* target, const void* data, std::size_t bytes);
void require_proxy_fence(Block& block, const uint8_t* source, std::size_t bytes, Where where);
void settle_proxy_fence(Block& block);
const char* explain_address(const void* address);

// ---- barriers (barrier.cpp)

// Ends the phase when all live threads have arrived.
void cluster_recheck(Cluster& cluster);

// ---- rendezvous (warp.cpp)

using Execute = void (*)(Thread** lanes, void** arguments, uint32_t mask);
void rendezvous(const char* name, uint32_t mask, void* argument, Execute execute, Where where);

// ---- mbarrier.cpp, async_copy.cpp, wgmma.cpp

uint64_t* checked_mbarrier(void* barrier, const char* what, Where where);
uint64_t* own_mbarrier(void* barrier, const char* what, Where where);  // of the caller's CTA
// By copies: bytes have arrived, or a thread's cp.async are complete.
void mbarrier_complete_tx(void* barrier, uint32_t bytes, Where where);
void mbarrier_complete_arrival(void* barrier, Where where);
std::string describe_mbarrier(const Thread& thread);
void check_registers(const Registers& registers);  // at the end of the CTA
void check_thread_exit(Thread& thread);
// Bulk stores and reductions of a thread; `write` gets the bytes of shared memory.
void add_bulk_store(const void* source, uint32_t bytes, std::function<void(const uint8_t*)> write,
                    Where where);
void add_elements(Type type, uint8_t* target, const uint8_t* source, uint32_t bytes, Where where);
// The CTA around a range of shared memory.
Block& shared_range(const void* pointer, std::size_t bytes, const char* what, Where where);
// The same; it must be the caller's own CTA.
Block& own_range(const void* pointer, std::size_t bytes, const char* what, Where where);

}  // namespace k2k::emulator
