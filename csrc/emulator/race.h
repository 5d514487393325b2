#pragma once

// ThreadSanitizer as a happens-before detector for the emulated program (-DK2K_TSAN): each CUDA
// thread is a TSan fiber, and only what orders memory on a GPU orders it here. The emulator itself
// is compiled without -fsanitize=thread and reports to TSan what its instructions access.
// Without K2K_TSAN everything here is empty.

#include <cstddef>

#ifdef K2K_TSAN
#include <sanitizer/tsan_interface.h>
extern "C" {
void __tsan_read_range(void*, unsigned long);
void __tsan_write_range(void*, unsigned long);
void AnnotateIgnoreReadsBegin(const char*, int);
void AnnotateIgnoreReadsEnd(const char*, int);
void AnnotateIgnoreWritesBegin(const char*, int);
void AnnotateIgnoreWritesEnd(const char*, int);
}
#endif

namespace k2k::emulator::race {

#ifdef K2K_TSAN

inline void ignore_begin() {
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
}
inline void ignore_end() {
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
}

// In its scope, memory accesses of the emulator itself (through libc) are ignored.
struct Quiet {
    Quiet() { ignore_begin(); }
    ~Quiet() { ignore_end(); }
};

inline void acquire(const void* token) { __tsan_acquire(const_cast<void*>(token)); }
inline void release(const void* token) { __tsan_release(const_cast<void*>(token)); }
inline void read(const void* address, std::size_t bytes) {
    ignore_end();
    __tsan_read_range(const_cast<void*>(address), bytes);
    ignore_begin();
}
inline void write(void* address, std::size_t bytes) {
    ignore_end();
    __tsan_write_range(address, bytes);
    ignore_begin();
}

#else

inline void ignore_begin() {}
inline void ignore_end() {}
struct Quiet {
    Quiet() {}
    ~Quiet() {}
};
inline void acquire(const void*) {}
inline void release(const void*) {}
inline void read(const void*, std::size_t) {}
inline void write(void*, std::size_t) {}

#endif

}  // namespace k2k::emulator::race
