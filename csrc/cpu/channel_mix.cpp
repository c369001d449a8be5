// CPU schedules of the channel mixing; compiled once per instruction set.
#include "core.h"
#include "cpu/isa.h"
#include "cpu/mix_sums.h"
#include "cpu/views.h"

namespace pyglow::cpu::PYGLOW_ISA {
namespace {

// x - center into rows of its own.
template <class T>
Rows<const T> centred_rows(const Squeezed<const T>& x, const Tile& tile, int64_t channels, const T* center, T* room) {
  const Rows<const T> rows = read_rows(x, tile, 0, channels, room);
  if (center == nullptr) return rows;
  for (int64_t c = 0; c < channels; ++c)
    for (int64_t i = 0; i < tile.padded; i += lanes<T>)
      store<T>(room + c * tile.padded + i, math::centred(load<T>(rows.row(c) + i), center[c]));
  clear_padding(Rows<T>{room, tile.padded}, channels, tile);  // it enters sums over positions
  return {room, tile.padded};
}

}  // namespace

// Each task is a tile: its rows of x stay in cache while every block of output rows passes over them.
template <class T>
void channel_mix(const ChannelMixArgs<T>& args, const Threads& threads) {
  const int64_t channels = args.channels;
  const TileShape shape = tile_shape<T>(args.samples, args.positions, channels);
  if (shape.count() == 0 || channels == 0) return;
  T* packed = static_cast<T*>(thread_scratch(Scratch::partials, packed_size(channels) * sizeof(T)));
  pack_matrix(args.matrix, channels, false, packed);
  const int64_t room = channels * shape.length;
  for_tiles<T>(shape, threads, channels, 2 * room, [&](const Tile& tile, T* memory) {
    const T* center = args.subtract_first ? args.offset : nullptr;
    const Rows<const T> x = centred_rows(args.x, tile, channels, center, memory);
    const Rows<T> u = write_rows(args.u, tile, 0, memory + room);
    product(packed, x, args.subtract_first ? nullptr : args.offset, u, channels, tile.padded);
    write_back(args.u, tile, 0, channels, u);
  });
}

// A tile's rows of grad_u serve the product and the sums.
template <class T>
void channel_mix_backward(const ChannelMixBackwardArgs<T>& args, const Threads& threads) {
  const int64_t channels = args.channels;
  const TileShape shape = tile_shape<T>(args.samples, args.positions, channels);
  const MixSums<T> sums(shape, channels, packed_size(channels));
  pack_matrix(args.matrix, channels, true, sums.memory());
  const int64_t room = channels * shape.length;
  sums.add_tiles(threads, 2 * room, 3 * room, [&](const Tile& tile, T* memory) {
    const Rows<const T> grad_u = read_rows(args.grad_u, tile, channels, memory + room);
    const Rows<T> grad_x = write_rows(args.grad_x, tile, 0, memory);
    product<T>(sums.memory(), grad_u, nullptr, grad_x, channels, tile.padded);
    write_back(args.grad_x, tile, 0, channels, grad_x);
    return Factors<T>{grad_u, centred_rows(args.x, tile, channels, args.center, memory + 2 * room), tile.padded};
  });
  sums.total(args.grad_matrix, args.grad_offset);
}

PYGLOW_CPU_INSTANTIATE(channel_mix, ChannelMixArgs)
PYGLOW_CPU_INSTANTIATE(channel_mix_backward, ChannelMixBackwardArgs)

}  // namespace pyglow::cpu::PYGLOW_ISA
