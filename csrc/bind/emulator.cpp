// What only the emulator's module has: its options, guarded memory, counters.
#include "emulator/emulator.h"

#include <memory>
#include <stdexcept>

#include "bind/run.h"
#include "common/launch.h"

namespace k2k::bind {

namespace {

thread_local std::uintptr_t current_stream = 0;

void configure(int arch, std::uint64_t seed, std::uintptr_t stream) {
    emulator::options().arch = arch;
    emulator::set_seed(emulator::options(), seed);
    current_stream = stream;
}

// Launches made after begin() and before run() run concurrently, those of a stream in their order.
class Together {
  public:
    void begin() { together_ = std::make_unique<emulator::Together>(); }
    void run() {
        const auto ended = std::move(together_);
        const py::gil_scoped_release release;
        if (ended) ended->run();
    }
    void forget() { together_.reset(); }

  private:
    std::unique_ptr<emulator::Together> together_;
};

py::dict counters() {
    const emulator::Counters& counters = emulator::counters();
    py::dict result;
    result["launches"] = counters.launches;
    result["switches"] = counters.switches;
    result["bytes_loaded"] = counters.bytes_loaded;
    result["bytes_stored"] = counters.bytes_stored;
    return result;
}

}  // namespace

long run_on(DLDevice device, void (*launch)(void*, void*), void* context) {
    if (device.device_type != kDLCPU) throw std::invalid_argument("the emulator takes CPU tensors");
    const long before = num_launches;
    launch(context, pointer<void>(current_stream));
    return num_launches - before;
}

void bind_runtime(py::module_& m) {
    py::register_local_exception<emulator::Error>(m, "EmulatorError", PyExc_RuntimeError);
    m.def("configure", &configure, py::arg("arch"), py::arg("seed"), py::arg("stream") = 0,
          "Chip (compute capability x 10), schedule and stream of this thread's launches from now "
          "on.");
    py::class_<Together>(m, "Together",
                         "Launches made after begin() and before run(), run concurrently by run(); "
                         "those of one stream one after the other. forget() drops them.")
        .def(py::init<>())
        .def("begin", &Together::begin)
        .def("run", &Together::run)
        .def("forget", &Together::forget);
    m.def(
        "sum_fp8_as_hopper", [](bool on) { emulator::options().hopper_fp8 = on; }, py::arg("on"),
        "Whether wgmma rounds e4m3 sums as H100 does in this thread's launches from now on.");
    m.def("counters", &counters, "Of this thread's launches so far.");
    m.def(
        "allocate",
        [](std::size_t bytes) { return reinterpret_cast<Address>(emulator::allocate(bytes)); },
        py::arg("bytes"),
        "Address of memory filled with 0xff whose surroundings fault when a kernel touches them.");
    m.def(
        "release", [](Address address) { emulator::release(pointer<void>(address)); },
        py::arg("address"), "Frees memory of `allocate`.");
    bind_kernels(m);
}

}  // namespace k2k::bind
