#include "common/dispatch.h"
#include "common/launch.h"
#include "scale_rows/kernel.cuh"
#include "scale_rows/launch.h"

namespace k2k {

void launch_scale_rows(const ScaleRowsParams& p, void* stream) {
    if (p.rows * p.columns == 0) return;
    LaunchShape shape{static_cast<unsigned>(p.rows), kScaleRowsThreads};
    shape.stream = stream;
    by_float_type(p.type, [&](auto* type) {
        launch<scale_rows_kernel<Element<decltype(type)>>, sizeof(RowMaxima)>(shape, p);
    });
}

}  // namespace k2k
