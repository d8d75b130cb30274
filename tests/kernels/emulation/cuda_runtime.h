// Found by `#include <cuda_runtime.h>` when kernels are compiled for the CPU.
#pragma once

#include "cuda_emulation.h"
