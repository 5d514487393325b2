// A launch: CTAs are made resident a few clusters at a time, their threads run as fibers, and
// an error in any of them is thrown as an exception by launch().
#include <pthread.h>
#include <signal.h>

#include <algorithm>
#include <cstring>
#include <exception>
#include <map>
#include <mutex>

#include "emulator/machine.h"

namespace k2k::emulator {

namespace {

constexpr std::size_t kMaxSharedMemory = 227 * 1024, kRegisters = 64 * 1024;
constexpr std::size_t kResidentThreads = 2048;  // of an SM

thread_local Options t_options;
thread_local Machine t_machine;
thread_local std::vector<GridRun>* t_together = nullptr;

[[noreturn]] void back_to_launch(std::string error) {
    Machine& machine = *g_machine;
    machine.failed = true;
    machine.error = std::move(error);
    Fiber& fiber = self()->fiber;
    switch_fiber(fiber, machine.main, /*last=*/true);
    __builtin_unreachable();
}

// ---- faults

constexpr int kSignals[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL};

// Handlers belong to the process, launches to threads of it: the first launch installs them and the
// last one restores what was there before.
std::mutex g_fault_mutex;
std::size_t g_fault_users = 0;  // launches that run
struct sigaction g_former[std::size(kSignals)];

// A fault outside kernels, of any thread: as if there were no emulator.
void forward(int signal, siginfo_t* info, void* context) {
    const auto* place = std::find(std::begin(kSignals), std::end(kSignals), signal);
    const struct sigaction& former = g_former[place - std::begin(kSignals)];
    if (former.sa_flags & SA_SIGINFO) return former.sa_sigaction(signal, info, context);
    if (former.sa_handler != SIG_DFL && former.sa_handler != SIG_IGN) {
        return former.sa_handler(signal);
    }
    ::signal(signal, SIG_DFL);              // the faulting instruction is executed again
    if (info->si_code <= 0) raise(signal);  // sent by a process: no instruction will repeat it
}

// Runs on the signal stack; returns by switching to the fiber of launch().
void on_signal(int signal, siginfo_t* info, void* context) {
    Machine* machine = g_machine;
    if (!machine || !g_current) return forward(signal, info, context);
    const Thread& thread = *self();
    const char* what = signal == SIGFPE   ? "integer division by zero"
                       : signal == SIGILL ? "undefined behaviour: a misaligned vector access, an "
                                            "index out of bounds or a shift too far"
                                          : explain_address(info->si_addr);
    std::string message = what;
    if (signal == SIGSEGV || signal == SIGBUS) message += format(", address %p", info->si_addr);
    if (machine->delivering) {
        message += format(", by the copy issued at %s:%d", machine->delivering->file,
                          machine->delivering->line);
        back_to_launch(message);
    }
    message += format(", after %s at %s:%d, ", thread.doing, thread.where.file, thread.where.line);
    back_to_launch(message + describe(thread));
}

bool is_ours(const struct sigaction& action) {
    return action.sa_flags & SA_SIGINFO && action.sa_sigaction == on_signal;
}

// Directs faults in kernels to on_signal while there is one, in any thread.
class FaultHandlers {
  public:
    FaultHandlers() {
        stack_.resize(64 * 1024);
        stack_t stack = {};
        stack.ss_sp = stack_.data();
        stack.ss_size = stack_.size();
        sigaltstack(&stack, &old_stack_);  // of this thread
        const std::lock_guard<std::mutex> lock(g_fault_mutex);
        if (g_fault_users++ > 0) return;
        struct sigaction action = {};
        action.sa_sigaction = on_signal;
        action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
        for (std::size_t i = 0; i < std::size(kSignals); ++i) {
            struct sigaction found = {};
            sigaction(kSignals[i], nullptr, &found);
            if (is_ours(found)) continue;  // restored by one who had installed another over it
            g_former[i] = found;
            sigaction(kSignals[i], &action, nullptr);
        }
    }
    ~FaultHandlers() {
        {
            const std::lock_guard<std::mutex> lock(g_fault_mutex);
            if (--g_fault_users == 0) restore();
        }
        sigaltstack(&old_stack_, nullptr);
    }
    FaultHandlers(const FaultHandlers&) = delete;
    FaultHandlers& operator=(const FaultHandlers&) = delete;

  private:
    static void restore() {
        for (std::size_t i = 0; i < std::size(kSignals); ++i) {
            struct sigaction found = {};
            sigaction(kSignals[i], nullptr, &found);
            if (is_ours(found)) sigaction(kSignals[i], &g_former[i], nullptr);
        }
    }

    std::vector<char> stack_;
    stack_t old_stack_ = {};
};

// ---- the life of a thread

// Starts the next launch of the stream after the thread's, which has ended.
void start_next_grid(const Thread& thread) {
    const GridRun& ended = *thread.block->grid;
    if (ended.next < 0) return;
    deliver_all();
    const GridRun* next = &(*g_machine->grids)[ended.next];
    for (std::size_t i = 0; i < g_machine->resident_threads; ++i) {
        Thread* other = g_machine->threads[i].get();
        if (other->block->grid == next) make_ready(other);
    }
}

void thread_exit() {
    Thread& thread = *self();
    Block& block = *thread.block;
    check_thread_exit(thread);
    thread.state = State::kDone;
    g_machine->progress = true;
    Warp& warp = block.warps[thread.warp];
    warp.live &= ~(1u << thread.lane);
    for (const Rendezvous& r : warp.rendezvous) {
        if (r.arrived && r.mask >> thread.lane & 1) {
            fail(r.where, "a thread ends although other lanes wait for it in %s", r.name);
        }
    }
    --block.live;
    --block.cluster->live;
    --g_machine->live;
    --block.grid->live;
    const NamedBarrier& barrier = block.barriers[0];
    if (barrier.arrived && barrier.whole_block) {
        fail(barrier.where, "a thread ends although others wait for it in sync_block");
    }
    cluster_recheck(*block.cluster);
    if (block.grid->live == 0) start_next_grid(thread);
    if (block.live > 0) return;
    if (shared_memory_overrun(block.smem)) {
        fail(thread.where, "the block wrote outside its %zu bytes of shared memory; it ended",
             block.smem.bytes);
    }
    check_registers(block.registers);
    if (block.cluster->blocks.size() > 1) close_shared_memory(block.smem);
}

void run_kernel() {
    fiber_started(self()->fiber);
    std::string error;
    try {
        const GridRun& grid = *self()->block->grid;
        race::acquire(&g_machine->main);
        if (grid.waits) race::acquire(&grid);
        grid.kernel();
        race::release(&g_machine->live);
        if (grid.next >= 0) race::release(&(*g_machine->grids)[grid.next]);
        race::Quiet quiet;
        thread_exit();
        self()->fiber.ended = true;
        if (g_machine->live > 0) switch_to(next_thread());
        deliver_all();
        switch_fiber(self()->fiber, g_machine->main, /*last=*/true);
    } catch (const std::exception& exception) {
        error = exception.what();
    }
    self()->fiber.ended = false;
    back_to_launch(std::move(error));
}

// ---- making CTAs resident

uint3 unflatten(std::size_t index, dim3 extent) {
    return {static_cast<unsigned>(index % extent.x),
            static_cast<unsigned>(index / extent.x % extent.y),
            static_cast<unsigned>(index / extent.x / extent.y)};
}

Thread& add_thread(Machine& machine) {
    if (machine.resident_threads == machine.threads.size()) {
        machine.threads.push_back(std::make_unique<Thread>());
        allocate_stack(machine.threads.back()->fiber);
    }
    Thread& thread = *machine.threads[machine.resident_threads++];
    const Fiber fiber = thread.fiber;
    thread = Thread();
    thread.fiber = fiber;
    return thread;
}

void add_block(Machine& machine, const GridRun& grid, Cluster& cluster, std::size_t index) {
    if (machine.resident_blocks == machine.blocks.size()) {
        machine.blocks.push_back(std::make_unique<Block>());
    }
    Block& block = *machine.blocks[machine.resident_blocks++];
    const std::size_t num_threads = grid.shape.threads.count();
    const std::size_t num_warps = (num_threads + kWarpSize - 1) / kWarpSize;
    const auto first_warp = static_cast<unsigned>((machine.resident_threads + 31) / kWarpSize);

    block.grid = &grid;
    block.cluster = &cluster;
    block.index = unflatten(index, grid.shape.blocks);
    block.cluster_rank = static_cast<unsigned>(cluster.blocks.size());
    block.live = static_cast<unsigned>(num_threads);
    grid.live += num_threads;
    map_shared_memory(block.smem, grid.shape.smem_bytes);
    block.warps.assign(num_warps, Warp());
    const std::size_t num_warpgroups = (num_threads + kWarpgroupSize - 1) / kWarpgroupSize;
    block.warpgroups.assign(num_warpgroups, nullptr);
    block.registers = Registers();
    block.registers.calls.resize(num_warpgroups);
    for (NamedBarrier& barrier : block.barriers) barrier = NamedBarrier();
    cluster.blocks.push_back(&block);
    cluster.live += block.live;

    for (std::size_t i = 0; i < num_threads; ++i) {
        Thread& thread = add_thread(machine);
        thread.thread_idx = unflatten(i, grid.shape.threads);
        thread.block_idx = block.index;
        thread.block_dim = grid.shape.threads;
        thread.grid_dim = grid.shape.blocks;
        thread.cluster_rank = block.cluster_rank;
        thread.block = &block;
        thread.linear = static_cast<unsigned>(i);
        thread.lane = static_cast<unsigned>(i % kWarpSize);
        thread.warp = static_cast<unsigned>(i / kWarpSize);
        thread.machine_warp = first_warp + thread.warp;
        // The registers that ptxas allocates for __launch_bounds__(num_threads, 1).
        thread.registers =
            static_cast<int>(std::min<std::size_t>(256, kRegisters / num_threads / 8 * 8));
        thread.doing = "the start";
        block.warps[thread.warp].live |= 1u << thread.lane;
        prepare(thread.fiber, run_kernel, thread.linear);
    }
}

void clear(Machine& machine) {
    machine.resident_threads = machine.resident_blocks = machine.live = 0;
    machine.clusters.clear();
    machine.in_flight.clear();
    machine.pollers.clear();
    machine.mbarrier_waiters.clear();
    machine.idle_rounds = 0;
    machine.delivering = nullptr;
    machine.failed = false;
}

// Runs the resident CTAs to their end.
void run_resident(Machine& machine) {
    std::size_t num_warps = 0;
    machine.live = machine.resident_threads;
    for (std::size_t i = 0; i < machine.resident_threads; ++i) {
        num_warps = std::max<std::size_t>(num_warps, machine.threads[i]->machine_warp + 1);
    }
    machine.warps_per_block = machine.blocks[0]->warps.size();
    machine.scheduler = make_scheduler(machine, num_warps);
    for (std::size_t i = 0; i < machine.resident_threads; ++i) {
        Thread* thread = machine.threads[i].get();
        if (!thread->block->grid->waits) make_ready(thread);
    }
    race::release(&machine.main);
    Thread* first = next_thread();
    first->state = State::kRunning;
    g_current = first;
    switch_fiber(machine.main, first->fiber);
    g_current = nullptr;
    race::acquire(&machine.live);
    if (machine.failed) throw Error(machine.error);
}

void describe_main_stack([[maybe_unused]] Fiber& main) {
#ifdef K2K_TSAN
    main.race_detector = __tsan_get_current_fiber();
#endif
#ifdef K2K_ASAN
    pthread_attr_t attributes;
    pthread_getattr_np(pthread_self(), &attributes);
    void* stack;
    pthread_attr_getstack(&attributes, &stack, &main.stack_bytes);
    main.stack = static_cast<char*>(stack);
    pthread_attr_destroy(&attributes);
#endif
}

void check(const Grid& grid) {
    const std::size_t threads = grid.threads.count();
    if (threads == 0 || threads > 1024) {
        throw Error(format("launch: %zu threads a block; 1 to 1024 fit", threads));
    }
    if (grid.smem_bytes > kMaxSharedMemory) {
        throw Error(format("launch: %zu bytes of shared memory a block; at most %zu fit",
                           grid.smem_bytes, kMaxSharedMemory));
    }
    if (grid.cluster == 0 || grid.cluster > 16 || grid.blocks.x % grid.cluster) {
        throw Error(format("launch: %u blocks along x do not divide into clusters of %u",
                           grid.blocks.x, grid.cluster));
    }
    if (grid.blocks.count() == 0) throw Error("launch: an empty grid");
}

// Orders the launches of each stream.
void chain(std::vector<GridRun>& grids) {
    std::map<const void*, std::size_t> last;
    for (std::size_t i = 0; i < grids.size(); ++i) {
        const void* stream = grids[i].shape.stream;
        if (stream == nullptr) continue;
        const auto before = last.find(stream);
        if (before != last.end()) {
            grids[before->second].next = static_cast<int>(i);
            grids[i].waits = true;
        }
        last[stream] = i;
    }
}

void run(const std::vector<GridRun>& grids) {
    Machine& machine = t_machine;
    if (g_current) throw Error("launch: called from within a kernel");
    machine.grids = &grids;
    g_machine = &machine;
    machine.options = t_options;
    machine.random_state = (machine.options.seed + 1) * 0x9e3779b97f4a7c15ull;
    machine.num_grids = static_cast<unsigned>(grids.size());
    describe_main_stack(machine.main);
    FaultHandlers handlers;
    race::Quiet quiet;

    bool cooperative = grids.size() > 1;
    std::vector<std::pair<const GridRun*, std::size_t>> clusters;  // grid, first CTA
    for (const GridRun& grid : grids) {
        check(grid.shape);
        if (grid.shape.cluster > 1 && machine.options.arch < 90) {
            throw Error(format("launch: clusters need sm_90; this launch emulates sm_%d",
                               machine.options.arch));
        }
        cooperative |= grid.shape.cooperative;
        for (std::size_t i = 0; i < grid.shape.blocks.count(); i += grid.shape.cluster) {
            clusters.emplace_back(&grid, i);
        }
        ++machine.counters.launches;
    }
    if (machine.options.schedule == Schedule::kDepthFirst) {
        std::reverse(clusters.begin(), clusters.end());
    } else if (machine.options.schedule == Schedule::kPct) {
        for (std::size_t i = clusters.size(); i > 1; --i) {
            std::swap(clusters[i - 1], clusters[machine.random() % i]);
        }
    }
    const Grid& shape = grids[0].shape;
    std::size_t batch = 2;
    if (machine.options.schedule == Schedule::kPct) {
        batch = std::max(batch, kResidentThreads / (shape.threads.count() * shape.cluster));
    }
    if (cooperative) batch = clusters.size();
    for (std::size_t first = 0; first < clusters.size(); first += batch) {
        clear(machine);
        for (std::size_t i = first; i < std::min(first + batch, clusters.size()); ++i) {
            const auto [grid, first_block] = clusters[i];
            machine.clusters.push_back(std::make_unique<Cluster>());
            for (unsigned rank = 0; rank < grid->shape.cluster; ++rank) {
                add_block(machine, *grid, *machine.clusters.back(), first_block + rank);
            }
        }
        run_resident(machine);
    }
}

}  // namespace

Machine::~Machine() {
    for (const auto& thread : threads) free_stack(thread->fiber);
    for (const auto& block : blocks) unmap_shared_memory(block->smem);
}

Options& options() { return t_options; }

int capability() { return g_machine->options.arch; }
const Counters& counters() { return t_machine.counters; }

void launch(const Grid& grid, std::function<void()> kernel) {
    if (t_together) {
        const auto number = static_cast<unsigned>(t_together->size());
        t_together->push_back(GridRun{grid, std::move(kernel), number});
        return;
    }
    run({GridRun{grid, std::move(kernel), 0}});
}

static thread_local std::vector<GridRun> t_queue;

Together::Together() {
    if (t_together) throw Error("Together: one is open already");
    t_queue.clear();
    t_together = &t_queue;
}

Together::~Together() { t_together = nullptr; }

void Together::run() {
    t_together = nullptr;
    chain(t_queue);
    emulator::run(t_queue);
}

}  // namespace k2k::emulator
