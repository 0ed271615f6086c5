/* Counts, logs, delays no call: what a process writes below one folder, and lets it die or fail at the n-th write.
 *
 * Loaded by fork.py with LD_PRELOAD. Every call that changes a file below the watched folder is one boundary:
 * open (when it creates or empties), write, pwrite, ftruncate, fsync, fdatasync, rename, unlink, mkdir. At boundary n
 *   BEFORE  the process is killed, as by kill -9, and the call is never made;
 *   TORN    a write of more than one sector is cut in half, then the process is killed;
 *   FULL    this call and all after it that need room fail with ENOSPC, as on a full disk;
 *   FAILS   this call alone fails with EIO.
 * And the wall clock can be moved.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

enum { OFF, BEFORE, TORN, FULL, FAILS };
enum { SECTOR = 512, FDS = 4096 };

static char folder[4096];
static size_t folder_length;
static volatile long at, count;
static volatile int mode;
static int log_to = -1;
static char known[FDS][48];
static volatile long ahead; /* seconds added to the wall clock */

void crash_watch(const char *path, int log) {
    folder_length = strlen(path);
    memcpy(folder, path, folder_length + 1);
    count = 0;
    log_to = log;
}

void crash_arm(int how, long n) {
    at = n;
    mode = how;
}

long crash_count(void) { return count; }

void crash_clock(long seconds) { ahead = seconds; }

#define REAL(name, type, ...) \
    static type (*real)(__VA_ARGS__); \
    if (!real) real = (type (*)(__VA_ARGS__))dlsym(RTLD_NEXT, name)

static ssize_t say(int fd, const void *data, size_t size) {
    REAL("write", ssize_t, int, const void *, size_t);
    return real(fd, data, size);
}

static const char *below(const char *path) {
    if (!folder_length || !path || strncmp(path, folder, folder_length) || path[folder_length] != '/') return NULL;
    return path + folder_length + 1;
}

static const char *held(int fd) { return fd >= 0 && fd < FDS && known[fd][0] ? known[fd] : NULL; }

static void die(void) {
    kill(getpid(), SIGKILL);
    for (;;) pause();
}

/* Returns the errno this call shall fail with, 0 to let it be, -1 to tear it. */
static int boundary(const char *what, const char *name, size_t size, int needs_room) {
    long n = ++count;
    if (log_to >= 0) {
        char line[128];
        int length = snprintf(line, sizeof line, "%ld %s %s %zu\n", n, what, name, size);
        say(log_to, line, (size_t)length);
    }
    if (mode == BEFORE && n == at) die();
    if (mode == TORN && n == at) {
        if (size <= SECTOR) die();
        return -1;
    }
    if (mode == FULL && n >= at && needs_room) return ENOSPC;
    if (mode == FAILS && n == at) return EIO;
    return 0;
}

static int opened(const char *path, int flags, int fd) {
    const char *name = below(path);
    if (fd >= 0 && fd < FDS) {
        known[fd][0] = 0;
        if (name && (flags & O_ACCMODE) != O_RDONLY) snprintf(known[fd], sizeof known[fd], "%s", name);
    }
    return fd;
}

static int refused(const char *path, int flags) {
    const char *name = below(path);
    struct stat there;
    if (!name || !(flags & (O_CREAT | O_TRUNC))) return 0;
    if (!(flags & O_TRUNC) && !stat(path, &there)) return 0;
    int told = boundary("open", name, 0, 1);
    if (told < 0) die();
    errno = told;
    return told;
}

#define OPEN(symbol) \
    int symbol(const char *path, int flags, ...) { \
        REAL(#symbol, int, const char *, int, ...); \
        mode_t bits = 0; \
        if (flags & (O_CREAT | O_TMPFILE)) { \
            va_list more; \
            va_start(more, flags); \
            bits = va_arg(more, mode_t); \
            va_end(more); \
        } \
        return refused(path, flags) ? -1 : opened(path, flags, real(path, flags, bits)); \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(symbol) \
    int symbol(int at_fd, const char *path, int flags, ...) { \
        REAL(#symbol, int, int, const char *, int, ...); \
        mode_t bits = 0; \
        if (flags & (O_CREAT | O_TMPFILE)) { \
            va_list more; \
            va_start(more, flags); \
            bits = va_arg(more, mode_t); \
            va_end(more); \
        } \
        return refused(path, flags) ? -1 : opened(path, flags, real(at_fd, path, flags, bits)); \
    }
OPENAT(openat)
OPENAT(openat64)

int close(int fd) {
    REAL("close", int, int);
    if (fd >= 0 && fd < FDS) known[fd][0] = 0;
    return real(fd);
}

ssize_t write(int fd, const void *data, size_t size) {
    REAL("write", ssize_t, int, const void *, size_t);
    const char *name = held(fd);
    int told = name ? boundary("write", name, size, 1) : 0;
    if (told < 0) {
        real(fd, data, size / 2);
        die();
    }
    return told ? (errno = told, -1) : real(fd, data, size);
}

#define PWRITE(symbol, offset_type) \
    ssize_t symbol(int fd, const void *data, size_t size, offset_type offset) { \
        REAL(#symbol, ssize_t, int, const void *, size_t, offset_type); \
        const char *name = held(fd); \
        int told = name ? boundary("pwrite", name, size, 1) : 0; \
        if (told < 0) { \
            real(fd, data, size / 2, offset); \
            die(); \
        } \
        return told ? (errno = told, -1) : real(fd, data, size, offset); \
    }
PWRITE(pwrite, off_t)
PWRITE(pwrite64, off64_t)

#define ONE(symbol, what, needs_room, declared, given, kinds) \
    int symbol declared { \
        REAL(#symbol, int, kinds); \
        const char *name = held(fd); \
        int told = name ? boundary(what, name, 0, needs_room) : 0; \
        if (told < 0) die(); \
        return told ? (errno = told, -1) : real given; \
    }
#define COMMA ,
ONE(fsync, "fsync", 1, (int fd), (fd), int)
ONE(fdatasync, "fdatasync", 1, (int fd), (fd), int)
ONE(ftruncate, "ftruncate", 0, (int fd, off_t size), (fd, size), int COMMA off_t)
ONE(ftruncate64, "ftruncate", 0, (int fd, off64_t size), (fd, size), int COMMA off64_t)

#define NAMED(symbol, what, needs_room, declared, given, kinds) \
    int symbol declared { \
        REAL(#symbol, int, kinds); \
        const char *name = below(path); \
        int told = name ? boundary(what, name, 0, needs_room) : 0; \
        if (told < 0) die(); \
        return told ? (errno = told, -1) : real given; \
    }
NAMED(unlink, "unlink", 0, (const char *path), (path), const char *)
NAMED(mkdir, "mkdir", 1, (const char *path, mode_t bits), (path, bits), const char *COMMA mode_t)
NAMED(rename, "rename", 1, (const char *from, const char *path), (from, path), const char *COMMA const char *)

int clock_gettime(clockid_t id, struct timespec *now) {
    REAL("clock_gettime", int, clockid_t, struct timespec *);
    int told = real(id, now);
    if (id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE) now->tv_sec += ahead;
    return told;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    REAL("gettimeofday", int, struct timeval *, void *);
    int told = real(now, zone);
    now->tv_sec += ahead;
    return told;
}

time_t time(time_t *where) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (where) *where = now.tv_sec;
    return now.tv_sec;
}
