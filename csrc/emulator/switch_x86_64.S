// void k2k_emulator_switch(void** save_stack_pointer, void* new_stack_pointer)
// Saves the callee-saved registers and switches to another stack.
#if defined(__x86_64__) && !defined(__APPLE__)
    .text
    .globl k2k_emulator_switch
    .hidden k2k_emulator_switch
    .type k2k_emulator_switch, @function
k2k_emulator_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size k2k_emulator_switch, . - k2k_emulator_switch
    .section .note.GNU-stack, "", @progbits
#endif
