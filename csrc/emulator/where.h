#pragma once

namespace k2k {

// A source location; as a default argument it is the caller's.
struct Where {
    const char* file;
    int line;
};

constexpr Where here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
}

}  // namespace k2k
