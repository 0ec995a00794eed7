// MLX graph nodes that run kernels written in Rust. The interface is declared again, and documented, in node.rs.
//
// An exception may cross MLX's frames, a Rust panic may not: kernels report failures as text, and this file turns the
// text into an exception, which MLX hands to whoever evaluates the graph.

#include <bit>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "mlx/allocator.h"
#include "mlx/array.h"
#include "mlx/backend/cpu/encoder.h"
#include "mlx/primitives.h"

namespace {

using mlx::core::array;
using mlx::core::Dtype;

extern "C" {

struct omlx_kernel_array {
  void* data;
  const int32_t* shape;
  const int64_t* strides;
  size_t ndim;
  uint32_t dtype;
};

typedef int32_t (*omlx_kernel_run)(
    const void* kernel,
    const omlx_kernel_array* inputs,
    size_t input_count,
    const omlx_kernel_array* output,
    char* message,
    size_t message_size);

typedef void (*omlx_kernel_drop)(void* kernel);
}

// Owns the Rust object: shared by the graph node and the tasks that are still to run it.
struct Kernel {
  void* self;
  omlx_kernel_run run;
  omlx_kernel_drop drop;

  Kernel(void* self, omlx_kernel_run run, omlx_kernel_drop drop) : self(self), run(run), drop(drop) {}
  Kernel(const Kernel&) = delete;
  Kernel& operator=(const Kernel&) = delete;
  ~Kernel() {
    drop(self);
  }
};

// The codes of `DTYPES` in node.rs.
const Dtype kDtypes[] = {
    mlx::core::float32,
    mlx::core::float16,
    mlx::core::bfloat16,
    mlx::core::uint32,
    mlx::core::int32,
    mlx::core::uint8};
constexpr uint32_t kDtypeCount = sizeof(kDtypes) / sizeof(kDtypes[0]);

uint32_t code_of(Dtype dtype) {
  uint32_t code = 0;
  while (code < kDtypeCount && kDtypes[code] != dtype) {
    code++;
  }
  return code;
}

omlx_kernel_array view(const array& a) {
  return {const_cast<char*>(a.data<char>()), a.shape().data(), a.strides().data(), a.ndim(), code_of(a.dtype())};
}

void run(const Kernel& kernel, const std::vector<array>& inputs, const array& output) {
  std::vector<omlx_kernel_array> views;
  views.reserve(inputs.size());
  for (const auto& input : inputs) {
    views.push_back(view(input));
  }
  omlx_kernel_array target = view(output);
  char message[512] = "";
  if (kernel.run(kernel.self, views.data(), views.size(), &target, message, sizeof(message)) != 0) {
    throw std::runtime_error(message);
  }
}

// Bytes to ask MLX's allocator for. What it keeps of freed memory serves sizes within two pages alone, and batches have
// any number of rows: sizes of at most an eighth more than needed are few enough to meet again. Small ones cost no pages,
// and large ones, such as pools, are hardly ever kept.
size_t shared_size(size_t bytes) {
  constexpr size_t SMALL = 64 << 10, LARGE = 16 << 20;
  if (bytes < SMALL || bytes > LARGE) {
    return bytes;
  }
  const size_t step = std::bit_floor(bytes) / 8;
  return (bytes + step - 1) / step * step;
}

class RustKernel : public mlx::core::UnaryPrimitive {
 public:
  RustKernel(mlx::core::Stream stream, std::shared_ptr<Kernel> kernel)
      : UnaryPrimitive(stream), kernel_(std::move(kernel)) {}

  void eval_cpu(const std::vector<array>& inputs, array& output) override {
    output.set_data(mlx::core::allocator::malloc(shared_size(output.nbytes())));
    auto& encoder = mlx::core::cpu::get_command_encoder(stream());
    std::vector<array> held;
    for (const auto& input : inputs) {
      encoder.set_input_array(input);
      held.push_back(array::unsafe_weak_copy(input));
    }
    encoder.set_output_array(output);
    encoder.dispatch([kernel = kernel_, held = std::move(held), target = array::unsafe_weak_copy(output)]() {
      run(*kernel, held, target);
    });
  }

  void eval_gpu(const std::vector<array>&, array&) override {
    throw std::runtime_error("this kernel runs on the CPU only");
  }

  const char* name() const override {
    return "OmlxKernel";
  }

 private:
  std::shared_ptr<Kernel> kernel_;
};

Dtype dtype_of(uint32_t code) {
  if (code >= kDtypeCount) {
    throw std::invalid_argument("unknown kernel output type");
  }
  return kDtypes[code];
}

} // namespace

extern "C" void* omlx_kernel_array_new(
    void* self,
    omlx_kernel_run run,
    omlx_kernel_drop drop,
    void* const* inputs,
    size_t input_count,
    const int32_t* shape,
    size_t ndim,
    uint32_t dtype,
    const void* stream,
    char* message,
    size_t message_size) {
  try {
    auto kernel = std::make_shared<Kernel>(self, run, drop);
    std::vector<array> operands;
    for (size_t i = 0; i < input_count; i++) {
      operands.push_back(*static_cast<array*>(inputs[i]));
    }
    auto primitive = std::make_shared<RustKernel>(*static_cast<const mlx::core::Stream*>(stream), std::move(kernel));
    return new array(mlx::core::Shape(shape, shape + ndim), dtype_of(dtype), primitive, std::move(operands));
  } catch (const std::exception& e) {
    std::string(e.what()).copy(message, message_size - 1);
    return nullptr;
  }
}
