/*
 * ptrace() for Debian 12's user-mode Linux, on a processor whose saved state is larger than that kernel knows.
 *
 * Such a kernel writes a process's floating-point registers back in the size of its own structure, and the host takes
 * the whole of the processor's state or nothing (xstateregs_set in Linux' arch/x86/kernel/fpu/regset.c). Where the
 * processor has AMX, the machine's first process dies of that. Here the host is given its own copy
 * of the state with what the kernel wrote over the beginning. For LD_PRELOAD; without threads, as that kernel is.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <elf.h>
#include <stdarg.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/uio.h>

long ptrace(enum __ptrace_request request, ...)
{
	static long (*real)(int, int, void *, void *);
	/* AMX alone takes 8 KiB; not on the stack, which is a kernel's */
	static char state[65536] __attribute__((aligned(64)));
	va_list arguments;
	int pid;
	void *address, *data;

	va_start(arguments, request);
	pid = va_arg(arguments, int);
	address = va_arg(arguments, void *);
	data = va_arg(arguments, void *);
	va_end(arguments);
	if (!real)
		real = (long (*)(int, int, void *, void *))dlsym(RTLD_NEXT, "ptrace");
	if (request == PTRACE_SETREGSET && address == (void *)NT_X86_XSTATE) {
		const struct iovec *given = data;
		struct iovec whole = { state, sizeof(state) };

		if (real(PTRACE_GETREGSET, pid, address, &whole) == 0 && given->iov_len < whole.iov_len) {
			memcpy(state, given->iov_base, given->iov_len);
			return real(PTRACE_SETREGSET, pid, address, &whole);
		}
	}
	return real(request, pid, address, data);
}
