#pragma once

// The interface of the emulator for the host: options, launches, guarded "global" memory, counters.
// csrc/emulator/README.md describes the model.

#include <cstddef>
#include <cstdint>
#include <functional>
#include <stdexcept>

#include "emulator/builtins.h"

namespace k2k::emulator {

// Which thread runs next.
enum class Schedule {
    kRoundRobin,  // FIFO
    kDepthFirst,  // LIFO; CTAs in reverse order
    kPct,         // a random priority per warp, rarely changed (Burckhardt et al., ASPLOS 2010)
};

// When an asynchronous copy or wgmma takes effect.
enum class Delivery {
    kLate,    // as late as legal
    kEarly,   // at once
    kRandom,  // at any time in between
};

struct Options {
    Schedule schedule = Schedule::kRoundRobin;
    Delivery delivery = Delivery::kLate;
    uint64_t seed = 0;
    int arch = 90;            // compute capability x 10: wrappers of a later one are refused
    bool hopper_fp8 = false;  // FP8 products summed as H100's tensor cores do
};

// The options of the calling OS thread, valid from its next launch on.
Options& options();

// The options of a seed. 0: round robin, 1: depth first, any other: PCT with that seed. Copies
// complete as late as legal, which finds most bugs; seeds 6 mod 8 complete them at random times and
// seeds 7 mod 8 at once, for kernels that rely on late copies.
void set_seed(Options& options, uint64_t seed);

// An error in a kernel, or a deadlock. The message names the CTA, the thread and the line.
class Error : public std::runtime_error {
    using std::runtime_error::runtime_error;
};

struct Grid {
    dim3 blocks;
    dim3 threads;
    std::size_t smem_bytes;
    unsigned cluster;
    bool cooperative;
    const void* stream = nullptr;  // used by Together
};

// Runs `kernel` once per CUDA thread; returns when all have ended, throws Error.
void launch(const Grid& grid, std::function<void()> kernel);

// Collects launches and runs them concurrently with all CTAs resident, as for ranks of a node,
// whose kernels wait for each other. Launches on one stream run in order, unless it is null.
class Together {
  public:
    Together();
    ~Together();
    Together(const Together&) = delete;
    void run();
};

// Memory that ends at a guard zone, whose access faults; filled with 0xff.
void* allocate(std::size_t bytes);
void release(void* pointer);

// Counters of the calling OS thread.
struct Counters {
    uint64_t launches = 0;
    uint64_t switches = 0;      // between CUDA threads
    uint64_t bytes_loaded = 0;  // by the wrappers of loads and asynchronous copies
    uint64_t bytes_stored = 0;
};
const Counters& counters();

}  // namespace k2k::emulator
