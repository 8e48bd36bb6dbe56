/* A CUDA driver of one device whose memory is the host's. It takes kernels and launches, and runs none: what
   `numba_opt.cuda.driver` asks of the real one, and in what form, can be seen without a GPU. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef unsigned long long address;

int cuGetProcAddress(const char *name, void **found, int version, address flags, int *status) {
    static void *self;
    Dl_info info;
    if (!self && dladdr((void *)&cuGetProcAddress, &info))
        self = dlopen(info.dli_fname, RTLD_NOW | RTLD_NOLOAD);
    *found = dlsym(self, name);
    if (status)
        *status = *found ? 0 : 1;
    return *found ? 0 : 500;
}

int cuGetProcAddress_v2(const char *name, void **found, int version, address flags, int *status) {
    return cuGetProcAddress(name, found, version, flags, status);
}

int cuInit(unsigned flags) { return setvbuf(stdout, NULL, _IONBF, 0), 0; }
int cuDriverGetVersion(int *version) { return *version = 13000, 0; }
int cuGetErrorString(int error, const char **text) { return *text = "the fake driver says no", 0; }

int cuDeviceGetCount(int *count) { return *count = 1, 0; }
int cuDeviceGet(int *device, int number) { return *device = number, number ? 101 : 0; }
int cuDeviceGetName(char *name, int room, int device) { return snprintf(name, room, "Fake"), 0; }
int cuDeviceTotalMem(size_t *bytes, int device) { return *bytes = (size_t)1 << 36, 0; }
int cuDeviceGetAttribute(int *value, int kind, int device) {
    return *value = kind == 75 ? 9 : kind == 76 ? 0 : kind == 16 ? 132 : -1, 0; /* 9.0, 132 processors */
}

int cuDevicePrimaryCtxRetain(void **context, int device) { return *context = (void *)0x1000, 0; }
int cuCtxPushCurrent(void *context) { return context == (void *)0x1000 ? 0 : 201; }
int cuCtxPopCurrent(void **context) { return *context = (void *)0x1000, 0; }
int cuCtxSynchronize(void) { return 0; }
int cuPointerGetAttribute(void *value, int kind, address place) { return *(int *)value = 0, 0; }

int cuMemAlloc(address *place, size_t bytes) { return *place = (address)malloc(bytes), 0; }
int cuMemFree(address place) { return free((void *)place), 0; }

/* The default stream sets memory at a time of its own: until it is waited for, no other stream may use any. */
static int setting;
int cuMemsetD8(address place, unsigned char byte, size_t count) {
    return memset((void *)place, byte, count), setting = 1, 0;
}
int cuMemHostAlloc(void **place, size_t bytes, unsigned flags) { return *place = malloc(bytes), 0; }
int cuMemFreeHost(void *place) { return free(place), 0; }
int cuMemcpyDtoH(void *to, address from, size_t bytes) { return memcpy(to, (void *)from, bytes), 0; }
int cuMemcpyHtoD(address to, const void *from, size_t bytes) { return memcpy((void *)to, from, bytes), 0; }
int cuMemcpyHtoDAsync(address to, const void *from, size_t bytes, void *stream) {
    printf("copy %zu %p\n", bytes, stream);
    return memcpy((void *)to, from, bytes), stream && setting ? 999 : 0;
}

int cuEventCreate(void **event, unsigned flags) { return *event = (void *)0x20, 0; }
int cuEventRecord(void *event, void *stream) { return 0; }
int cuEventSynchronize(void *event) { return 0; }
int cuEventDestroy(void *event) { return 0; }
int cuStreamWaitEvent(void *stream, void *event, unsigned flags) { return printf("wait %p\n", stream), 0; }
int cuStreamSynchronize(void *stream) { return setting &= stream != 0, 0; }
int cuStreamIsCapturing(void *stream, int *status) { return *status = 0, 0; }

int cuModuleLoadData(void **module, const void *image) {
    return *module = (void *)image, memcmp(image, "\177ELF", 4) ? 200 : 0;
}
int cuModuleGetFunction(void **function, void *module, const char *name) { return *function = strdup(name), 0; }

/* The name, the grid, the block, the stream, the first argument, and of `set_coefficients` the learning rate. */
int cuLaunchKernel(void *function, unsigned x, unsigned y, unsigned z, unsigned a, unsigned b, unsigned c,
                   unsigned shared, void *stream, void **arguments, void **extra) {
    double number = strstr(function, "set_coefficients") ? *(double *)arguments[10] : 0;
    printf("%s %u %u %p %lld %g\n", (char *)function, x * y * z, a * b * c, stream, *(long long *)arguments[0], number);
    return stream && setting ? 999 : 0;
}
