// TMA: boxes of a tensor of one to five dimensions, between global and swizzled shared memory.
#include <cstring>

#include "emulator/machine.h"
#include "emulator/tensor_map.h"

namespace k2k::emulator {

namespace {

struct Box {
    TensorMapFields map;
    int start[5];
    uint32_t inner_bytes, rows;

    uint32_t bytes() const { return inner_bytes * rows; }
};

Box make_box(int rank, const void* map, const int* coordinates, Where where) {
    const char* what = self()->doing;
    Box box{};
    if (reinterpret_cast<uintptr_t>(map) % 64) fail(where, "%s: misaligned tensor map", what);
    std::memcpy(&box.map, map, sizeof box.map);  // the kernel's copy is on its thread's stack
    if (box.map.mark != TensorMapFields::kMark) fail(where, "%s: not a tensor map", what);
    if (box.map.rank != rank) {
        fail(where, "%s: %d coordinates for a tensor map of rank %d", what, rank, box.map.rank);
    }
    box.inner_bytes = box.map.box[0] * bytes_of(static_cast<Type>(box.map.type));
    box.rows = 1;
    for (int d = 0; d < rank; ++d) box.start[d] = coordinates[d];
    for (int d = 1; d < rank; ++d) box.rows *= box.map.box[d];
    return box;
}

// Calls visit(offset in the tile, global address or null, bytes) for each 16-byte chunk. A chunk
// across the tensor's end is visited in two parts; the one outside has a null address.
template <class Visit>
void for_each_chunk(const Box& box, Visit visit) {
    const TensorMapFields& map = box.map;
    const uint32_t width = bytes_of(static_cast<Type>(map.type));
    for (uint32_t row = 0; row < box.rows; ++row) {
        bool inside = true;
        uint64_t address = map.base;
        uint32_t rest = row;
        for (int d = 1; d < map.rank; ++d) {
            const long index = long(box.start[d]) + rest % map.box[d];
            rest /= map.box[d];
            inside &= index >= 0 && index < long(map.sizes[d]);
            address += static_cast<uint64_t>(index) * map.stride_bytes[d - 1];
        }
        for (uint32_t at = 0; at < box.inner_bytes; at += 16) {
            for (uint32_t byte = at; byte < at + 16;) {  // runs inside or outside
                const auto exists = [&](uint32_t b) {
                    const long index = long(box.start[0]) + b / width;
                    return inside && index >= 0 && index < long(map.sizes[0]);
                };
                uint32_t end = byte + width;
                while (end < at + 16 && exists(end) == exists(byte)) end += width;
                const long offset = long(box.start[0]) * width + byte;
                auto* global = reinterpret_cast<uint8_t*>(address + static_cast<uint64_t>(offset));
                visit(row * box.inner_bytes + byte, exists(byte) ? global : nullptr, end - byte);
                byte = end;
            }
        }
    }
}

uint8_t* tile_bytes(Block& block, const uint8_t* tile, uint32_t offset, unsigned swizzle_bytes) {
    const auto start = static_cast<uint32_t>(tile - block.smem.base);  // base is 1024-aligned
    return block.smem.base + swizzle(start + offset, swizzle_bytes);
}

void check_tile(const void* tile, const Box& box, Where where) {
    const unsigned align = box.map.swizzle_bytes == 0 ? 128 : 8 * box.map.swizzle_bytes;
    const Block& block = shared_range(tile, box.bytes(), self()->doing, where);
    const auto offset = static_cast<const uint8_t*>(tile) - block.smem.base;
    if (offset % align) {
        fail(where, "%s: the tile at smem+%ld is not a multiple of %u", self()->doing, long(offset),
             align);
    }
}

}  // namespace

void tma_prefetch(const void* map, Where where) {
    enter("tma_prefetch", where, 90);
    uint32_t mark;
    std::memcpy(&mark, map, sizeof mark);
    if (mark != TensorMapFields::kMark) fail(where, "tma_prefetch: not a tensor map");
}

void tma_prefetch_box(int rank, const void* map, const int* coordinates, Where where) {
    enter("tma_prefetch", where, 90);
    make_box(rank, map, coordinates, where);
}

void tma_load(int rank, void* target, const void* map, void* barrier, const int* coordinates,
              uint32_t cta_mask, Where where) {
    race::Quiet quiet;
    enter("tma_load", where, 90);
    const Box box = make_box(rank, map, coordinates, where);
    check_tile(target, box, where);
    if (cta_mask == 0) cta_mask = 1u << self()->cluster_rank;
    const std::vector<uint8_t> poison(box.bytes(), 0xff);
    for (unsigned cta = 0; cta_mask >> cta; ++cta) {
        if (!(cta_mask >> cta & 1)) continue;
        uint8_t* tile = peer(target, cta, where);
        void* peer_barrier = peer(barrier, cta, where);
        Block* block = owner_of(tile);
        if (block->live == 0) fail(where, "tma_load: block %u of the cluster has ended", cta);
        checked_mbarrier(peer_barrier, "tma_load", where);
        async_proxy_writes(*block, tile, poison.data(), box.bytes());
        add_copy(where, block, [=] {
            constexpr uint8_t kZero[16] = {};
            for_each_chunk(box, [&](uint32_t offset, const uint8_t* global, uint32_t bytes) {
                uint8_t* shared = tile_bytes(*block, tile, offset, box.map.swizzle_bytes);
                async_proxy_writes(*block, shared, global ? global : kZero, bytes);
                if (global) g_machine->counters.bytes_loaded += bytes;
            });
            mbarrier_complete_tx(peer_barrier, box.bytes(), where);
        });
    }
    preempt("tma_load", where);
}

// Writes a tile from shared memory to its box: `write(global, data, bytes)`.
template <class Write>
static void store_box(int rank, const void* map, const void* source, const int* coordinates,
                      Write write, Where where) {
    const Box box = make_box(rank, map, coordinates, where);
    check_tile(source, box, where);
    const auto* tile = static_cast<const uint8_t*>(source);
    Block* block = owner_of(source);
    add_bulk_store(
        source, box.bytes(),
        [=](const uint8_t* data) {
            for_each_chunk(box, [&](uint32_t offset, uint8_t* global, uint32_t bytes) {
                const uint8_t* at = tile_bytes(*block, tile, offset, box.map.swizzle_bytes);
                if (global) write(global, data + (at - tile), bytes);
            });
        },
        where);
}

void tma_store(int rank, const void* map, const void* source, const int* coordinates, Where where) {
    race::Quiet quiet;
    enter("tma_store", where, 90);
    store_box(
        rank, map, source, coordinates,
        [](uint8_t* global, const uint8_t* data, uint32_t bytes) {
            std::memcpy(global, data, bytes);
        },
        where);
}

void tma_reduce_add(int rank, const void* map, const void* source, const int* coordinates,
                    Where where) {
    race::Quiet quiet;
    enter("tma_reduce_add", where, 90);
    TensorMapFields fields;
    std::memcpy(&fields, map, sizeof fields);
    const auto type = static_cast<Type>(fields.type);
    store_box(
        rank, map, source, coordinates,
        [type, where](uint8_t* global, const uint8_t* data, uint32_t bytes) {
            add_elements(type, global, data, bytes, where);
        },
        where);
}

}  // namespace k2k::emulator
