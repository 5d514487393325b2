#include "emulator/fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <new>

#include "emulator/race.h"

#if !defined(__x86_64__) || defined(__APPLE__)
#define K2K_UCONTEXT  // portable, but it makes system calls: kernels run 4 to 6 times slower
#endif
#ifdef K2K_UCONTEXT
#include <ucontext.h>
#endif

#ifdef K2K_ASAN
#include <sanitizer/common_interface_defs.h>
#endif

namespace k2k::emulator {

namespace {

constexpr std::size_t kGuard = 64 * 1024;  // larger than any page and most overruns
#ifdef K2K_ASAN
constexpr std::size_t kStack = 512 * 1024;  // red zones make frames large
#else
constexpr std::size_t kStack = 128 * 1024;
#endif

// The TSan fiber of a reused stack: the old one if its thread has ended (it then ignores accesses,
// see fiber_started), else a new one; an abandoned one cannot be destroyed.
void renew_race_detector([[maybe_unused]] Fiber& fiber) {
#ifdef K2K_TSAN
    if (!fiber.race_detector || !fiber.ended) {
        fiber.race_detector = __tsan_create_fiber(0);
        fiber.ended = false;
    }
#endif
}

}  // namespace

void allocate_stack(Fiber& fiber) {
    void* memory = mmap(nullptr, kGuard + kStack, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    mprotect(memory, kGuard, PROT_NONE);
    fiber.stack = static_cast<char*>(memory) + kGuard;
    fiber.stack_bytes = kStack;
}

void free_stack(Fiber& fiber) {
    if (fiber.stack) munmap(fiber.stack - kGuard, kGuard + kStack);
    fiber.stack = nullptr;
}

#ifdef K2K_UCONTEXT

void prepare(Fiber& fiber, void (*entry)(), unsigned color) {
    char* top = fiber.stack + fiber.stack_bytes - color % 64 * 64;
    auto* context = reinterpret_cast<ucontext_t*>(top - (sizeof(ucontext_t) + 63) / 64 * 64);
    getcontext(context);
    context->uc_stack.ss_sp = fiber.stack;
    context->uc_stack.ss_size =
        static_cast<std::size_t>(reinterpret_cast<char*>(context) - fiber.stack);
    context->uc_link = nullptr;
    makecontext(context, entry, 0);
    fiber.saved = context;
    fiber.fake_stack = nullptr;
    renew_race_detector(fiber);
}

static void transfer(Fiber& from, Fiber& to) {
    ucontext_t context;
    from.saved = &context;
    swapcontext(&context, static_cast<ucontext_t*>(to.saved));
}

#else

extern "C" void k2k_emulator_switch(void** save_stack_pointer, void* new_stack_pointer);

void prepare(Fiber& fiber, void (*entry)(), unsigned color) {
    auto** top = reinterpret_cast<void**>(fiber.stack + fiber.stack_bytes - color % 64 * 64);
    *--top = nullptr;  // the return address of `entry`; also keeps the stack aligned
    *--top = reinterpret_cast<void*>(entry);
    for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
    fiber.saved = top;
    fiber.fake_stack = nullptr;
    renew_race_detector(fiber);
}

static void transfer(Fiber& from, Fiber& to) { k2k_emulator_switch(&from.saved, to.saved); }

#endif

void switch_fiber(Fiber& from, Fiber& to, [[maybe_unused]] bool last) {
#ifdef K2K_TSAN
    __tsan_switch_to_fiber(to.race_detector, __tsan_switch_to_fiber_no_sync);
#endif
#ifdef K2K_ASAN
    __sanitizer_start_switch_fiber(last ? nullptr : &from.fake_stack, to.stack, to.stack_bytes);
#endif
    transfer(from, to);
#ifdef K2K_ASAN
    __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

void fiber_started([[maybe_unused]] Fiber& fiber) {
#ifdef K2K_ASAN
    __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
#ifdef K2K_TSAN
    if (fiber.ended) race::ignore_end();
    fiber.ended = false;
#endif
}

}  // namespace k2k::emulator
