#include "bindings/dry.h"

#include <ATen/ops/empty.h>
#include <c10/core/Allocator.h>
#include <torch/csrc/utils/pybind.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <utility>

namespace pyglow::bindings {
namespace {

namespace py = pybind11;

constexpr int64_t block_on_gpu = 512;  // of which torch's allocator gives multiples there

// Bytes of tensors: those that there are now, and the most so far.
struct Count {
  explicit Count(bool on_gpu) : on_gpu(on_gpu), block(on_gpu ? block_on_gpu : 1) {}
  void add(int64_t bytes) {
    const int64_t found = now += bytes;
    if (found > most) most = found;
  }

  const bool on_gpu;
  const int64_t block;  // sizes are rounded up to multiples of it
  std::atomic<int64_t> now{0}, most{0};
};

thread_local std::shared_ptr<Count> counting;  // of this thread's dry run, if it is in one

// What tensors on "meta" are made with, in the place of torch's allocator, which gives nothing as this one does outside
// of a dry run. Inside, a tensor has an address, so that it can be given to functions of a kernel's form, but no
// memory.
class MetaAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(std::size_t bytes) override {
    if (!counting) return {nullptr, nullptr, &nothing, c10::Device(c10::kMeta)};
    const int64_t block = counting->block, size = (static_cast<int64_t>(bytes) + block - 1) / block * block;
    auto* const piece = new Piece{counting, size};
    counting->add(size);
    return {piece, piece, &take_back, c10::Device(c10::kMeta)};
  }
  void copy_data(void*, const void*, std::size_t) const override {}

 private:
  struct Piece {
    std::shared_ptr<Count> count;
    int64_t bytes;
  };
  static void nothing(void*) {}
  static void take_back(void* context) {
    auto* const piece = static_cast<Piece*>(context);
    piece->count->now -= piece->bytes;
    delete piece;
  }
};

void set_allocator() {
  static MetaAllocator* const own = new MetaAllocator;  // never destroyed: tensors may outlive everything static
  if (c10::GetAllocator(c10::kMeta) != own) c10::SetAllocator(c10::kMeta, own);
}

// A context in which tensors on "meta" are counted on this thread.
class DryRun {
 public:
  explicit DryRun(bool on_gpu) : count_(std::make_shared<Count>(on_gpu)) {}
  void enter() {
    set_allocator();
    before_ = std::exchange(counting, count_);
  }
  void exit() { counting = std::exchange(before_, nullptr); }
  int64_t most() const { return count_->most; }

 private:
  std::shared_ptr<Count> count_, before_;
};

}  // namespace

bool stands_for_gpu() { return counting && counting->on_gpu; }

at::Tensor convolution_scratch(const at::Tensor& x, int64_t outputs, int64_t taps) {
  constexpr int64_t block = 16, least_blocked = 20480;
  if (stands_for_gpu()) return {};
  const int64_t inputs = x.size(1), positions = inputs > 0 ? x.numel() / inputs : 0;
  const auto blocked = [](int64_t channels) { return (channels + block - 1) / block * block; };
  int64_t count = (blocked(inputs) + blocked(outputs)) * positions + blocked(inputs) * blocked(outputs) * taps;
  if (x.scalar_type() == at::kDouble || (x.size(0) == 1 && x.numel() <= least_blocked)) count = x.numel() * taps;
  return at::empty({count}, x.options());
}

void define_dry(py::module& m) {
  m.def("convolution_scratch", &convolution_scratch, "What torch's convolution takes besides on a CPU, in a dry run.",
        py::arg("x"), py::arg("outputs"), py::arg("taps"));
  py::class_<DryRun>(m, "DryRun", "Counts tensors on \"meta\" that this thread makes while it is entered.")
      .def(py::init<bool>(), py::arg("on_gpu"))
      .def("enter", &DryRun::enter, "Begin to count.")
      .def("exit", &DryRun::exit, "Count no new tensors any more; those counted are still subtracted.")
      .def_property_readonly("most", &DryRun::most, "The most so far.");
}

}  // namespace pyglow::bindings
