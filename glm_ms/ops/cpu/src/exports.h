// Marks the functions that the library shows to ctypes and to MindSpore's custom operators:
//   int name(int nparam, void** params, int* ndims, int64_t** shapes, const char** dtypes, void* stream, void* extra)
#pragma once

#define GLM_EXPORT extern "C" __attribute__((visibility("default")))
