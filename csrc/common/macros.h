#pragma once

// Macros that differ between the two builds of a kernel: nvcc compiles it for GPUs; a host compiler
// with -DK2K_EMULATED compiles the same file for the CPU emulator. Only csrc/arch, csrc/common and
// csrc/emulator may test K2K_EMULATED.
//
//   K2K_DEVICE          function qualifier: device code
//   K2K_HOST_DEVICE     function qualifier: host and device code
//   K2K_UNROLL          before a loop that must be unrolled fully, as when it indexes registers
//   K2K_UNROLL_BY(n)    before a loop to be unrolled by n, for n iterations in flight
//   K2K_NO_UNROLL       before a loop that must not be unrolled
//   K2K_RESIDENT(n)     in __launch_bounds__: the least number of CTAs per SM. One fewer on sm_120,
//                       whose code takes more registers and whose SMs hold 1,536 threads, not 2,048
//   K2K_WHERE           last in a parameter list: the caller's source line, for emulator reports
//   K2K_WHERE_ONLY      the same in a function without other parameters
//   K2K_PASS_WHERE      last in an argument list: passes the caller's line on
//   K2K_PASS_WHERE_ONLY the same in a call without other arguments

#ifdef K2K_EMULATED

#include "emulator/builtins.h"

#define K2K_DEVICE inline
#define K2K_HOST_DEVICE inline
#define K2K_UNROLL
#define K2K_UNROLL_BY(n)
#define K2K_NO_UNROLL
#define K2K_RESIDENT(n) (n)
#define K2K_WHERE , ::k2k::Where where = ::k2k::here()
#define K2K_WHERE_ONLY ::k2k::Where where = ::k2k::here()
#define K2K_PASS_WHERE , where
#define K2K_PASS_WHERE_ONLY where

#else

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#define K2K_DEVICE __device__ __forceinline__
#define K2K_HOST_DEVICE __host__ __device__ __forceinline__
#define K2K_PRAGMA(words) _Pragma(#words)
#define K2K_UNROLL _Pragma("unroll")
#define K2K_UNROLL_BY(n) K2K_PRAGMA(unroll n)
#define K2K_NO_UNROLL _Pragma("unroll 1")
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200
#define K2K_RESIDENT(n) ((n) > 1 ? (n) - 1 : 1)
#else
#define K2K_RESIDENT(n) (n)
#endif
#define K2K_WHERE
#define K2K_WHERE_ONLY
#define K2K_PASS_WHERE
#define K2K_PASS_WHERE_ONLY

#endif
