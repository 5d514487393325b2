#pragma once

namespace k2k {

// A warp per token; few warps per CTA, so that a decoding batch spreads over the SMs.
constexpr int kCacheWarps = 4;

// The 656-byte row: 512 codes, 4 float32 scales, 64 bfloat16.
constexpr int kLatent = 512, kRope = 64;
constexpr int kScalesAt = kLatent, kRopeAt = kScalesAt + kLatent / 128 * 4;
constexpr int kRowBytes = kRopeAt + kRope * 2;
static_assert(kRowBytes == 656 && kRopeAt % 16 == 0);

}  // namespace k2k
