/*
 * What can a VMM do that was taken over? This program runs in the VMM's place, with all of its unit's properties, tries, and
 * writes what came of it to standard output, a line each of words separated by tabs:
 *
 *   path  NAME TYPE MODE UID GID DEVICE INODE DEVICE-NUMBER ACCESS   every path it sees; access of "rwx" as tried by opening
 *   changed  NAME CALL                           a file of somebody else's that it could change without opening it
 *   made  NAME                                   a directory in which it could make a file
 *   descriptor  NUMBER TYPE DEVICE INODE FLAGS   its open files
 *   call  NAME RESULT                            "done", an errno's name, or the signal that ended it
 *   process  PID CALL RESULT                     the same, for the processes whose ids its arguments give (-p PID)
 *   socket  NAME RESULT                          connecting to a socket that its arguments give (-s PATH, @NAME abstract)
 *   interface  NAME                              network interfaces
 *   status  NAME VALUE                           what it is and may
 *   environment  NAME=VALUE
 *   end
 *
 * Where its unit gives it no console (standard input is /dev/null) it serves one as Cloud Hypervisor does, on a socket, and takes the
 * first client's connection for standard input and output. Asked for its version, it names those of the VMMs that it stands for.
 *
 * Then it waits for a line on standard input, obeys it, and waits again: "kill" sends SIGKILL to all that it may, "usurp" asks
 * systemd to take process 1 for the unit's main one, "link NAME TARGET" puts a symbolic link there, "shout" writes a line of the
 * highest priority to standard error, "fork" leaves a child that ignores SIGTERM, "exit N" ends with that status. It says "done"
 * or the errno's name each time.
 */

#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/capability.h>
#include <net/if.h>
#include <sched.h>
#include <signal.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/personality.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/sysmacros.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <sys/xattr.h>
#include <unistd.h>

enum { HIGHEST_DESCRIPTOR = 4096, HIGHEST_INTERFACE = 64, HIGHEST_CAPABILITY = 63, PATH_ROOM = 4096 };

#define CONSOLE_SOCKET "/var/lib/cocoon/run/sock/console"

extern char **environ;

/* The result of a call in words. Positive results are descriptors or counts, and as good as 0. */
static const char *result(long value)
{
    return value >= 0 ? "done" : strerrorname_np(errno);
}

static char type(mode_t mode)
{
    return S_ISREG(mode) ? 'f' : S_ISDIR(mode) ? 'd' : S_ISLNK(mode) ? 'l' : S_ISCHR(mode) ? 'c' : S_ISBLK(mode) ? 'b' :
           S_ISSOCK(mode) ? 's' : S_ISFIFO(mode) ? 'p' : '?';
}

static int opens(const char *path, int flags)
{
    int descriptor = open(path, flags | O_NONBLOCK | O_NOCTTY | O_NOFOLLOW | O_CLOEXEC);
    if (descriptor < 0)
        return 0;
    close(descriptor);
    return 1;
}

static void try_to_make(const char *directory)
{
    char path[PATH_ROOM];
    snprintf(path, sizeof path, "%s/.probe", directory);
    int descriptor = open(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    if (descriptor < 0)
        return;
    close(descriptor);
    unlink(path);
    printf("made\t%s\n", directory);
}

/* What is tried on a file of somebody else's: what would change it for all who share it. */
static void try_to_change(const char *path)
{
#define CHANGE(name, expression) if ((expression) == 0) printf("changed\t%s\t" name "\n", path)
    CHANGE("truncate", truncate(path, 0));
    CHANGE("chmod", chmod(path, 0666));
    CHANGE("chown", chown(path, geteuid(), getegid()));
    CHANGE("utimensat", utimensat(AT_FDCWD, path, (struct timespec[2]){{0, 0}, {0, 0}}, 0));
    CHANGE("setxattr", setxattr(path, "user.probe", "x", 1, 0));
    CHANGE("removexattr", removexattr(path, "system.posix_acl_access"));
    int descriptor = open(path, O_RDONLY | O_CLOEXEC);
    if (descriptor < 0)
        return;
    CHANGE("fchmod", fchmod(descriptor, 0666));
    CHANGE("fallocate", fallocate(descriptor, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, 4096));
    void *page = mmap(NULL, 4096, PROT_READ, MAP_SHARED, descriptor, 0);
    if (page != MAP_FAILED) {
        CHANGE("mprotect", mprotect(page, 4096, PROT_READ | PROT_WRITE));
        munmap(page, 4096);
    }
    close(descriptor);
}

static void walk(const char *path)
{
    struct stat status;
    if (lstat(path, &status)) {
        printf("path\t%s\t?\t0\t0\t0\t0\t0\t0\t%s\n", path, strerrorname_np(errno));
        return;
    }
    char kind = type(status.st_mode);
    char access_[4] = "---";
    if (kind != 'l' && kind != 's') {
        access_[0] = opens(path, O_RDONLY) ? 'r' : '-';
        access_[1] = kind != 'd' && opens(path, O_WRONLY) ? 'w' : '-';
    }
    if (kind == 'f' || kind == 'd')
        access_[2] = faccessat(AT_FDCWD, path, X_OK, AT_EACCESS) ? '-' : 'x';
    printf("path\t%s\t%c\t%o\t%u\t%u\t%llu\t%llu\t%u:%u\t%s\n", path, kind, status.st_mode & 07777, status.st_uid,
           status.st_gid, (unsigned long long)status.st_dev, (unsigned long long)status.st_ino, major(status.st_rdev),
           minor(status.st_rdev), access_);
    if (kind == 'f' && status.st_uid != getuid())
        try_to_change(path);
    if (kind != 'd')
        return;
    try_to_make(path);
    DIR *directory = opendir(path);
    if (!directory)
        return;
    for (struct dirent *entry; (entry = readdir(directory));) {
        char below[PATH_ROOM];
        if (!strcmp(entry->d_name, ".") || !strcmp(entry->d_name, ".."))
            continue;
        snprintf(below, sizeof below, "%s/%s", strcmp(path, "/") ? path : "", entry->d_name);
        walk(below);
    }
    closedir(directory);
}

static void descriptors(void)
{
    for (int number = 0; number < HIGHEST_DESCRIPTOR; number++) {
        struct stat status;
        if (fstat(number, &status) == 0)
            printf("descriptor\t%d\t%c\t%llu\t%llu\t%o\n", number, type(status.st_mode), (unsigned long long)status.st_dev,
                   (unsigned long long)status.st_ino, fcntl(number, F_GETFL));
    }
}

static void statuses(void)
{
    uid_t uids[3];
    gid_t gids[3], groups[64];
    getresuid(&uids[0], &uids[1], &uids[2]);
    getresgid(&gids[0], &gids[1], &gids[2]);
    printf("status\tuids\t%u %u %u\n", uids[0], uids[1], uids[2]);
    printf("status\tgids\t%u %u %u\n", gids[0], gids[1], gids[2]);
    int count = getgroups(64, groups);
    printf("status\tgroups\t");
    for (int n = 0; n < count; n++)
        printf(n ? " %u" : "%u", groups[n]);
    printf("\n");

    struct __user_cap_header_struct header = {_LINUX_CAPABILITY_VERSION_3, 0};
    struct __user_cap_data_struct sets[2] = {{0}};
    syscall(SYS_capget, &header, sets);
    printf("status\tcapabilities\t%x%08x %x%08x %x%08x\n", sets[1].effective, sets[0].effective, sets[1].permitted,
           sets[0].permitted, sets[1].inheritable, sets[0].inheritable);
    unsigned long long bounding = 0, ambient = 0;
    for (int number = 0; number <= HIGHEST_CAPABILITY; number++) {
        if (prctl(PR_CAPBSET_READ, number, 0, 0, 0) > 0)
            bounding |= 1ull << number;
        if (prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_IS_SET, number, 0, 0) > 0)
            ambient |= 1ull << number;
    }
    printf("status\tbounding\t%llx\nstatus\tambient\t%llx\n", bounding, ambient);
    printf("status\tno_new_privs\t%d\n", prctl(PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0));
    printf("status\tseccomp\t%d\n", prctl(PR_GET_SECCOMP, 0, 0, 0, 0));
    struct rlimit core;
    getrlimit(RLIMIT_CORE, &core);
    printf("status\tcore\t%llu\n", (unsigned long long)core.rlim_max);
    mode_t mask = umask(0);
    umask(mask);
    printf("status\tumask\t%o\n", mask);
    struct statvfs root;
    statvfs("/", &root);
    printf("status\troot\t%s\n", root.f_flag & ST_RDONLY ? "read-only" : "writable");
    char *directory = getcwd(NULL, 0);
    printf("status\tdirectory\t%s\n", directory ? directory : strerrorname_np(errno));
    for (char **variable = environ; *variable; variable++)
        printf("environment\t%s\n", *variable);
}

static void interfaces(void)
{
    /* Any socket answers for its network namespace. */
    int any = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    for (int index = 1; index <= HIGHEST_INTERFACE; index++) {
        struct ifreq request = {.ifr_ifindex = index};
        if (ioctl(any, SIOCGIFNAME, &request) == 0)
            printf("interface\t%s\n", request.ifr_name);
    }
    close(any);
}

static void reach(const char *name)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    socklen_t length = offsetof(struct sockaddr_un, sun_path) + strlen(name) + (*name != '@');
    strncpy(address.sun_path, name, sizeof address.sun_path - 1);
    if (*name == '@')
        address.sun_path[0] = 0;
    int client = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    printf("socket\t%s\t%s\n", name, result(connect(client, (struct sockaddr *)&address, length)));
    close(client);
}

static int in_child(void *unused)
{
    (void)unused;
    _exit(0);
}

/* A child of clone with the given flags, as for a namespace. */
static long clone_with(int flags)
{
    static char stack[65536];
    int child = clone(in_child, stack + sizeof stack, flags | SIGCHLD, NULL);
    if (child > 0)
        waitpid(child, NULL, 0);
    return child;
}

static long map_writable_and_executable(void)
{
    return mmap(NULL, 4096, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) == MAP_FAILED ? -1 : 0;
}

static long make_executable(void)
{
    void *page = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return page == MAP_FAILED ? 0 : mprotect(page, 4096, PROT_READ | PROT_EXEC);
}

static long make_setuid_file(void)
{
    return open("/var/lib/cocoon/run/vm/setuid", O_WRONLY | O_CREAT, 04755);
}

static long system_call_of_another_architecture(void)
{
#ifdef __x86_64__
    long value = 20; /* getpid of i386 */
    asm volatile("int $0x80" : "+a"(value) : : "memory");
    return value < 0 ? (errno = (int)-value, -1) : 0;
#else
    return errno = ENOSYS, -1;
#endif
}

static long real_time(void)
{
    struct sched_param one = {1};
    return syscall(SYS_sched_setscheduler, 0, SCHED_FIFO, &one);
}

/* Runs the expression in a child, which a filter may kill. */
#define CALL(name, expression) \
    do { \
        fflush(stdout); \
        pid_t child = fork(); \
        if (child == 0) { \
            printf("call\t" name "\t%s\n", result(expression)); \
            fflush(stdout); \
            _exit(0); \
        } \
        int status; \
        if (child < 0) \
            printf("call\t" name "\tfork:%s\n", strerrorname_np(errno)); \
        else if (waitpid(child, &status, 0) == child && WIFSIGNALED(status)) \
            printf("call\t" name "\tSIG%s\n", sigabbrev_np(WTERMSIG(status))); \
    } while (0)

#define FAMILY(name) CALL("socket " #name, socket(name, SOCK_STREAM, 0)); CALL("raw socket " #name, socket(name, SOCK_RAW, 0))
#define NAMESPACE(name) CALL("unshare " #name, unshare(name)); CALL("clone " #name, clone_with(name))

static void calls(void)
{
    FAMILY(AF_INET);
    FAMILY(AF_INET6);
    FAMILY(AF_NETLINK);
    FAMILY(AF_PACKET);
    FAMILY(AF_VSOCK);
    FAMILY(AF_ALG);
    FAMILY(AF_BLUETOOTH);
    NAMESPACE(CLONE_NEWUSER);
    NAMESPACE(CLONE_NEWNS);
    NAMESPACE(CLONE_NEWPID);
    NAMESPACE(CLONE_NEWNET);
    NAMESPACE(CLONE_NEWIPC);
    NAMESPACE(CLONE_NEWUTS);
    NAMESPACE(CLONE_NEWCGROUP);
    CALL("setns", setns(0, 0));
    CALL("mount tmpfs", syscall(SYS_mount, "none", "/var/lib/cocoon/run/vm", "tmpfs", 0, NULL));
    CALL("mount proc", syscall(SYS_mount, "none", "/var/lib/cocoon/run/vm", "proc", 0, NULL));
    CALL("remount root", syscall(SYS_mount, NULL, "/", NULL, 0x1020 /* MS_REMOUNT | MS_BIND */, NULL));
    CALL("umount2", syscall(SYS_umount2, "/var/lib/cocoon/run/vmm", 2));
    CALL("open_tree", syscall(SYS_open_tree, AT_FDCWD, "/", 1));
    CALL("fsopen", syscall(SYS_fsopen, "tmpfs", 0));
    CALL("pivot_root", syscall(SYS_pivot_root, "/", "/"));
    CALL("chroot", chroot("/var/lib/cocoon/run/vm"));
    CALL("mknod character device", mknod("/var/lib/cocoon/run/vm/null", S_IFCHR | 0666, makedev(1, 3)));
    CALL("mknod block device", mknod("/var/lib/cocoon/run/vm/disk", S_IFBLK | 0666, makedev(7, 0)));
    CALL("setuid", syscall(SYS_setuid, 0));
    CALL("setresuid", syscall(SYS_setresuid, 0, 0, 0));
    CALL("setgid", syscall(SYS_setgid, 0));
    CALL("setresgid", syscall(SYS_setresgid, 0, 0, 0));
    CALL("setgroups", syscall(SYS_setgroups, 0, NULL));
    CALL("setfsuid", syscall(SYS_setfsuid, 0));
    CALL("capset", syscall(SYS_capset, &(struct __user_cap_header_struct){_LINUX_CAPABILITY_VERSION_3, 0},
                           (struct __user_cap_data_struct[2]){{0}}));
    CALL("chown", chown("/var/lib/cocoon/run/vm", 0, 0));
    CALL("setuid file", make_setuid_file());
    CALL("bpf", syscall(SYS_bpf, 0, NULL, 0));
    CALL("perf_event_open", syscall(SYS_perf_event_open, NULL, 0, -1, -1, 0));
    CALL("keyctl", syscall(SYS_keyctl, 0, -4 /* the user's keyring */, 1));
    CALL("add_key", syscall(SYS_add_key, "user", "probe", "x", 1, -4));
    CALL("request_key", syscall(SYS_request_key, "user", "probe", NULL, 0));
    CALL("ptrace", syscall(SYS_ptrace, 0 /* PTRACE_TRACEME */, 0, 0, 0));
    CALL("process_vm_readv", syscall(SYS_process_vm_readv, getppid(), NULL, 0, NULL, 0, 0));
    CALL("init_module", syscall(SYS_init_module, NULL, 0, ""));
    CALL("finit_module", syscall(SYS_finit_module, 0, "", 0));
    CALL("kexec_load", syscall(SYS_kexec_load, 0, 0, NULL, 0));
    CALL("reboot", syscall(SYS_reboot, 0, 0, 0, NULL));
    CALL("swapon", syscall(SYS_swapon, "/var/lib/cocoon/run/vmm", 0));
    CALL("syslog", syscall(SYS_syslog, 10 /* the buffer's size, which all may ask by default */, NULL, 0));
    CALL("clock_settime", syscall(SYS_clock_settime, 0, NULL));
    CALL("adjtimex", syscall(SYS_adjtimex, NULL));
    CALL("sethostname", syscall(SYS_sethostname, "taken", 5));
    CALL("acct", syscall(SYS_acct, NULL));
    CALL("quotactl", syscall(SYS_quotactl, 0, NULL, 0, NULL));
    CALL("fanotify_init", syscall(SYS_fanotify_init, 0, 0));
    CALL("open_by_handle_at", syscall(SYS_open_by_handle_at, AT_FDCWD, NULL, 0));
    CALL("personality", syscall(SYS_personality, ADDR_NO_RANDOMIZE));
    CALL("shmget", syscall(SYS_shmget, 0, 4096, 01600));
    CALL("msgget", syscall(SYS_msgget, 0, 01600));
    CALL("semget", syscall(SYS_semget, 0, 1, 01600));
    CALL("mq_open", syscall(SYS_mq_open, "probe", O_CREAT | O_RDWR, 0600, NULL));
    CALL("writable and executable memory", map_writable_and_executable());
    CALL("executable memory", make_executable());
    CALL("real time", real_time());
    CALL("lower niceness", syscall(SYS_setpriority, 0, 0, -10));
    CALL("higher niceness", syscall(SYS_setpriority, 0, 0, 19));
    CALL("sched_setaffinity", syscall(SYS_sched_setaffinity, 0, sizeof(long), &(long){1}));
    CALL("raise a limit", setrlimit(RLIMIT_CORE, &(struct rlimit){RLIM_INFINITY, RLIM_INFINITY}));
#ifdef __x86_64__
    CALL("iopl", syscall(SYS_iopl, 3));
    CALL("ioperm", syscall(SYS_ioperm, 0x60, 1, 1));
#endif
    CALL("another architecture", system_call_of_another_architecture());
}

static void touch(pid_t pid)
{
    struct rlimit limit;
#define TRY(name, expression) printf("process\t%d\t" name "\t%s\n", pid, result(expression))
    TRY("signal 0", kill(pid, 0));
    TRY("SIGCONT", kill(pid, SIGCONT));
    TRY("SIGKILL", kill(pid, SIGKILL));
    TRY("ptrace", syscall(SYS_ptrace, 16 /* PTRACE_ATTACH */, pid, 0, 0));
    TRY("process_vm_readv", syscall(SYS_process_vm_readv, pid, NULL, 0, NULL, 0, 0));
    TRY("prlimit", syscall(SYS_prlimit64, pid, RLIMIT_NOFILE, NULL, &limit));
    TRY("setpriority", syscall(SYS_setpriority, PRIO_PROCESS, pid, 19));
    TRY("sched_setaffinity", syscall(SYS_sched_setaffinity, pid, 0, NULL));
    int process = (int)syscall(SYS_pidfd_open, pid, 0);
    if (process >= 0) {
        TRY("pidfd_send_signal", syscall(SYS_pidfd_send_signal, process, SIGKILL, NULL, 0));
        TRY("pidfd_getfd", syscall(SYS_pidfd_getfd, process, 0, 0));
        TRY("setns", setns(process, CLONE_NEWNS));
        close(process);
    }
}

static long notify(const char *message)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX, .sun_path = "/run/systemd/notify"};
    int client = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    long sent = sendto(client, message, strlen(message), 0, (struct sockaddr *)&address, sizeof address);
    close(client);
    return sent;
}

static long obey(char *line)
{
    char *verb = strtok(line, " \n"), *first = strtok(NULL, " \n"), *second = strtok(NULL, " \n");
    if (!strcmp(verb, "kill"))
        return kill(-1, SIGKILL);
    if (!strcmp(verb, "usurp"))
        return notify("MAINPID=1\nSTATUS=taken over\n");
    if (!strcmp(verb, "link")) {
        unlink(first);
        return symlink(second, first);
    }
    if (!strcmp(verb, "shout"))
        return dprintf(STDERR_FILENO, "<0>shouted\n");
    if (!strcmp(verb, "fork")) {
        pid_t child = fork();
        if (child == 0) {
            signal(SIGTERM, SIG_IGN);
            setsid();
            for (;;)
                pause();
        }
        return child;
    }
    if (!strcmp(verb, "exit"))
        exit(atoi(first));
    return errno = EINVAL, -1;
}

/* Standard input and output become the first connection to the console's socket. */
static void serve_console(void)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX, .sun_path = CONSOLE_SOCKET};
    int server = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (bind(server, (struct sockaddr *)&address, sizeof address) || listen(server, 1))
        exit(3);
    int client = accept(server, NULL, NULL);
    if (client < 0 || dup2(client, STDIN_FILENO) < 0 || dup2(client, STDOUT_FILENO) < 0)
        exit(3);
    close(client);
    close(server);
}

int main(int count, char **arguments)
{
    if (count == 2 && !strcmp(arguments[1], "--version")) {
        printf("Firecracker v1.12.1\ncloud-hypervisor v53.0\nQEMU emulator version 7.2.0\n");
        return 0;
    }
    if (getuid() == 0) {
        fprintf(stderr, "not as root, who may do all this\n");
        return 2;
    }
    char *given = NULL;
    size_t length;
    FILE *console = stdout;
    stdout = open_memstream(&given, &length);
    descriptors();
    fclose(stdout);
    stdout = console;
    struct stat input;
    if (fstat(STDIN_FILENO, &input) == 0 && input.st_rdev == makedev(1, 3))
        serve_console();
    fputs(given, stdout);
    walk("/");
    statuses();
    interfaces();
    for (int n = 1; n + 1 < count; n += 2)
        if (!strcmp(arguments[n], "-p"))
            touch(atoi(arguments[n + 1]));
        else if (!strcmp(arguments[n], "-s"))
            reach(arguments[n + 1]);
    calls();
    printf("end\n");
    fflush(stdout);
    for (char line[PATH_ROOM]; fgets(line, sizeof line, stdin);) {
        printf("%s\n", result(obey(line)));
        fflush(stdout);
    }
    return 0;
}
