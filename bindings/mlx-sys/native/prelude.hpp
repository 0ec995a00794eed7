// Included before every mlx-c source: what mlx-c expects to find and some toolchains do not give.
#pragma once

// mlx-c uses std::format and relies on another header to bring it in.
#include <format>

#include "mlx/types/half_types.h"

// mlx-c names the half types only on ARM, after the compiler's own, and elsewhere leaves out every function that has
// one in its signature. They cross the C interface by pointer only, so MLX's own two-byte types fit on every platform.
#define MLX_HALF_H
#define HAS_FLOAT16
#define HAS_BFLOAT16
using float16_t = mlx::core::float16_t;
using bfloat16_t = mlx::core::bfloat16_t;
