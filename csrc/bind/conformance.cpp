#include "bind/run.h"
#include "common/error.h"
#include "conformance/launch.h"

namespace k2k::bind {

namespace {

const std::map<std::string, conformance::Launch>& find_launches(bool sm90) {
    return sm90 ? conformance::launches_sm90() : conformance::launches();
}

long start(const std::string& name, Address input, Address output, int device) {
    const DLDevice where{device < 0 ? kDLCPU : kDLCUDA, device};
    for (const bool sm90 : {false, true}) {
        const auto found = find_launches(sm90).find(name);
        if (found == find_launches(sm90).end()) continue;
        return run(where, [&](void* stream) {
            found->second(pointer<const void>(input), pointer<void>(output), stream);
        });
    }
    throw Error("k2kernels: there is no conformance kernel " + name);
}

py::dict names() {
    py::dict result;
    for (const bool sm90 : {false, true}) {
        for (const auto& [name, launch] : find_launches(sm90)) {
            result[py::str(name)] = sm90 ? 90 : 80;
        }
    }
    return result;
}

}  // namespace

void bind_conformance(py::module_& m) {
    m.def("conformance", &start,
          "Runs a kernel of csrc/conformance from one address to another, on a GPU or, for -1, in "
          "the emulator; returns the number of kernels started.");
    m.def("conformance_names", &names, "{name: 80 or 90, the chip it needs}.");
}

}  // namespace k2k::bind
