#pragma once

// silu(x) = x / (1 + exp(-x)), for SwiGLU.

#include <cfloat>

#include "arch/convert.cuh"

namespace k2k::tile {

// A division costs about ten instructions, a branch and a call; a reciprocal and one step of
// Newton's give the same bits wherever the reciprocal is rounded correctly (that of a GPU may be
// off by an ulp: then the quotient is off by one at most, rarely). The remainder has the opposite
// sign so that -0 stays -0. Below -87, where the denominator would overflow, the result is
// silu(-87) = -1.4e-36; the exact one is between that and -0.
K2K_DEVICE float silu(float x) {
    if (-FLT_MAX <= x && x < -87.0f) x = -87.0f;  // NaN stays, and -inf becomes NaN
    const float denominator = 1.0f + expf(-x);
    const float reciprocal = arch::reciprocal_approx(denominator);
    const float quotient = x * reciprocal;
    const float remainder = fmaf(quotient, denominator, -x);
    return quotient > FLT_MAX ? quotient : fmaf(remainder, -reciprocal, quotient);
}

}  // namespace k2k::tile
