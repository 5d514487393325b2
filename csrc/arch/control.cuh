#pragma once

// Register allocation, time, dependent launches.

#include "arch/body.h"

namespace k2k::arch {

// Releases registers of each thread of the warpgroup (down to kCount) or acquires more (up to
// kCount), waiting until other warpgroups of the CTA have released them. kCount: a multiple of 8
// from 24 to 256. All four warps execute it; __launch_bounds__ fixes a thread's initial number.
// sm_90a.
// PTX: #miscellaneous-instructions-setmaxnreg
template <int kCount>
K2K_DEVICE void registers_decrease(K2K_WHERE_ONLY) {
    static_assert(kCount % 8 == 0 && kCount >= 24 && kCount <= 256);
    K2K_EMULATE(set_max_registers(kCount, false, where));
    K2K_PTX("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}
template <int kCount>
K2K_DEVICE void registers_increase(K2K_WHERE_ONLY) {
    static_assert(kCount % 8 == 0 && kCount >= 24 && kCount <= 256);
    K2K_EMULATE(set_max_registers(kCount, true, where));
    K2K_PTX("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}

// Waits until the prerequisite grids have completed and their writes are visible. sm_90.
// PTX: #parallel-synchronization-and-communication-instructions-griddepcontrol
K2K_DEVICE void grid_dependency_wait(K2K_WHERE_ONLY) {
    K2K_EMULATE(enter_sm90("grid_dependency_wait", where));
    K2K_PTX("griddepcontrol.wait;" :: : "memory");
}

// Allows dependent grids to start before this one ends. sm_90.
// PTX: #parallel-synchronization-and-communication-instructions-griddepcontrol
K2K_DEVICE void grid_dependency_launch(K2K_WHERE_ONLY) {
    K2K_EMULATE(enter_sm90("grid_dependency_launch", where));
    K2K_PTX("griddepcontrol.launch_dependents;" :: : "memory");
}

// Sleeps for about `ns`, at most a millisecond; for polling loops.
// PTX: #miscellaneous-instructions-nanosleep
K2K_DEVICE void nanosleep([[maybe_unused]] uint32_t nanoseconds K2K_WHERE) {
    K2K_EMULATE(nanosleep(where));
    K2K_PTX("nanosleep.u32 %0;" ::"r"(nanoseconds));
}

// Nanoseconds of a clock common to all threads of all GPUs, in steps of up to a microsecond. The
// emulator advances it with every poll, so that a wait with a timeout ends.
// PTX: #special-registers-globaltimer
K2K_DEVICE uint64_t globaltimer() {
    K2K_EMULATE(globaltimer());
    uint64_t time = 0;
    K2K_PTX("mov.u64 %0, %%globaltimer;" : "=l"(time));
    return time;
}

// Ends the kernel with an error.
// PTX: #miscellaneous-instructions-trap
K2K_DEVICE void trap(K2K_WHERE_ONLY) {
    K2K_EMULATE(trap(where));
    K2K_PTX("trap;");
}

}  // namespace k2k::arch
