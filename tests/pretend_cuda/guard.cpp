// A CUDA device guard and CUDA hooks without CUDA: nothing is done, eight devices are reported. Autograd and autocast
// then accept tensors that say "cuda". Preloaded before torch (LD_PRELOAD); see cuda.py.
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/DeviceType.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

constexpr c10::DeviceIndex kDevices = 8;

struct PretendGuard final : public c10::impl::DeviceGuardImplInterface {
  static thread_local c10::Device current;
  c10::DeviceType type() const override { return c10::DeviceType::CUDA; }
  c10::Device exchangeDevice(c10::Device next) const override {
    auto before = current;
    current = next;
    return before;
  }
  c10::Device getDevice() const override { return current; }
  void setDevice(c10::Device next) const override { current = next; }
  void uncheckedSetDevice(c10::Device next) const noexcept override { current = next; }
  c10::Stream getStream(c10::Device device) const override { return c10::Stream(c10::Stream::DEFAULT, device); }
  c10::Stream getNewStream(c10::Device device, int) const override { return getStream(device); }
  c10::Stream getDefaultStream(c10::Device device) const override { return getStream(device); }
  c10::Stream exchangeStream(c10::Stream stream) const override { return getStream(stream.device()); }
  c10::DeviceIndex deviceCount() const noexcept override { return kDevices; }
};
thread_local c10::Device PretendGuard::current(c10::DeviceType::CUDA, 0);
static c10::impl::DeviceGuardImplRegistrar registered(c10::DeviceType::CUDA, new PretendGuard());

namespace at {
struct PretendHooks : public CUDAHooksInterface {
  explicit PretendHooks(CUDAHooksArgs) {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return false; }
  c10::DeviceIndex deviceCount() const override { return kDevices; }
  c10::DeviceIndex current_device() const override { return 0; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  void init() const override {}
  int getNumGPUs() const override { return kDevices; }
};
using at::CUDAHooksRegistry;
using at::RegistererCUDAHooksRegistry;
C10_REGISTER_TYPED_CLASS(CUDAHooksRegistry, "CUDAHooks", PretendHooks)
}  // namespace at
