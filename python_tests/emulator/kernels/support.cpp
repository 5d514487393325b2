// The C interface of the test library.
#include "support.h"

#include <exception>
#include <string>

#include "emulator/emulator.h"

static std::string g_error;

extern "C" {
int planted_bug = 0;

const char* last_error() { return g_error.c_str(); }

// `delivery` below 0: the seed's.
void configure(uint64_t seed, int delivery, int arch, int hopper_fp8) {
    emulator::Options& options = emulator::options();
    emulator::set_seed(options, seed);
    if (delivery >= 0) options.delivery = static_cast<emulator::Delivery>(delivery);
    options.arch = arch;
    options.hopper_fp8 = hopper_fp8 != 0;
}

void* allocate(std::size_t bytes) { return emulator::allocate(bytes); }
void release(void* pointer) { emulator::release(pointer); }
uint64_t count_switches() { return emulator::counters().switches; }
uint64_t count_bytes_loaded() { return emulator::counters().bytes_loaded; }
}

int guarded(void (*run)(void* arguments), void* arguments) {
    try {
        run(arguments);
        return 0;
    } catch (const std::exception& exception) {
        g_error = exception.what();
        return 1;
    }
}
