// CPU schedules of the channel mixing; compiled once per instruction set.
#include "core.h"
#include "cpu/isa.h"
#include "cpu/product.h"

namespace pyglow::cpu::PYGLOW_ISA {
namespace {

constexpr int64_t tile_bytes = 24 * 1024;            // of x: half of a first-level cache of 48 KB
constexpr int64_t max_slots = 32;                    // partial sums of grad_M; fixed, so that threads do not change bits
constexpr int64_t max_partial_bytes = 16 << 20;

// x - center into rows of its own.
template <class T>
Rows<const T> centred_rows(const Strided<const T>& x, const Tile& tile, int64_t channels, const T* center, T* room) {
  const Rows<const T> rows = read_rows(x, tile, 0, channels, room);
  if (center == nullptr) return rows;
  for (int64_t c = 0; c < channels; ++c)
    for (int64_t i = 0; i < tile.padded; i += lanes<T>)
      store<T>(room + c * tile.padded + i, math::centred(load<T>(rows.row(c) + i), center[c]));
  // The padding must stay zero: it enters sums over positions.
  for (int64_t c = 0; c < channels; ++c)
    for (int64_t i = tile.length; i < tile.padded; ++i) room[c * tile.padded + i] = T(0);
  return {room, tile.padded};
}

}  // namespace

// Each task is a tile: its rows of x stay in cache while every block of output rows passes over them.
template <class T>
void channel_mix(const ChannelMixArgs<T>& args, const Threads& threads) {
  const int64_t channels = args.channels;
  const TileShape shape = tile_shape<T>(args.samples, args.positions, channels, tile_bytes);
  if (shape.count() == 0 || channels == 0) return;
  const Blocks blocks = blocks_of(channels);
  const int64_t packed_size = round_up(channels * blocks.count * blocks.rows, 16);
  T* packed = static_cast<T*>(thread_scratch(Scratch::partials, packed_size * sizeof(T)));
  pack_matrix(args.matrix, channels, false, packed);
  parallel(threads, shape.count(), grain_of(channels * shape.length), [&](int64_t begin, int64_t end) {
    const int64_t room = channels * round_up(shape.length, lanes<T>);
    T* memory = static_cast<T*>(thread_scratch(Scratch::tile, 2 * room * sizeof(T)));
    for (int64_t index = begin; index < end; ++index) {
      const Tile tile = tile_at<T>(shape, index);
      const T* center = args.subtract_first ? args.offset : nullptr;
      const Rows<const T> x = centred_rows(args.x, tile, channels, center, memory);
      const Rows<T> u = write_rows(args.u, tile, 0, memory + room);
      product(packed, x, args.subtract_first ? nullptr : args.offset, u, channels, tile.padded);
      write_back(args.u, tile, 0, channels, u);
    }
  });
}

// Each task is a slot: a fixed run of tiles with partial sums of its own, added up in order at the end.
template <class T>
void channel_mix_backward(const ChannelMixBackwardArgs<T>& args, const Threads& threads) {
  const int64_t channels = args.channels, square = channels * channels;
  const TileShape shape = tile_shape<T>(args.samples, args.positions, channels, tile_bytes);
  const int64_t slot_size = round_up(square + channels, 16);
  const int64_t fitting = larger(1, max_partial_bytes / static_cast<int64_t>(slot_size * sizeof(T)));
  const int64_t slots = smaller(smaller(max_slots, shape.count()), fitting);
  const Blocks blocks = blocks_of(channels);
  const int64_t packed_size = round_up(channels * blocks.count * blocks.rows, 16);
  T* packed = static_cast<T*>(thread_scratch(Scratch::partials, (packed_size + slots * slot_size) * sizeof(T)));
  T* partials = packed + packed_size;
  pack_matrix(args.matrix, channels, true, packed);
  const int64_t tiles_per_slot = slots == 0 ? 0 : (shape.count() + slots - 1) / slots;
  parallel(threads, slots, grain_of(2 * tiles_per_slot * channels * shape.length), [&](int64_t begin, int64_t end) {
    const int64_t room = channels * round_up(shape.length, lanes<T>);
    T* memory = static_cast<T*>(thread_scratch(Scratch::tile, 3 * room * sizeof(T)));
    for (int64_t slot = begin; slot < end; ++slot) {
      T* sums = partials + slot * slot_size;
      for (int64_t i = 0; i < slot_size; ++i) sums[i] = T(0);
      const int64_t last = smaller((slot + 1) * tiles_per_slot, shape.count());
      for (int64_t index = slot * tiles_per_slot; index < last; ++index) {
        const Tile tile = tile_at<T>(shape, index);
        const Rows<const T> grad_u = read_rows(args.grad_u, tile, 0, channels, memory);
        const Rows<const T> x = centred_rows(args.x, tile, channels, args.center, memory + room);
        add_outer_product(grad_u, x, channels, tile.padded, sums);
        for (int64_t c = 0; c < channels; ++c) {
          Vec<T> sum{};
          for (int64_t i = 0; i < tile.padded; i += lanes<T>) sum += load<T>(grad_u.row(c) + i);
          sums[square + c] += sum_lanes<T>(sum);
        }
        const Rows<T> grad_x = write_rows(args.grad_x, tile, 0, memory + 2 * room);
        product<T>(packed, grad_u, nullptr, grad_x, channels, tile.padded);
        write_back(args.grad_x, tile, 0, channels, grad_x);
      }
    }
  });
  const auto total = [&](int64_t i) {
    double sum = 0;
    for (int64_t slot = 0; slot < slots; ++slot) sum += partials[slot * slot_size + i];
    return static_cast<T>(sum);
  };
  for (int64_t i = 0; i < square; ++i) args.grad_matrix[i] = total(i);
  for (int64_t c = 0; c < channels; ++c) args.grad_offset[c] = total(square + c);
}

template void channel_mix<float>(const ChannelMixArgs<float>&, const Threads&);
template void channel_mix<double>(const ChannelMixArgs<double>&, const Threads&);
template void channel_mix_backward<float>(const ChannelMixBackwardArgs<float>&, const Threads&);
template void channel_mix_backward<double>(const ChannelMixBackwardArgs<double>&, const Threads&);

}  // namespace pyglow::cpu::PYGLOW_ISA
