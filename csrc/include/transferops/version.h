// The one symbol that ties an embedding program to the library (see ops.h).
#pragma once

#if defined(_WIN32)
#define TRANSFEROPS_EXPORT
#else
#define TRANSFEROPS_EXPORT __attribute__((visibility("default")))
#endif

// The version of the library that is loaded, as "major.minor.patch".
extern "C" TRANSFEROPS_EXPORT const char* transferops_version();
