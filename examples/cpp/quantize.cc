// Quantizes a plain buffer of bf16 with a kernel that was built ahead of time: no Python, no
// compiler. Kernels have the arguments that `__call__` in cute_quant/kernels/quantize.py lists.

#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/extra/c_env_api.h>
#include <tvm/ffi/extra/module.h>
#include <tvm/ffi/function.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

namespace ffi = tvm::ffi;

constexpr char kKernel[] = "quantize-bfloat16-e4m3_128_e8m0_mn_major_packed";
constexpr int64_t kRows = 1000, kColumns = 7168, kGroup = 128;
constexpr int64_t kGroups = kColumns / kGroup, kWords = (kGroups + 3) / 4;
constexpr int64_t kAlignedRows = (kRows + 3) / 4 * 4;
constexpr float kMax = 448;
constexpr int kBias = 127;
// 1e-10, the lower bound of scales, up to the next power of two: 2^-33.
constexpr int kFloor = kBias - 33;

void check(cudaError_t status) {
  if (status != cudaSuccess) throw std::runtime_error(cudaGetErrorString(status));
}

template <typename T>
class DeviceBuffer {
 public:
  explicit DeviceBuffer(int64_t size) : size_(size) { check(cudaMalloc(&data_, bytes())); }
  ~DeviceBuffer() { cudaFree(data_); }
  DeviceBuffer(const DeviceBuffer &) = delete;
  DeviceBuffer &operator=(const DeviceBuffer &) = delete;

  void upload(const std::vector<T> &from) {
    check(cudaMemcpy(data_, from.data(), bytes(), cudaMemcpyHostToDevice));
  }
  std::vector<T> download() const {
    std::vector<T> to(size_);
    check(cudaMemcpy(to.data(), data_, bytes(), cudaMemcpyDeviceToHost));
    return to;
  }
  T *data() { return data_; }

 private:
  size_t bytes() const { return size_ * sizeof(T); }
  int64_t size_;
  T *data_ = nullptr;
};

// A matrix of `rows` as kernels take it.
struct Matrix {
  int64_t shape[2], strides[2];
  DLTensor tensor;

  Matrix(void *data, DLDataType dtype, int64_t columns, int64_t row_stride, int64_t column_stride)
      : shape{kRows, columns}, strides{row_stride, column_stride} {
    tensor = {data, {kDLCUDA, 0}, 2, dtype, shape, strides, 0};
  }
  Matrix(const Matrix &) = delete;
};

float from_e4m3(uint8_t byte) {
  int exponent = byte >> 3 & 15, mantissa = byte & 7;
  float magnitude = exponent == 0 ? std::ldexp(mantissa, -9) : std::ldexp(8 + mantissa, exponent - 10);
  return byte & 0x80 ? -magnitude : magnitude;
}

// Whether each scale is the smallest power of two that brings its group into range, and each value
// the nearest one of e4m3 to what it stands for.
bool is_right(const std::vector<__nv_bfloat16> &x, const std::vector<uint8_t> &q,
              const std::vector<uint32_t> &sf, double *largest_error) {
  bool right = true;
  *largest_error = 0;
  for (int64_t row = 0; row < kRows; ++row) {
    for (int64_t group = 0; group < kGroups; ++group) {
      const int64_t start = row * kColumns + group * kGroup;
      uint32_t word = sf[group / 4 * kAlignedRows + row];
      double scale = std::ldexp(1.0, static_cast<int>(word >> group % 4 * 8 & 255) - kBias);
      double amax = 0;
      for (int64_t i = start; i < start + kGroup; ++i) {
        double value = __bfloat162float(x[i]), got = from_e4m3(q[i]) * scale;
        double error = std::abs(got - value);
        amax = std::max(amax, std::abs(value));
        // Half a step: of three bits of mantissa, or of subnormals.
        right &= error <= std::max(std::abs(value) / 16, scale * std::ldexp(1.0, -10));
        *largest_error = std::max(*largest_error, error / scale);
      }
      right &= amax <= scale * kMax && amax > scale * kMax / 2;
    }
  }
  return right;
}

int run(const std::string &directory, const std::string &arch) {
  const std::string path = directory + "/" + kKernel + "-" + arch + ".so";
  std::string symbol = std::string(kKernel) + "_" + arch;
  std::replace(symbol.begin(), symbol.end(), '-', '_');
  // Beside it lies the runtime library that it was linked with.
  ffi::Module module = ffi::Module::LoadFromFile(path);
  ffi::Optional<ffi::Function> quantize = module->GetFunction(symbol);
  if (!quantize.has_value()) throw std::runtime_error(path + " has no function " + symbol);
  std::printf("loaded %s\n", path.c_str());

  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::printf("no GPU here, so it is not called\n");
    return 0;
  }

  std::mt19937 generator(0);
  std::normal_distribution<float> normal;
  std::vector<__nv_bfloat16> x(kRows * kColumns);
  for (auto &value : x) value = __float2bfloat16(normal(generator));

  DeviceBuffer<__nv_bfloat16> device_x(kRows * kColumns);
  DeviceBuffer<uint8_t> device_q(kRows * kColumns);
  DeviceBuffer<uint32_t> device_sf(kAlignedRows * kWords);
  device_x.upload(x);
  Matrix x_matrix(device_x.data(), {kDLBfloat, 16, 1}, kColumns, kColumns, 1);
  Matrix q_matrix(device_q.data(), {kDLFloat8_e4m3fn, 8, 1}, kColumns, kColumns, 1);
  Matrix sf_matrix(device_sf.data(), {kDLInt, 32, 1}, kWords, 1, kAlignedRows);

  cudaStream_t stream;
  check(cudaStreamCreate(&stream));
  TVMFFIEnvSetStream(kDLCUDA, 0, stream, nullptr);
  // All padding rows are there, no rows are counted or gathered, and values are rounded to nearest.
  // The first null stands for the scale over those of groups, which only formats of FP4 with e4m3
  // scales have.
  const int missing_rows = 0, alignment = 1, row_ctas = 1;
  (*quantize)(ffi::TensorView(&x_matrix.tensor), ffi::TensorView(&q_matrix.tensor),
              ffi::TensorView(&sf_matrix.tensor), nullptr, nullptr, nullptr, nullptr, missing_rows,
              alignment, row_ctas, kFloor);
  check(cudaStreamSynchronize(stream));
  check(cudaStreamDestroy(stream));

  double largest_error = 0;
  bool right = is_right(x, device_q.download(), device_sf.download(), &largest_error);
  std::printf("quantized %lld x %lld bf16 values in groups of %lld\n",
              static_cast<long long>(kRows), static_cast<long long>(kColumns),
              static_cast<long long>(kGroup));
  std::printf("largest error: %.1f scales, %s\n", largest_error, right ? "right" : "WRONG");
  return right ? 0 : 1;
}

int main(int argc, char **argv) {
  if (argc != 3) {
    std::fprintf(stderr, "usage: quantize DIRECTORY ARCHITECTURE, such as kernels sm_90a\n");
    return 2;
  }
  try {
    return run(argv[1], argv[2]);
  } catch (const std::exception &error) {
    std::fprintf(stderr, "quantize: %s\n", error.what());
    return 1;
  }
}
