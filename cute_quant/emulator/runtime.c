// Stands in for the CUDA runtime under a kernel that CuTe DSL exported to an object file: hands
// the module that it loads and the launches that it makes to callbacks. One of these is linked
// into every such library, so the state below belongs to one kernel.

#include <stdint.h>
#include <string.h>

typedef struct {
    uint32_t x, y, z;
} dim3;

// cudaLaunchConfig_t of driver_types.h, as far as it is read here.
typedef struct {
    dim3 grid, block;
    size_t dynamic_shared_bytes;
    void *stream;
    void *attributes;
    uint32_t attribute_count;
} launch_config;

typedef int (*load_callback)(const void *image);
typedef int (*launch_callback)(const launch_config *config, const char *kernel, void **arguments);

static load_callback on_load;
static launch_callback on_launch;
static int device;
static char kernel_name[4096];

enum { SUCCESS = 0, INVALID_VALUE = 1, NOT_INITIALIZED = 3 };

void emulator_connect(load_callback load, launch_callback launch) {
    on_load = load;
    on_launch = launch;
}

int emulator_device(void) { return device; }

// Loads the library at the first call; `load_on` then prepares it for a device. A caller that is
// told of a failure expects the error to be set already.
int cuda_dialect_init_library_once(void **library, int (*load)(void **),
                                   int (*load_on)(void **, int),
                                   void (*set_error)(const char *, const char *)) {
    if (*library != NULL) return SUCCESS;
    int status = load(library);
    if (status == SUCCESS && load_on != NULL) status = load_on(library, 0);
    if (status == SUCCESS) return SUCCESS;
    *library = NULL;
    set_error("RuntimeError", "the emulator did not load the module");
    return -1;
}

void cuda_dialect_unload_library_once(void **library) { *library = NULL; }

int _cudaLibraryLoadData(void **library, const void *image) {
    if (on_load == NULL) return NOT_INITIALIZED;
    *library = kernel_name;
    return on_load(image);
}

int _cudaLibraryGetKernel(void **kernel, void *library, const char *name) {
    (void)library;
    if (strlen(name) >= sizeof kernel_name) return INVALID_VALUE;
    strcpy(kernel_name, name);
    *kernel = kernel_name;
    return SUCCESS;
}

int _cudaLaunchKernelEx(const launch_config *config, void *kernel, void **arguments) {
    return on_launch(config, kernel, arguments);
}

int _cudaGetDevice(int *current) {
    *current = device;
    return SUCCESS;
}

int _cudaSetDevice(int wanted) {
    device = wanted;
    return SUCCESS;
}

// Asked for the dynamic shared memory that a kernel may have; emulated kernels use none.
int _cudaDeviceGetAttribute(int *value, int attribute, int of_device) {
    (void)attribute, (void)of_device;
    *value = 0;
    return SUCCESS;
}

int _cuKernelGetAttribute(int *value, int attribute, void *kernel, int of_device) {
    (void)attribute, (void)kernel, (void)of_device;
    *value = 0;
    return SUCCESS;
}

int _cudaKernelSetAttributeForDevice(void *kernel, int attribute, int value, int of_device) {
    (void)kernel, (void)attribute, (void)value, (void)of_device;
    return SUCCESS;
}

// Code for sm_107a calls it too when it is loaded.
int _cudaFuncSetAttribute(const void *kernel, int attribute, int value) {
    (void)kernel, (void)attribute, (void)value;
    return SUCCESS;
}

void CuteDSLRT_TVMFFISetRaisedCudaError(void (*set_raised)(const char *, const char **, int),
                                        int status) {
    (void)status;
    const char *parts[] = {"the launch callback failed"};
    set_raised("RuntimeError", parts, 1);
}
