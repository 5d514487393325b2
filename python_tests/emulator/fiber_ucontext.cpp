// The emulator's fibers as machines other than x86-64 have them.
#define K2K_UCONTEXT
#include "emulator/fiber.cpp"
