#pragma once

#include <cstddef>
#include <cstdint>

namespace k2k {

// Decodes e4m3 codes (1 sign, 4 exponent, 3 mantissa bits, bias 7; 0x7f and 0xff are NaN; no
// infinities) to float. `python -m k2kernels doctor` compares all 256 codes with torch's own
// decoding, as a check that this module loads and runs on this machine.
void decode_e4m3(const std::uint8_t* codes, float* values, std::size_t count);

}  // namespace k2k
