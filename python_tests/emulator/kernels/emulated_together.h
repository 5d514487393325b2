#pragma once

// Several grids that run at once: emulator::Together there, streams of their own on a GPU.

#include "common/launch.h"

#ifdef K2K_EMULATED
class EmulatedTogether {
  public:
    explicit EmulatedTogether(bool several) {
        if (several) together_ = new k2k::emulator::Together();
    }
    ~EmulatedTogether() { delete together_; }
    void run() {
        if (together_) together_->run();
    }

  private:
    k2k::emulator::Together* together_ = nullptr;
};
#else
struct EmulatedTogether {
    explicit EmulatedTogether(bool) {}
    void run() {}
};
#endif
