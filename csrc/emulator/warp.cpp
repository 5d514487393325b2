// Warp-wide instructions: the lanes meet, and the last to arrive executes the instruction for all,
// reading and writing the other lanes' variables directly.
#include <algorithm>
#include <cstring>

#include "emulator/machine.h"
#include "emulator/tensor_core.h"

namespace k2k::emulator {

void rendezvous(const char* name, uint32_t mask, void* argument, Execute execute, Where where) {
    Thread* thread = self();
    Warp& warp = thread->block->warps[thread->warp];
    const uint32_t lane_bit = 1u << thread->lane;
    const std::size_t block_threads = thread->block->grid->shape.threads.count();
    if (mask == kFullWarp && (thread->warp + 1) * kWarpSize > block_threads) {
        mask = warp.live;  // the CTA's last warp has fewer than 32 lanes
    }
    if (!(mask & lane_bit)) fail(where, "%s: the calling lane is not in mask %08x", name, mask);
    if (mask & ~warp.live) fail(where, "%s: mask %08x names lanes that have ended", name, mask);

    Rendezvous* meeting = nullptr;
    for (Rendezvous& r : warp.rendezvous) {
        if (r.arrived && (r.mask & mask)) meeting = &r;
    }
    if (!meeting) {
        meeting = std::find_if(std::begin(warp.rendezvous), std::end(warp.rendezvous),
                               [](const Rendezvous& r) { return r.arrived == 0; });
        if (meeting == std::end(warp.rendezvous)) fail(where, "%s: the warp is in shreds", name);
        meeting->name = name;
        meeting->mask = mask;
        meeting->where = where;
    }
    if (std::strcmp(meeting->name, name) || meeting->mask != mask ||
        meeting->where.line != where.line) {
        fail(where, "the warp diverged: %s (mask %08x) here, %s (mask %08x) at %s:%d", name, mask,
             meeting->name, meeting->mask, meeting->where.file, meeting->where.line);
    }
    meeting->lanes[thread->lane] = thread;
    meeting->arguments[thread->lane] = argument;
    meeting->arrived |= lane_bit;
    if (meeting->arrived != mask) {
        wait(name, where);
        return;
    }
    meeting->arrived = 0;
    if (execute) execute(meeting->lanes, meeting->arguments, mask);
    for (unsigned lane = 0; lane < kWarpSize; ++lane) {
        if (mask >> lane & 1 && lane != thread->lane) make_ready(meeting->lanes[lane]);
    }
    if (g_machine->options.schedule != Schedule::kRoundRobin) yield(name, where);
}

void sync_warp(uint32_t mask, Where where) {
    race::Quiet quiet;
    enter("sync_warp", where);
    const Thread* thread = self();
    const void* token = &thread->block->warps[thread->warp];
    race::release(token);
    rendezvous("sync_warp", mask, nullptr, nullptr, where);
    race::acquire(token);
}

// ---- votes, shuffles, reductions

uint32_t ballot(bool predicate, Where where) {
    race::Quiet quiet;
    enter("ballot", where);
    struct Argument {
        bool predicate;
        uint32_t result;
    } argument{predicate, 0};
    rendezvous(
        "ballot", kFullWarp, &argument,
        [](Thread**, void** arguments, uint32_t mask) {
            uint32_t votes = 0;
            for (unsigned lane = 0; lane < kWarpSize; ++lane) {
                if (!(mask >> lane & 1)) continue;
                votes |= uint32_t(static_cast<Argument*>(arguments[lane])->predicate) << lane;
            }
            for (unsigned lane = 0; lane < kWarpSize; ++lane) {
                if (mask >> lane & 1) static_cast<Argument*>(arguments[lane])->result = votes;
            }
        },
        where);
    return argument.result;
}

uint32_t match_any(uint32_t value, Where where) {
    race::Quiet quiet;
    enter("match_any", where);
    struct Argument {
        uint32_t value;
        uint32_t result;
    } argument{value, 0};
    rendezvous(
        "match_any", kFullWarp, &argument,
        [](Thread**, void** arguments, uint32_t mask) {
            for (unsigned lane = 0; lane < kWarpSize; ++lane) {
                if (!(mask >> lane & 1)) continue;
                auto* own = static_cast<Argument*>(arguments[lane]);
                for (unsigned other = 0; other < kWarpSize; ++other) {
                    if (!(mask >> other & 1)) continue;
                    const bool equal =
                        static_cast<Argument*>(arguments[other])->value == own->value;
                    own->result |= uint32_t(equal) << other;
                }
            }
        },
        where);
    return argument.result;
}

bool elect_one(Where where) {
    race::Quiet quiet;
    enter("elect_one", where, 90);
    rendezvous("elect_one", kFullWarp, nullptr, nullptr, where);
    const Thread* thread = self();
    return thread->lane == 0;
}

uint64_t shuffle(Shuffle kind, uint64_t value, uint32_t operand, Where where) {
    race::Quiet quiet;
    enter("shuffle", where);
    struct Argument {
        Shuffle kind;
        uint64_t value;
        uint32_t operand;
        uint64_t result;
    } argument{kind, value, operand, 0};
    rendezvous(
        "shuffle", kFullWarp, &argument,
        [](Thread**, void** arguments, uint32_t mask) {
            for (unsigned lane = 0; lane < kWarpSize; ++lane) {
                if (!(mask >> lane & 1)) continue;
                auto* own = static_cast<Argument*>(arguments[lane]);
                unsigned source = lane;
                switch (own->kind) {
                    case Shuffle::kIndex:
                        source = own->operand % kWarpSize;
                        break;
                    case Shuffle::kXor:
                        source = lane ^ own->operand % kWarpSize;
                        break;
                    case Shuffle::kUp:
                        source = lane >= own->operand ? lane - own->operand : lane;
                        break;
                    case Shuffle::kDown:
                        source = lane + own->operand < kWarpSize ? lane + own->operand : lane;
                        break;
                }
                const bool present = mask >> source & 1;
                own->result = present ? static_cast<Argument*>(arguments[source])->value
                                      : ~uint64_t(0);  // undefined on a GPU
            }
        },
        where);
    return argument.result;
}

template <class T>
static T reduce(const char* kind, T value, Where where) {
    race::Quiet quiet;
    enter("redux", where);
    struct Argument {
        const char* kind;
        T value, result;
    } argument{kind, value, 0};
    rendezvous(
        "redux", kFullWarp, &argument,
        [](Thread** lanes, void** arguments, uint32_t mask) {
            if (mask != kFullWarp) fail(lanes[0]->where, "redux: needs a whole warp");
            auto at = [&](unsigned lane) { return static_cast<Argument*>(arguments[lane]); };
            T result = at(0)->value;
            const char first = at(0)->kind[1];  // aDd, mIn, mAx
            for (unsigned lane = 1; lane < kWarpSize; ++lane) {
                const T other = at(lane)->value;
                result = first == 'd'   ? static_cast<T>(uint32_t(result) + uint32_t(other))
                         : first == 'i' ? std::min(result, other)
                                        : std::max(result, other);
            }
            for (unsigned lane = 0; lane < kWarpSize; ++lane) at(lane)->result = result;
        },
        where);
    return argument.result;
}

uint32_t redux(const char* kind, uint32_t value, Where where) { return reduce(kind, value, where); }
int32_t redux(const char* kind, int32_t value, Where where) { return reduce(kind, value, where); }

// ---- 8x8 matrices of 16-bit elements
//
// Lane 8m + i holds the address of row i of matrix m. In the registers lane l has elements
// (l / 4, 2 (l % 4)) and the next one of each matrix; transposed, those of the transposed matrix.

namespace {

struct MatrixMove {
    int count;
    bool transposed;
    uint32_t* registers;
    uint32_t address;
    Where where;
};

void move_matrices(void** arguments, bool to_registers) {
    const auto* first = static_cast<MatrixMove*>(arguments[0]);
    for (int m = 0; m < first->count; ++m) {
        uint16_t* rows[8];
        for (int i = 0; i < 8; ++i) {
            const auto* lane = static_cast<MatrixMove*>(arguments[8 * m + i]);
            const char* what = to_registers ? "ldmatrix" : "stmatrix";
            rows[i] =
                reinterpret_cast<uint16_t*>(shared_bytes(lane->address, 16, 16, what, lane->where));
        }
        for (int l = 0; l < 32; ++l) {
            const int i = l / 4, j = 2 * (l % 4);
            uint32_t& packed = static_cast<MatrixMove*>(arguments[l])->registers[m];
            uint16_t& low = first->transposed ? rows[j][i] : rows[i][j];
            uint16_t& high = first->transposed ? rows[j + 1][i] : rows[i][j + 1];
            if (to_registers) {
                packed = low | uint32_t(high) << 16;
            } else {
                low = static_cast<uint16_t>(packed);
                high = static_cast<uint16_t>(packed >> 16);
            }
        }
    }
}

}  // namespace

void ldmatrix(int count, bool transposed, uint32_t* registers, uint32_t address, Where where) {
    race::Quiet quiet;
    enter("ldmatrix", where);
    MatrixMove move{count, transposed, registers, address, where};
    if (static_cast<int>(self()->lane) < 8 * count) {
        race::read(shared_bytes(address, 16, 16, "ldmatrix", where), 16);
    }
    rendezvous(
        "ldmatrix", kFullWarp, &move,
        [](Thread**, void** arguments, uint32_t) { move_matrices(arguments, true); }, where);
}

void stmatrix(int count, bool transposed, const uint32_t* registers, uint32_t address,
              Where where) {
    race::Quiet quiet;
    enter("stmatrix", where, 90);
    MatrixMove move{count, transposed, const_cast<uint32_t*>(registers), address, where};
    if (static_cast<int>(self()->lane) < 8 * count) {
        race::write(shared_bytes(address, 16, 16, "stmatrix", where), 16);
    }
    rendezvous(
        "stmatrix", kFullWarp, &move,
        [](Thread**, void** arguments, uint32_t) { move_matrices(arguments, false); }, where);
}

// ---- mma.sync: D[16][8] += A[16][K] B[K][8], K = 32 bytes of elements
//
// In units of 4 bytes (2 or 4 elements of K), lane l = 4 g + t holds A[g + 8 (i % 2)][t + 4 (i /
// 2)] in a[i], B[t + 4 i][g] in b[i], and D[g + 8 (i / 2)][2 t + i % 2] in d[i].

namespace {

struct Mma {
    Type type;
    float* d;
    const uint32_t *a, *b;
};

void execute_mma(Thread**, void** arguments, uint32_t) {
    const Type type = static_cast<Mma*>(arguments[0])->type;
    uint32_t a[16][8], b[8][8];
    float c[16 * 8];
    for (int l = 0; l < 32; ++l) {
        const auto* lane = static_cast<Mma*>(arguments[l]);
        const int g = l / 4, t = l % 4;
        for (int i = 0; i < 4; ++i) a[g + 8 * (i % 2)][t + 4 * (i / 2)] = lane->a[i];
        for (int i = 0; i < 2; ++i) b[g][t + 4 * i] = lane->b[i];
        for (int i = 0; i < 4; ++i) c[(g + 8 * (i / 2)) * 8 + 2 * t + i % 2] = lane->d[i];
    }
    float a_values[16 * kMaxK], b_values[kMaxK * 8];
    decode_rows(type, a, 16, a_values);
    decode_columns(type, b, 8, b_values);
    multiply(type, c, a_values, b_values, 16, 8);
    for (int l = 0; l < 32; ++l) {
        const auto* lane = static_cast<Mma*>(arguments[l]);
        const int g = l / 4, t = l % 4;
        for (int i = 0; i < 4; ++i) lane->d[i] = c[(g + 8 * (i / 2)) * 8 + 2 * t + i % 2];
    }
}

}  // namespace

void mma_sync(Type type, float* d, const uint32_t* a, const uint32_t* b, Where where) {
    race::Quiet quiet;
    enter("mma.sync", where, type == Type::kE4m3 ? 89 : 80);
    Mma mma{type, d, a, b};
    rendezvous("mma.sync", kFullWarp, &mma, execute_mma, where);
}

// ---- setmaxnreg: registers released by one warpgroup can be acquired by another

void set_max_registers(int count, bool increase, Where where) {
    race::Quiet quiet;
    enter("setmaxnreg", where, 90);
    rendezvous("setmaxnreg", kFullWarp, nullptr, nullptr, where);
    Thread* thread = self();
    Registers& registers = thread->block->registers;
    unsigned& calls = registers.calls[thread->warp / 4];
    if (calls < thread->register_calls * kWarpgroupSize) {
        fail(where, "setmaxnreg: again, before all four warps have executed the last one");
    }
    const int more = count - thread->registers;
    if (increase ? more < 0 : more > 0) {
        fail(where, "setmaxnreg: %s to %d; a thread of this block has %d",
             increase ? "an increase" : "a decrease", count, thread->registers);
    }
    while (registers.free < more) {
        registers.waiting.push_back(thread);
        wait("setmaxnreg for registers that no warp releases", where);
    }
    registers.free -= more;
    thread->registers = count;
    ++calls;
    ++thread->register_calls;
    registers.where = where;
    for (Thread* waiting : registers.waiting) make_ready(waiting);
    registers.waiting.clear();
}

void check_registers(const Registers& registers) {
    for (const unsigned calls : registers.calls) {
        if (calls % kWarpgroupSize) {
            fail(registers.where, "setmaxnreg: not executed by all four warps of the warpgroup");
        }
    }
}

}  // namespace k2k::emulator
