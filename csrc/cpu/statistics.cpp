// CPU schedules of the normal log density and of samples; compiled once per instruction set.
#include "cpu/isa.h"
#include "cpu/tiles.h"
#include "math/gaussian.h"

namespace pyglow::cpu::PYGLOW_ISA {
namespace {

// The rows of a value (or its noise) and of its distribution, each with `room` elements of memory.
template <class T>
struct NormalRows {
  Rows<const T> value, mean, log_sd;
};

template <class T>
NormalRows<T> read_normal(const Strided<const T>& value, const Strided<const T>& mean, const Strided<const T>& log_sd,
                          const Tile& tile, int64_t channels, T* memory, int64_t room) {
  return {read_rows(value, tile, 0, channels, memory), read_rows(mean, tile, 0, channels, memory + room),
          read_rows(log_sd, tile, 0, channels, memory + 2 * room)};
}

}  // namespace

template <class T>
void gaussian_log_prob(const GaussianArgs<T>& args, const Threads& threads) {
  const int64_t channels = args.channels;
  const TileShape shape = tile_shape<T>(args.samples, args.positions, 3 * channels);
  double* partials = static_cast<double*>(thread_scratch(Scratch::partials, (shape.count() + 1) * sizeof(double)));
  const int64_t room = channels * shape.length;
  for_tiles<T>(shape, threads, 4 * channels, 3 * room, [&](const Tile& tile, T* memory) {
    const auto [z, mean, log_sd] = read_normal(args.z, args.mean, args.log_sd, tile, channels, memory, room);
    Vec<T> sum{};
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t i = 0; i < tile.padded; i += lanes<T>) {
        const Vec<T> term =
            math::gaussian_log_density(load<T>(z.row(c) + i), load<T>(mean.row(c) + i), load<T>(log_sd.row(c) + i));
        sum += tile.length - i < lanes<T> ? first_lanes<T>(term, tile.length - i) : term;
      }
    }
    partials[tile.index] = static_cast<double>(sum_lanes<T>(sum));
  });
  const double constant = -math::half_log_2pi * static_cast<double>(channels * args.positions);
  sum_per_sample(partials, shape, 1.0, constant, args.log_prob);
}

template <class T>
void gaussian_log_prob_backward(const GaussianBackwardArgs<T>& args, const Threads& threads) {
  const int64_t channels = args.channels;
  const TileShape shape = tile_shape<T>(args.samples, args.positions, 6 * channels);
  const int64_t room = channels * shape.length;
  for_tiles<T>(shape, threads, 8 * channels, 6 * room, [&](const Tile& tile, T* memory) {
    const auto [z, mean, log_sd] = read_normal(args.z, args.mean, args.log_sd, tile, channels, memory, room);
    const Rows<T> grad_z = write_rows(args.grad_z, tile, 0, memory + 3 * room);
    const Rows<T> grad_mean = write_rows(args.grad_mean, tile, 0, memory + 4 * room);
    const Rows<T> grad_log_sd = write_rows(args.grad_log_sd, tile, 0, memory + 5 * room);
    const Vec<T> grad = broadcast<T>(args.grad_log_prob[tile.sample]);
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t i = 0; i < tile.padded; i += lanes<T>) {
        const math::GaussianGrad<Vec<T>> grads =
            math::gaussian_backward(load<T>(z.row(c) + i), load<T>(mean.row(c) + i), load<T>(log_sd.row(c) + i), grad);
        store<T>(grad_z.row(c) + i, grads.z);
        store<T>(grad_mean.row(c) + i, grads.mean);
        store<T>(grad_log_sd.row(c) + i, grads.log_sd);
      }
    }
    write_back(args.grad_z, tile, 0, channels, grad_z);
    write_back(args.grad_mean, tile, 0, channels, grad_mean);
    write_back(args.grad_log_sd, tile, 0, channels, grad_log_sd);
  });
}

template <class T>
void gaussian_sample(const GaussianSampleArgs<T>& args, const Threads& threads) {
  const int64_t channels = args.channels;
  const TileShape shape = tile_shape<T>(args.samples, args.positions, 4 * channels);
  const int64_t room = channels * shape.length;
  for_tiles<T>(shape, threads, 6 * channels, 4 * room, [&](const Tile& tile, T* memory) {
    const auto [noise, mean, log_sd] = read_normal(args.noise, args.mean, args.log_sd, tile, channels, memory, room);
    const Rows<T> z = write_rows(args.z, tile, 0, memory + 3 * room);
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t i = 0; i < tile.padded; i += lanes<T>)
        store<T>(z.row(c) + i,
                 math::gaussian_value(load<T>(noise.row(c) + i), load<T>(mean.row(c) + i), load<T>(log_sd.row(c) + i)));
    write_back(args.z, tile, 0, channels, z);
  });
}

PYGLOW_CPU_INSTANTIATE(gaussian_log_prob, GaussianArgs)
PYGLOW_CPU_INSTANTIATE(gaussian_log_prob_backward, GaussianBackwardArgs)
PYGLOW_CPU_INSTANTIATE(gaussian_sample, GaussianSampleArgs)

}  // namespace pyglow::cpu::PYGLOW_ISA
