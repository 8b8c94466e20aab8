/* Interposes the calls that change files, and kills the process or fails the call at the Nth one.
 *
 * Loaded with LD_PRELOAD. access("/torture/arm/N/ERRNO") arms it: from then on the Nth call kills
 * the process with SIGKILL, before it has any effect, or with ERRNO > 0 it and all later ones that
 * write, flush or rename fail with that. torture_count() returns the number of calls since,
 * torture_failed() how many of them failed.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static atomic_long calls, target, failed;
static atomic_int failure;

static int due(int fd, int can_fail) {
  if (!atomic_load(&target) || (fd >= 0 && fd <= 2)) return 0;
  long now = atomic_fetch_add(&calls, 1) + 1, when = atomic_load(&target);
  if (now < when) return 0;
  if (!atomic_load(&failure)) { if (now == when) kill(getpid(), SIGKILL); return 0; }
  if (!can_fail) return 0;
  atomic_fetch_add(&failed, 1);
  errno = atomic_load(&failure);
  return 1;
}

#define REAL(name) static __typeof__(name) *real; if (!real) real = dlsym(RTLD_NEXT, #name)
static int regular(int fd) { struct stat s; return !fstat(fd, &s) && S_ISREG(s.st_mode); }

int access(const char *path, int mode) {
  REAL(access);
  if (!strncmp(path, "/torture/arm/", 13)) {
    long when; int error = 0;
    sscanf(path + 13, "%ld/%d", &when, &error);
    atomic_store(&calls, 0); atomic_store(&failed, 0); atomic_store(&failure, error); atomic_store(&target, when);
    return 0;
  }
  return real(path, mode);
}
long torture_count(void) { return atomic_load(&calls); }
long torture_failed(void) { return atomic_load(&failed); }

ssize_t write(int fd, const void *b, size_t n) {
  REAL(write); if (regular(fd) && due(fd, 1)) return -1; return real(fd, b, n); }
ssize_t pwrite(int fd, const void *b, size_t n, off_t o) {
  REAL(pwrite); if (due(fd, 1)) return -1; return real(fd, b, n, o); }
ssize_t pwrite64(int fd, const void *b, size_t n, off64_t o) {
  REAL(pwrite64); if (due(fd, 1)) return -1; return real(fd, b, n, o); }
int fsync(int fd) { REAL(fsync); if (due(fd, 1)) return -1; return real(fd); }
int fdatasync(int fd) { REAL(fdatasync); if (due(fd, 1)) return -1; return real(fd); }
int ftruncate(int fd, off_t n) { REAL(ftruncate); if (due(fd, 1)) return -1; return real(fd, n); }
int rename(const char *a, const char *b) { REAL(rename); if (due(-1, 1)) return -1; return real(a, b); }
int renameat(int x, const char *a, int y, const char *b) {
  REAL(renameat); if (due(-1, 1)) return -1; return real(x, a, y, b); }
int renameat2(int x, const char *a, int y, const char *b, unsigned f) {
  REAL(renameat2); if (due(-1, 1)) return -1; return real(x, a, y, b, f); }
int link(const char *a, const char *b) { REAL(link); if (due(-1, 0)) return -1; return real(a, b); }
int unlink(const char *a) { REAL(unlink); if (due(-1, 0)) return -1; return real(a); }
int unlinkat(int x, const char *a, int f) { REAL(unlinkat); if (due(-1, 0)) return -1; return real(x, a, f); }
int rmdir(const char *a) { REAL(rmdir); if (due(-1, 0)) return -1; return real(a); }
int mkdir(const char *a, mode_t m) { REAL(mkdir); if (due(-1, 1)) return -1; return real(a, m); }
