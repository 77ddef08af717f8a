/* Preloaded into a program (LD_PRELOAD): makes chosen calls of the C library fail, and writes a trace of them.

   FAULTS        rules, separated by commas: CALL:NTH:WHAT. The NTH occurrence of CALL, from 1, does WHAT; `NTH+`: that
                 and all later ones. CALL is a name of the table below, or `*` for any. WHAT is
                   an error: EIO, ENOSPC, ... or a number; the call fails with it and is not carried out, but for close
                   ZERO              read, pread, write, pwrite: returns 0
                   SHORT             the same: works on half of the bytes, at least on one
                   KILL, TERM, INT   sends the process SIGKILL, SIGTERM, SIGINT, then goes on with the call
                   HALFKILL          pwrite, write: writes half of the bytes, then SIGKILL
   FAULTS_UNDER  absolute paths, separated by colons: only calls on files below them are counted. Not set: all.
                 Calls without a file (pthread_create, mmap of memory) are always counted
   FAULTS_TRACE  a file: one line per counted call: `number-of-this-call call path [offset size | new path]`
   FAULTS_SKIP   a file that the program opens: nothing is counted before that

   One name stands for all variants: stat for stat64, fstatat, statx; open for openat; pwrite for pwritev; and so on. */
#define _GNU_SOURCE
/* The variants for large files are defined here by their own names. */
#undef _FILE_OFFSET_BITS
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <sys/xattr.h>
#include <unistd.h>

#define NEXT(name) ((__typeof__(&name))next(#name))

static void* next(const char* name) {
  void* found = dlsym(RTLD_NEXT, name);
  if (!found) abort();
  return found;
}

static const char* const kCalls[] = {
    "open",   "close",          "stat",   "fstat",   "lstat",    "access",    "mkdir",           "rmdir",
    "unlink", "rename",         "link",   "symlink", "chmod",    "utime",     "opendir",         "readdir",
    "read",   "pread",          "write",  "pwrite",  "lseek",    "ftruncate", "fallocate",       "fsync",
    "flock",  "fcntl",          "mmap",   "statvfs", "getxattr", "readlink",  "sync_file_range", "copy_file_range",
    "dup",    "pthread_create", "fadvise"};
enum { kCount = sizeof kCalls / sizeof *kCalls };

static atomic_long counts[kCount], all;
static atomic_int counting = -1;

static const struct {
  const char* name;
  int number;
} kErrors[] = {{"EIO", EIO},       {"ENOSPC", ENOSPC}, {"EACCES", EACCES}, {"EPERM", EPERM},
               {"EINTR", EINTR},   {"EMFILE", EMFILE}, {"ENFILE", ENFILE}, {"ENOMEM", ENOMEM},
               {"EAGAIN", EAGAIN}, {"EDQUOT", EDQUOT}, {"EROFS", EROFS},   {"ESTALE", ESTALE},
               {"ENOENT", ENOENT}, {"EEXIST", EEXIST}, {"EINVAL", EINVAL}, {"EBUSY", EBUSY},
               {"ENODEV", ENODEV}, {"ELOOP", ELOOP},   {"EXDEV", EXDEV},   {"ENOTDIR", ENOTDIR},
               {"EFBIG", EFBIG},   {"ENOSYS", ENOSYS}, {"ENOLCK", ENOLCK}, {"EOPNOTSUPP", EOPNOTSUPP}};

enum { kGoOn = 0, kZero = -1, kShort = -2, kHalfKill = -3 }; /* else an error's number */

static int what(const char* word) {
  if (!strcmp(word, "ZERO")) return kZero;
  if (!strcmp(word, "SHORT")) return kShort;
  if (!strcmp(word, "HALFKILL")) return kHalfKill;
  if (!strcmp(word, "KILL")) return -1000 - SIGKILL;
  if (!strcmp(word, "TERM")) return -1000 - SIGTERM;
  if (!strcmp(word, "INT")) return -1000 - SIGINT;
  for (size_t i = 0; i < sizeof kErrors / sizeof *kErrors; ++i)
    if (!strcmp(word, kErrors[i].name)) return kErrors[i].number;
  const int number = atoi(word);
  if (number <= 0) abort(); /* a misspelt rule must not pass as a test */
  return number;
}

/* The path of a call, absolute, as it was given: `..` and links are left in it. Only system calls are used here. */
static void full_path(int folder, const char* path, char* to, size_t room) {
  char name[64];
  size_t length = 0;
  if (!path || path[0] != '/') {
    ssize_t got = -1;
    if (folder == AT_FDCWD) {
      got = syscall(SYS_getcwd, to, room);
      if (got > 0) --got; /* its terminating zero is counted */
    } else {
      snprintf(name, sizeof name, "/proc/self/fd/%d", folder);
      got = syscall(SYS_readlinkat, AT_FDCWD, name, to, room - 1);
    }
    length = got > 0 ? (size_t)got : 0;
  }
  to[length] = 0;
  if (path && *path) snprintf(to + length, room - length, "%s%s", length ? "/" : "", path);
}

static int below(const char* path, const char* roots) {
  if (!roots) return 1;
  while (*roots) {
    const char* end = strchrnul(roots, ':');
    const size_t length = (size_t)(end - roots);
    if (!strncmp(path, roots, length) && (path[length] == 0 || path[length] == '/' || path[length - 1] == '/'))
      return 1;
    roots = *end ? end + 1 : end;
  }
  return 0;
}

static void trace(const char* line, int length) {
  static atomic_int file = -1;
  const char* path = getenv("FAULTS_TRACE");
  if (!path) return;
  if (file < 0) {
    int fd = (int)syscall(SYS_openat, AT_FDCWD, path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
    int high = fd < 0 ? -1 : (int)syscall(SYS_fcntl, fd, F_DUPFD_CLOEXEC, 900); /* away from the program's own */
    if (high >= 0) syscall(SYS_close, fd);
    file = high >= 0 ? high : fd;
  }
  if (file >= 0) syscall(SYS_write, file, line, (size_t)length);
}

/* Counts a call. Returns what becomes of it. `has_file`: it has a path, or a folder's or file's descriptor. */
static int outcome(const char* call, int has_file, int folder, const char* path, const char* more) {
  const int saved = errno;
  char full[4096] = "-";
  if (has_file) full_path(folder, path, full, sizeof full);
  if (counting < 0) counting = getenv("FAULTS_SKIP") == NULL;
  if (!counting) {
    if (strcmp(call, "open") || strcmp(full, getenv("FAULTS_SKIP"))) return errno = saved, kGoOn;
    counting = 1;
    return errno = saved, kGoOn;
  }
  if (has_file && !below(full, getenv("FAULTS_UNDER"))) return errno = saved, kGoOn;
  int which = 0;
  while (which < kCount && strcmp(call, kCalls[which])) ++which;
  if (which == kCount) abort();
  const long nth = ++counts[which], of_all = ++all;
  char line[8600];
  int length = snprintf(line, sizeof line, "%ld %s %s%s%s\n", nth, call, full, more ? " " : "", more ? more : "");
  if (length > 0) trace(line, length < (int)sizeof line ? length : (int)sizeof line);
  int result = kGoOn;
  const char* rules = getenv("FAULTS");
  char rule[200];
  while (rules && *rules && result == kGoOn) {
    const char* end = strchrnul(rules, ',');
    snprintf(rule, sizeof rule, "%.*s", (int)(end - rules), rules);
    rules = *end ? end + 1 : end;
    char* first = strchr(rule, ':');
    char* second = first ? strchr(first + 1, ':') : NULL;
    if (!second) abort();
    *first = *second = 0;
    const int any = !strcmp(rule, "*"), later = second[-1] == '+';
    const long wanted = atol(first + 1), now = any ? of_all : nth;
    if ((any || !strcmp(rule, call)) && (now == wanted || (later && now > wanted))) result = what(second + 1);
  }
  if (result != kGoOn) {
    length = snprintf(line, sizeof line, "! %ld %s\n", nth, call);
    trace(line, length);
  }
  if (result <= -1000) {
    syscall(SYS_kill, syscall(SYS_getpid), -1000 - result);
    result = kGoOn;
  }
  errno = saved;
  return result;
}

#define PATH(call, path) outcome(call, 1, AT_FDCWD, path, NULL)
#define AT(call, folder, path) outcome(call, 1, folder, path, NULL)
#define FD(call, fd) outcome(call, 1, fd, NULL, NULL)
#define FAIL_IF(happens, value)  \
  do {                           \
    const int code_ = (happens); \
    if (code_ > 0) {             \
      errno = code_;             \
      return value;              \
    }                            \
  } while (0)

/* ---- files by name ---- */

#define OPEN(name)                                                                \
  int name(const char* path, int flags, ...) {                                    \
    va_list list;                                                                 \
    va_start(list, flags);                                                        \
    const mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(list, mode_t) : 0; \
    va_end(list);                                                                 \
    FAIL_IF(PATH("open", path), -1);                                              \
    return NEXT(name)(path, flags, mode);                                         \
  }
OPEN(open)
OPEN(open64)

#define OPENAT(name)                                                              \
  int name(int folder, const char* path, int flags, ...) {                        \
    va_list list;                                                                 \
    va_start(list, flags);                                                        \
    const mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(list, mode_t) : 0; \
    va_end(list);                                                                 \
    FAIL_IF(AT("open", folder, path), -1);                                        \
    return NEXT(name)(folder, path, flags, mode);                                 \
  }
OPENAT(openat)
OPENAT(openat64)

/* fopen is inside the library: it does not come by `open` above. */
#define FOPEN(name)                                \
  FILE* name(const char* path, const char* mode) { \
    FAIL_IF(PATH("open", path), NULL);             \
    return NEXT(name)(path, mode);                 \
  }
FOPEN(fopen)
FOPEN(fopen64)

#define STAT(name, type, call)                                      \
  int name(const char* restrict path, struct type* restrict info) { \
    FAIL_IF(PATH(call, path), -1);                                  \
    return NEXT(name)(path, info);                                  \
  }
STAT(stat, stat, "stat")
STAT(stat64, stat64, "stat")
STAT(lstat, stat, "lstat")
STAT(lstat64, stat64, "lstat")

#define FSTAT(name, type)               \
  int name(int fd, struct type* info) { \
    FAIL_IF(FD("fstat", fd), -1);       \
    return NEXT(name)(fd, info);        \
  }
FSTAT(fstat, stat)
FSTAT(fstat64, stat64)

#define FSTATAT(name, type)                                                                \
  int name(int folder, const char* restrict path, struct type* restrict info, int flags) { \
    FAIL_IF(AT(flags & AT_SYMLINK_NOFOLLOW ? "lstat" : "stat", folder, path), -1);         \
    return NEXT(name)(folder, path, info, flags);                                          \
  }
FSTATAT(fstatat, stat)
FSTATAT(fstatat64, stat64)

int statx(int folder, const char* restrict path, int flags, unsigned mask, struct statx* restrict info) {
  FAIL_IF(AT(flags & AT_SYMLINK_NOFOLLOW ? "lstat" : "stat", folder, path), -1);
  return NEXT(statx)(folder, path, flags, mask, info);
}

int access(const char* path, int mode) {
  FAIL_IF(PATH("access", path), -1);
  return NEXT(access)(path, mode);
}
int faccessat(int folder, const char* path, int mode, int flags) {
  FAIL_IF(AT("access", folder, path), -1);
  return NEXT(faccessat)(folder, path, mode, flags);
}
int mkdir(const char* path, mode_t mode) {
  FAIL_IF(PATH("mkdir", path), -1);
  return NEXT(mkdir)(path, mode);
}
int mkdirat(int folder, const char* path, mode_t mode) {
  FAIL_IF(AT("mkdir", folder, path), -1);
  return NEXT(mkdirat)(folder, path, mode);
}
int rmdir(const char* path) {
  FAIL_IF(PATH("rmdir", path), -1);
  return NEXT(rmdir)(path);
}
int unlink(const char* path) {
  FAIL_IF(PATH("unlink", path), -1);
  return NEXT(unlink)(path);
}
int unlinkat(int folder, const char* path, int flags) {
  FAIL_IF(AT(flags & AT_REMOVEDIR ? "rmdir" : "unlink", folder, path), -1);
  return NEXT(unlinkat)(folder, path, flags);
}
int rename(const char* from, const char* to) {
  FAIL_IF(outcome("rename", 1, AT_FDCWD, from, to), -1);
  return NEXT(rename)(from, to);
}
int renameat(int folder, const char* from, int other, const char* to) {
  FAIL_IF(outcome("rename", 1, folder, from, to), -1);
  return NEXT(renameat)(folder, from, other, to);
}
int renameat2(int folder, const char* from, int other, const char* to, unsigned flags) {
  FAIL_IF(outcome("rename", 1, folder, from, to), -1);
  return NEXT(renameat2)(folder, from, other, to, flags);
}
int link(const char* from, const char* to) {
  FAIL_IF(outcome("link", 1, AT_FDCWD, from, to), -1);
  return NEXT(link)(from, to);
}
int linkat(int folder, const char* from, int other, const char* to, int flags) {
  FAIL_IF(outcome("link", 1, folder, from, to), -1);
  return NEXT(linkat)(folder, from, other, to, flags);
}
int symlink(const char* target, const char* path) {
  FAIL_IF(PATH("symlink", path), -1);
  return NEXT(symlink)(target, path);
}
int symlinkat(const char* target, int folder, const char* path) {
  FAIL_IF(AT("symlink", folder, path), -1);
  return NEXT(symlinkat)(target, folder, path);
}
int chmod(const char* path, mode_t mode) {
  FAIL_IF(PATH("chmod", path), -1);
  return NEXT(chmod)(path, mode);
}
int fchmod(int fd, mode_t mode) {
  FAIL_IF(FD("chmod", fd), -1);
  return NEXT(fchmod)(fd, mode);
}
int utimensat(int folder, const char* path, const struct timespec times[2], int flags) {
  FAIL_IF(AT("utime", folder, path), -1);
  return NEXT(utimensat)(folder, path, times, flags);
}
int futimens(int fd, const struct timespec times[2]) {
  FAIL_IF(FD("utime", fd), -1);
  return NEXT(futimens)(fd, times);
}
ssize_t readlink(const char* restrict path, char* restrict to, size_t room) {
  FAIL_IF(PATH("readlink", path), -1);
  return NEXT(readlink)(path, to, room);
}
ssize_t readlinkat(int folder, const char* restrict path, char* restrict to, size_t room) {
  FAIL_IF(AT("readlink", folder, path), -1);
  return NEXT(readlinkat)(folder, path, to, room);
}
#define XATTR(name, type)                                                     \
  ssize_t name(const char* path, const char* key, void* value, size_t size) { \
    FAIL_IF(PATH("getxattr", path), -1);                                      \
    return NEXT(name)(path, key, value, size);                                \
  }
XATTR(getxattr, 0)
XATTR(lgetxattr, 0)

#define STATVFS(name, type)                                         \
  int name(const char* restrict path, struct type* restrict info) { \
    FAIL_IF(PATH("statvfs", path), -1);                             \
    return NEXT(name)(path, info);                                  \
  }
STATVFS(statvfs, statvfs)
STATVFS(statvfs64, statvfs64)
#define FSTATVFS(name, type)            \
  int name(int fd, struct type* info) { \
    FAIL_IF(FD("statvfs", fd), -1);     \
    return NEXT(name)(fd, info);        \
  }
FSTATVFS(fstatvfs, statvfs)
FSTATVFS(fstatvfs64, statvfs64)

/* ---- folders ---- */

DIR* opendir(const char* path) {
  FAIL_IF(PATH("opendir", path), NULL);
  return NEXT(opendir)(path);
}
DIR* fdopendir(int fd) {
  FAIL_IF(FD("opendir", fd), NULL);
  return NEXT(fdopendir)(fd);
}
#define READDIR(name, type)                      \
  struct type* name(DIR* folder) {               \
    FAIL_IF(FD("readdir", dirfd(folder)), NULL); \
    return NEXT(name)(folder);                   \
  }
READDIR(readdir, dirent)
READDIR(readdir64, dirent64)

/* ---- open files ---- */

int close(int fd) {
  const int code = FD("close", fd);
  const int result = NEXT(close)(fd); /* Linux has closed it whatever it returns */
  FAIL_IF(code, -1);
  return result;
}
int dup(int fd) {
  FAIL_IF(FD("dup", fd), -1);
  return NEXT(dup)(fd);
}
int fsync(int fd) {
  FAIL_IF(FD("fsync", fd), -1);
  return NEXT(fsync)(fd);
}
int fdatasync(int fd) {
  FAIL_IF(FD("fsync", fd), -1);
  return NEXT(fdatasync)(fd);
}
int syncfs(int fd) {
  FAIL_IF(FD("fsync", fd), -1);
  return NEXT(syncfs)(fd);
}
int sync_file_range(int fd, off64_t from, off64_t size, unsigned flags) {
  FAIL_IF(FD("sync_file_range", fd), -1);
  return NEXT(sync_file_range)(fd, from, size, flags);
}
int flock(int fd, int operation) {
  FAIL_IF(FD("flock", fd), -1);
  return NEXT(flock)(fd, operation);
}
#define FCNTL(name)                           \
  int name(int fd, int command, ...) {        \
    va_list list;                             \
    va_start(list, command);                  \
    void* argument = va_arg(list, void*);     \
    va_end(list);                             \
    FAIL_IF(FD("fcntl", fd), -1);             \
    return NEXT(name)(fd, command, argument); \
  }
FCNTL(fcntl)
FCNTL(fcntl64)

#define TRUNCATE(name, type)          \
  int name(int fd, type size) {       \
    FAIL_IF(FD("ftruncate", fd), -1); \
    return NEXT(name)(fd, size);      \
  }
TRUNCATE(ftruncate, off_t)
TRUNCATE(ftruncate64, off64_t)
#define FALLOCATE(name, type)                        \
  int name(int fd, int mode, type from, type size) { \
    FAIL_IF(FD("fallocate", fd), -1);                \
    return NEXT(name)(fd, mode, from, size);         \
  }
FALLOCATE(fallocate, off_t)
FALLOCATE(fallocate64, off64_t)
#define POSIX_FALLOCATE(name, type)        \
  int name(int fd, type from, type size) { \
    const int code = FD("fallocate", fd);  \
    if (code > 0) return code;             \
    return NEXT(name)(fd, from, size);     \
  }
POSIX_FALLOCATE(posix_fallocate, off_t)
POSIX_FALLOCATE(posix_fallocate64, off64_t)
#define FADVISE(name, type)                            \
  int name(int fd, type from, type size, int advice) { \
    const int code = FD("fadvise", fd);                \
    if (code > 0) return code;                         \
    return NEXT(name)(fd, from, size, advice);         \
  }
FADVISE(posix_fadvise, off_t)
FADVISE(posix_fadvise64, off64_t)
#define LSEEK(name, type)                  \
  type name(int fd, type at, int whence) { \
    FAIL_IF(FD("lseek", fd), -1);          \
    return NEXT(name)(fd, at, whence);     \
  }
LSEEK(lseek, off_t)
LSEEK(lseek64, off64_t)

/* ---- bytes ---- */

static int sized(const char* call, int fd, long long offset, size_t size) {
  char more[64];
  snprintf(more, sizeof more, "%lld %zu", offset, size);
  return outcome(call, 1, fd, NULL, more);
}
static size_t half(size_t size) { return size > 1 ? size / 2 : size; }

#define BYTES(name, call, pointer, parameters, offset, arguments)           \
  ssize_t name parameters {                                                 \
    const int code = sized(call, fd, offset, size);                         \
    FAIL_IF(code, -1);                                                      \
    if (code == kZero) return 0;                                            \
    if (code == kShort || code == kHalfKill) size = half(size);             \
    const ssize_t done = NEXT(name) arguments;                              \
    if (code == kHalfKill) syscall(SYS_kill, syscall(SYS_getpid), SIGKILL); \
    return done;                                                            \
  }
BYTES(read, "read", void*, (int fd, void* to, size_t size), -1LL, (fd, to, size))
BYTES(write, "write", const void*, (int fd, const void* from, size_t size), -1LL, (fd, from, size))
BYTES(pread, "pread", void*, (int fd, void* to, size_t size, off_t at), at, (fd, to, size, at))
BYTES(pread64, "pread", void*, (int fd, void* to, size_t size, off64_t at), at, (fd, to, size, at))
BYTES(pwrite, "pwrite", const void*, (int fd, const void* from, size_t size, off_t at), at, (fd, from, size, at))
BYTES(pwrite64, "pwrite", const void*, (int fd, const void* from, size_t size, off64_t at), at, (fd, from, size, at))

/* The first buffer alone stands for half of them. */
#define VECTORS(name, call, type)                                           \
  ssize_t name(int fd, const struct iovec* buffers, int count, type at) {   \
    const int code = sized(call, fd, at, (size_t)count);                    \
    FAIL_IF(code, -1);                                                      \
    if (code == kZero) return 0;                                            \
    if (code == kShort || code == kHalfKill) count = 1;                     \
    const ssize_t done = NEXT(name)(fd, buffers, count, at);                \
    if (code == kHalfKill) syscall(SYS_kill, syscall(SYS_getpid), SIGKILL); \
    return done;                                                            \
  }
VECTORS(preadv, "pread", off_t)
VECTORS(preadv64, "pread", off64_t)
VECTORS(pwritev, "pwrite", off_t)
VECTORS(pwritev64, "pwrite", off64_t)

ssize_t copy_file_range(int fd, off64_t* from, int other, off64_t* to, size_t size, unsigned flags) {
  FAIL_IF(FD("copy_file_range", other), -1);
  return NEXT(copy_file_range)(fd, from, other, to, size, flags);
}
#define SENDFILE(name, type)                                \
  ssize_t name(int to, int fd, type* offset, size_t size) { \
    FAIL_IF(FD("copy_file_range", to), -1);                 \
    return NEXT(name)(to, fd, offset, size);                \
  }
SENDFILE(sendfile, off_t)
SENDFILE(sendfile64, off64_t)

/* ---- memory and threads ---- */

#define MMAP(name, type)                                                              \
  void* name(void* at, size_t size, int protection, int flags, int fd, type offset) { \
    FAIL_IF(outcome("mmap", fd >= 0, fd, NULL, NULL), MAP_FAILED);                    \
    return NEXT(name)(at, size, protection, flags, fd, offset);                       \
  }
MMAP(mmap, off_t)
MMAP(mmap64, off64_t)

int pthread_create(pthread_t* restrict thread, const pthread_attr_t* restrict attributes, void* (*run)(void*),
                   void* restrict argument) {
  const int code = outcome("pthread_create", 0, 0, NULL, NULL);
  if (code > 0) return code;
  return NEXT(pthread_create)(thread, attributes, run, argument);
}
