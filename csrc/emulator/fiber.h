#pragma once

// A fiber: a stack and a saved program counter. One OS thread runs many, one at a time; a switch
// takes about ten nanoseconds in assembly (x86-64).

#include <cstddef>

namespace k2k::emulator {

struct Fiber {
    void* saved = nullptr;  // while suspended: its stack pointer; other registers are on the stack
    char* stack = nullptr;  // lowest address; the page below it faults
    std::size_t stack_bytes = 0;
    void* race_detector = nullptr;  // its TSan fiber
    void* fake_stack = nullptr;     // ASan's
    bool ended = false;             // its last computation has ended
};

void allocate_stack(Fiber& fiber);
void free_stack(Fiber& fiber);

// Makes the next switch to `fiber` call `entry`, which must not return. `color` spreads the stack
// tops of neighbouring fibers over the cache.
void prepare(Fiber& fiber, void (*entry)(), unsigned color);

// Suspends `from` and resumes `to`. `last`: `from` is never resumed.
void switch_fiber(Fiber& from, Fiber& to, bool last = false);

// The first call of a fiber.
void fiber_started(Fiber& fiber);

}  // namespace k2k::emulator
