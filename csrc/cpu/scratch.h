// Memory that a thread keeps between calls, so that no kernel pays for fresh pages.
#pragma once
#include <cstddef>

namespace pyglow::cpu {

// Scratch is for one tile's rows, inside a task; partials for what a call collects across its tasks, net
// for the matrices of a small coupling net.
enum class Scratch { tile, partials, net };

// At least `bytes` of this thread's own memory, 64-byte aligned, contents undefined. It stays valid until the thread
// asks for the same kind again; it grows to the largest request and is freed when the thread ends.
void* thread_scratch(Scratch kind, std::size_t bytes);

}  // namespace pyglow::cpu
