#pragma once

// The iteration as a list of stages: the products of a stage depend on earlier stages alone.

#include <vector>

#include "newton_schulz/params.h"

namespace k2k {

using NsProgram = std::vector<std::vector<NsOp>>;

namespace ns_program {

constexpr NsBuffer kNone = NsBuffer::kNone;

// X X^T.
inline NsOp gram(NsBuffer x) {
    return {NsKind::kGram, x, x, kNone, NsBuffer::kGram, kNone, 1, 0, 0, 0, 0, 0};
}
// alpha a b + beta c.
inline NsOp square(NsBuffer a, NsBuffer b, NsBuffer c, NsBuffer d, float alpha, float beta) {
    return {NsKind::kSquare, a, b, c, d, kNone, alpha, beta, 0, 0, 0, 0};
}
// q X + beta X; the kernel makes it X q + beta X for tall matrices.
inline NsOp multiply(NsBuffer q, NsBuffer x, NsBuffer d, float beta) {
    return {NsKind::kMultiply, q, x, beta != 0 ? x : kNone, d, kNone, 1, beta, 0, 0, 0, 0};
}
inline NsBuffer other(NsBuffer buffer) {
    switch (buffer) {
        case NsBuffer::kX0:
            return NsBuffer::kX1;
        case NsBuffer::kX1:
            return NsBuffer::kX0;
        case NsBuffer::kQ0:
            return NsBuffer::kQ1;
        default:
            return NsBuffer::kQ0;
    }
}

}  // namespace ns_program

// R = X X^T;  Z = b R + c R^2;  X <- a X + Z X
inline NsProgram standard_program(const std::vector<NsStep>& steps) {
    using namespace ns_program;
    using B = NsBuffer;
    NsProgram program;
    B x = B::kX0;
    for (std::size_t i = 0; i < steps.size(); ++i) {
        const auto [a, b, c, unused] = steps[i];
        const B next = i + 1 == steps.size() ? B::kResult : other(x);
        program.push_back({gram(x)});
        program.push_back({square(B::kGram, B::kGram, B::kGram, B::kZ, c, b)});
        program.push_back({multiply(B::kZ, x, next, a)});
        x = next;
    }
    return program;
}

// Z = b R + c R^2;  Q <- a Q + Q Z;  R <- (a I + Z)^2 R;  at the end, and before the steps that
// restart, X = Q X.
inline NsProgram gram_program(const std::vector<NsStep>& steps) {
    using namespace ns_program;
    using B = NsBuffer;
    const int num_steps = static_cast<int>(steps.size());
    NsProgram program;
    B x = B::kX0, q = kNone;
    program.push_back({gram(x)});
    for (int i = 0; i < num_steps; ++i) {
        const auto [a, b, c, restart] = steps[i];
        if (restart) {
            program.push_back({multiply(q, x, other(x), 0)});
            x = other(x);
            program.push_back({gram(x)});
            q = kNone;
        }
        const bool gram_goes_on = i + 1 < num_steps && !steps[i + 1].restart;
        const bool first = q == kNone;
        NsOp z = square(B::kGram, B::kGram, B::kGram, first && !gram_goes_on ? kNone : B::kZ, c, b);
        if (first) {  // Q = a I + Z
            z.shifted = q = B::kQ0;
            z.diagonal = a;
        }
        program.push_back({z});
        std::vector<NsOp> both;
        if (!first) {
            both.push_back(square(q, B::kZ, q, other(q), 1, a));
            q = other(q);
        }
        if (gram_goes_on) both.push_back(square(B::kGram, B::kZ, B::kGram, B::kProduct, 1, a));
        if (!both.empty()) program.push_back(both);
        if (gram_goes_on) {
            program.push_back({square(B::kZ, B::kProduct, B::kProduct, B::kGram, 1, a)});
        }
    }
    program.push_back({multiply(q, x, B::kResult, 0)});
    return program;
}

}  // namespace k2k
