// The arguments of augmented_linear and the plans of its scratch memory.
#pragma once

#include <algorithm>

#include "augmented.h"
#include "gemm.h"
#include "kernel.h"
