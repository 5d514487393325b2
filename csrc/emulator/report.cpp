// Error reports: the thread, the source line, and what each thread waits for.
#include <cstdarg>
#include <cstdio>
#include <map>

#include "emulator/machine.h"

namespace k2k::emulator {

std::string format(const char* text, ...) {
    char buffer[1024];
    va_list arguments;
    va_start(arguments, text);
    vsnprintf(buffer, sizeof buffer, text, arguments);
    va_end(arguments);
    return buffer;
}

static std::string describe(const Block& block) {
    std::string name = format("block (%u,%u,%u)", block.index.x, block.index.y, block.index.z);
    if (g_machine->num_grids > 1) name = format("grid %u ", block.grid->number) + name;
    return name;
}

std::string describe(const Thread& thread) {
    return describe(*thread.block) +
           format(" thread %u (warp %u lane %u)", thread.linear, thread.warp, thread.lane);
}

void fail(Where where, const char* text, ...) {
    char message[1024];
    va_list arguments;
    va_start(arguments, text);
    vsnprintf(message, sizeof message, text, arguments);
    va_end(arguments);
    throw Error(std::string(message) + format(" at %s:%d, ", where.file, where.line) +
                describe(*self()));
}

void report_deadlock(const char* what) {
    std::map<std::string, int> waiting;
    for (std::size_t i = 0; i < g_machine->resident_threads; ++i) {
        const Thread& thread = *g_machine->threads[i];
        if (thread.state == State::kDone) continue;
        ++waiting[describe(*thread.block) +
                  format(" warp %u waits in %s", thread.warp, thread.doing) +
                  describe_mbarrier(thread) +
                  format(" at %s:%d", thread.where.file, thread.where.line)];
    }
    std::string message = std::string("deadlock: ") + what;
    for (const auto& [who, count] : waiting) {
        message += format("\n    %d thread%s: ", count, count == 1 ? "" : "s") + who;
    }
    throw Error(message);
}

void enter(const char* doing, Where where, int arch) {
    Thread* thread = self();
    thread->doing = doing;
    thread->where = where;
    if (g_machine->options.arch < arch) {
        fail(where, "%s needs sm_%d; this launch emulates sm_%d", doing, arch,
             g_machine->options.arch);
    }
}

void enter_sm90(const char* doing, Where where) { enter(doing, where, 90); }

}  // namespace k2k::emulator
