#pragma once

// The whole iteration of a matrix whose short side s is at most 192, in one CTA. The result equals
// that of kernel_sm80.cuh to the bit.
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
// Grid      one CTA per matrix, of 4 kBlocks warps; kBlocks = ceil(s / 64).
// Warps     no roles: all copy and multiply. A warp has 64 x 32 of the lower triangle of a square
//           (kBlocks 1 and 2: two warps have none) and 64 x 32 of a panel. gram() keeps the sums of
//           R in registers over all panels.
// Squares   R, Z and Q are symmetric to the bit, so only the blocks of 64 x 64 on and below the
//           diagonal are kept; a block above it is read by ldmatrix.trans. Updated in place: all
//           sums are complete before the first is written. In blocks on the diagonal the part above
//           it is then copied from below.
//
//               0 . .      block (i, j) is number i (i + 1) / 2 + j;
//               1 2 .      warps: two for each, of 32 columns
//               3 4 5
//
// Panels    128 of the long axis x all of the short, in the orientation of X: a double buffer,
//           filled by cp.async, in the memory of R and Z. multiply() replaces a panel by its
//           product and stores it from there.
// Swizzle   of tile/swizzle.cuh, in the rows of panels and blocks.
// Barriers  all are sync_block:
//           panel_landed   all threads' copies have landed, and the other panel has been read
//           sums_complete  operands have been read; the results may overwrite them
//           result_ready   all threads have written their results to shared memory
//           mirrored       the blocks on the diagonal are complete
//           shifted        a I has been added
//           panels_stored  X is in memory again
// Epilogue  store_square: of R, Z and Q, in shared memory; copy_out: of X, to the workspace or, the
//           last product, to the caller (result.cuh).
// Order     each sum runs along K (the summed axis) in steps of 16.
// Shared    40, 88 or 144 KB for kBlocks 1, 2 or 3.
// Registers 64 accumulators per thread. kBlocks 2: at most 128 registers, for two CTAs per SM;
//           kBlocks 3: at most 168.
// Traffic   X_0 once for each R, in and out at each restart (each step, if standard), once at the
//           end; a matrix of 192 x 1536 is 590 KB, which L2 keeps.
// Limits    one CTA per matrix, however few matrices there are.

#include "arch/cp_async.cuh"
#include "arch/matrix.cuh"
#include "arch/mma.cuh"
#include "arch/smem.cuh"
#include "arch/warp.cuh"
#include "newton_schulz/result.cuh"
#include "tile/pack.cuh"
#include "tile/swizzle.cuh"

namespace k2k {

template <int kBlocks>
struct alignas(128) NsSmallStorage {
    uint8_t q[ns_small_square_bytes(kBlocks)];  // Q [s, s]; Z, if standard
    union {
        uint8_t squares[2][ns_small_square_bytes(kBlocks)];  // R, Z [s, s]
        uint8_t panels[2][ns_small_panel_bytes(kBlocks)];    // X [s, 128], or [128, s] if m > n
    };
};

enum class NsSmallSquare { kQ, kR, kZ };

// [64, 32] of a result: a warp's accumulators, in fragments of 16 x 8.
using NsSums64x32 = float[4][4][4];

// Byte offset of block (i, j), i >= j, of a square.
K2K_DEVICE uint32_t block_offset(int i, int j) {
    return (i * (i + 1) / 2 + j) * kNsSmallBlock * kNsSmallBlock * 2;
}

// An operand in a square: 64 rows (B, not kLeft: 32) from `first` on, x 16 of K from `depth` on.
template <bool kLeft>
struct NsSquareRows {
    uint32_t address;
    bool transposed;  // above the diagonal: read block (j, i)

    K2K_DEVICE NsSquareRows(uint32_t square, int first, int depth) {
        const int i = first / kNsSmallBlock, j = depth / kNsSmallBlock;
        first %= kNsSmallBlock;
        depth %= kNsSmallBlock;
        transposed = i < j;
        address = transposed ? tile::ldmatrix_address<kLeft, true, 128>(square + block_offset(j, i),
                                                                        depth, first / 8)
                             : tile::ldmatrix_address<kLeft, false, 128>(
                                   square + block_offset(i, j), first, depth / 8);
    }
    // The i-th 16 of the rows.
    K2K_DEVICE void load(uint32_t (&fragment)[4], int i) const {
        if (transposed) {
            arch::ldmatrix<4, true>(fragment, address ^ i * 32);
        } else {
            arch::ldmatrix<4, false>(fragment, address + i * 16 * 128);
        }
    }
};

// An operand in a panel; `kTransposed`: its rows are columns of the panel.
template <bool kLeft, bool kTransposed, int kPitch>
struct NsPanelRows {
    uint32_t address;

    K2K_DEVICE NsPanelRows(uint32_t panel, int first, int depth)
        : address(tile::ldmatrix_address<kLeft, kTransposed, kPitch>(
              panel, kTransposed ? depth : first, (kTransposed ? first : depth) / 8)) {}

    K2K_DEVICE void load(uint32_t (&fragment)[4], int i) const {
        arch::ldmatrix<4, kTransposed>(fragment,
                                       kTransposed ? address ^ i * 32 : address + i * 16 * kPitch);
    }
};

// The main loop: sums += A B over `depth` of K; a(k) and b(k) are the operands at k.
template <class T, class A, class B>
K2K_DEVICE void multiply_64x32(NsSums64x32& sums, int depth, A&& a, B&& b) {
    K2K_NO_UNROLL
    for (int k = 0; k < depth; k += 16) {
        // Keep B's fragments in registers, load those of A one at a time.
        const auto rows_a = a(k);
        const auto rows_b = b(k);
        uint32_t fragment_b[2][4];  // [16, 16] each
        K2K_UNROLL
        for (int j = 0; j < 2; ++j) rows_b.load(fragment_b[j], j);
        K2K_UNROLL
        for (int i = 0; i < 4; ++i) {
            uint32_t fragment_a[4];  // [16, 16]
            rows_a.load(fragment_a, i);
            K2K_UNROLL
            for (int j = 0; j < 4; ++j) {
                const uint32_t* pair = fragment_b[j / 2] + j % 2 * 2;
                arch::mma_sync<T>(sums[i][j], fragment_a, {pair[0], pair[1]});
            }
        }
    }
}

// Calls f(offset, low, high) for each pair of this lane's accumulators. `offset`: of the pair, in
// bytes, in a matrix with rows of kPitch bytes in which the [64, 32] begin at (row, column).
template <int kPitch, class F>
K2K_DEVICE void for_each_pair(const NsSums64x32& sums, int row, int column, F&& f) {
    const int lane = arch::lane_id();
    const uint32_t first =
        (row + lane / 4) * kPitch + tile::swizzled(lane / 4, column / 8) * 16 + lane % 4 * 4;
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

// The steps of the iteration of one matrix; all threads of the CTA call them.
template <class T, int kBlocks, bool kTall>
class NsSmallMatrix {
  public:
    using Square = NsSmallSquare;

    K2K_DEVICE NsSmallMatrix(NsSmallStorage<kBlocks>& storage, const NsTables& tables,
                             int tensor_index, int matrix)
        : storage_(storage), tables_(tables), tensor_index_(tensor_index), matrix_(matrix) {
        const NsTensor& t = tables.tensors[tensor_index];
        short_side_ = kTall ? t.n : t.m;
        long_side_ = kTall ? t.m : t.n;
        // Find this warp's 64 x 32 of the triangle (2 (i + 1) warps in block row i) and of a panel.
        const int warp = arch::warp_id(), i = warp < 2 ? 0 : warp < 6 ? 1 : 2;
        square_row_ = i * 64;
        square_column_ = (warp - i * (i + 1)) * 32;
        square_active_ = i < kBlocks;
        constexpr int kPerRow = kTall ? 2 * kBlocks : 4;
        panel_row_ = warp / kPerRow * 64;
        panel_column_ = warp % kPerRow * 32;
    }

    // R = X X^T (X^T X, if kTall).
    K2K_DEVICE void gram() {
        // Sum over all panels; a panel is both operands.
        NsSums64x32 sums = {};
        for_each_panel([&](int, uint8_t* panel) {
            if (!square_active_) return;
            const uint32_t base = arch::smem_address(panel);
            multiply_64x32<T>(
                sums, kNsSmallPanel,
                [&](int k) { return NsPanelRows<true, kTall, kPitch>(base, square_row_, k); },
                [&](int k) { return NsPanelRows<false, kTall, kPitch>(base, square_column_, k); });
        });
        // Store R, in the memory of the panels.
        arch::sync_block();  // sums_complete
        store_square(sums, 1, 0, Square::kR, Square::kR, false, 0);
    }

    // X <- Q X + beta X (X Q, if kTall); `last`: to the caller instead of X.
    K2K_DEVICE void multiply(float beta, bool last) {
        for_each_panel([&](int first, uint8_t* panel) {
            // Multiply in place, then store, while the next panel's copies are in flight.
            multiply(panel, beta);
            copy_out(panel, first, last);
        });
        arch::sync_block();  // panels_stored
    }

    // d = alpha a b + beta c; with `shifts`, Q = d + diagonal I.
    K2K_DEVICE void square(Square a, Square b, float alpha, float beta, Square c, Square d,
                           bool shifts, float diagonal) {
        // Main loop, without barriers: both operands are in shared memory.
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
    // Panels: [s, 128], kTall [128, s].
    static constexpr int kPitch = 2 * (kTall ? kBlocks * kNsSmallBlock : kNsSmallPanel);
    static constexpr int kRows = kTall ? kNsSmallPanel : kBlocks * kNsSmallBlock;
    static constexpr int kChunksPerRow = kPitch / 16;
    static constexpr int kChunks = kRows * kChunksPerRow / ns_small_threads(kBlocks);

    K2K_DEVICE uint8_t* at(Square square) const {
        return square == Square::kQ ? storage_.q : storage_.squares[square == Square::kZ];
    }

    // The epilogue of a square: d = alpha sums + beta c; with `shifts`, Q = d + diagonal I.
    K2K_DEVICE void store_square(const NsSums64x32& sums, float alpha, float beta, Square c,
                                 Square d, bool shifts, float diagonal) {
        const int block_row = square_row_ / kNsSmallBlock,
                  block_column = square_column_ / kNsSmallBlock;
        // Store this warp's 64 x 32, a pair at a time; c, d and Q have the same layout.
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
                                       low = fmaf(beta, tile::unpack<T>(old, 0), low);
                                       high = fmaf(beta, tile::unpack<T>(old, 1), high);
                                   }
                                   const uint32_t pair = tile::pack<T>(low, high);
                                   *reinterpret_cast<uint32_t*>(to + offset) = pair;
                                   if (shifts)
                                       *reinterpret_cast<uint32_t*>(shifted + offset) = pair;
                               });
        }
        // Complete the blocks on the diagonal; nothing reads blocks above it.
        arch::sync_block();  // result_ready
        mirror(at(d));
        if (shifts) mirror(storage_.q);
        arch::sync_block();  // mirrored
        if (!shifts) return;
        // Add to Q's diagonal, one row per thread.
        const int row = threadIdx.x;
        if (row < short_side_) {
            auto* element = reinterpret_cast<T*>(
                storage_.q + block_offset(row / kNsSmallBlock, row / kNsSmallBlock) +
                tile::chunk_offset<128>(row % kNsSmallBlock, row % kNsSmallBlock / 8) +
                row % 8 * 2);
            *element = tile::narrowed<T>(arch::to_float(*element) + diagonal);
        }
        arch::sync_block();  // shifted
    }

    // Copies the lower triangle of the blocks on the diagonal to the upper one, 16 rows per warp.
    K2K_DEVICE static void mirror(uint8_t* square) {
        const int lane = arch::lane_id(), i = arch::warp_id() / 4;
        uint8_t* block = square + block_offset(i, i);
        const uint32_t base = arch::smem_address(block);
        K2K_NO_UNROLL
        for (int task = 0; task < 4; ++task) {
            const int eight = arch::warp_id() % 4 * 2 + task / 2,
                      first = task % 2 * 4;  // rows, columns
            // Load four 8 x 8 from column `eight`, transposed. Those above the diagonal are not
            // needed, and other warps write them: load the one on the diagonal instead.
            const int source = first + lane / 8 < eight ? eight : first + lane / 8;
            const int from = source * 8 + lane % 8, row = eight * 8 + lane / 4;
            uint32_t words[4];
            arch::ldmatrix<4, true>(words, base + tile::chunk_offset<128>(from, eight));
            arch::sync_warp();
            // Store the elements above the diagonal, in row `eight`.
            K2K_UNROLL
            for (int j = 0; j < 4; ++j) {
                const int column = (first + j) * 8 + lane % 4 * 2;
                auto* pair = reinterpret_cast<uint16_t*>(
                    block + tile::chunk_offset<128>(row, first + j) + lane % 4 * 4);
                if (column > row) {
                    *reinterpret_cast<uint32_t*>(pair) = words[j];
                } else if (column == row) {
                    pair[1] = static_cast<uint16_t>(words[j] >> 16);
                }
            }
            arch::sync_warp();
        }
    }

    // panel <- Q panel + beta panel (panel Q, if kTall)
    K2K_DEVICE void multiply(uint8_t* panel, float beta) {
        // Main loop; kTall: the panel is the left operand, Q the right one.
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
        // Replace the panel, a pair at a time.
        arch::sync_block();  // sums_complete
        for_each_pair<kPitch>(sums, panel_row_, panel_column_,
                              [&](uint32_t offset, float low, float high) {
                                  auto* pair = reinterpret_cast<uint32_t*>(panel + offset);
                                  if (beta != 0) {
                                      low = fmaf(beta, tile::unpack<T>(*pair, 0), low);
                                      high = fmaf(beta, tile::unpack<T>(*pair, 1), high);
                                  }
                                  *pair = tile::pack<T>(low, high);
                              });
        arch::sync_block();  // result_ready
    }

    // X in the workspace. Computed at each use, to save registers for accumulators.
    K2K_DEVICE NsMatrix<T> workspace() const {
        return {tables_.tensors[tensor_index_], matrix_, NsBuffer::kX0};
    }

    // Double buffering: calls f(first, panel) for the panel that begins at `first` of the long
    // axis, while the copies of the next one are in flight.
    template <class F>
    K2K_DEVICE void for_each_panel(F&& f) {
        copy_in(0, 0);
        K2K_NO_UNROLL
        for (int first = 0, at = 0; first < long_side_; first += kNsSmallPanel, at ^= 1) {
            // Wait for this panel, then start the copies of the next.
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

    // Stores the panel: to X, or `last`: to the caller.
    K2K_DEVICE void copy_out(const uint8_t* panel, int first, bool last) {
        const NsMatrix<T> x = workspace();
        K2K_NO_UNROLL
        for (int i = 0; i < kChunks; ++i) {
            const int chunk = i * ns_small_threads(kBlocks) + threadIdx.x;
            T* target = place(x, chunk, first);
            if (target == nullptr) continue;
            const uint8_t* source = panel + offset_of(chunk);
            // Last product: to the caller's result or weights.
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

    // A chunk's byte offset in a panel, and its address in X (null: outside).
    K2K_DEVICE static uint32_t offset_of(int chunk) {
        const int row = chunk / kChunksPerRow;
        return tile::chunk_offset<kPitch>(row, chunk % kChunksPerRow);
    }
    K2K_DEVICE static T* place(const NsMatrix<T>& x, int chunk, int first) {
        const int row = chunk / kChunksPerRow + (kTall ? first : 0);
        const int column = chunk % kChunksPerRow * 8 + (kTall ? 0 : first);
        return row < x.rows && column < x.columns ? x.data + row * x.pitch + column : nullptr;
    }

    NsSmallStorage<kBlocks>& storage_;
    const NsTables& tables_;
    const int tensor_index_, matrix_;
    int short_side_, long_side_, square_row_, square_column_, panel_row_, panel_column_;
    bool square_active_;
};

template <class T, int kBlocks, bool kTall>
K2K_DEVICE void small_iteration(const NsSmall& p, NsSmallStorage<kBlocks>& storage,
                                int tensor_index, int matrix) {
    NsSmallMatrix<T, kBlocks, kTall> iteration(storage, p.tables, tensor_index, matrix);
    const bool standard = !p.tables.tensors[tensor_index].gram;
    bool fresh = true;  // (re)start: X <- Q X if i > 0, R from X, no Q yet
    K2K_NO_UNROLL
    for (int i = 0;; ++i) {
        // At a restart and at the end, X <- Q X (standard: every step, a X + Z X); then R = X X^T.
        if (fresh) {
            if (i > 0) iteration.multiply(standard ? p.steps[i - 1].a : 0, i == p.num_steps);
            if (i == p.num_steps) return;
            iteration.gram();
        }
        const float a = p.steps[i].a;
        // The step's products of squares: 0 Z (and Q), 1 Q, 2 and 3 R. `meets_x`: X is multiplied
        // next, so R is not updated.
        const bool meets_x = standard || i + 1 == p.num_steps || p.steps[i + 1].restart;
        K2K_NO_UNROLL
        for (int product = 0; product < 4; ++product) {
            using S = NsSmallSquare;
            if (product == 1 && fresh) continue;
            if (product == 2 && meets_x) break;
            S left = S::kR, right = S::kZ, addend = S::kR, target = S::kR;
            float alpha = 1, beta = a;
            const bool shifts = product == 0 && fresh && !standard;
            // Set the operands; one call for all four products keeps the code small.
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
    // Find this CTA's tensor and matrix.
    if (is_skipped(p.tables)) return;
    auto& storage = arch::shared_storage<NsSmallStorage<kBlocks>>();
    const int64_t index = blockIdx.x;
    const int tensor_index =
        find_tensor(p.tables.tensors, &NsTensor::first_matrix, p.begin, p.end, index);
    const NsTensor& tensor = p.tables.tensors[tensor_index];
    const int matrix = static_cast<int>(index - tensor.first_matrix);
    // m > n: X^T X and X Q.
    if (tensor.m > tensor.n) {
        small_iteration<T, kBlocks, true>(p, storage, tensor_index, matrix);
    } else {
        small_iteration<T, kBlocks, false>(p, storage, tensor_index, matrix);
    }
}

}  // namespace k2k
