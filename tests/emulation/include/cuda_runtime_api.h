// The emulator has one header.
#pragma once
#include "cuda_runtime.h"
