// Tensors as they were, and dictionaries as they were. Both are asked before each call of inference, of hundreds of
// tensors and thousands of entries: in Python the questions take as long as a small model's kernels.
#include "bindings/kept.h"

#include <ATen/core/Tensor.h>
#include <pybind11/stl.h>
#include <torch/csrc/autograd/python_variable.h>

#include <cstdint>
#include <cstring>
#include <vector>

namespace pyglow::bindings {
namespace {

namespace py = pybind11;

// Where a tensor is, of what form and what version. Values are not asked for.
struct Place {
  explicit Place(const at::Tensor& tensor)
      : data(tensor.const_data_ptr()),
        version(tensor._version()),
        dtype(tensor.scalar_type()),
        device(tensor.device()),
        sizes(tensor.sizes().vec()),
        strides(tensor.strides().vec()),
        storage_bytes(tensor.storage().nbytes()) {}

  bool holds(const at::Tensor& tensor) const {
    return !tensor.is_inference() && !tensor.is_neg() && tensor.const_data_ptr() == data &&
           static_cast<int64_t>(tensor._version()) == version && tensor.scalar_type() == dtype &&
           tensor.device() == device && tensor.sizes() == sizes && tensor.strides() == strides &&
           tensor.storage().nbytes() == storage_bytes;
  }

  const void* data;
  int64_t version;
  at::ScalarType dtype;
  at::Device device;
  std::vector<int64_t> sizes, strides;
  std::size_t storage_bytes;
};

// A tensor whose bytes lie in one piece, and where the copy of them begins.
struct Piece {
  at::Tensor tensor;
  std::size_t begin;
};

// The places of tensors, and a copy of the bits of some of them, which are on the CPU.
class KeptTensors {
 public:
  KeptTensors(const std::vector<at::Tensor>& tensors, const std::vector<at::Tensor>& compared) {
    for (const at::Tensor& tensor : tensors) places_.emplace_back(tensor);
    std::size_t bytes = 0;
    for (const at::Tensor& tensor : compared) {
      TORCH_CHECK_VALUE(tensor.is_cpu(), "compared: expected CPU tensors, found device ", tensor.device());
      if (tensor.is_non_overlapping_and_dense()) {
        pieces_.push_back({.tensor = tensor, .begin = bytes});
        bytes += tensor.nbytes();
      } else {
        strided_.push_back(tensor);
        copies_.push_back(tensor.clone(at::MemoryFormat::Contiguous));
      }
    }
    bits_.resize(bytes);
    for (const auto& [tensor, begin] : pieces_) {
      if (tensor.numel() > 0) std::memcpy(bits_.data() + begin, tensor.const_data_ptr(), tensor.nbytes());
    }
  }

  // Whether these are the tensors, in their places and of their versions; of a class of their own they are not.
  bool in_place(const py::list& tensors) const {
    const auto count = static_cast<std::size_t>(PyList_GET_SIZE(tensors.ptr()));
    if (count != places_.size()) return false;
    for (std::size_t i = 0; i < count; ++i) {
      PyObject* const tensor = PyList_GET_ITEM(tensors.ptr(), static_cast<Py_ssize_t>(i));
      if (!THPVariable_CheckExact(tensor) || !places_[i].holds(THPVariable_Unpack(tensor))) return false;
    }
    return true;
  }

  // Whether the bits are those of the copy. What was given must be in place: else this reads where nothing may be.
  bool same_bits() const {
    const py::gil_scoped_release released;
    for (const auto& [tensor, begin] : pieces_) {
      if (tensor.numel() == 0) continue;
      if (std::memcmp(bits_.data() + begin, tensor.const_data_ptr(), tensor.nbytes()) != 0) return false;
    }
    for (std::size_t i = 0; i < strided_.size(); ++i) {
      const at::Tensor now = strided_[i].contiguous();
      if (std::memcmp(now.const_data_ptr(), copies_[i].const_data_ptr(), now.nbytes()) != 0) return false;
    }
    return true;
  }

 private:
  std::vector<Place> places_;
  std::vector<Piece> pieces_;
  std::vector<char> bits_;
  std::vector<at::Tensor> strided_, copies_;
};

// Whether a dictionary has these entries, key and value in turn, in this order; each is told by its identity.
bool has_entries(PyObject* dict, PyObject* entries) {
  if (2 * PyDict_Size(dict) != PyTuple_GET_SIZE(entries)) return false;
  PyObject *key = nullptr, *value = nullptr;
  Py_ssize_t position = 0;
  for (Py_ssize_t i = 0; PyDict_Next(dict, &position, &key, &value) != 0; i += 2) {
    if (key != PyTuple_GET_ITEM(entries, i) || value != PyTuple_GET_ITEM(entries, i + 1)) return false;
  }
  return true;
}

// Whether objects are of these classes and have these attributes, and dictionaries these entries.
bool same_entries(const py::tuple& objects, const py::tuple& dicts) {
  for (const py::handle object : objects) {
    PyObject* const known = object.ptr();  // (object, its class, the entries of its __dict__)
    PyObject* const owner = PyTuple_GET_ITEM(known, 0);
    if (reinterpret_cast<PyObject*>(Py_TYPE(owner)) != PyTuple_GET_ITEM(known, 1)) return false;
    const auto attributes = py::reinterpret_steal<py::object>(PyObject_GenericGetDict(owner, nullptr));
    if (!attributes) throw py::error_already_set();
    if (!has_entries(attributes.ptr(), PyTuple_GET_ITEM(known, 2))) return false;
  }
  for (const py::handle dict : dicts) {
    if (!has_entries(PyTuple_GET_ITEM(dict.ptr(), 0), PyTuple_GET_ITEM(dict.ptr(), 1))) return false;
  }
  return true;
}

}  // namespace

void define_kept(py::module& m) {
  py::class_<KeptTensors>(m, "KeptTensors", "The places of tensors, and the bits of some of them.")
      .def(py::init<const std::vector<at::Tensor>&, const std::vector<at::Tensor>&>(), py::arg("tensors"),
           py::arg("compared"))
      .def("in_place", &KeptTensors::in_place, "Whether these tensors are where, and of the version, that they were.")
      .def("same_bits", &KeptTensors::same_bits, "Whether the bits of tensors that are in place are what they were.");
  m.def("same_entries", &same_entries, "Whether objects and dictionaries hold the very objects that they held.",
        py::arg("objects"), py::arg("dicts"));
}

}  // namespace pyglow::bindings
