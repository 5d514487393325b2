#pragma once

namespace k2k {

// A CTA for each row, 16 elements for each thread: 4 warps take 2,048 columns a round.
constexpr int kScaleRowsThreads = 128;

}  // namespace k2k
