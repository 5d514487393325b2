#pragma once

// What the test kernels share. BUG is 0 on a GPU; in the emulator the tests choose it at run time,
// so that one compilation serves all planted bugs. `// @7` marks where bug 7 is to be seen.

#include "common/launch.h"

#ifndef BUG
#define BUG 0
#else
extern "C" int planted_bug;
#endif

using namespace k2k;

// Runs a launch for ctypes: 0, or 1 and a message.
int guarded(void (*run)(void* arguments), void* arguments);

template <class Run>
int guard(Run run) {
    return guarded([](void* arguments) { (*static_cast<Run*>(arguments))(); }, &run);
}
