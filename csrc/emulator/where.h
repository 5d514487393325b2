#pragma once

namespace k2k {

// A place in the source, carried as a default argument so that it names the caller's line.
struct Where {
    const char* file;
    int line;
};

constexpr Where here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
}

}  // namespace k2k
