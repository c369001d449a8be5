// What the module's entry registers with the dispatcher, file by file.
#pragma once
#include <torch/library.h>

namespace pyglow::bindings {

void register_step_ops(torch::Library& m);
void register_fused_ops(torch::Library& m);
void register_statistics_ops(torch::Library& m);
void register_matrix_ops(torch::Library& m);
// For CPU tensors alone:
void register_net_ops(torch::Library& m);
void register_checkerboard_ops(torch::Library& m);

}  // namespace pyglow::bindings
