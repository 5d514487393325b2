#pragma once

// A fiber: a stack and the place where its computation stopped. One OS thread runs many, one at a
// time; a switch costs about ten nanoseconds where the assembly version serves (x86-64).

#include <cstddef>

namespace k2k::emulator {

struct Fiber {
    void* saved = nullptr;  // while it does not run: the place on its stack where all else is
    char* stack = nullptr;  // lowest address; the page below it faults
    std::size_t stack_bytes = 0;
    void* race_detector = nullptr;  // TSan's view of it
    void* fake_stack = nullptr;     // ASan's
    bool ended = false;             // its last computation came to its end
};

void allocate_stack(Fiber& fiber);
void free_stack(Fiber& fiber);

// Makes the next switch to `fiber` call `entry`, which must never return. `color` spreads the stack
// tops of neighbours over the cache.
void prepare(Fiber& fiber, void (*entry)(), unsigned color);

// Stops `from` here and goes on with `to`. `last`: nobody will come back to `from`.
void switch_fiber(Fiber& from, Fiber& to, bool last = false);

// What a fiber does first.
void fiber_started(Fiber& fiber);

}  // namespace k2k::emulator
