// One source, several instruction sets: the binary carries all and picks at run time, so that a wheel
// built anywhere runs everywhere at full width and no -march flag is needed.
#pragma once

#include <cstdlib>
#include <string_view>

#if defined(__x86_64__) && defined(__GNUC__)
#define TRANSFEROPS_X86_64 1
#endif

// For plain loops: the compiler clones the function per instruction set (needs ifunc support).
#if defined(TRANSFEROPS_X86_64) && defined(__linux__) && !defined(__clang__) && !defined(__SANITIZE_ADDRESS__) && \
    !defined(__SANITIZE_THREAD__)
#define TRANSFEROPS_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define TRANSFEROPS_CLONES
#endif

// For kernels whose register tile differs per instruction set: spelled out, chosen by cpu_level().
#ifdef TRANSFEROPS_X86_64
#define TRANSFEROPS_TARGET_V4 __attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma,f16c")))
#define TRANSFEROPS_TARGET_V3 __attribute__((target("avx2,fma,f16c")))
#endif

namespace transferops::cpu {

enum class Level { kBaseline, kV3, kV4 };

// TRANSFEROPS_CPU_LEVEL=v3 or baseline in the environment takes what an older processor would run, for tests of it.
// Loops with TRANSFEROPS_CLONES go by the processor alone.
inline Level cpu_level() {
#ifdef TRANSFEROPS_X86_64
    static const Level level = [] {
        const char* variable = std::getenv("TRANSFEROPS_CPU_LEVEL");
        const std::string_view asked = variable == nullptr ? "" : variable;
        __builtin_cpu_init();
        if (asked != "v3" && asked != "baseline" && __builtin_cpu_supports("avx512f") &&
            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
            __builtin_cpu_supports("avx512vl"))
            return Level::kV4;
        if (asked != "baseline" && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Level::kV3;
        return Level::kBaseline;
    }();
    return level;
#else
    return Level::kBaseline;
#endif
}

}  // namespace transferops::cpu
