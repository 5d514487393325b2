#pragma once

// Limits, the task of a warp, and the layout of a flag.

#include <cstdint>

namespace k2k {

constexpr int kMostRanks = 64;  // bits of Exchange::live
constexpr int kExchangeThreads = 256;
constexpr int kExchangeWarps = kExchangeThreads / 32;
// A warp moves 2 KiB of a row: 64 bytes per thread, by four loads in flight at once.
constexpr int kExchangeVectors = 4;
constexpr int kExchangeBytes = kExchangeVectors * 512;
constexpr int kExchangeBlocksResident = 3;  // on one SM: 48 KiB in flight
constexpr int kFlagBytes = 128;             // a cache line per flag

// A flag is a uint64 {epoch : 32, call : 8, rows : 24}.
constexpr int kFlagRowsBits = 24, kFlagCallBits = 8;
constexpr uint32_t kMostFlagRows = (1u << kFlagRowsBits) - 1;

}  // namespace k2k
