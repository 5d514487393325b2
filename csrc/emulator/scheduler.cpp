// Chooses the next thread, by three schedules, and handles the case that none can run.
#include <algorithm>
#include <utility>

#include "emulator/machine.h"

namespace k2k::emulator {

__thread Builtins* g_current;
__thread Machine* g_machine;

uint32_t Machine::random() {  // xorshift64
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return static_cast<uint32_t>(random_state >> 32);
}

namespace {

constexpr unsigned kMaxIdleRounds = 1000;  // while all threads poll
// Time advances while all threads poll, so that a wait with a timeout ends.
constexpr uint64_t kIdleNanoseconds = 1000000;

class RoundRobin : public Scheduler {
  public:
    void push(Thread* thread) override { ready_.push_back(thread); }
    Thread* pop() override {
        if (ready_.empty()) return nullptr;
        Thread* thread = ready_.front();
        ready_.pop_front();
        return thread;
    }

  private:
    std::deque<Thread*> ready_;
};

class DepthFirst : public Scheduler {
  public:
    void push(Thread* thread) override { ready_.push_back(thread); }
    Thread* pop() override {
        if (ready_.empty()) return nullptr;
        Thread* thread = ready_.back();
        ready_.pop_back();
        return thread;
    }

  private:
    std::vector<Thread*> ready_;
};

// Probabilistic concurrency testing: the warp of the highest priority runs until it waits, so that
// some warps fall as far behind as the program allows. Priorities change rarely.
class Pct : public Scheduler {
  public:
    Pct(Machine& machine, std::size_t num_warps)
        : machine_(machine),
          warp_at_(num_warps),
          rank_of_(num_warps),
          lanes_(num_warps),
          threads_(num_warps * kWarpSize),
          ready_((num_warps + 63) / 64) {
        for (std::size_t warp = 0; warp < num_warps; ++warp) {
            warp_at_[warp] = rank_of_[warp] = static_cast<unsigned>(warp);
        }
        shuffle_ranks();
    }

    void push(Thread* thread) override {
        threads_[thread->machine_warp * kWarpSize + thread->lane] = thread;
        lanes_[thread->machine_warp] |= 1u << thread->lane;
        set_ready(rank_of_[thread->machine_warp], true);
    }

    Thread* pop() override {
        if (machine_.random() % 256 == 0) {
            const std::size_t count = warp_at_.size();
            swap_ranks(machine_.random() % count, machine_.random() % count);
        }
        for (std::size_t word = 0; word < ready_.size(); ++word) {
            if (ready_[word] == 0) continue;
            const unsigned rank = static_cast<unsigned>(word * 64 + __builtin_ctzll(ready_[word]));
            return take_lane(warp_at_[rank]);
        }
        return nullptr;
    }

    void demote(Thread* thread) override {
        swap_ranks(rank_of_[thread->machine_warp], rank_of_.size() - 1);
    }

  private:
    // Seeds 2 and 3 let the first, or the last, CTA run far ahead of the others: with these two
    // every CTA has been ahead of its neighbour. Further seeds mix all warps.
    void shuffle_ranks() {
        const std::size_t count = warp_at_.size();
        const uint64_t seed = machine_.options.seed;
        if (seed == 3) std::reverse(warp_at_.begin(), warp_at_.end());
        for (std::size_t rank = 0; rank < count; ++rank) {
            rank_of_[warp_at_[rank]] = static_cast<unsigned>(rank);
        }
        const std::size_t span = seed == 2 || seed == 3 ? machine_.warps_per_block : count;
        for (std::size_t first = 0; first < count; first += span) {
            const std::size_t size = std::min(span, count - first);
            for (std::size_t i = size; i > 1; --i) {
                swap_ranks(first + i - 1, first + machine_.random() % i);
            }
        }
    }

    Thread* take_lane(unsigned warp) {
        uint32_t lanes = lanes_[warp];
        for (uint32_t skip = machine_.random() % __builtin_popcount(lanes); skip > 0; --skip) {
            lanes &= lanes - 1;
        }
        const unsigned lane = __builtin_ctz(lanes);
        lanes_[warp] &= ~(1u << lane);
        if (lanes_[warp] == 0) set_ready(rank_of_[warp], false);
        return threads_[warp * kWarpSize + lane];
    }

    void set_ready(unsigned rank, bool ready) {
        const uint64_t bit = uint64_t(1) << rank % 64;
        ready_[rank / 64] = ready ? ready_[rank / 64] | bit : ready_[rank / 64] & ~bit;
    }

    void swap_ranks(std::size_t a, std::size_t b) {
        std::swap(warp_at_[a], warp_at_[b]);
        for (const std::size_t rank : {a, b}) {
            rank_of_[warp_at_[rank]] = static_cast<unsigned>(rank);
            set_ready(static_cast<unsigned>(rank), lanes_[warp_at_[rank]] != 0);
        }
    }

    Machine& machine_;
    std::vector<unsigned> warp_at_, rank_of_;  // priority rank to warp and back; 0 runs first
    std::vector<uint32_t> lanes_;              // ready lanes of a warp
    std::vector<Thread*> threads_;
    std::vector<uint64_t> ready_;  // bit per rank
};

void deliver(std::size_t index) {
    Copy copy = std::move(g_machine->in_flight[index]);
    g_machine->in_flight.erase(g_machine->in_flight.begin() + static_cast<long>(index));
    g_machine->delivering = &copy.where;
    copy.deliver();
    g_machine->delivering = nullptr;
    g_machine->progress = true;
}

}  // namespace

std::unique_ptr<Scheduler> make_scheduler(Machine& machine, std::size_t num_warps) {
    switch (machine.options.schedule) {
        case Schedule::kDepthFirst:
            return std::make_unique<DepthFirst>();
        case Schedule::kPct:
            return std::make_unique<Pct>(machine, num_warps);
        default:
            return std::make_unique<RoundRobin>();
    }
}

void set_seed(Options& options, uint64_t seed) {
    options.seed = seed;
    options.schedule = seed == 0   ? Schedule::kRoundRobin
                       : seed == 1 ? Schedule::kDepthFirst
                                   : Schedule::kPct;
    options.delivery = seed % 8 == 6   ? Delivery::kRandom
                       : seed % 8 == 7 ? Delivery::kEarly
                                       : Delivery::kLate;
}

void make_ready(Thread* thread) {
    thread->state = State::kReady;
    g_machine->scheduler->push(thread);
}

// Makes polling threads ready again.
static void wake_pollers() {
    std::vector<Thread*> pollers;
    pollers.swap(g_machine->pollers);
    for (Thread* thread : pollers) make_ready(thread);
}

Thread* next_thread() {
    Machine& machine = *g_machine;
    const auto& copies = machine.in_flight;
    if (machine.options.delivery == Delivery::kRandom && !copies.empty() &&
        machine.random() % 8 == 0) {
        deliver(machine.random() % copies.size());
    }
    for (;;) {
        if (Thread* thread = machine.scheduler->pop()) return thread;
        if (!copies.empty()) {
            const bool in_order = machine.options.schedule == Schedule::kRoundRobin;
            deliver(in_order ? 0 : machine.random() % copies.size());
            continue;
        }
        if (machine.pollers.empty()) {
            report_deadlock("no thread can run and no copy is in flight");
        }
        machine.idle_rounds = machine.progress ? 0 : machine.idle_rounds + 1;
        if (!machine.progress) machine.time += kIdleNanoseconds;
        machine.progress = false;
        if (machine.idle_rounds > kMaxIdleRounds) {
            report_deadlock("the threads that still run only poll, and nothing changes");
        }
        wake_pollers();
    }
}

void switch_to(Thread* next) {
    Thread* previous = self();
    next->state = State::kRunning;
    if (next == previous) return;
    ++g_machine->counters.switches;
    g_current = next;
    switch_fiber(previous->fiber, next->fiber);
}

static void stop(const char* doing, Where where) {
    Thread* thread = self();
    thread->doing = doing;
    thread->where = where;
    switch_to(next_thread());
}

void wait(const char* doing, Where where) {
    self()->state = State::kWaiting;
    stop(doing, where);
}

void yield(const char* doing, Where where) {
    make_ready(self());
    stop(doing, where);
}

void preempt(const char* doing, Where where) {
    Machine& machine = *g_machine;
    self()->polls = 0;
    machine.progress = true;
    if (machine.options.schedule != Schedule::kPct || machine.random() % 4) return;
    wake_pollers();
    yield(doing, where);
}

// Resumes the calling thread once no other can run and copies have completed.
static void go_last(const char* doing, Where where) {
    self()->state = State::kPolling;
    g_machine->pollers.push_back(self());
    stop(doing, where);
}

void fall_behind() {
    Machine& machine = *g_machine;
    Thread* thread = self();
    if (machine.options.schedule == Schedule::kDepthFirst) {
        go_last(thread->doing, thread->where);
    } else if (machine.options.schedule == Schedule::kPct && machine.random() % 4 == 0) {
        machine.scheduler->demote(thread);
        wake_pollers();
        yield(thread->doing, thread->where);
    }
}

void poll(const char* doing, Where where) {
    Machine& machine = *g_machine;
    Thread* thread = self();
    ++machine.time;
    ++thread->polls;
    if (machine.options.schedule == Schedule::kPct && thread->polls < 4 &&
        machine.random() % 2 == 0) {
        return;  // polls again before any other thread runs
    }
    go_last(doing, where);
}

void add_copy(Where where, Block* target, std::function<void()> deliver_copy) {
    Machine& machine = *g_machine;
    machine.in_flight.push_back({std::move(deliver_copy), where, target});
    if (machine.options.delivery == Delivery::kEarly) deliver(machine.in_flight.size() - 1);
}

void deliver_all() {
    while (!g_machine->in_flight.empty()) deliver(g_machine->in_flight.size() - 1);
}

bool deliver_now() {
    const Delivery delivery = g_machine->options.delivery;
    return delivery == Delivery::kEarly ||
           (delivery == Delivery::kRandom && g_machine->random() % 2 == 0);
}

}  // namespace k2k::emulator
