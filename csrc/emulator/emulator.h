#pragma once

// The emulator as the host sees it: options, launching, guarded "global" memory, counters.
// csrc/emulator/README.md describes the model.

#include <cstddef>
#include <cstdint>
#include <functional>
#include <stdexcept>

#include "emulator/builtins.h"

namespace k2k::emulator {

// Which thread runs next.
enum class Schedule {
    kRoundRobin,  // first come, first served
    kDepthFirst,  // the last one made ready; blocks in reverse order
    kPct,         // a random priority per warp, rarely changed (Burckhardt et al., ASPLOS 2010)
};

// When an asynchronous copy or wgmma takes effect.
enum class Delivery {
    kLate,    // as late as the program allows
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

// Those of the calling OS thread; they hold from its next launch on.
Options& options();

// What a seed stands for. 0: round robin, 1: depth first, any other: PCT with that seed. Copies
// come late, which finds most; of every eight seeds the seventh (6, 14, ...) has them come at any
// time and the eighth (7, 15, ...) at once, for kernels that rely on lateness.
void set_seed(Options& options, uint64_t seed);

// A kernel did something wrong, or waits for ever. The message names block, thread and line.
class Error : public std::runtime_error {
    using std::runtime_error::runtime_error;
};

struct Grid {
    dim3 blocks;
    dim3 threads;
    std::size_t smem_bytes;
    unsigned cluster;
    bool cooperative;
    const void* stream = nullptr;  // matters in Together
};

// Runs `kernel` once per CUDA thread; returns when all have ended, throws Error.
void launch(const Grid& grid, std::function<void()> kernel);

// Collects launches and runs them at once, all blocks resident: the ranks of a node, whose kernels
// wait for one another. Launches on the same stream, unless it is null, run one after the other.
class Together {
  public:
    Together();
    ~Together();
    Together(const Together&) = delete;
    void run();
};

// Memory whose end lies at a zone that faults when touched; filled with 0xff.
void* allocate(std::size_t bytes);
void release(void* pointer);

// Counted on the calling OS thread since it started.
struct Counters {
    uint64_t launches = 0;
    uint64_t switches = 0;      // between CUDA threads
    uint64_t bytes_loaded = 0;  // by the wrappers of loads and asynchronous copies
    uint64_t bytes_stored = 0;
};
const Counters& counters();

}  // namespace k2k::emulator
