// Memory of MLX's allocator that is filled before arrays are made of it. The interface is declared again, and documented,
// in buffer.rs.

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <exception>
#include <memory>

#include "mlx/allocator.h"
#include "mlx/array.h"
#include "mlx/c/private/enums.h"

using mlx::core::array;
using mlx::core::allocator::Buffer;

extern "C" void* omlx_memory_new(size_t size, void** bytes) {
  try {
    // MLX counts what the system refuses as if it had got it, and then lets every evaluation wait for memory, for good.
    void* volatile granted = std::malloc(size);
    if (granted == nullptr) {
      return nullptr;
    }
    std::free(granted);
    Buffer buffer = mlx::core::allocator::malloc(size);
    *bytes = buffer.raw_ptr();
    return buffer.ptr();
  } catch (const std::exception&) {
    return nullptr;
  }
}

extern "C" void omlx_memory_free(void* memory) {
  try {
    mlx::core::allocator::free(Buffer(memory));
  } catch (const std::exception&) {
    // Nobody could do anything about it.
  }
}

extern "C" void* omlx_memory_array(
    void* memory,
    size_t offset,
    const int32_t* shape,
    size_t ndim,
    mlx_dtype dtype,
    void* owner,
    void (*drop)(void*)) {
  try {
    // Dropped with the array's data, or here.
    std::shared_ptr<void> held(owner, drop);
    auto leave = [held](Buffer) {};
    auto made = std::make_unique<array>(
        Buffer(memory), mlx::core::Shape(shape, shape + ndim), mlx_dtype_to_cpp(dtype), leave);
    // The same data, further behind.
    made->set_data(
        Buffer(memory), made->data_size(), made->strides(), made->flags(), static_cast<int64_t>(offset), leave);
    return made.release();
  } catch (const std::exception&) {
    return nullptr;
  }
}
