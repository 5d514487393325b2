#pragma once

// The whole iteration of a matrix whose short side s is at most 192, in one block; and to the bit
// what the tiles of kernel_sm80.cuh make of it.
//
//     gram        R = X X^T                                              panel by panel
//     each step   Z = b R + c R^2
//                 standard:  X <- a X + Z X, then R = X X^T              panel by panel
//                 gram:      Q = a I + Z, or Q <- a Q + Q Z;  R <- a R + R Z, R <- a R + Z R
//                 before a restart:  X <- Q X, then R = X X^T            panel by panel
//     at the end  result = Q X, or a X + Z X                             panel by panel
//
// (X^T X and X Q if m > n.)
//
// Grid      a block for each matrix; 4 warps for each 64 of s: kBlocks of them.
// Warps     64 x 32 each: of the lower triangle of a square, where the sums of R stay in registers
//           while panels pass; and of a panel's product.
// Squares   R, Z and Q are symmetric to the bit, so only the blocks of 64 x 64 on and below the
//           diagonal are kept; ldmatrix transposes what is read from the other side. They are
//           updated in place: sums are complete before anybody writes. In blocks on the diagonal
//           what lies above it is then copied from below.
// Panels    128 of the long axis by all of the short, as they lie in memory, two of them by
// cp.async
//           where R and Z were: the next arrives while one is multiplied. Its product takes its
//           place, on the way back.
// Swizzle   chunk c of 16 bytes of a row at c ^ (row % 8), of panels and of blocks.
// Barriers  panel_landed   all threads' copies are there, and nobody reads the other panel
//           sums_complete  nobody reads what the sums replace
//           result_ready   all have stored it
//           mirrored       the blocks on the diagonal are whole
//           shifted        and a I is added
//           panels_stored  X is in memory again
// Order     of a sum: along the summed axis, 16 by 16.
// Shared    kBlocks of 1, 2, 3: 40, 88, 144 KB.
// Registers 64 sums a thread: at most 168, of two blocks 128, so that one or two warpgroups leave
//           room for another block.
// Traffic   X_0 once for each R, in and out at each restart (each step, if standard), once at the
//           end; a matrix of 192 x 1536 is 590 KB, which L2 keeps.
// Limits    one block a matrix, however few matrices there are.

#include "arch/convert.cuh"
#include "arch/cp_async.cuh"
#include "arch/matrix.cuh"
#include "arch/mma.cuh"
#include "arch/smem.cuh"
#include "arch/warp.cuh"
#include "newton_schulz/result.cuh"

namespace k2k {

template <int kBlocks>
struct alignas(128) NsSmallStorage {
    uint8_t q[ns_small_square_bytes(kBlocks)];  // what panels are multiplied by; Z, if standard
    union {
        uint8_t squares[2][ns_small_square_bytes(kBlocks)];  // R, Z
        uint8_t panels[2][ns_small_panel_bytes(kBlocks)];
    };
};

enum class NsSmallSquare { kQ, kR, kZ };

// 64 x 32 of a result, as mma.sync holds it.
using NsSums64x32 = float[4][4][4];

// Which row this lane addresses of 16 x 16 of an operand, in rows of `pitch` bytes from (row,
// chunk) on: `kLeft` as A, else as two pieces of B; `kTransposed` if rows are those of the summed
// axis.
template <bool kLeft, bool kTransposed>
K2K_DEVICE uint32_t address_16x16(uint32_t base, int pitch, int row, int chunk) {
    const int lane = arch::lane_id(), matrix = lane / 8;
    constexpr bool kRowsFirst = kLeft != kTransposed;
    row += (kRowsFirst ? matrix % 2 : matrix / 2) * 8 + lane % 8;
    chunk += kRowsFirst ? matrix / 2 : matrix % 2;
    return base + row * pitch + (chunk ^ lane % 8) * 16;
}

// A symmetric matrix in shared memory, as blocks (i, j) of 64 x 64 with i >= j.
K2K_DEVICE uint32_t block_offset(int i, int j) {
    return (i * (i + 1) / 2 + j) * kNsSmallBlock * kNsSmallBlock * 2;
}

// Its rows from `first` on, 64 or 32, against 16 of the summed axis.
template <bool kLeft>
struct NsSquareRows {
    uint32_t address;
    bool transposed;  // it is the other side of the diagonal that is kept

    K2K_DEVICE NsSquareRows(uint32_t square, int first, int depth) {
        const int i = first / kNsSmallBlock, j = depth / kNsSmallBlock;
        first %= kNsSmallBlock;
        depth %= kNsSmallBlock;
        transposed = i < j;
        address =
            transposed
                ? address_16x16<kLeft, true>(square + block_offset(j, i), 128, depth, first / 8)
                : address_16x16<kLeft, false>(square + block_offset(i, j), 128, first, depth / 8);
    }
    // 16 of them.
    K2K_DEVICE void load(uint32_t (&fragment)[4], int i K2K_WHERE) const {
        if (transposed) {
            arch::ldmatrix<4, true>(fragment, address ^ i * 32 K2K_PASS_WHERE);
        } else {
            arch::ldmatrix<4, false>(fragment, address + i * 16 * 128 K2K_PASS_WHERE);
        }
    }
};

// The same of a panel; `kTransposed`: along its columns.
template <bool kLeft, bool kTransposed, int kPitch>
struct NsPanelRows {
    uint32_t address;

    K2K_DEVICE NsPanelRows(uint32_t panel, int first, int depth)
        : address(kTransposed ? address_16x16<kLeft, true>(panel, kPitch, depth, first / 8)
                              : address_16x16<kLeft, false>(panel, kPitch, first, depth / 8)) {}

    K2K_DEVICE void load(uint32_t (&fragment)[4], int i K2K_WHERE) const {
        arch::ldmatrix<4, kTransposed>(
            fragment, kTransposed ? address ^ i * 32 : address + i * 16 * kPitch K2K_PASS_WHERE);
    }
};

// sums += A B over `depth` of the summed axis; a(k) and b(k) are the rows of the operands.
template <class T, class A, class B>
K2K_DEVICE void multiply_64x32(NsSums64x32& sums, int depth, A&& a, B&& b K2K_WHERE) {
    K2K_NO_UNROLL
    for (int k = 0; k < depth; k += 16) {
        const auto rows_a = a(k);
        const auto rows_b = b(k);
        uint32_t fragment_b[2][4];
        K2K_UNROLL
        for (int j = 0; j < 2; ++j) rows_b.load(fragment_b[j], j K2K_PASS_WHERE);
        K2K_UNROLL
        for (int i = 0; i < 4; ++i) {
            uint32_t fragment_a[4];
            rows_a.load(fragment_a, i K2K_PASS_WHERE);
            K2K_UNROLL
            for (int j = 0; j < 4; ++j) {
                const uint32_t* pair = fragment_b[j / 2] + j % 2 * 2;
                arch::mma_sync<T>(sums[i][j], fragment_a, {pair[0], pair[1]} K2K_PASS_WHERE);
            }
        }
    }
}

// Calls f(offset, low, high) for the pairs of neighbours that this lane holds of 64 x 32, from
// (row, column) on in rows of kPitch bytes: `offset` is theirs.
template <int kPitch, class F>
K2K_DEVICE void for_each_pair(const NsSums64x32& sums, int row, int column, F&& f) {
    const int lane = arch::lane_id();
    const uint32_t first = (row + lane / 4) * kPitch + (column / 8 ^ lane / 4) * 16 + lane % 4 * 4;
    K2K_UNROLL
    for (int i = 0; i < 4; ++i) {
        K2K_UNROLL
        for (int j = 0; j < 4; ++j) {
            K2K_UNROLL
            for (int half = 0; half < 2; ++half) {
                f((first ^ j * 16) + (i * 16 + half * 8) * kPitch, sums[i][j][2 * half],
                  sums[i][j][2 * half + 1]);
            }
        }
    }
}

// One matrix and its block.
template <class T, int kBlocks, bool kTall>
class NsSmallMatrix {
  public:
    using Square = NsSmallSquare;

    K2K_DEVICE NsSmallMatrix(NsSmallStorage<kBlocks>& storage,
                             const NsTables& tables,
                             int tensor_index,
                             int matrix)
        : storage_(storage), tables_(tables), tensor_index_(tensor_index), matrix_(matrix) {
        const NsTensor& t = tables.tensors[tensor_index];
        short_side_ = kTall ? t.n : t.m;
        long_side_ = kTall ? t.m : t.n;
        // Block row i of the triangle has 2 (i + 1) warps.
        const int warp = arch::warp_id(), i = warp < 2 ? 0 : warp < 6 ? 1 : 2;
        square_row_ = i * 64;
        square_column_ = (warp - i * (i + 1)) * 32;
        square_active_ = i < kBlocks;
        constexpr int kPerRow = kTall ? 2 * kBlocks : 4;
        panel_row_ = warp / kPerRow * 64;
        panel_column_ = warp % kPerRow * 32;
    }

    // R = X X^T
    K2K_DEVICE void gram() {
        NsSums64x32 sums = {};
        for_each_panel([&](int, uint8_t* panel) {
            if (!square_active_) return;
            const uint32_t base = arch::smem_address(panel);
            multiply_64x32<T>(
                sums, kNsSmallPanel,
                [&](int k) { return NsPanelRows<true, kTall, kPitch>(base, square_row_, k); },
                [&](int k) { return NsPanelRows<false, kTall, kPitch>(base, square_column_, k); });
        });
        arch::sync_block();  // sums_complete: R replaces panels
        store_square(sums, 1, 0, Square::kR, Square::kR, false, 0);
    }

    // X <- Q X + beta X; the last time it goes where the result belongs.
    K2K_DEVICE void multiply(float beta, bool last) {
        for_each_panel([&](int first, uint8_t* panel) {
            multiply(panel, beta);
            copy_out(panel, first, last);
        });
        arch::sync_block();  // panels_stored
    }

    // d = alpha a b + beta c; with `shifts`, Q = d + diagonal I.
    K2K_DEVICE void square(Square a,
                           Square b,
                           float alpha,
                           float beta,
                           Square c,
                           Square d,
                           bool shifts,
                           float diagonal) {
        NsSums64x32 sums = {};
        if (square_active_) {
            const uint32_t base_a = arch::smem_address(at(a)), base_b = arch::smem_address(at(b));
            multiply_64x32<T>(
                sums, short_side_,
                [&](int k) { return NsSquareRows<true>(base_a, square_row_, k); },
                [&](int k) { return NsSquareRows<false>(base_b, square_column_, k); });
        }
        arch::sync_block();  // sums_complete
        store_square(sums, alpha, beta, c, d, shifts, diagonal);
    }

  private:
    // Panels: rows of the short axis, or of the long one.
    static constexpr int kPitch = 2 * (kTall ? kBlocks * kNsSmallBlock : kNsSmallPanel);
    static constexpr int kRows = kTall ? kNsSmallPanel : kBlocks * kNsSmallBlock;
    static constexpr int kChunksPerRow = kPitch / 16;
    static constexpr int kChunks = kRows * kChunksPerRow / ns_small_threads(kBlocks);

    K2K_DEVICE uint8_t* at(Square square) const {
        return square == Square::kQ ? storage_.q : storage_.squares[square == Square::kZ];
    }

    // The sums of the triangle, with the epilogue, to d and, if wanted, plus diagonal I to Q.
    K2K_DEVICE void store_square(const NsSums64x32& sums,
                                 float alpha,
                                 float beta,
                                 Square c,
                                 Square d,
                                 bool shifts,
                                 float diagonal) {
        const int block_row = square_row_ / kNsSmallBlock,
                  block_column = square_column_ / kNsSmallBlock;
        if (square_active_) {
            const uint32_t block = block_offset(block_row, block_column);
            const uint8_t* from = at(c) + block;
            uint8_t *to = at(d) + block, *shifted = storage_.q + block;
            for_each_pair<128>(sums, 0, square_column_ % kNsSmallBlock,
                               [&](uint32_t offset, float low, float high) {
                                   low *= alpha;
                                   high *= alpha;
                                   if (beta != 0) {
                                       const uint32_t old =
                                           *reinterpret_cast<const uint32_t*>(from + offset);
                                       low = fmaf(beta, unpack(old, 0), low);
                                       high = fmaf(beta, unpack(old, 1), high);
                                   }
                                   const uint32_t pair = pack(low, high);
                                   *reinterpret_cast<uint32_t*>(to + offset) = pair;
                                   if (shifts)
                                       *reinterpret_cast<uint32_t*>(shifted + offset) = pair;
                               });
        }
        arch::sync_block();  // result_ready
        mirror(at(d));
        if (shifts) mirror(storage_.q);
        arch::sync_block();  // mirrored
        if (!shifts) return;
        const int row = threadIdx.x;
        if (row < short_side_) {
            auto* element = reinterpret_cast<T*>(
                storage_.q + block_offset(row / kNsSmallBlock, row / kNsSmallBlock) +
                row % kNsSmallBlock * 128 + (row % kNsSmallBlock / 8 ^ row % 8) * 16 + row % 8 * 2);
            *element = narrowed<T>(arch::to_float(*element) + diagonal);
        }
        arch::sync_block();  // shifted
    }

    // In the blocks on the diagonal, what is above it becomes what is below: a warp for 16 rows.
    K2K_DEVICE static void mirror(uint8_t* square) {
        const int lane = arch::lane_id(), i = arch::warp_id() / 4;
        uint8_t* block = square + block_offset(i, i);
        const uint32_t base = arch::smem_address(block);
        K2K_NO_UNROLL
        for (int task = 0; task < 4; ++task) {
            const int eight = arch::warp_id() % 4 * 2 + task / 2,
                      first = task % 2 * 4;  // rows, columns
            // What lies above the diagonal is written by other warps: the diagonal's 8 x 8 is read
            // in its place, for nothing.
            const int source = first + lane / 8 < eight ? eight : first + lane / 8;
            const int from = source * 8 + lane % 8, row = eight * 8 + lane / 4;
            uint32_t words[4];
            arch::ldmatrix<4, true>(words, base + from * 128 + (eight ^ lane % 8) * 16);
            arch::sync_warp();
            K2K_UNROLL
            for (int j = 0; j < 4; ++j) {
                const int column = (first + j) * 8 + lane % 4 * 2;
                auto* pair = reinterpret_cast<uint16_t*>(
                    block + row * 128 + ((first + j) ^ lane / 4) * 16 + lane % 4 * 4);
                if (column > row) {
                    *reinterpret_cast<uint32_t*>(pair) = words[j];
                } else if (column == row) {
                    pair[1] = static_cast<uint16_t>(words[j] >> 16);
                }
            }
            arch::sync_warp();
        }
    }

    // panel <- Q panel + beta panel
    K2K_DEVICE void multiply(uint8_t* panel, float beta) {
        NsSums64x32 sums = {};
        const uint32_t base = arch::smem_address(panel), q = arch::smem_address(storage_.q);
        multiply_64x32<T>(
            sums, short_side_,
            [&](int k) {
                if constexpr (kTall) {
                    return NsPanelRows<true, false, kPitch>(base, panel_row_, k);
                } else {
                    return NsSquareRows<true>(q, panel_row_, k);
                }
            },
            [&](int k) {
                if constexpr (kTall) {
                    return NsSquareRows<false>(q, panel_column_, k);
                } else {
                    return NsPanelRows<false, true, kPitch>(base, panel_column_, k);
                }
            });
        arch::sync_block();  // sums_complete
        for_each_pair<kPitch>(sums, panel_row_, panel_column_,
                              [&](uint32_t offset, float low, float high) {
                                  auto* pair = reinterpret_cast<uint32_t*>(panel + offset);
                                  if (beta != 0) {
                                      low = fmaf(beta, unpack(*pair, 0), low);
                                      high = fmaf(beta, unpack(*pair, 1), high);
                                  }
                                  *pair = pack(low, high);
                              });
        arch::sync_block();  // result_ready
    }

    // X. Looked up anew each time: registers are better used for sums.
    K2K_DEVICE NsMatrix<T> workspace() const {
        return {tables_.tensors[tensor_index_], matrix_, NsBuffer::kX0};
    }

    // Calls f(where it begins on the long axis, the panel) while the next panel is on its way.
    template <class F>
    K2K_DEVICE void for_each_panel(F&& f) {
        copy_in(0, 0);
        K2K_NO_UNROLL
        for (int first = 0, at = 0; first < long_side_; first += kNsSmallPanel, at ^= 1) {
            arch::cp_async_wait<0>();
            arch::sync_block();  // panel_landed
            if (first + kNsSmallPanel < long_side_) copy_in(first + kNsSmallPanel, at ^ 1);
            f(first, storage_.panels[at]);
        }
    }

    // Starts the copies of the panel from `first` of the long axis on.
    K2K_DEVICE void copy_in(int first, int index) {
        const NsMatrix<T> x = workspace();
        const uint32_t target = arch::smem_address(storage_.panels[index]);
        K2K_UNROLL_BY(4)
        for (int i = 0; i < kChunks; ++i) {
            const int chunk = i * ns_small_threads(kBlocks) + threadIdx.x;
            const T* source = place(x, chunk, first);
            arch::cp_async(target + offset_of(chunk), source != nullptr ? source : x.data,
                           source != nullptr);
        }
        arch::cp_async_commit();
    }

    // Stores the panel: into X, or where the result belongs.
    K2K_DEVICE void copy_out(const uint8_t* panel, int first, bool last) {
        const NsMatrix<T> x = workspace();
        K2K_NO_UNROLL
        for (int i = 0; i < kChunks; ++i) {
            const int chunk = i * ns_small_threads(kBlocks) + threadIdx.x;
            T* target = place(x, chunk, first);
            if (target == nullptr) continue;
            const uint8_t* source = panel + offset_of(chunk);
            if (last) {
                const NsFinish finish(tables_, tensor_index_, matrix_);
                float values[8];
                load_eight(values, reinterpret_cast<const T*>(source), 8);
                const int row = chunk / kChunksPerRow, column = chunk % kChunksPerRow * 8;
                finish(kTall ? first + row : row, kTall ? column : first + column, values);
            } else {
                arch::store(reinterpret_cast<uint4*>(target),
                            *reinterpret_cast<const uint4*>(source));
            }
        }
    }

    // Where a chunk lies in a panel, and in X (null: outside).
    K2K_DEVICE static uint32_t offset_of(int chunk) {
        const int row = chunk / kChunksPerRow;
        return row * kPitch + (chunk % kChunksPerRow ^ row % 8) * 16;
    }
    K2K_DEVICE static T* place(const NsMatrix<T>& x, int chunk, int first) {
        const int row = chunk / kChunksPerRow + (kTall ? first : 0);
        const int column = chunk % kChunksPerRow * 8 + (kTall ? 0 : first);
        return row < x.rows && column < x.columns ? x.data + row * x.pitch + column : nullptr;
    }

    K2K_DEVICE static uint32_t pack(float low, float high) {
        return std::is_same_v<T, bf16> ? arch::pack_bf16(low, high) : arch::pack_fp16(low, high);
    }
    K2K_DEVICE static float unpack(uint32_t pair, int which) {
        return arch::to_float(T{static_cast<uint16_t>(pair >> 16 * which)});
    }

    NsSmallStorage<kBlocks>& storage_;
    const NsTables& tables_;
    const int tensor_index_, matrix_;
    int short_side_, long_side_, square_row_, square_column_, panel_row_, panel_column_;
    bool square_active_;
};

template <class T, int kBlocks, bool kTall>
K2K_DEVICE void small_iteration(const NsSmall& p,
                                NsSmallStorage<kBlocks>& storage,
                                int tensor_index,
                                int matrix) {
    NsSmallMatrix<T, kBlocks, kTall> iteration(storage, p.tables, tensor_index, matrix);
    const bool standard = !p.tables.tensors[tensor_index].gram;
    bool fresh = true;  // Q has met X, or there is none yet
    K2K_NO_UNROLL
    for (int i = 0;; ++i) {
        if (fresh) {
            if (i > 0) iteration.multiply(standard ? p.steps[i - 1].a : 0, i == p.num_steps);
            if (i == p.num_steps) return;
            iteration.gram();
        }
        const float a = p.steps[i].a;
        const bool meets_x = standard || i + 1 == p.num_steps || p.steps[i + 1].restart;
        K2K_NO_UNROLL
        for (int product = 0; product < 4; ++product) {
            using S = NsSmallSquare;
            if (product == 1 && fresh) continue;
            if (product == 2 && meets_x) break;
            S left = S::kR, right = S::kZ, addend = S::kR, target = S::kR;
            float alpha = 1, beta = a;
            const bool shifts = product == 0 && fresh && !standard;
            if (product == 0) {  // Z = b R + c R^2, and Q = Z + a I or (standard) Z
                right = S::kR;
                target = standard ? S::kQ : S::kZ;
                alpha = p.steps[i].c;
                beta = p.steps[i].b;
            } else if (product == 1) {  // Q <- a Q + Q Z
                left = addend = target = S::kQ;
            } else if (product == 3) {  // R <- a R + Z R, after R <- a R + R Z
                left = S::kZ;
                right = S::kR;
            }
            iteration.square(left, right, alpha, beta, addend, target, shifts, a);
        }
        fresh = meets_x;
    }
}

template <class T, int kBlocks>
__global__ void __launch_bounds__(ns_small_threads(kBlocks), kBlocks < 3 ? 2 : 1)
    newton_schulz_small_kernel(const __grid_constant__ NsSmall p) {
    if (is_skipped(p.tables)) return;
    auto& storage = arch::shared_storage<NsSmallStorage<kBlocks>>();
    const int64_t index = blockIdx.x;
    const int tensor_index =
        find_tensor(p.tables.tensors, &NsTensor::first_matrix, p.begin, p.end, index);
    const NsTensor& tensor = p.tables.tensors[tensor_index];
    const int matrix = static_cast<int>(index - tensor.first_matrix);
    if (tensor.m > tensor.n) {
        small_iteration<T, kBlocks, true>(p, storage, tensor_index, matrix);
    } else {
        small_iteration<T, kBlocks, false>(p, storage, tensor_index, matrix);
    }
}

}  // namespace k2k
