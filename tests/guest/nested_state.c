/*
 * Preloaded into a VMM where KVM knows no nested state: Cloud Hypervisor asks for it in every snapshot.
 *
 * Linux's KVM has KVM_GET_NESTED_STATE wherever nested guests are possible. Software that stands in for KVM may lack it, and
 * answers EINVAL. A guest that has started none of its own has an empty state: its header, and nothing behind it.
 */

#define _GNU_SOURCE
#include <errno.h>
#include <linux/kvm.h>
#include <stdarg.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

int ioctl(int fd, unsigned long request, ...)
{
    va_list arguments;
    va_start(arguments, request);
    void *argument = va_arg(arguments, void *);
    va_end(arguments);
    int result = syscall(SYS_ioctl, fd, request, argument);
    if (result < 0 && errno == EINVAL && request == KVM_GET_NESTED_STATE) {
        struct kvm_nested_state *state = argument;
        memset(state, 0, sizeof *state);
        state->size = sizeof *state;
        return 0;
    }
    return result;
}
